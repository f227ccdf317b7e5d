"""Files that are whole or absent, even if the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; at the end of the block it replaces ``path``, all at once.

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


def lengthen(path: Path, size: int, added: bytes, head: bytes) -> int:
    """Replace a file by a copy of its whole records with another one added; return the size of the copy.

    Args:
        path: the path of the file, which may be missing.
        size: bytes after the last record that was written. The file is shorter if this record was taken back,
            and longer if the process was interrupted after it wrote another one.
        added: the bytes of the record.
        head: the bytes before the first record.
    """
    size = min(size, path.stat().st_size) if path.exists() else 0
    with replacing(path) as file:
        if size:
            with open(path, "rb") as earlier:
                shutil.copyfileobj(earlier, file, 2**20)
            file.truncate(size)
            file.seek(size)
        file.write(added if size else head + added)
        return file.tell()


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
