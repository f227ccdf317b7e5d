"""One recorder at a time for a directory."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import weakref
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FILE_NAME = ".recorder.lock"
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_FAR = 2**30  # on Windows no process can read locked bytes, and others must read the holder's name


class DirectoryLock:
    """A lock of one owner at a time, in this process or in another; it ends if its process is killed.

    The lock is the operating system's, on a hidden file in the directory that :meth:`release` removes.
    Processes that are forked while it is held, such as a data loader's workers, do not hold it. On a file
    system without locks, nothing is locked.

    Args:
        directory: the directory to lock; it must exist.

    Raises:
        BlockingIOError: while another owner holds the lock; names its process.
        OSError: if the file cannot be made.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> lock = DirectoryLock(directory)
    >>> lock.release()
    >>> list(directory.iterdir())
    []
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._process = os.getpid()
        self._file: IO[bytes] | None = self._acquire(directory)
        _HELD.add(self)

    def release(self) -> None:
        """Release the lock; has no effect the second time and in a forked process."""
        if self._file is None or os.getpid() != self._process:
            return
        file, self._file = self._file, None
        if sys.platform == "win32":  # which removes no open file
            file.close()
        # While the lock is held, so that no other process can lock the file that is removed.
        with contextlib.suppress(OSError):
            self._path.unlink()
        file.close()

    def _acquire(self, directory: Path) -> IO[bytes]:
        while True:
            file = open(self._path, "a+b", buffering=0)  # noqa: SIM115  # it stays open as long as the lock is held
            try:
                _lock(file)
                # Between opening and locking, the earlier holder may have removed the file.
                if not _is_at(file, self._path):
                    file.close()
                    continue
                with contextlib.suppress(OSError):  # on a full disk the lock works without its holder's name
                    file.truncate(0)
                    file.write(f"{self._process} {socket.gethostname()}".encode())
            except BlockingIOError:
                holder = _read(self._path)
                file.close()
                raise BlockingIOError(
                    f"expected no other recorder of {directory}, got one{holder} that is still open: close() it"
                    " first, or record to another directory"
                ) from None
            except BaseException:
                file.close()
                raise
            return file

    def _forget(self) -> None:
        """Close the file without giving up the lock, which the parent process holds through its own."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


_HELD: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _lock(file: IO[bytes]) -> None:
    """Lock a file, or raise a BlockingIOError."""
    try:
        if sys.platform == "win32":
            file.seek(_FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, "locked") from error
        if error.errno not in _UNSUPPORTED:
            raise


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> str:
    """The holder of the lock, as far as the file says."""
    try:
        process, host = path.read_text().split()
    except (OSError, ValueError):
        return ""
    if int(process) == os.getpid() and host == socket.gethostname():
        return " in this process"
    return f" in process {process} on {host}"
