"""Streaming spectral metrics of neural-network features: which layers do work, while training runs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralmetrics.face import *  # noqa: F403

__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Import the public names, and PyTorch with them, when the first is used: ``--help`` needs none."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    face = vars(importlib.import_module(f"{__name__}.face"))
    public = {each: value for each, value in face.items() if not each.startswith("_")}
    globals().update(public, __all__=sorted(public))
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
