"""The origin of sums follows the data: it moves to the mean of new rows, and the sums move with it, exactly.

The sums are exact about any origin, so that it need not be the mean to the last digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.sums import compiled
from spectralmetrics.sums.about_origin import AboutOrigin, DenseSums
from spectralmetrics.sums.arithmetic import as_rows, block_rows, clear, row_flags, workspace

_BLOCK = 256  # features of the sums that are moved at once


def recentre(moments: DenseSums, piece: Tensor, dim: int, valid: Tensor | None, dtype: torch.dtype) -> None:
    """Move the origin, and the sums with it, to the mean of rows, unless these are too few.

    Args:
        moments: the sums so far.
        piece: shape (N, D) with the features in dimension -1, or (D, b, p) with them in dimension 0.
        dim: the dimension of the features.
        valid: shape (N,), boolean; None if all rows count.
        dtype: the dtype to compute the mean in.
    """
    rounded = piece.dtype != torch.float64
    rows = as_rows(workspace(piece, "rows", piece.shape, dtype).copy_(piece), dim)
    if is_read_freely(rows) and valid is None:
        # Finite rows take half of the passes.
        pivot = rows[0].to(torch.float64, copy=True)
        total = rows.new_ones(len(rows)) @ rows.sub_(pivot.to(dtype))
        if total.isfinite().all():
            kept = torch.full((), len(rows), device="cpu")
            _move(moments, next_origin(moments, pivot, total, kept, rounded=rounded))
            return
        rows = as_rows(workspace(piece, "rows", piece.shape, dtype).copy_(piece), dim)
    mask = row_flags(rows)
    mask = mask if valid is None else mask & valid.unsqueeze(1)
    pivot = rows.index_select(0, first_of(mask[:, 0]))[0].to(torch.float64)
    rows.sub_(pivot.to(dtype))
    clear(rows, mask)
    _move(moments, next_origin(moments, pivot, rows.sum(0), mask.sum(), rounded=rounded))


def recentre_in_memory(moments: DenseSums, maps: Tensor, valid: Tensor | None, rounded: bool) -> None:
    """Like :func:`recentre`, in one compiled pass over any number of rows.

    Args:
        moments: the sums so far.
        maps: shape (samples, D, positions), float32 or float64, in any memory layout.
        valid: shape (samples * positions,), boolean; None if all count.
        rounded: True if the rows came in float32 or half precision.
    """
    row = 0 if valid is None else int(first_of(valid))
    pivot = _observation(maps, row)
    if not pivot.isfinite().all():
        flags = maps.isfinite().all(1).flatten()
        pivot = _observation(maps, int(first_of(flags if valid is None else flags & valid.cpu())))
    pivot = pivot.to(torch.float64)
    counts, totals = compiled.measure(maps, valid, pivot)
    _move(moments, next_origin(moments, pivot, totals[0], counts[0], rounded=rounded))


def next_origin(
    sums: AboutOrigin, pivot: Tensor, total: Tensor, kept: Tensor, *, rounded: bool = False
) -> Tensor:
    """The next origin: the mean of the rows, or the present origin if the rows are too few.

    Args:
        sums: the sums so far.
        pivot: one of the rows, so that constant features are centred to exactly zero; shape (D,), float64.
        total: the sum of the rows minus ``pivot``, shape (D,).
        kept: the number of rows, shape ().
        rounded: True rounds the origin to float32, so that float32 rows minus the origin is one subtraction.
    """
    about_pivot = total.to(torch.float64) / kept.clamp(min=1)
    origin = pivot + torch.where(about_pivot.isfinite(), about_pivot, 0)
    if rounded:
        nearest = origin.to(torch.float32).to(torch.float64)
        origin = torch.where(nearest.isfinite(), nearest, origin)
    # A few rows that are unlike the rest, such as a last incomplete batch, must not move the origin far.
    return torch.where((kept > 0) & (kept.square() >= sums.count), origin, sums.origin)


def _move(moments: DenseSums, origin: Tensor) -> None:
    """Move sums to another origin, in place."""
    # Without observations the sums are zero and the origin has no meaning: a shift must leave them zero.
    shift = torch.where(moments.count > 0, moments.origin - origin, 0)
    if not is_read_freely(shift) or shift.any():
        left, right, first = moments.moved_by(shift)
        for start, stop in block_rows(shift, _BLOCK):
            moments.second[start:stop, start:].addmm_(left[start:stop], right[:, start:])
        moments.first.copy_(first)
    moments.origin.copy_(origin)


def _observation(maps: Tensor, number: int) -> Tensor:
    sample, position = divmod(number, maps.shape[2])
    return maps[sample, :, position]


def first_of(flags: Tensor) -> Tensor:
    """The index of the first set flag, or 0 if none is set, shape (1,); reads nothing from a device."""
    return flags.to(torch.uint8).argmax().reshape(1)


def is_read_freely(values: Tensor) -> bool:
    """True if the program may branch on values, because reading them waits for no device."""
    return values.is_cpu
