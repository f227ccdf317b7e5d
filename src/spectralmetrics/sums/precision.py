"""Products at the precision of their dtype, whatever the user's program has switched on around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Without autocast inside, and afterwards as it was, its cache of cast weights included.

    ``torch.autocast(device_type, enabled=False)`` would clear that cache on leaving, if the user has switched
    autocast on by a function and not by a context: weights would be cast anew, and gradients differ.

    Args:
        device_type: of the tensors to compute with.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), no_autocast("cpu"):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        yield
        return
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, True)


@contextlib.contextmanager
def full_precision(device_type: str, float32: bool = True) -> Iterator[None]:
    """Products inside keep their dtype's precision under autocast, TF32 and bfloat16 matmul settings.

    Args:
        device_type: of the tensors to multiply.
        float32: whether there will be float32 products; float64 ones know no such settings.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_autocast(device_type))
        if float32:
            _forbid_reduced_precision(device_type, stack)
        yield


def _forbid_reduced_precision(device_type: str, stack: contextlib.ExitStack) -> None:
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    settings: Any = getattr(backend, "matmul", None)
    if not hasattr(settings, "fp32_precision"):  # before torch 2.9
        legacy = torch.get_float32_matmul_precision()
        if legacy != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, legacy)
        return
    # The setting of this backend alone: PyTorch refuses to read the common one once both kinds have been used.
    everywhere: Any = torch.backends
    precision = settings.fp32_precision
    if precision not in ("none", "ieee"):
        inherited = precision == everywhere.fp32_precision
        settings.fp32_precision = "ieee"
        stack.callback(setattr, settings, "fp32_precision", "none" if inherited else precision)
