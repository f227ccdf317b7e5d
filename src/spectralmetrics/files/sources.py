"""Sources of rows: files in numeric order, objects in memory, items of an iterable."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectralmetrics.files.fields import Columns, columns_of
from spectralmetrics.files.readers import READERS, read_columns


class Part(NamedTuple):
    """A file, or an object in memory.

    Attributes:
        name: the name in messages.
        columns: reads the descriptions of its columns.
    """

    name: str
    columns: Callable[[], Columns]


def parts_of(source: Any) -> list[Part] | Iterator[Part]:
    """The parts of a source: a list if they are known, an iterator if they are made one by one.

    Args:
        source: a path (a file, a folder, or a glob), an array, tensor, data frame or dict of arrays, a sequence
            of these, or any other iterable of them.

    Raises:
        FileNotFoundError: for a path or a glob without a file.
        TypeError: for anything else.
    """
    if (own := _one(source, "the array")) is not None:
        return own
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        return _once([part for index, each in enumerate(source) for part in _of_item(each, index)])
    if isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
        return (part for index, each in enumerate(source) for part in _of_item(each, index))
    raise TypeError(
        "expected source to be a path, an array, a tensor, a data frame or an iterable of these, got"
        f" {type(source).__name__}"
    )


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a path in numeric order, ``shard-2`` before ``shard-10``.

    Args:
        path: a file, a folder, whose readable files are taken, or a glob, ``**`` included.

    Raises:
        FileNotFoundError: if there are none.
    """
    text = os.path.expanduser(path)
    if os.path.isdir(text):
        files = [each for each in Path(text).iterdir() if each.suffix.lower() in READERS and each.is_file()]
        files = [each for each in files if not each.name.startswith(".")]
        if not files:
            kinds = sorted({each.suffix for each in Path(text).iterdir() if each.suffix})
            raise FileNotFoundError(
                f"expected files among {', '.join(READERS)} in {text!r}, got {', '.join(kinds) or 'none'}; a"
                f" glob such as '{text}/**/*.npy' looks into the folders below"
            )
    elif os.path.lexists(text):
        files = [Path(text)]
    else:
        # A folder that exists is not a pattern, even if its name holds the characters of one.
        folder = next((each for each in Path(text).parents if each.is_dir()), Path())
        pattern = os.path.join(glob.escape(str(folder)), *Path(text).parts[len(folder.parts) :])
        files = [Path(each) for each in glob.glob(pattern, recursive=True) if not os.path.isdir(each)]
    for each in files:
        if not each.exists():
            raise FileNotFoundError(f"expected a file, got {str(each)!r}, a link to nothing")
    if not files:
        raise FileNotFoundError(f"expected a file, a folder or a glob, found no {text!r}")
    return sorted(files, key=numeric_order)


def numeric_order(path: str | Path) -> list[tuple[tuple[int, int, str], ...]]:
    """The key that sorts paths with numbers in their names by value.

    >>> sorted(["s-10.npy", "s-9.npy", "s-1.npy"], key=numeric_order)
    ['s-1.npy', 's-9.npy', 's-10.npy']
    """
    return [
        tuple(
            (0, int(each), each) if each.isdecimal() else (1, 0, each)
            for each in re.split(r"(\d+)", part)
            if each
        )
        for part in Path(path).parts
    ]


def _one(source: Any, name: str) -> list[Part] | None:
    """The parts of a path or of an object in memory; None for anything else."""
    if isinstance(source, (str, os.PathLike)):
        return _once([Part(str(file), lambda file=file: read_columns(file)) for file in files_of(source)])  # type: ignore[misc]
    columns = columns_of(source, name)
    return None if columns is None else [Part(name, lambda: columns)]


def _of_item(item: Any, index: int) -> list[Part]:
    parts = _one(item, f"item {index}")
    if parts is None:
        hint = ""
        if isinstance(item, (list, tuple)):
            hint = "; of pairs of rows and labels give the rows alone: (rows for rows, _ in loader)"
        raise TypeError(
            f"expected the items of source to be paths, arrays, tensors, data frames or dicts of arrays, got"
            f" {type(item).__name__}{hint}"
        )
    return parts


def _once(parts: list[Part]) -> list[Part]:
    """The parts, each file once even if it comes twice, by another name or through a link."""
    seen: dict[str, str] = {}
    kept, twice = [], []
    for part in parts:
        path = os.path.realpath(part.name) if os.path.exists(part.name) else ""
        if path and path in seen:
            twice.append(part.name)
            continue
        seen[path] = part.name
        kept.append(part)
    if twice:
        warnings.warn(
            f"read once, though named twice: {', '.join(map(repr, twice))}", UserWarning, stacklevel=5
        )
    return kept
