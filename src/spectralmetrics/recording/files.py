"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` at the end of the block, all at once.

    If the block raises, ``path`` is as it was. A process killed inside leaves a hidden ``.tmp`` file beside it,
    which the next call for the same path replaces and :func:`sweep` removes.

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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name itself must survive a loss of power
        with contextlib.suppress(OSError):  # but the file is there: this is no failure to write it
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def kept_size(path: Path, size: int) -> int:
    """The bytes of a file that hold whole records.

    Args:
        path: the path of the file, which may be missing.
        size: bytes after the last record that was written; the file is shorter if that was taken back, and
            longer if the process was interrupted once it had written one more.
    """
    return min(size, path.stat().st_size) if path.exists() else 0


def lengthen(path: Path, size: int, added: bytes) -> int:
    """Replace a file by a copy of its first bytes and what is added; return the size of the copy."""
    with replacing(path) as file:
        if size:
            with open(path, "rb") as earlier:
                shutil.copyfileobj(earlier, file, 2**20)
            file.truncate(size)
            file.seek(size)
        file.write(added)
    return size + len(added)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a process left that was killed while it replaced a file.

    Args:
        folder: the folder of the file.
        pattern: glob of the names that the files were to have.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".epoch-000003.npz.tmp").touch()
    >>> sweep(folder, "epoch-*.npz")
    >>> list(folder.iterdir())
    []
    """
    for path in folder.glob(f".{pattern}.tmp"):
        with contextlib.suppress(OSError):  # one that cannot be removed does no harm
            path.unlink()


def read_table(
    path: Path,
    what: str,
    parse: Callable[[list[str]], T],
    columns: tuple[str, ...],
    *earlier: tuple[str, ...],
) -> list[T]:
    """Reads the lines of a CSV file behind its header.

    Args:
        path: the path of the file.
        what: a line is, with its article.
        parse: makes something of the cells of a line; raises a ValueError where it cannot.
        columns: the columns of the header.
        earlier: other headers, which earlier releases wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such table, with the line.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text: {error}") from error
    found = []
    with io.StringIO(text, newline="") as file:
        reader = csv.reader(file)
        try:
            header = tuple(next(reader, ()))
            if header not in (columns, *earlier):
                raise ValueError(f"expected {path} to begin with {','.join(columns)}, got {','.join(header)!r}")
            for cells in reader:
                try:
                    if len(cells) != len(header):
                        raise ValueError
                    found.append(parse(cells))
                except ValueError:
                    line = f"line {reader.line_num} of {path}"
                    raise ValueError(f"expected {what} in {line}, got {','.join(cells)!r}") from None
        except csv.Error as error:
            raise ValueError(f"expected {what} in line {reader.line_num} of {path}: {error}") from None
    return found
