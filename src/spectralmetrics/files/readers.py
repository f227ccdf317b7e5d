"""Files of rows: one function for each format, which describes the columns and reads no rows yet.

Rows are read some at a time. Between two reads no file stays mapped, and only a file that must be read in order
stays open: memory is bounded by the rows of one read, whatever the size of the file. Files are read as data; no
code in them is run.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.extras import from_extra
from spectralmetrics.files.fields import (
    EMPTY,
    Columns,
    Field,
    ReadError,
    as_tensor,
    describe,
    field_of_tensor,
    torch_dtype,
)
from spectralmetrics.files.in_order import InOrder, first_line
from spectralmetrics.files.parquet import parquet_columns
from spectralmetrics.torch_private import load_tensors

_NO_OBJECTS = (
    "it holds Python objects, which could run code when they are read; save an array of numbers, as in"
    " np.save(path, np.stack(rows).astype(np.float32))"
)


def read_columns(path: Path) -> Columns:
    """The columns of a file, by its suffix.

    Raises:
        ReadError: for a suffix that is not known, or a file that is damaged or not what its suffix says.
        ModuleNotFoundError: without the extra that the format needs.
    """
    name = str(path)
    if path.suffix.lower() not in READERS:
        raise ReadError(name, f"expected a file among {', '.join(READERS)}{_instead(path)}")
    if path.is_dir():
        raise ReadError(name, "expected a file, got a folder")
    if path.stat().st_size == 0:
        return Columns(name, EMPTY)
    try:
        return READERS[path.suffix.lower()](path)
    except (ReadError, ModuleNotFoundError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file raises any kind of error in other libraries
        raise ReadError(name, f"cannot be read as {path.suffix}: {first_line(error)}") from error


def _instead(path: Path) -> str:
    if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"):
        return f", got {path.suffix!r}: unpack it first"
    if path.suffix in (".pkl", ".pickle"):
        return ", got a pickle, which could run code when it is read: save arrays with np.save"
    if path.suffix in (".csv", ".tsv", ".json", ".jsonl"):
        return f", got {path.suffix!r}: pandas.read_csv and the like read it, and measure(frame) takes that"
    return f", got {path.suffix!r}" if path.suffix else ", got none of these"


# -- numpy ----------------------------------------------------------------------------------------------------


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, True if columns come first, and dtype; the file is then at its first number."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _npy(path: Path) -> Columns:
    with path.open("rb") as file:
        if not file.read(6).startswith(b"\x93NUMPY"):
            file.seek(0)
            is_pickle = file.read(1) == pickle.PROTO
            raise ReadError(str(path), _NO_OBJECTS if is_pickle else "cannot be read as .npy: it is none")
        file.seek(0)
        shape, is_fortran, dtype = _header(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ReadError(str(path), _NO_OBJECTS)
    whole = _whole_rows(path.stat().st_size - offset, shape, dtype, is_fortran)

    def read(start: int, stop: int) -> Tensor:
        if stop > whole:
            raise ReadError(str(path), f"is cut off: it holds {whole} of {shape[0]} rows", whole)
        if is_fortran and len(shape) == 2:
            return as_tensor(_of_columns(path, offset, shape, dtype, start, stop))
        size = dtype.itemsize * int(np.prod(shape[1:]))
        return as_tensor(np.memmap(path, dtype, "r", offset + start * size, (stop - start, *shape[1:])))

    field = Field(shape, torch_dtype(dtype), describe(dtype), read)
    return Columns(str(path), {"": field} if not shape or shape[0] else EMPTY)


def _of_columns(
    path: Path, offset: int, shape: Sequence[int], dtype: np.dtype[Any], start: int, stop: int
) -> np.ndarray[Any, Any]:
    """Rows of a matrix stored column by column. If mapped, much of the file would count as memory in use."""
    columns = np.empty((shape[1], (stop - start) * dtype.itemsize), np.uint8)
    with path.open("rb") as file:
        for index, column in enumerate(columns):
            file.seek(offset + (index * shape[0] + start) * dtype.itemsize)
            file.readinto(column.data)
    return columns.view(dtype).T


def _whole_rows(size: int, shape: Sequence[int], dtype: np.dtype[Any], is_fortran: bool) -> int:
    """The number of whole rows in a file that may have been cut off."""
    if not shape:
        return 1
    needed = dtype.itemsize * int(np.prod(shape[1:]))
    if size >= needed * shape[0]:
        return shape[0]
    return 0 if is_fortran else size // max(needed, 1)


def _npz(path: Path) -> Columns:
    fields = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                fields[member.removesuffix(".npy")] = _of_member(path, archive, member)
    return Columns(str(path), fields)


def _of_member(path: Path, archive: zipfile.ZipFile, member: str) -> Field:
    with archive.open(member) as file:
        shape, is_fortran, dtype = _header(file)
    if dtype.hasobject:
        return Field(shape, None, "objects", lambda a, b: torch.empty(0))
    if is_fortran and len(shape) > 1:

        def read_whole(start: int, stop: int) -> Tensor:
            with np.load(path) as arrays:
                return as_tensor(arrays[member.removesuffix(".npy")][start:stop])

        return Field(shape, torch_dtype(dtype), describe(dtype), read_whole)
    size = dtype.itemsize * int(np.prod(shape[1:]))

    def stream() -> Iterator[Callable[[int], Tensor]]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _header(file)

            def take(count: int) -> Tensor:
                data = file.read(count * size)
                return as_tensor(np.frombuffer(data, dtype).reshape(-1, *shape[1:]))

            while True:
                yield take

    return Field(shape, torch_dtype(dtype), describe(dtype), InOrder(path, (*shape, 0)[0], stream).read)


# -- safetensors and PyTorch ----------------------------------------------------------------------------------


def _safetensors(path: Path) -> Columns:
    with from_extra("files", ".safetensors files need safetensors"):
        import safetensors

    def field(name: str, piece: Any) -> Field:
        shape = tuple(piece.get_shape())
        dtype = piece[:0].dtype if shape else None

        def read(start: int, stop: int) -> Tensor:
            with safetensors.safe_open(path, "pt") as file:
                rows: Tensor = file.get_slice(name)[start:stop]
            return rows

        return Field(shape, dtype, str(dtype or piece.get_dtype()).removeprefix("torch."), read)

    with safetensors.safe_open(path, "pt") as file:
        return Columns(str(path), {name: field(name, file.get_slice(name)) for name in file.keys()})  # noqa: SIM118


def _pt(path: Path) -> Columns:
    is_zip = zipfile.is_zipfile(path)

    def load() -> dict[str, Tensor]:
        content = load_tensors(path, is_zip)
        return dict(_tensors(content))

    try:
        tensors = load()
    except pickle.UnpicklingError as error:
        raise ReadError(
            str(path),
            "it holds Python objects besides tensors, which could run code when they are read; save a tensor or"
            " a dict of tensors, as in torch.save(rows, path)",
        ) from error

    def field(name: str, tensor: Tensor) -> Field:
        own = field_of_tensor(tensor)
        if not is_zip:  # `load` has read all of it
            return own
        # Mapped anew for each read: pages that were read once would count as memory in use.
        return Field(own.shape, own.dtype, own.described, lambda a, b: load()[name][a:b].clone())

    return Columns(str(path), {name: field(name, tensor) for name, tensor in tensors.items()})


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
        return
    named = content if isinstance(content, Mapping) else {}
    if isinstance(content, (list, tuple)):
        named = dict(enumerate(content))
    for key, value in named.items():
        yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


READERS: Mapping[str, Callable[[Path], Columns]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": parquet_columns,
    ".pt": _pt,
    ".pth": _pt,
}
"""Suffix -> function that reads the columns of such a file."""
