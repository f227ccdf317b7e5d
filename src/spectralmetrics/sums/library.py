"""Find the library that installing the package compiles from ``csrc/``, or the reason why there is none."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).with_name("_accumulate.so")
NOTE = LIBRARY.with_suffix(".txt")  # says, in the library's place, why the install has compiled nothing
INTERFACE_VERSION = 4
_INSTALL_AGAIN = "install spectralmetrics again"


class Found(NamedTuple):
    """The library, or why there is none.

    Attributes:
        library: None where PyTorch does the sums.
        why: the reason why there is none, in words.
        is_broken: True if the install has made a library that is missing or unusable now.
    """

    library: ctypes.CDLL | None
    why: str = ""
    is_broken: bool = False


@functools.cache
def find() -> Found:
    """Load the library beside the package, or say why there is none."""
    system, processor = sys.platform, platform.machine()
    if (system, processor) != ("linux", "x86_64"):
        return Found(None, f"they are compiled for Linux on x86-64 only, and this is {system} {processor}")
    if not LIBRARY.exists():
        if NOTE.exists():
            note = NOTE.read_text(encoding="utf-8").strip()
            return Found(None, f"nothing was compiled when the package was installed: {note}")
        why = f"no compiled library beside the package ({LIBRARY})"
        if _was_installed():
            return Found(None, f"{why}, where the install had put one; {_INSTALL_AGAIN}", True)
        return Found(None, why)
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.interface_version()
    except (OSError, AttributeError) as error:
        return Found(None, f"the compiled library cannot be loaded ({error}); {_INSTALL_AGAIN}", True)
    if version != INTERFACE_VERSION:
        why = f"interface version {version} and not {INTERFACE_VERSION}"
        return Found(None, f"the compiled library is of other sources, {why}; {_INSTALL_AGAIN}", True)
    seed, number, address = ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p
    library.workspace_bytes.restype = number
    library.workspace_bytes.argtypes = [address]
    library.accumulate.restype = library.measure.restype = None
    library.accumulate.argtypes = library.measure.argtypes = [address, address]
    library.draw_places.restype = library.draw_rows.restype = None
    library.draw_places.argtypes = [seed, number, number, number, address]
    library.draw_rows.argtypes = [seed, number, number, number, address, number, address]
    return Found(library)


def _was_installed() -> bool:
    """True if the package was installed with a library: only then is its wheel for one platform."""
    try:
        wheel = importlib.metadata.distribution("spectralmetrics").read_text("WHEEL")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "Root-Is-Purelib: false" in (wheel or "")


@functools.cache
def is_switched_off() -> bool:
    """True if the user has switched compiled code off; read once, so that `describe` stays true."""
    return os.environ.get("SPECTRALMETRICS_COMPILED") == "0"
