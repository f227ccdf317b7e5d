"""Numbers as a tidy table."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectralmetrics.recording.files import replacing, sweep
from spectralmetrics.recording.record import COLUMNS, Record, Row
from spectralmetrics.recording.writer import Writer

FILE_NAME = "records.csv"
_EARLIER_COLUMNS = COLUMNS[:5]  # of 0.1.0, which knew no intervals


class CSVWriter(Writer):
    """All numbers in one ``records.csv``: epoch, stage, layer, statistic, value, low and high.

    Low and high are the ends of the value's interval, empty without folds. Rows are in forward order. The file
    is replaced as a whole by a copy that is one record longer: at any moment it holds whole records only.
    """

    name = "csv"
    keeps_records = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._path = directory / FILE_NAME
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb") as earlier:
                is_earlier = earlier.readline().strip() == ",".join(_EARLIER_COLUMNS).encode()
                earlier.seek(-1, os.SEEK_END)
                is_cut = earlier.read() != b"\n"  # an editor's doing
            if is_earlier or is_cut:  # what will be added has more columns, or begins a line
                rows = read_rows(self._path)
                with replacing(self._path) as file:
                    file.write(format_rows(rows))
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        rows = format_rows(record.rows, header=self._size == 0)
        with replacing(self._path) as file:
            if self._size:
                with open(self._path, "rb") as earlier:
                    shutil.copyfileobj(earlier, file, 2**20)
                # Of a record that was interrupted after it was written, and is written again, nothing is left.
                file.truncate(self._size)
                file.seek(0, os.SEEK_END)
            file.write(rows)
        self._size += len(rows)

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        path = directory / FILE_NAME
        return max((row.epoch for row in read_rows(path)), default=None) if path.exists() else None

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / FILE_NAME).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        path = directory / FILE_NAME
        sweep(directory, FILE_NAME)
        if not path.exists():
            return
        if after is None:
            path.unlink()
            return
        rows = read_rows(path)
        kept = [row for row in rows if row.epoch <= after]
        if len(kept) < len(rows):
            with replacing(path) as file:
                file.write(format_rows(kept))


def format_rows(rows: Iterable[Row | Mapping[str, Any]], *, header: bool = True) -> bytes:
    """Rows as CSV text; floats with all their digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(row.values() if isinstance(row, Mapping) else row for row in rows)
    return text.getvalue().encode()


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``records.csv``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no table of records.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text: {error}") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None or tuple(header) not in (COLUMNS, _EARLIER_COLUMNS):
            first = ",".join(header or [])
            raise ValueError(f"expected {path} to begin with {','.join(COLUMNS)}, got {first!r}")
        rows = []
        for cells in reader:
            try:
                epoch, stage, layer, statistic, value, *ends = cells
                if len(cells) != len(header):
                    raise ValueError
                low_and_high = (_number(end) if end else None for end in ends)
                rows.append(Row(int(epoch), stage, layer, statistic, _number(value), *low_and_high))
            except ValueError:
                found, line = ",".join(cells), reader.line_num
                raise ValueError(f"expected a record in line {line} of {path}, got {found!r}") from None
    return rows


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
