"""Numbers as a tidy table."""

from __future__ import annotations

import os
from pathlib import Path

from spectralmetrics.recording.files import lengthen, replace_file, sweep
from spectralmetrics.recording.record import Record, RecordKey
from spectralmetrics.recording.tables import COLUMNS, RECORDS, format_rows, read_rows
from spectralmetrics.recording.writer import Writer


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
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        rows = format_rows(record.rows, header=False)
        self._size = lengthen(self._path, self._size, rows, head=format_rows([]))

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
