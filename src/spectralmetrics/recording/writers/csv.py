"""Numbers as a tidy table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectralmetrics.recording.files import kept_size, lengthen, read_table, replacing, sweep
from spectralmetrics.recording.record import COLUMNS, Record, RecordKey, Row
from spectralmetrics.recording.writer import Writer

FILE_NAME = "records.csv"
# The columns of 0.1.0, without intervals, and of 0.2.0, without steps.
_EARLIER_COLUMNS = (COLUMNS[:5], COLUMNS[:7])


class CSVWriter(Writer):
    """All numbers in one ``records.csv``: epoch, stage, layer, statistic, value, low, high and step.

    Low and high are the ends of the value's interval, empty without folds; the step is empty at the end of an
    epoch. Rows are in forward order. The file is replaced as a whole by a copy that is one record longer: at
    any moment it holds only whole records.
    """

    name = "csv"
    keeps_records = True
    at_steps = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._path = directory / FILE_NAME
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb") as earlier:
                head = earlier.readline().strip().decode(errors="replace")
                is_earlier = tuple(head.split(",")) in _EARLIER_COLUMNS
                earlier.seek(-1, os.SEEK_END)
                is_cut = earlier.read() != b"\n"  # by an editor
            if is_earlier or is_cut:  # new rows have more columns, or must begin a line
                rows = read_rows(self._path)
                with replacing(self._path) as file:
                    file.write(format_rows(rows))
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        size = kept_size(self._path, self._size)
        self._size = lengthen(self._path, size, format_rows(record.rows, header=size == 0))

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        last = cls.last_record(directory)
        return None if last is None else last.epoch

    @classmethod
    def last_record(cls, directory: Path) -> RecordKey | None:
        """See :class:`Writer`."""
        path = directory / FILE_NAME
        keys = {row.key for row in read_rows(path)} if path.exists() else set()
        return max(keys, key=lambda key: key.order, default=None)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / FILE_NAME).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        cls.discard_after(directory, None if after is None else RecordKey(after))

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """See :class:`Writer`."""
        path = directory / FILE_NAME
        sweep(directory, FILE_NAME)
        if not path.exists():
            return
        if after is None:
            path.unlink()
            return
        rows = read_rows(path)
        kept = [row for row in rows if row.key.order <= after.order]
        if len(kept) < len(rows):
            with replacing(path) as file:
                file.write(format_rows(kept))


def format_rows(rows: Iterable[Row | Mapping[str, Any]], *, header: bool = True) -> bytes:
    """Rows as CSV text; floats with all their digits."""
    lines = _Lines()
    # The csv module quotes names that hold a character of the terminator: either one would end a line.
    writer = csv.writer(lines, lineterminator="\r\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(row.values() if isinstance(row, Mapping) else row for row in rows)
    return "".join(lines).encode()


class _Lines(list[str]):
    """A file for the csv module, which writes a whole row in each call."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``records.csv``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a table of records.
    """
    return read_table(path, "a record", _row, COLUMNS, *_EARLIER_COLUMNS)


def _row(cells: list[str]) -> Row:
    epoch, stage, layer, statistic, value, *more = cells
    low, high, step = (*more, "", "", "")[:3]
    ends = _optional(low), _optional(high)
    return Row(int(epoch), stage, layer, statistic, _number(value), *ends, int(step) if step else None)


def _optional(text: str) -> float | None:
    return _number(text) if text else None


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
