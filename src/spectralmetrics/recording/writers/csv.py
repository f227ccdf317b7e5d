"""``records.csv``: numbers as a tidy table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectralmetrics.recording.files import csv_text, lengthen, read_table, replace_file, size_of, sweep
from spectralmetrics.recording.record import Record, RecordKey, Row
from spectralmetrics.recording.writer import Writer

RECORDS = "records.csv"
COLUMNS = Row._fields
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
        self._path = directory / RECORDS
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb") as earlier:
                head = earlier.readline().strip().decode(errors="replace")
                earlier.seek(-1, os.SEEK_END)
                is_cut = earlier.read() != b"\n"  # by an editor
            if head != ",".join(COLUMNS) or is_cut:  # new rows have more columns, or must begin a line
                replace_file(self._path, format_rows(read_rows(self._path)))
        self._size = size_of(self._path)

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        if size_of(self._path) not in (0, self._size):  # a record was taken back, or an editor saved the table
            earlier = [row for row in read_rows(self._path) if row.key.order < record.key.order]
            replace_file(self._path, format_rows(earlier))
        rows = format_rows(record.rows, header=False)
        self._size = lengthen(self._path, rows, head=format_rows([]))

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        last = cls.last_record(directory)
        return None if last is None else last.epoch

    @classmethod
    def last_record(cls, directory: Path) -> RecordKey | None:
        """See :class:`Writer`."""
        keys = {row.key for row in read_rows(directory / RECORDS)}
        return max(keys, key=lambda key: key.order, default=None)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / RECORDS).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        cls.discard_after(directory, None if after is None else RecordKey(after))

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """See :class:`Writer`."""
        path = directory / RECORDS
        sweep(directory, RECORDS)
        if after is None:
            path.unlink(missing_ok=True)
            return
        rows = read_rows(path)
        kept = [row for row in rows if row.key.order <= after.order]
        if len(kept) < len(rows):
            replace_file(path, format_rows(kept))


def format_rows(rows: Iterable[Row | Mapping[str, Any]], *, header: bool = True) -> bytes:
    """Rows as CSV text; floats with all their digits."""
    lines: list[Iterable[Any]] = [COLUMNS] if header else []
    lines += [row.values() if isinstance(row, Mapping) else row for row in rows]
    return b"".join(csv_text([line]).removesuffix(b"\r\n") + b"\n" for line in lines)


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``records.csv``; none without one.

    Raises:
        ValueError: if it is not a table of records.
    """
    return read_table(path, "a record", _row, COLUMNS, *_EARLIER_COLUMNS)


def _row(cells: list[str]) -> Row:
    epoch, stage, layer, statistic, value, *more = cells
    *ends, step = (*more, "", "", "")[:3]
    low, high = (_number(end) if end else None for end in ends)
    return Row(int(epoch), stage, layer, statistic, _number(value), low, high, int(step) if step else None)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
