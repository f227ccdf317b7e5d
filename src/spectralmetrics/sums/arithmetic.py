"""Arithmetic on rows: products at the precision of their dtype, flags of finite rows, memory that is reused.

Products keep their precision whatever settings the user's program has switched on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS_PER_FLOAT32_SUM = 256
"""A float32 sum of products of like sign drifts in proportion to their number: by 2.4e-3 for 131,072."""

# The most memory that a thread keeps for one role.
_KEPT_WORKSPACE_BYTES = 2**26
_KEPT = threading.local()


@contextlib.contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Switch autocast off inside; restore it afterwards and keep its cache of cast weights.

    ``torch.autocast(device_type, enabled=False)`` would clear the cache on leaving, if the user has switched
    autocast on by a function and not by a context: weights would be cast again, and gradients would differ.

    Args:
        device_type: device type of the tensors to compute with.

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
    """Keep the precision of their dtype for products inside, under autocast, TF32 and bfloat16 matmul settings.

    Args:
        device_type: device type of the tensors to multiply.
        float32: True if there are float32 products; only autocast changes float64 products.

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
    # Set this backend alone: PyTorch refuses to read the common setting once both kinds have been used.
    everywhere: Any = torch.backends
    precision = settings.fp32_precision
    if precision not in ("none", "ieee"):
        inherited = precision == everywhere.fp32_precision
        settings.fp32_precision = "ieee"
        stack.callback(setattr, settings, "fp32_precision", "none" if inherited else precision)


def power_of_two_scale(largest: Tensor) -> Tensor:
    """A float64 power of two that brings rows of this largest magnitude near one; 1 if they are all zero."""
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    if largest.dtype == torch.float32:
        exponent = exponent.clamp(min=-120, max=120)  # the scale itself must be a float32
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), -exponent)


def power_of_two_below(largest: Tensor) -> Tensor:
    """The largest power of two that is not above a float64 value; 1 for zero. Dividing by it rounds nothing.

    >>> power_of_two_below(torch.tensor([6.0, 0.0], dtype=torch.float64))
    tensor([4., 1.], dtype=torch.float64)
    """
    positive = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)
    return positive / (2 * torch.frexp(positive).mantissa)


def are_finite(values: Tensor) -> Tensor:
    """Flags of rows (..., D) without NaN and infinities, shape (..., 1); two kernels, and no copy.

    >>> are_finite(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [-torch.inf, 0.0]])).flatten()
    tensor([ True, False, False])
    """
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)  # PyTorch has no norm of eight bits
    # The largest magnitude of a row is NaN or infinite if one of its values is.
    largest: Tensor = torch.linalg.vector_norm(values, torch.inf, dim=-1, keepdim=True)
    return largest <= torch.finfo(values.dtype).max


def flags_of_counted(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Flags of the rows that count, shape (N,): finite rows (N, D), and not marked False in ``valid``, (N,)."""
    finite = are_finite(rows)[:, 0]
    return finite if valid is None else finite & valid


def row_flags(rows: Tensor) -> Tensor:
    """Flags of rows (N, D) without NaN and infinities, shape (N, 1)."""
    # NaN and infinities make the sum of the row not finite. Small summands ensure that nothing else does.
    small = torch.full_like(rows[0], 2.0 ** -(rows.shape[1].bit_length() + 1))
    return torch.mv(rows, small).isfinite().unsqueeze(1)


def clear(centred: Tensor, mask: Tensor) -> None:
    """Set the rows to leave out to zero, whatever they hold."""
    # Mask bits, in one vectorised pass: a product would leave NaN, and a masked fill is several times slower.
    bits = torch.int64 if centred.dtype == torch.float64 else torch.int32
    centred.view(bits).bitwise_and_(mask.to(bits).neg_())


def as_rows(piece: Tensor, dim: int) -> Tensor:
    """A view of shape (n, D) of rows, or of contiguous memory of shape (D, b, p) with features first."""
    return piece if dim == -1 else piece.flatten(1).t()


def block_rows(like: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """The upper triangle of a product as block rows ``[start:stop, start:]``: half the work.

    Args:
        like: shape (..., D), on the device of the product.
        size: number of rows of a block on the CPU.
    """
    features = like.shape[-1]
    if not like.is_cpu:
        size = max(128, min(256, features // 4))  # fewer, larger products
    for start in range(0, features, size):
        yield start, min(start + size, features)


def workspace(like: Tensor, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of any content; on a CPU it is reused for the same role, since fresh pages are slow there."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size * dtype.itemsize > _KEPT_WORKSPACE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)
    name = f"{role}, {dtype}"
    kept: Tensor | None = getattr(_KEPT, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype, device="cpu")
        setattr(_KEPT, name, kept)
    return kept[:size].view(tuple(shape))


@functools.cache
def has_float64(device: torch.device) -> bool:
    """True if a device computes in float64; MPS does not.

    >>> has_float64(torch.device("cpu"))
    True
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


# P100, V100, A100, H100 and B200 by compute capability; MI200, MI300 and MI350 by architecture.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_FAST_FLOAT64_BY_AMD = {"gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"}


@functools.cache
def has_fast_float64(device: torch.device) -> bool:
    """True if an accelerator multiplies float64 at half the speed of float32 or faster.

    >>> has_fast_float64(torch.device("meta"))
    False
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) in _FAST_FLOAT64
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] in _FAST_FLOAT64_BY_AMD
