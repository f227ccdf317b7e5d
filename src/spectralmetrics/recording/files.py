"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a process left that was killed while it replaced a file.

    Args:
        folder: of the file.
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
