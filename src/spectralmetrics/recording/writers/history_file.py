"""The history of the last forwards, as a tidy table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spectralmetrics.probing.movers import History, HistoryRow
from spectralmetrics.recording.files import kept_size, lengthen, read_table, replacing, sweep
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import ForwardHistory

T = TypeVar("T")

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
        size = kept_size(self._path, self._size)
        if size == 0:
            writer.writerow(HISTORY_COLUMNS)
        writer.writerows(lines)
        self._size = lengthen(self._path, size, text.getvalue().encode())

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max(_read(directory, lambda cells: int(cells[0])), default=None)

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
        lines = _read(directory, lambda cells: (int(cells[0]), cells))
        kept = [cells for epoch, cells in lines if epoch <= after]
        if len(kept) < len(lines):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([HISTORY_COLUMNS, *kept])
            with replacing(path) as file:
                file.write(text.getvalue().encode())


def read_history(directory: Path) -> dict[str, list[HistoryRow]]:
    """Stage -> the rows of a run's ``history.csv``, each forward of a layer once; none without one.

    Args:
        directory: the directory of the run.

    Raises:
        ValueError: for a file that is none of a recorder's, or damaged.
    """
    found: dict[str, dict[tuple[int, str], HistoryRow]] = {}
    for stage, row in _read(directory, _stage_and_row):
        # A history reaches back beyond the record before it: the forwards in both are the same ones.
        found.setdefault(stage, {})[row.forward, row.layer] = row
    return {stage: list(rows.values()) for stage, rows in found.items()}


def _read(directory: Path, parse: Callable[[list[str]], T]) -> list[T]:
    path = directory / FILE_NAME
    return read_table(path, "a forward", parse, HISTORY_COLUMNS) if path.exists() else []


def _stage_and_row(cells: list[str]) -> tuple[str, HistoryRow]:
    epoch, stage, forward, step, layer, observations, *values, left_out = cells
    int(epoch)
    rms, mean, most, zeros = (math.nan if cell == "" else float(cell) for cell in values)
    when = int(forward), int(step) if step else None
    return stage, HistoryRow(*when, layer, int(observations), rms, mean, most, zeros, int(left_out))


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
