"""The file with the history of the last forwards, a tidy table."""

from __future__ import annotations

from pathlib import Path

from spectralmetrics.probing.movers import History
from spectralmetrics.recording.files import lengthen, replace_file, sweep
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.tables import HISTORY, HISTORY_COLUMNS, blank_missing, csv_text, read_table
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import ForwardHistory


class HistoryWriter(Writer):
    """Writes the forwards that a :class:`~spectralmetrics.HistoryMetric` remembers to one ``history.csv``.

    A row for each record, stage, forward and layer, with the columns of :class:`~spectralmetrics.HistoryRow`
    after ``epoch`` and ``stage``; unknown steps and values without observations are empty. Forwards have the
    probe's numbers, which begin at 0 in a process that does not load the state of the probe. The file is
    replaced as a whole by a copy that is one record longer: at any moment it holds whole records only.
    """

    name = "history"
    keeps_records = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._path = directory / HISTORY
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        histories: dict[str, dict[str, ForwardHistory]] = {}
        for stage, layer in record.sums:
            kept = next((each for each in record.sums[stage, layer] if isinstance(each, ForwardHistory)), None)
            if kept is not None:
                histories.setdefault(stage, {})[layer] = kept
        lines = [
            [record.epoch, stage, *blank_missing(row)]
            for stage, layers in histories.items()
            for row in History.of_sums(stage, layers)
        ]
        self._size = lengthen(self._path, self._size, csv_text(lines), head=csv_text([HISTORY_COLUMNS]))

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max((epoch for epoch, _ in _lines(directory)), default=None)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / HISTORY).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        path = directory / HISTORY
        sweep(directory, HISTORY)
        if after is None:
            path.unlink(missing_ok=True)
            return
        lines = _lines(directory)
        kept = [cells for epoch, cells in lines if epoch <= after]
        if len(kept) < len(lines):
            replace_file(path, csv_text([HISTORY_COLUMNS, *kept]))


def _lines(directory: Path) -> list[tuple[int, list[str]]]:
    """(Epoch, cells) of all lines."""
    return read_table(directory / HISTORY, "a forward", lambda cells: (int(cells[0]), cells), HISTORY_COLUMNS)
