"""Parquet files: columns of lists, and columns of numbers; needs pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.extras import from_extra
from spectralmetrics.files.fields import EMPTY, Columns, Field, as_tensor, check_names, ragged, torch_dtype
from spectralmetrics.files.in_order import AT_A_TIME, InOrder, RowError

_BUFFER = 2**20


def parquet_columns(path: Path) -> Columns:
    """The columns of a Parquet file; a column of lists of floating numbers holds vectors."""
    with from_extra("files", ".parquet files need pyarrow"):
        import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        rows, schema = file.metadata.num_rows, file.schema_arrow
    if not rows:
        return Columns(str(path), EMPTY)
    check_names(str(path), schema.names)
    types = {each.name: getattr(each.type, "storage_type", each.type) for each in schema}

    def batches(names: Sequence[str], size: int = AT_A_TIME) -> Iterator[list[Any]]:
        # Without `pre_buffer`, pages are read as they are decoded; a row group may be larger than the memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(size, columns=list(names), use_threads=False):
                # A tensor of fixed shape is a list inside an extension type.
                yield [getattr(column, "storage", column) for column in map(batch.column, names)]

    def field(name: str) -> Field:
        kind = types[name]
        is_list = any(
            getattr(pyarrow.types, f"is_{each}")(kind) for each in ("list", "large_list", "fixed_size_list")
        )
        inner = kind.value_type if is_list else kind
        dtype = _dtype_of_arrow(inner)
        words = str(dtype or inner).removeprefix("torch.")
        if not is_list or dtype is None or not dtype.is_floating_point:
            shape = (rows, 0) if is_list else (rows,)
            return Field(
                shape, dtype, words, _in_order(path, rows, lambda: batches([name]), lambda c: _numbers(c[0]))
            )
        width = _width_of_lists(batches([name], size=64))
        read = _in_order(path, rows, lambda: batches([name]), lambda columns: _vectors(columns[0], width))
        return Field((rows, width), dtype, words, read)

    def join(names: Sequence[str]) -> Field:
        is_double = any(str(types[name]) == "double" for name in names)
        dtype = torch.float64 if is_double else torch.float32

        def rows_of(columns: list[Any]) -> Tensor:
            return torch.stack([_numbers(each).to(dtype) for each in columns], dim=1)

        words = str(dtype).removeprefix("torch.")
        return Field((rows, len(names)), dtype, words, _in_order(path, rows, lambda: batches(names), rows_of))

    # pandas keeps the index of a frame as columns and names them; an index that only counts it keeps as a dict.
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    names = frozenset(each for each in index if isinstance(each, str))
    return Columns(str(path), {name: field(name) for name in types}, join, names)


def _dtype_of_arrow(kind: Any) -> torch.dtype | None:
    names = {"halffloat": "float16", "float": "float32", "double": "float64"}
    try:
        return torch_dtype(np.dtype(names.get(str(kind), str(kind))))
    except (TypeError, ValueError):
        return None


def _in_order(
    path: Path, size: int, batches: Callable[[], Iterator[Any]], rows_of: Callable[[Any], Tensor]
) -> Callable[[int, int], Tensor]:
    """A function that reads rows from batches of another size."""
    return InOrder(path, size, lambda: _in_pieces(batches(), rows_of)).read


def _in_pieces(batches: Iterator[Any], rows_of: Callable[[Any], Tensor]) -> Iterator[Callable[[int], Tensor]]:
    kept: list[Tensor] = []
    failed: list[Exception] = []

    def take(count: int) -> Tensor:
        while sum(map(len, kept)) < count and not failed and (batch := next(batches, None)) is not None:
            try:
                kept.append(rows_of(batch))
            except _RaggedError as error:
                kept.append(error.before)
                failed.append(error)
        whole = torch.cat(kept) if kept else torch.empty(0)
        if len(whole) < count and failed:
            raise RowError(len(whole), str(failed[0]))
        kept[:] = [whole[count:]]
        return whole[:count]

    while True:
        yield take


def _numbers(column: Any) -> Tensor:
    """Numbers; missing numbers are NaN, also among integers."""
    return as_tensor(column.to_numpy(zero_copy_only=False))


def _width_of_lists(batches: Iterator[list[Any]]) -> int:
    """The length of the first list that is not missing; 0 if all are missing."""
    for (column,) in batches:
        if len(there := column.drop_null()):
            return int(there.value_lengths()[0].as_py())
    return 0


def _vectors(column: Any, width: int) -> Tensor:
    """Lists as rows; a missing list is a row of NaN, and so is a missing number in it."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    wrong = is_there & (lengths != width)
    if wrong.any():
        index = int(wrong.argmax())
        raise _RaggedError(ragged(width, int(lengths[index])), _vectors(column[:index], width))
    values = _numbers(column.drop_null().flatten()).reshape(-1, width)
    if is_there.all():
        return values
    rows = torch.full((len(column), width), torch.nan, dtype=values.dtype)
    rows[torch.from_numpy(is_there.copy())] = values
    return rows


class _RaggedError(ValueError):
    """Raised for a row of another width.

    Attributes:
        before: the rows of the batch that come before it.
    """

    def __init__(self, problem: str, before: Tensor) -> None:
        super().__init__(problem)
        self.before = before
