"""Columns of a file or of an object in memory, and which of them are features or labels."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ReadError(ValueError):
    """Raised where a file, or an item of an iterable, cannot be read as rows.

    Attributes:
        file: its name.
        row: number of the first row that could not be read, from 0; None if unknown.
        partial: the :class:`~spectralmetrics.Measurement` of the rows that were read before; None if there
            were none.
    """

    def __init__(self, file: str, problem: str, row: int | None = None) -> None:
        super().__init__(file, problem, row)  # pickle passes these arguments
        self.file = file
        self.problem = problem
        self.row = row
        self.partial: Any = None

    def __str__(self) -> str:
        where = repr(self.file) if self.row is None else f"row {self.row} of {self.file!r}"
        return f"{where}: {self.problem}"


@dataclass(frozen=True)
class Field:
    """A column.

    Attributes:
        shape: rows first: (N,) for numbers, (N, D) for vectors, or any other shape.
        dtype: the dtype of the rows that :attr:`read` returns; None if they are not numbers.
        described: the dtype as its file calls it.
        read: (start, stop) -> these rows. From call to call, the start must not decrease.
        names: names of the columns of numbers that make the vectors; empty for others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    described: str
    read: Callable[[int, int], Tensor]
    names: tuple[str, ...] = ()

    @property
    def is_floating(self) -> bool:
        """True if it holds floating numbers."""
        return self.dtype is not None and self.dtype.is_floating_point

    @property
    def is_integer(self) -> bool:
        """True if it holds integers."""
        return not (self.dtype is None or self.is_floating or self.dtype.is_complex or self.dtype == torch.bool)

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape)) or 'one'} {self.described}"


@dataclass(frozen=True)
class Columns:
    """The columns of one file or object.

    Attributes:
        name: the name of the file or object.
        fields: the fields by name, in their order; an object without columns has one field ``""``.
        join: names of columns of numbers -> the field of their rows as vectors.
        index: names of columns that number or name the rows: features only if the user chooses them.
    """

    name: str
    fields: Mapping[str, Field]
    join: Callable[[Sequence[str]], Field] | None = None
    index: frozenset[str] = frozenset()

    @property
    def is_empty(self) -> bool:
        """True if there are columns, and no rows in them."""
        return bool(self.fields) and all(each.shape[:1] == (0,) for each in self.fields.values())

    def features(self, column: str | None, labels: str | None, order: tuple[str, ...] = ()) -> Field:
        """The column of feature vectors.

        Args:
            column: its name, or a pattern as in ``fnmatch``, which may match several columns of numbers. None:
                the only candidate.
            labels: name of the column of labels, which is not a candidate.
            order: names of the columns of numbers that made the features before; empty if there were none.

        Raises:
            ReadError: if there is none, or there are several, or as many columns of numbers with other names.
        """
        fields = {name: each for name, each in self.fields.items() if name != labels}
        if column is None:
            fields = {name: each for name, each in fields.items() if name not in self.index}
        else:
            fields = {name: each for name, each in fields.items() if fnmatch.fnmatchcase(name, column)}
            if not fields:
                raise ReadError(self.name, f"expected a column {column!r}, got {self.listed()}")
        vectors = {name: each for name, each in fields.items() if each.is_floating and len(each.shape) == 2}
        if len(vectors) > 1:
            raise ReadError(
                self.name,
                f"expected one column of features, got {self.listed(vectors)}; choose one with column=NAME"
                " (--column NAME)",
            )
        if vectors:
            return next(iter(vectors.values()))
        numbers = tuple(name for name, each in fields.items() if each.is_floating and len(each.shape) == 1)
        if numbers and self.join is not None:
            if len(numbers) == len(order):
                if missing := [name for name in order if name not in numbers]:
                    raise ReadError(
                        self.name,
                        f"expected a column {missing[0]!r} as in the rows before, got {self.listed(fields)}; a"
                        " feature is one column throughout: rename columns that are the same",
                    )
                numbers = order
            return replace(self.join(numbers), names=numbers)
        if not fields:
            raise ReadError(self.name, f"expected a column of features, got {self.listed()}")
        words = f"expected floating rows of shape (N, D), got {self.listed(fields)}"
        raise ReadError(self.name, f"{words}; {_advice(fields.values())}")

    def labels(self, name: str) -> Field:
        """The column of labels.

        Raises:
            ReadError: if there is none, or it does not hold a number for each row.
        """
        if name not in self.fields:
            raise ReadError(
                self.name, f"expected labels as a column {name!r} or a file of that name, got {self.listed()}"
            )
        field = self.fields[name]
        if len(field.shape) != 1 or not (field.is_integer or field.is_floating):
            raise ReadError(
                self.name,
                f"expected an integer label for each row in {name!r}, got {field}: number the classes",
            )
        return field

    def listed(self, fields: Mapping[str, Field] | None = None) -> str:
        """Fields in words, by default all."""
        chosen = self.fields if fields is None else fields
        shown = [f"{name!r} ({each})" if name else f"one array ({each})" for name, each in chosen.items()]
        more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
        return (", ".join(shown[:12]) + more) if shown else "no columns"


def _advice(fields: Collection[Field]) -> str:
    """The way to make features of columns that are none."""
    ndims = [len(each.shape) for each in fields if each.is_floating]
    if ndims and max(ndims) > 2:
        return "rows.reshape(-1, rows.shape[-1]) makes every position a row, rows.mean(1) one of each sample"
    if ndims:
        return "give each observation a row, of one feature as rows[:, None]"
    dtypes = {each.dtype for each in fields}
    if torch.uint8 in dtypes:
        return (
            "for bits packed into bytes save np.unpackbits(rows, axis=1).astype(np.float16), for quantised rows"
            " the numbers that they stand for"
        )
    if torch.int8 in dtypes:
        return "save the numbers that quantised ones stand for: (rows * scale).astype(np.float16)"
    if None in dtypes:
        return "save numbers alone, such as np.stack(rows).astype(np.float32)"
    return "integers are never features; save rows.astype(np.float32) if these are"


EMPTY: Mapping[str, Field] = {"": Field((0, 0), torch.float32, "nothing", lambda a, b: torch.empty(0, 0))}
"""The columns of a file without rows."""


# -- in memory ------------------------------------------------------------------------------------------------


def columns_of(value: Any, name: str) -> Columns | None:
    """The columns of an object in memory; None for an object of another kind.

    Args:
        value: a tensor, an array, an object with ``__array__``, a data frame, or a dict of these.
        name: the name of the object in messages.
    """
    if isinstance(value, Mapping):
        check_names(name, map(str, value))
        fields = {str(key): field for key, each in value.items() if (field := _field_of(each)) is not None}
        return Columns(name, fields)
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):  # a data frame
        check_names(name, map(str, value.columns))
        fields = {str(key): _field_of_series(value[key]) for key in value.columns}
        return Columns(name, fields, lambda names: _joined([fields[each] for each in names]))
    own = None if isinstance(value, list) else _field_of(value)
    return None if own is None else Columns(name, {"": own})


def check_names(name: str, columns: Iterable[str]) -> None:
    """Raise a ReadError for several columns of one name: only one of them could be read."""
    if twice := [column for column, number in Counter(columns).items() if number > 1]:
        raise ReadError(
            name, f"expected columns of different names, got several called {twice[0]!r}; rename all but one"
        )


def _field_of(value: Any) -> Field | None:
    if isinstance(value, Tensor):
        return field_of_tensor(value)
    if hasattr(value, "dtype") and hasattr(value, "to_numpy"):
        return _field_of_series(value)
    if hasattr(value, "__array__"):
        return field_of_array(np.asanyarray(value))
    if isinstance(value, list):
        if not value:
            return EMPTY[""]
        if np.ndim(value[0]) == 0:
            return field_of_array(np.asarray(value))
        vectors = np.empty(len(value), object)
        for index, each in enumerate(value):
            vectors[index] = each
        return _field_of_vectors(vectors)
    return None


def field_of_tensor(value: Tensor) -> Field:
    """The field of a tensor."""
    value = value.detach()
    words = str(value.dtype).removeprefix("torch.")
    dtype: torch.dtype | None = value.dtype
    if value.layout != torch.strided or value.is_quantized:
        words, dtype = f"{words} as {str(value.layout).removeprefix('torch.')}", None
    return Field(tuple(value.shape), dtype, words, lambda a, b: value[a:b])


def field_of_array(value: np.ndarray[Any, Any]) -> Field:
    """The field of an array. An array of objects may hold vectors; masked values are missing."""
    if isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "iuf":
        is_float = value.dtype.kind == "f"

        def read(start: int, stop: int) -> Tensor:
            part = value[start:stop]
            return as_tensor(np.ma.filled(part if is_float else part.astype(np.float64), np.nan))
    else:
        value = np.asarray(value)
        if value.dtype == object and value.ndim == 1:
            return _field_of_vectors(value)

        def read(start: int, stop: int) -> Tensor:
            return as_tensor(value[start:stop])

    return Field(value.shape, torch_dtype(value.dtype), describe(value.dtype), read)


def _field_of_series(series: Any) -> Field:
    kind = getattr(series.dtype, "kind", "O")
    values = series.to_numpy()
    if values.dtype == object and kind in "iuf":  # some are missing
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    field = field_of_array(values)
    return replace(field, dtype=torch.int64, described="int64") if kind in "iu" else field


def _field_of_vectors(values: np.ndarray[Any, Any]) -> Field:
    lengths = [None if each is None else np.ndim(each) and len(each) for each in values]
    width = next((length for length in lengths if length), None)
    first = next((np.asarray(each) for each, length in zip(values, lengths, strict=True) if length), None)
    if width is None or first is None or first.ndim != 1 or torch_dtype(first.dtype) is None:
        return Field(values.shape, None, "objects", lambda a, b: torch.empty(0))

    # The common dtype, so that vectors of several floating dtypes lose no digits.
    floating = {each.dtype for each in values if isinstance(each, np.ndarray) and each.dtype.kind == "f"}
    common = np.result_type(*floating) if floating else first.dtype

    def read(start: int, stop: int) -> Tensor:
        rows = np.full((stop - start, width), np.nan, np.result_type(common, np.float16))
        for index in range(start, stop):
            if lengths[index] is not None:
                if lengths[index] != width:
                    raise ReadError("", ragged(width, lengths[index] or 0), index)
                rows[index - start] = values[index]
        return as_tensor(rows)

    return Field((len(values), width), torch_dtype(common), describe(common), read)


def _joined(fields: Sequence[Field]) -> Field:
    dtype = torch.float32 if all(each.dtype != torch.float64 for each in fields) else torch.float64

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([each.read(start, stop).to(dtype) for each in fields], dim=1)

    return Field((fields[0].shape[0], len(fields)), dtype, fields[0].described, read)


def ragged(expected: int, width: int) -> str:
    """The message for a row of another width."""
    return f"expected {expected} features as in the rows before, got {width}"


# -- dtypes ---------------------------------------------------------------------------------------------------

_BFLOAT16 = ("V2", "bfloat16")  # numpy's name in files from ml_dtypes and JAX, and ml_dtypes' own name


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The dtype of :func:`as_tensor`; None for a dtype without numbers."""
    if dtype.names is not None or dtype.subdtype is not None:
        return None
    if dtype.str.lstrip("|<=") in _BFLOAT16 or dtype.name == "bfloat16":
        return torch.bfloat16
    if dtype.kind == "f":
        return {2: torch.float16, 4: torch.float32}.get(dtype.itemsize, torch.float64)
    if dtype.kind in "iu":
        signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(dtype.itemsize, torch.int64)
        return torch.uint8 if dtype == np.uint8 else signed if dtype.kind == "i" else torch.int64
    return {"b": torch.bool, "c": torch.complex128}.get(dtype.kind)


def describe(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, without its order of bytes."""
    if torch_dtype(dtype) == torch.bfloat16:
        return "bfloat16"
    return "objects" if dtype.hasobject else dtype.name


def as_tensor(values: np.ndarray[Any, Any]) -> Tensor:
    """The numbers of an array as a tensor: in the machine's order of bytes, and in a dtype that PyTorch has."""
    dtype = values.dtype
    wanted = torch_dtype(dtype)
    if wanted is None:
        raise TypeError(f"expected an array of numbers, got {describe(dtype)}")
    if wanted == torch.bfloat16:
        return torch.from_numpy(np.array(values, order="C").view(np.uint16)).view(torch.bfloat16)
    kind = np.dtype(str(wanted).removeprefix("torch."))
    if dtype != kind or not values.flags.writeable or not values.flags.c_contiguous:
        values = np.array(values, dtype=kind, order="C")
    return torch.from_numpy(values)
