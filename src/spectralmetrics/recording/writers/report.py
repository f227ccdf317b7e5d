"""The report of a run, in its directory while the run goes on."""

from __future__ import annotations

import contextlib
import math
import numbers
from pathlib import Path

from spectralmetrics.recording.files import replace_file, sweep
from spectralmetrics.recording.record import Record, RecordKey
from spectralmetrics.recording.writer import Writer

FILE_NAME = "report.html"


class ReportWriter(Writer):
    """The page of ``spectralmetrics report`` as ``report.html`` in the run's directory, anew at each record.

    Open it while the run goes on: it reloads by itself, and keeps its sliders and its place. It needs the
    writer ``"csv"`` or ``"arrays"``, whose files it reads: with arrays each record takes longer than the one
    before. The file is replaced as a whole: a browser never sees half of it. Once the recorder is closed the
    page no longer reloads.

    Args:
        refresh: seconds after which the page reloads.

    Raises:
        ValueError: for ``refresh`` that is not a positive number.
    """

    name = "report"
    at_steps = True

    def __init__(self, refresh: float = 10.0) -> None:
        is_number = isinstance(refresh, numbers.Real) and not isinstance(refresh, bool)
        if not is_number or not 0 < refresh < math.inf:
            raise ValueError(f"expected refresh to be a positive number of seconds, got {refresh!r}")
        self.refresh = float(refresh)

    def open_after(self, directory: Path, last: RecordKey | None) -> None:
        """See :class:`Writer`."""
        self._directory = directory

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        from spectralmetrics.recording.report.write import write_page  # here, since it imports the writers
        from spectralmetrics.recording.saved import SavedRun

        if SavedRun(self._directory).records:  # a history alone has no numbers to draw
            write_page([self._directory], self._directory / FILE_NAME, refresh=self.refresh)

    def restore(self, record: Record) -> None:
        """See :class:`Writer`."""
        self.write(record)

    def close(self) -> None:
        """See :class:`Writer`."""
        path = self._directory / FILE_NAME
        with contextlib.suppress(OSError):  # a page that goes on reloading does no harm
            text = path.read_bytes()
            live = f'data-refresh="{self.refresh:g}"'.encode()
            if live in text[:200]:
                replace_file(path, text.replace(live, b'data-refresh=""', 1))

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`; the page is drawn from the files of other writers."""
        return False

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """See :class:`Writer`."""
        sweep(directory, FILE_NAME)
        if after is None:
            (directory / FILE_NAME).unlink(missing_ok=True)
