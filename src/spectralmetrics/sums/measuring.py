"""Measure each feature of a batch on its own, in one pass.

On the CPU, compiled code does this where the install has compiled it, see
:mod:`~spectralmetrics.sums.compiled`; on GPUs, fused kernels do, see :mod:`~spectralmetrics.sums.fused`.
PyTorch does it here in more passes everywhere else. Nothing is read from a device. Observations that hold NaN
or an infinity are counted and left out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums import compiled, fused
from spectralmetrics.sums.arithmetic import has_float64, no_autocast
from spectralmetrics.sums.observations import Observations, as_maps

# Memory for one piece of the rows where PyTorch does the work; on a CPU it stays in the cache.
_CPU_PIECE_BYTES = 2**20
_ACCELERATOR_PIECE_BYTES = 2**27
_LAST = threading.local()


class Measured(NamedTuple):
    """The marginals of one batch.

    Attributes:
        counts: numbers of observations counted and left out, shape (2,), int64.
        totals: see :class:`Marginals`; about ``origin``.
        largest: shape (D,), float64.
        origin: shape (D,), float64.
    """

    counts: Tensor
    totals: Tensor
    largest: Tensor
    origin: Tensor


def measure(observations: Observations, origin: Tensor) -> Measured:
    """The marginals of a batch about an origin, on its device; kept until this thread measures another batch.

    >>> measure(Observations(torch.tensor([[1.0], [-2.0]])), torch.zeros(1, dtype=torch.float64)).totals[:, 0]
    tensor([-1.,  5.,  3.,  2.], dtype=torch.float64)
    """
    values, valid = observations.values.detach(), observations.valid
    dim = observations.feature_dim % values.ndim
    if valid is None and values.dtype in _NATIVE and origin.is_cpu and compiled.reads(values):  # the short way
        counts, totals = compiled.measure(as_maps(values, dim), None, origin)
        result = Measured(counts, totals[:4], totals[4], origin)
        _LAST.measured = weakref.ref(observations), result
        return result
    if valid is not None or values.ndim == 1:  # flags are in the order of rows with the features last
        values, dim = observations.rows().detach(), 1
    with torch.inference_mode(False), torch.no_grad(), no_autocast(values.device.type):
        if fused.takes(values) and origin.device == values.device:
            parts = [fused.measure(as_maps(values, dim), valid, origin)]
        elif compiled.reads(values):
            parts = list(_measure_compiled(values, dim, valid, origin))
        else:
            parts = list(_measure_by_torch(values, dim, valid, origin))
        result = _added(parts, origin)
    _LAST.measured = weakref.ref(observations), result
    return result


def measured_last(observations: Observations) -> Measured | None:
    """The last measurement of this thread, if it was of these observations; None otherwise."""
    reference, measured = getattr(_LAST, "measured", (None, None))
    return measured if reference is not None and reference() is observations else None


def _added(parts: list[tuple[Tensor, Tensor]], origin: Tensor) -> Measured:
    """The marginals of all pieces together; see :func:`.compiled.measure` for those of each."""
    pieces = []
    for number, five in parts:
        sums = five.to(origin.device).to(torch.float64)
        pieces.append((number.to(origin.device), sums[:4], sums[4]))
    if len(pieces) == 1:
        return Measured(*pieces[0], origin)
    counts, totals, largest = (torch.stack(each) for each in zip(*pieces, strict=True))
    return Measured(counts.sum(0), totals.sum(0), largest.amax(0), origin)


_NATIVE = (torch.float32, torch.float64)


def _measure_compiled(
    values: Tensor, dim: int, valid: Tensor | None, origin: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    for piece, chosen in _pieces(values, dim, valid, None if values.dtype in _NATIVE else _CPU_PIECE_BYTES):
        piece = piece if piece.dtype in _NATIVE else piece.to(torch.float32)
        yield compiled.measure(as_maps(piece, dim), chosen, origin)


def _measure_by_torch(
    values: Tensor, dim: int, valid: Tensor | None, origin: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    device = values.device
    dtype = torch.float64 if has_float64(device) else torch.float32
    over = [each for each in range(values.ndim) if each != dim]
    origin = origin.to(dtype).to(device).view([-1 if each == dim else 1 for each in range(values.ndim)])
    room = _CPU_PIECE_BYTES if device.type == "cpu" else _ACCELERATOR_PIECE_BYTES
    for piece, chosen in _pieces(values, dim, valid, room):
        # float64 holds half precision exactly, and the difference of float32 values from an origin.
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
        sums = [centred.sum(over), centred.square().sum(over), magnitudes.sum(over)]
        largest = magnitudes.amax(over)
        sums += [magnitudes.sign_().sum(over), largest]
        yield torch.stack([number, offered - number]), torch.stack(sums)


def _pieces(
    values: Tensor, dim: int, valid: Tensor | None, room: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut values along their first dimension to fit memory; yield each piece with its part of ``valid``."""
    length = values.shape[0]
    size = length if room is None or dim == 0 else max(room * length // max(8 * values.numel(), 1), 1)
    for start in range(0, length, size):
        yield values[start : start + size], None if valid is None else valid[start : start + size]
