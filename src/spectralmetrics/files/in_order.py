"""Rows of files that can only be read from their beginning on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from spectralmetrics.files.fields import ReadError

AT_A_TIME = 4096
"""Rows that are decoded together."""


class InOrder:
    """Reads rows of a file that can only be read from its beginning on, and closes it after the last row.

    Args:
        path: the path of the file.
        size: the number of all rows.
        stream: opens the file and yields a function: number -> this many of the next rows, fewer at the end.
    """

    def __init__(self, path: Path, size: int, stream: Callable[[], Iterator[Callable[[int], Tensor]]]) -> None:
        self._path = path
        self._size = size
        self._stream = stream
        self._open: Iterator[Callable[[int], Tensor]] | None = None
        self._at = 0

    def read(self, start: int, stop: int) -> Tensor:
        """See :class:`Field`."""
        if self._open is None or start < self._at:
            self._open, self._at = self._stream(), 0
        while self._at < start:
            self._take(min(start - self._at, AT_A_TIME))
        return self._take(stop - start)

    def _take(self, count: int) -> Tensor:
        assert self._open is not None
        try:
            rows = next(self._open)(count)
        except RowError as error:
            self._open = None
            raise ReadError(str(self._path), str(error), self._at + error.row) from error
        except Exception as error:  # damaged data raises any kind of error
            self._open = None
            raise ReadError(str(self._path), f"is damaged: {first_line(error)}", self._at) from error
        if len(rows) < count:
            self._open = None
            raise ReadError(
                str(self._path), f"is cut off after {self._at + len(rows)} rows", self._at + len(rows)
            )
        self._at += count
        if self._at == self._size:
            self._open = None
        return rows


class RowError(ValueError):
    """Raised for a row that cannot be read, counted from the next row."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


def first_line(error: Exception) -> str:
    """An error of another library, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
