"""Blocks of rows, with their labels and the fold that they belong to, one after the other."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.files.fields import Columns, Field, ReadError, field_of_array, field_of_tensor
from spectralmetrics.files.readers import READERS, read_columns
from spectralmetrics.files.sources import Part, parts_of

_MOST_BYTES = 2**25
"""The most bytes of a block, whatever its number of rows."""
_BLOCKS_A_FOLD = 8
"""If folds are made of blocks, the least number of blocks in a fold, taken from all over the rows."""

_LARGEST_LABEL = 2**53
"""The largest whole number up to which float64 has all of them."""


class Block(NamedTuple):
    """Rows that are read together.

    Attributes:
        rows: shape (n, D), floating.
        labels: shape (n,), int64, -1 where there is none; None without labels.
        start: number of the first row among all rows of the source.
        group: the fold is this number modulo the number of folds.
        done: rows that this process has read so far, and the number that it will read; if this is unknown, the
            first number again.
    """

    rows: Tensor
    labels: Tensor | None
    start: int
    group: int
    done: tuple[int, int]


class _Opened(NamedTuple):
    """A part with its columns.

    Attributes:
        number: its number among the parts that are not empty.
        name: the name in messages.
        columns: all its columns.
        features: the column of rows; None if there is an ``error``.
        error: raised when the part is read.
        before: the number of rows in the parts before.
    """

    number: int
    name: str
    columns: Columns | None
    features: Field | None
    error: ReadError | None
    before: int

    @property
    def num_rows(self) -> int:
        return 0 if self.features is None else self.features.shape[0]


class _Piece(NamedTuple):
    """Rows of a part that will be read together."""

    part: _Opened
    start: int
    stop: int
    group: int


class Rows:
    """The rows of a source that this process reads; for the arguments see :func:`~spectralmetrics.measure`.

    All processes share the source: each takes some parts or, with fewer parts than processes, some blocks.

    Attributes:
        width: the number of features D; 0 if no part has rows.
        dtype: the dtype of the features, as the first part calls it.
        unit: the unit that is dealt to folds, in words.
        num_parts: the number of parts opened so far.
        empty: names of parts without rows.
    """

    def __init__(
        self,
        source: Any,
        column: str | None,
        labels: Any,
        folds: int,
        block_rows: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._column = column
        self._folds = folds
        self._block_rows = block_rows
        self._rank, self._world_size = rank, world_size
        self.empty: list[str] = []
        self.num_parts = self._num_rows = 0  # opened so far
        self._order: tuple[str, ...] = ()  # names of the columns of numbers that are features
        self._label_column, self._label_field = _labels_of(labels)
        self._label_name = str(labels) if isinstance(labels, (str, Path)) else "labels"
        parts = parts_of(source)
        if isinstance(parts, list):
            parts = [each for each in parts if not _is_file(each.name, labels)]
        opened = self._open(parts)
        self._is_iterable = not isinstance(parts, list)
        known = list(itertools.islice(opened, 1 if self._is_iterable else None))
        self._parts: Iterable[_Opened] = itertools.chain(known, opened) if self._is_iterable else known
        self._like, features = next(((each.name, each.features) for each in known if each.features), ("", None))
        self.width = 0 if features is None else features.shape[1]
        self.dtype = "" if features is None else features.described
        self._by_part = self._is_iterable or len(known) >= folds
        self._by_block = not self._is_iterable and len(known) < world_size
        self.unit = "items" if self._is_iterable else "whole files" if self._by_part else "blocks"
        if not self._is_iterable and all(each.error is None for each in known):
            self._check_count(self._num_rows)

    def num_classes(self) -> int:
        """One more than the largest label; 0 without labels.

        Raises:
            ValueError: if labels are in columns of an iterable, which can be read only once.
        """
        if self._label_field is not None:
            return self._largest(self._label_field, self._label_name) + 1
        if self._label_column is None:
            return 0
        if self._is_iterable:
            raise ValueError(
                f"expected metrics with labels={self._label_column!r} of an iterable, which is read once:"
                " metrics=[LinearProbeMetric(num_classes=10)], say"
            )
        largest = -1
        for part in self._parts:
            if part.columns is not None and self._label_column in part.columns.fields:
                largest = max(largest, self._largest(part.columns.labels(self._label_column), part.name))
        return largest + 1

    def _largest(self, field: Field, name: str) -> int:
        size = field.shape[0]
        blocks = (_read_labels(field, name, at, min(at + 2**20, size)) for at in range(0, size, 2**20))
        return max((int(each.max()) for each in blocks), default=-1)

    def __iter__(self) -> Iterator[Block]:
        """The blocks of this process.

        Raises:
            ReadError: at a part or a row that cannot be read, after all blocks before it.
        """
        pieces: Iterable[_Piece] = self._pieces() if self._is_iterable else list(self._pieces())
        total = None if self._is_iterable else sum(each.stop - each.start for each in pieces)
        done = 0
        for piece in pieces:
            for rows, labels in self._read(piece):
                done += len(rows)
                progress = done, done if total is None else total
                yield Block(rows, labels, piece.part.before + piece.start, piece.group, progress)
        if self._is_iterable:
            self._check_count(self._num_rows)

    # -- parts and pieces --------------------------------------------------------------------------------

    def _open(self, parts: Iterable[Part]) -> Iterator[_Opened]:
        for part in parts:
            columns: Columns | None = None
            features: Field | None = None
            error: ReadError | None = None
            try:
                columns = part.columns()
                if columns.is_empty:
                    self.empty.append(part.name)
                    continue
                features = columns.features(self._column, self._label_column, self._order)
                self._order = self._order or features.names
                if features.shape[1] == 0:
                    raise ReadError(part.name, f"expected at least one feature, got {features}")
            except ReadError as raised:
                features, error = None, raised
            opened = _Opened(self.num_parts, part.name, columns, features, error, self._num_rows)
            self._num_rows += opened.num_rows
            yield opened
            self.num_parts += 1

    def _pieces(self) -> Iterator[_Piece]:
        """The pieces of this process, whose groups are their numbers over all parts, or their parts."""
        first = 0
        for part in self._parts:
            size = self._size(part)
            starts = range(0, part.num_rows, size)
            if self._by_block or part.number % self._world_size == self._rank:
                if part.features is None:
                    yield _Piece(part, 0, 0, 0)
                for number, start in enumerate(starts, first):
                    if not self._by_block or number % self._world_size == self._rank:
                        stop = min(start + size, part.num_rows)
                        yield _Piece(part, start, stop, part.number if self._by_part else number)
            first += max(len(starts), 1)

    def _size(self, part: _Opened) -> int:
        """Rows of a piece."""
        size = self._block_rows
        if not self._by_part:
            size = min(size, math.ceil(self._num_rows / (_BLOCKS_A_FOLD * self._folds)))
        if part.features is not None and part.features.dtype is not None:
            size = min(size, _MOST_BYTES // (part.features.shape[1] * part.features.dtype.itemsize))
        return max(size, 1)

    # -- reading -----------------------------------------------------------------------------------------

    def _read(self, piece: _Piece) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The rows of a piece up to the first row that cannot be read, then an error."""
        part = piece.part
        if part.error is not None or part.features is None:
            raise part.error or ReadError(part.name, "expected rows")
        if part.features.shape[1] != self.width:
            raise ReadError(
                part.name,
                f"expected {self.width} features as in {self._like!r}, got {part.features.shape[1]}",
                0,
            )
        failed: ReadError | None = None
        stop = piece.stop
        try:
            rows = _read(part.features, part.name, piece.start, stop)
        except ReadError as error:
            if error.row is None or error.row <= piece.start:
                raise
            failed, stop = error, error.row
            rows = _read(part.features, part.name, piece.start, stop)
        yield rows, self._labels(part, piece.start, stop)
        if failed is not None:
            raise failed

    def _labels(self, part: _Opened, start: int, stop: int) -> Tensor | None:
        if self._label_field is not None:
            first, last = part.before + start, part.before + stop
            if last > self._label_field.shape[0]:
                self._check_count(last, "more than ")
            return _read_labels(self._label_field, self._label_name, first, last)
        if self._label_column is None or part.columns is None:
            return None
        field = part.columns.labels(self._label_column)
        if field.shape[0] != part.num_rows:
            raise ReadError(
                part.name,
                f"expected a label for each of {part.num_rows} rows in {self._label_column!r}, got"
                f" {field.shape[0]}",
            )
        return _read_labels(field, part.name, start, stop)

    def _check_count(self, rows: int, more: str = "") -> None:
        if self._label_field is None or (not more and self._label_field.shape[0] == rows):
            return
        raise ValueError(
            f"expected a label for each row, got {self._label_field.shape[0]} labels in {self._label_name!r}"
            f" and {more}{rows} rows"
        )


def _read(field: Field, name: str, start: int, stop: int) -> Tensor:
    try:
        rows = field.read(start, stop)
    except ReadError as error:
        error.file = error.file or name
        raise
    except Exception as error:  # damaged data raises any kind of error in other libraries
        raise ReadError(name, f"cannot be read: {error}", start) from error
    if rows.dtype.itemsize == 1:  # PyTorch does not calculate with floats of eight bits
        rows = rows.to(torch.float32)
    return rows


# -- labels --------------------------------------------------------------------------------------------------


def _read_labels(field: Field, name: str, start: int, stop: int) -> Tensor:
    """Labels of some rows, shape (n,), int64; -1 for a row without one."""
    labels = field.read(start, stop)
    if labels.is_floating_point():
        is_there = labels.isfinite()
        wrong = is_there & ((labels != labels.round()) | (labels.abs() > _LARGEST_LABEL))
        if bool(wrong.any()):
            row = int(wrong.to(torch.uint8).argmax())
            raise ReadError(name, f"expected an integer label, got {float(labels[row])}", start + row)
        labels = torch.where(is_there, labels, -1)
    return labels.to(torch.int64)


def _labels_of(labels: Any) -> tuple[str | None, Field | None]:
    """The name of the column of labels, or the field of all labels."""
    if labels is None:
        return None, None
    if isinstance(labels, (str, Path)):
        path = Path(os.path.expanduser(labels))
        if not path.is_file():
            if isinstance(labels, Path) or path.suffix.lower() in READERS:
                raise FileNotFoundError(f"expected a file of labels, found no {str(labels)!r}")
            return str(labels), None
        columns = _read_text(path) if path.suffix == ".txt" else read_columns(path)
        candidates = [name for name, each in columns.fields.items() if each.is_integer and len(each.shape) == 1]
        if len(candidates) != 1:
            raise ReadError(
                str(path), f"expected one column of integer labels of shape (N,), got {columns.listed()}"
            )
        return None, columns.fields[candidates[0]]
    field = field_of_tensor(labels) if isinstance(labels, Tensor) else field_of_array(np.asanyarray(labels))
    if len(field.shape) != 1 or not (field.is_integer or field.is_floating):
        raise TypeError(
            f"expected labels as integers of shape (N,), the name of a column or a file, got {field}"
        )
    return None, field


def _is_file(name: str, other: Any) -> bool:
    """True if two paths are one file."""
    if not isinstance(other, (str, Path)):
        return False
    return os.path.isfile(name) and os.path.isfile(other) and os.path.samefile(name, other)


def _read_text(path: Path) -> Columns:
    try:
        return Columns(str(path), {"": field_of_array(np.loadtxt(path, dtype=np.int64, ndmin=1))})
    except ValueError as error:
        raise ReadError(str(path), f"expected an integer in each line: {error}") from error
