"""One pass over a batch that says what each feature does by itself.

On the CPU this is compiled where it could be, see :mod:`~spectralmetrics.sums.compiled`, and on GPUs fused, see
:mod:`~spectralmetrics.sums.fused`; the same is done here in PyTorch everywhere else, in more passes. Nothing is
read from a device. Observations that hold NaN or an infinity are counted and left out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums import compiled, fused
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.precision import has_float64, no_autocast

# Memory for one piece of the rows where PyTorch does the work; on a CPU it stays in the cache.
_CPU_PIECE_BYTES = 2**20
_ACCELERATOR_PIECE_BYTES = 2**27
_LAST = threading.local()


class Measured(NamedTuple):
    """The marginals of one batch.

    Attributes:
        counts: observations that count and those left out, shape (2,), int64.
        totals: see :class:`Marginals`; about the origin that they were measured about.
        largest: shape (D,), float64.
        origin: shape (D,), float64.
    """

    counts: Tensor
    totals: Tensor
    largest: Tensor
    origin: Tensor


def measure(observations: Observations, origin: Tensor) -> Measured:
    """The marginals of a batch about an origin, where the origin is; kept until this thread measures another.

    >>> measure(Observations(torch.tensor([[1.0], [-2.0]])), torch.zeros(1, dtype=torch.float64)).totals[:, 0]
    tensor([-1.,  5.,  3.,  2.], dtype=torch.float64)
    """
    values, valid = observations.values.detach(), observations.valid
    dim = observations.feature_dim % values.ndim
    if valid is None and values.dtype in _NATIVE and origin.is_cpu and compiled.reads(values):  # in few steps
        counts, totals = compiled.measure(_as_maps(values, dim), None, origin)
        result = Measured(counts, totals[:4], totals[4], origin)
        _LAST.found = weakref.ref(observations), result
        return result
    if valid is not None or values.ndim == 1:  # its rows are enumerated with the features last
        values, dim = observations.rows().detach(), 1
    with torch.inference_mode(False), torch.no_grad(), no_autocast(values.device.type):
        parts = _measure_compiled if compiled.reads(values) else _measure_by_torch
        if fused.takes(values) and origin.device == values.device:
            parts = _measure_fused
        found = [_brought(part, origin) for part in parts(values, dim, valid, origin)]
        result = found[0] if len(found) == 1 else _sum_of(found)
    _LAST.found = weakref.ref(observations), result
    return result


def measured_last(observations: Observations) -> Measured | None:
    """The last measurement of this thread, if it was of these observations; None otherwise."""
    of, found = getattr(_LAST, "found", (None, None))
    return found if of is not None and of() is observations else None


def _brought(part: tuple[Tensor, Tensor, Tensor], origin: Tensor) -> Measured:
    counts, *sums = (each.to(origin.device) for each in part)
    totals, largest = (each.to(torch.float64) for each in sums)
    return Measured(counts, totals, largest, origin)


def _sum_of(found: list[Measured]) -> Measured:
    counts, totals, largest = (torch.stack(parts) for parts in list(zip(*found, strict=True))[:3])
    return Measured(counts.sum(0), totals.sum(0), largest.amax(0), found[0].origin)


_NATIVE = (torch.float32, torch.float64)


def _measure_compiled(
    values: Tensor, dim: int, valid: Tensor | None, origin: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for piece, chosen in _pieces(values, dim, valid, None if values.dtype in _NATIVE else _CPU_PIECE_BYTES):
        piece = piece if piece.dtype in _NATIVE else piece.to(torch.float32)
        counts, totals = compiled.measure(_as_maps(piece, dim), chosen, origin)
        yield counts, totals[:4], totals[4]


def _as_maps(values: Tensor, dim: int) -> Tensor:
    """Values as (samples, features, positions), in the same memory where the layout allows it."""
    if values.ndim == 2:
        rows, columns = values.stride()
        if dim:  # (N, D) -> (1, D, N)
            return values.as_strided((1, values.shape[1], values.shape[0]), (0, columns, rows))
        return values[None]  # (D, N) -> (1, D, N)
    if dim == values.ndim - 1:  # (..., D) -> (1, D, N)
        return values.reshape(-1, values.shape[-1]).t()[None]
    return values.movedim(dim, 1).flatten(2)  # (N, ..., D, ...) -> (N, D, positions)


def _measure_fused(
    values: Tensor, dim: int, valid: Tensor | None, origin: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    counts, totals = fused.measure(fused.as_maps(values, dim), valid, origin)
    yield counts, totals[:4], totals[4]


def _measure_by_torch(
    values: Tensor, dim: int, valid: Tensor | None, origin: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    device = values.device
    dtype = torch.float64 if has_float64(device) else torch.float32
    over = [each for each in range(values.ndim) if each != dim]
    origin = origin.to(dtype).to(device).view([-1 if each == dim else 1 for each in range(values.ndim)])
    room = _CPU_PIECE_BYTES if device.type == "cpu" else _ACCELERATOR_PIECE_BYTES
    for piece, chosen in _pieces(values, dim, valid, room):
        # In float64, where half precision is exact, and so is what float32 differs from an origin.
        wide = piece.to(dtype)
        magnitudes = wide.abs()
        kept = magnitudes.amax(dim, keepdim=True) <= torch.finfo(dtype).max
        offered: Tensor | int = kept.numel()
        if chosen is not None:
            kept, offered = kept & chosen[:, None], chosen.sum()
        number = kept.sum()
        centred = wide - origin
        if device.type != "cpu" or int(number) < kept.numel():
            magnitudes, centred = torch.where(kept, magnitudes, 0), torch.where(kept, centred, 0)
        totals = [centred.sum(over), centred.square().sum(over), magnitudes.sum(over)]
        largest = magnitudes.amax(over)
        totals.append(magnitudes.sign_().sum(over))
        yield torch.stack([number, offered - number]), torch.stack(totals), largest


def _pieces(
    values: Tensor, dim: int, valid: Tensor | None, room: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Values cut along their first dimension, as far as memory allows, and which of their rows are valid."""
    length = values.shape[0]
    size = length if room is None or dim == 0 else max(room * length // max(8 * values.numel(), 1), 1)
    for start in range(0, length, size):
        yield values[start : start + size], None if valid is None else valid[start : start + size]
