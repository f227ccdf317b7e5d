"""What each of the last forwards did, as a tidy table."""

from __future__ import annotations

import csv
import io
import math
import shutil
from pathlib import Path

from spectralmetrics.probing.history import History, HistoryRow
from spectralmetrics.recording.files import replacing, sweep
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import ForwardHistory

FILE_NAME = "history.csv"
HISTORY_COLUMNS = ("epoch", "stage", *HistoryRow._fields)


class HistoryWriter(Writer):
    """All that a :class:`~spectralmetrics.HistoryMetric` remembers, in one ``history.csv``.

    A row for each record, stage, forward and layer, with the columns of :class:`~spectralmetrics.HistoryRow`
    after ``epoch`` and ``stage``; a step that nobody told and a value without observations are empty. The file
    is replaced as a whole by a copy that is one record longer: at any moment it holds whole records only.
    """

    name = "history"
    keeps_records = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._path = directory / FILE_NAME
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        found: dict[str, dict[str, ForwardHistory]] = {}
        for stage, layer in record.sums:
            kept = next((each for each in record.sums[stage, layer] if isinstance(each, ForwardHistory)), None)
            if kept is not None:
                found.setdefault(stage, {})[layer] = kept
        lines = [
            [record.epoch, stage, *("" if _is_missing(value) else value for value in row)]
            for stage, layers in found.items()
            for row in History.of_sums(stage, layers)
        ]
        text = io.StringIO(newline="")
        writer = csv.writer(text)  # which quotes a name with a line break in it
        if self._size == 0:
            writer.writerow(HISTORY_COLUMNS)
        writer.writerows(lines)
        added = text.getvalue().encode()
        with replacing(self._path) as file:
            if self._size:
                with open(self._path, "rb") as earlier:
                    shutil.copyfileobj(earlier, file, 2**20)
                file.truncate(self._size)  # of a record that was interrupted, and is written again
                file.seek(self._size)
            file.write(added)
        self._size += len(added)

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max((int(line[0]) for line in _lines(directory)[1:]), default=None)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / FILE_NAME).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        path = directory / FILE_NAME
        sweep(directory, FILE_NAME)
        if after is None:
            path.unlink(missing_ok=True)
            return
        head, *lines = _lines(directory) or [[]]
        kept = [line for line in lines if int(line[0]) <= after]
        if len(kept) < len(lines):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([head, *kept])
            with replacing(path) as file:
                file.write(text.getvalue().encode())


def _lines(directory: Path) -> list[list[str]]:
    path = directory / FILE_NAME
    if not path.exists():
        return []
    with io.StringIO(path.read_bytes().decode(), newline="") as file:
        lines = list(csv.reader(file))
    if lines and tuple(lines[0]) != HISTORY_COLUMNS:
        raise ValueError(
            f"expected {path} to begin with {','.join(HISTORY_COLUMNS)}, got {','.join(lines[0])!r}"
        )
    return lines


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
