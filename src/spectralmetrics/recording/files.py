"""Files that are whole or absent, even if the process is killed, and tables in them."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; at the end of the block it replaces ``path``, all at once.

    If the block raises, ``path`` is as it was, and an OSError names it. A process killed inside leaves a hidden
    ``.tmp`` file beside it, which the next call for the same path replaces and :func:`sweep` removes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(path) as file:
    ...     _ = file.write(b"1 2 3")
    ...     path.exists()
    False
    >>> path.read_text()
    '1 2 3'
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the directory may be gone; the first error is raised
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # of a write to an open file
            error.filename = str(path)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name itself must survive a loss of power
        with contextlib.suppress(OSError):  # the file is there: its writing did not fail
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by one with this content, all at once; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(content)


def lengthen(path: Path, added: bytes, head: bytes) -> int:
    """Replace a file by a copy with another record added; return the size of the copy.

    Args:
        path: the path of the file, which may be missing.
        added: the bytes of the record.
        head: the bytes before the first record.
    """
    with replacing(path) as file:
        if size_of(path):
            with open(path, "rb") as earlier:
                shutil.copyfileobj(earlier, file, 2**20)
        file.write(added if file.tell() else head + added)
        return file.tell()


def size_of(path: Path) -> int:
    """The size of a file in bytes; 0 without one."""
    return path.stat().st_size if path.exists() else 0


def sweep(folder: Path, pattern: str) -> None:
    """Remove the temporary files of processes that were killed while they replaced a file of this pattern.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".epoch-000003.npz.tmp").touch()
    >>> sweep(folder, "epoch-*.npz")
    >>> list(folder.iterdir())
    []
    """
    for path in folder.glob(f".{pattern}.tmp"):
        with contextlib.suppress(OSError):  # a file that cannot be removed does no harm
            path.unlink()


def read_table(
    path: Path, what: str, parse: Callable[[list[str]], T], columns: tuple[str, ...], *earlier: tuple[str, ...]
) -> list[T]:
    """The lines of a CSV file behind its header; none without the file.

    Args:
        path: the path of the file.
        what: the content of a line, with its article, for errors.
        parse: makes an object of the cells of a line; raises a ValueError if it cannot.
        columns: the header.
        earlier: headers of earlier releases.

    Raises:
        ValueError: if it is not such a table; names the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text: {error}") from error
    parsed = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = tuple(next(reader, ()))
        if header not in (columns, *earlier):
            raise ValueError(f"expected {path} to begin with {','.join(columns)}, got {','.join(header)!r}")
        for cells in reader:
            try:
                if len(cells) != len(header):
                    raise ValueError
                parsed.append(parse(cells))
            except ValueError:
                line = f"line {reader.line_num} of {path}"
                raise ValueError(f"expected {what} in {line}, got {','.join(cells)!r}") from None
    except csv.Error as error:
        raise ValueError(f"expected {what} in line {reader.line_num} of {path}: {error}") from None
    return parsed


def csv_text(lines: Iterable[Iterable[Any]]) -> bytes:
    """Lines of cells as CSV; cells with line breaks are quoted."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def blank_missing(values: Iterable[Any]) -> list[Any]:
    """The values of a line, with empty cells for None and NaN."""
    return ["" if value is None or value != value else value for value in values]
