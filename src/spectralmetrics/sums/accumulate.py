"""Add rows to dense moments: centre, check, mask and multiply them in a bounded workspace.

On the CPU, compiled code does this where the install has compiled it, see
:mod:`~spectralmetrics.sums.compiled`; PyTorch does the same here everywhere else. Nothing here reads from an
accelerator: no branch and no shape depends on a value there. Rows that hold NaN or an infinity are counted and
left out. Finite rows that overflow when centred or squared make the sums infinite; reading the sums reports it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectralmetrics.sums import about_origin, compiled
from spectralmetrics.sums.about_origin import DenseSums, first_of, move, next_origin
from spectralmetrics.sums.arithmetic import (
    ROWS_PER_FLOAT32_SUM,
    as_rows,
    block_rows,
    clear,
    full_precision,
    power_of_two_scale,
    row_flags,
    workspace,
)
from spectralmetrics.sums.checks import check_type
from spectralmetrics.sums.observations import Observations

# Memory that one pass may use for centred rows. On a CPU it is small enough to stay in the cache between
# centring and product; on an accelerator, fewer and larger products are faster.
_CPU_WORKSPACE_BYTES = 2**22
_ACCELERATOR_WORKSPACE_BYTES = 2**26
# With fewer rows the pass over the D x D sum takes longer than the arithmetic. With more, rows leave the cache.
_MINIMUM_ROWS_PER_PRODUCT = 1024
# Float32 products of rows whose largest magnitude lies between these lose no digits to the range of float32.
_LEAST, _MOST = 1.0, 2.0**50
_USUAL = 2**20  # where scaling puts deviations as large as those before: somewhat nearer the lower end
# Rows of memory at a distance of a power of two from one another would fall into the same lines of the cache.
_PADDING = 16
_NATIVE = (torch.float32, torch.float64)  # dtypes that the compiled sums read as they are


def accumulate(
    moments: DenseSums,
    observations: Observations,
    gram_dtype: torch.dtype = torch.float64,
    *,
    recentre: bool = True,
) -> None:
    r"""Add observations to ``moments``, in place.

    Rows are centred on the origin, masked, and multiplied in blocks that fit a bounded workspace; no copy
    of all observations is made. On the CPU, compiled code does this where the install has compiled it, see
    :mod:`spectralmetrics.sums.compiled`; PyTorch does the same everywhere else.

    Args:
        moments: the sums so far.
        observations: floating observations of the same width, on the same device.
        gram_dtype: dtype of the products. ``torch.float64``, or ``torch.float32`` for speed: then the centred
            rows are scaled by a power of two to the middle of the range of float32 and each block's product
            is added to the float64 sum.
            A float32 sum has at most 256 products, and the sums of one block are added in float32, so that the
            error of a sum stays below 1e-5 of the size of its summands, as long as no feature is more than 1e18
            times smaller than another and no deviation from the origin exceeds 3e38.
        recentre: True first moves the origin to the mean of these rows, which re-bases the sums exactly, unless
            they are fewer than the root of the number of rows before them. False saves that pass: use it if the
            origin lies near the data and rows of this dtype have set it.

    Raises:
        TypeError: for observations that are not floating.
        ValueError: for observations of another width, a ``valid`` of another length, or another ``gram_dtype``.

    >>> from spectralmetrics.sums import covariance, empty_moments
    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1e9], [1e9 + 2]], dtype=torch.float64)))
    >>> covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    """
    check_type("observations", observations, Observations)
    if gram_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"expected gram_dtype torch.float64 or torch.float32, got {gram_dtype!r}")
    observations.check()
    values, valid = observations.values.detach(), observations.valid
    features = moments.second.shape[-1]
    if observations.num_features != features:
        raise ValueError(
            f"expected observations with {features} features, got {observations.num_features}"
            f" (shape {tuple(values.shape)}, feature_dim {observations.feature_dim})"
        )
    if values.numel() == 0:
        return
    fast = gram_dtype == torch.float32
    # Half precision is exact in float32, and float64 rows keep their digits until they are centred.
    dtype = torch.float32 if fast and values.dtype != torch.float64 else torch.float64
    budget = _CPU_WORKSPACE_BYTES if values.device.type == "cpu" else _ACCELERATOR_WORKSPACE_BYTES
    fewest = _MINIMUM_ROWS_PER_PRODUCT if features <= 1024 else 2 * _MINIMUM_ROWS_PER_PRODUCT
    limit = max(budget // (features * gram_dtype.itemsize), fewest)
    if valid is not None:  # its flags are in the order of rows with the features last
        values = observations.rows()
    is_compiled = compiled.takes(moments, values, gram_dtype)
    if is_compiled and values.dtype in _NATIVE:
        limit = values.numel()  # the compiled code cuts rows into pieces
    # State tensors are not inference tensors, so they can be updated inside and outside of inference mode.
    with torch.inference_mode(False), torch.no_grad(), full_precision(values.device.type, fast):
        feature_dim = observations.feature_dim if valid is None else -1
        for piece, dim, start in _blocks(values, feature_dim, limit):
            chosen = None if valid is None else valid[start : start + piece.shape[0]]
            if is_compiled:
                _add_compiled(moments, piece, dim, chosen, gram_dtype, recentre)
                continue
            if recentre:
                about_origin.recentre(moments, piece, dim, chosen, dtype)
            if chosen is not None or not _add_if_finite(moments, piece, dim, dtype, gram_dtype, recentre):
                centred, finite = _centre(moments, piece, dim, dtype, exactly=recentre)
                _add_centred(moments, centred, _count(moments, finite, chosen), fast)


def _blocks(values: Tensor, feature_dim: int, limit: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut observations into equal pieces of about ``limit`` rows, without copying where the layout allows it.

    Yields each piece with the dimension of its features, which is the first or the last, and the index of its
    first row among all rows (meaningful if the features come last).
    """
    features = values.shape[feature_dim]
    moved = values.movedim(feature_dim, -1)
    if moved.is_contiguous() or moved.ndim == 2:
        start = 0
        rows = moved.reshape(-1, features)
        for piece in torch.split(rows, _evenly(len(rows), limit)):
            yield piece, -1, start
            start += len(piece)
        return
    # (B, D, *positions) -> (D, b, p) for b samples at a time, so that runs of positions stay contiguous
    maps = values.movedim(feature_dim, 1).flatten(2)
    positions = max(maps.shape[2], 1)
    for samples in torch.split(maps, _evenly(len(maps), limit / positions)):
        for piece in torch.split(samples, _evenly(positions, limit), dim=2):
            yield piece.transpose(0, 1), 0, 0


def _evenly(number: int, limit: float) -> int:
    """The size of equal parts of about a limit; a small last part would cost as many passes as a full one."""
    return -(-number // max(round(number / limit), 1))


def _add_compiled(
    moments: DenseSums, piece: Tensor, dim: int, valid: Tensor | None, gram_dtype: torch.dtype, recentre: bool
) -> None:
    rounded = piece.dtype != torch.float64
    if piece.dtype not in _NATIVE:
        piece = workspace(piece, "rows", piece.shape, torch.float32).copy_(piece)
    maps = piece.t().unsqueeze(0) if dim == -1 else piece.transpose(0, 1)
    if recentre:
        _recentre_in_memory(moments, maps, valid, rounded)
    compiled.add(moments, maps, valid, gram_dtype)


def _recentre_in_memory(moments: DenseSums, maps: Tensor, valid: Tensor | None, rounded: bool) -> None:
    """Like :func:`.recentre`, in one compiled pass over any number of rows.

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
    move(moments, next_origin(moments, pivot, totals[0], counts[0], rounded=rounded))


def _observation(maps: Tensor, number: int) -> Tensor:
    sample, position = divmod(number, maps.shape[2])
    return maps[sample, :, position]


def _add_if_finite(
    moments: DenseSums, piece: Tensor, dim: int, dtype: torch.dtype, gram_dtype: torch.dtype, exactly: bool
) -> bool:
    """Add rows in half of the passes if all are finite; False if some may not be, or not on a CPU."""
    if not about_origin.is_read_freely(piece) or dtype != gram_dtype:
        return False
    origin = moments.origin.to(dtype)
    if exactly and not torch.equal(origin.to(torch.float64), moments.origin):
        return False  # one subtraction in this dtype would round the origin
    work = _memory(piece, dim, dtype)
    scale = _usual_scale(moments) if dtype == torch.float32 else 1.0
    shift = origin * -scale if dim == -1 else (origin * -scale)[:, None, None]
    # scale · (x − o): a power of two adds no rounding error to the difference.
    torch.add(shift, piece if piece.dtype == dtype else work.copy_(piece), alpha=scale, out=work)
    rows = as_rows(work, dim)
    number, features = rows.shape
    if dtype == torch.float64:
        first = rows.new_ones(number) @ rows
        if not first.isfinite().all():  # a row is not finite, or finite rows overflow
            return False
        _multiply_in_float64(moments, rows)
    else:
        norms = torch.linalg.vector_norm(rows if dim == -1 else rows.t(), dim=-1)  # faster than the largest
        largest, summands = float(norms.amax()), features if dim == -1 else number
        if not _LEAST * math.sqrt(summands) <= largest <= _MOST:
            return False  # a row is not finite, or the rows are much smaller or larger than those before
        first = _multiply_in_float32(moments, rows, scale)
    moments.first.add_(first)
    moments.count.add_(number)
    return True


def _memory(piece: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Memory for rows in the layout of a piece, which the next piece reuses."""
    if dim == -1:
        return workspace(piece, "rows", piece.shape, dtype)
    features, *positions = piece.shape
    number = math.prod(positions)
    padded = workspace(piece, "rows", (features, number + _PADDING), dtype)
    return padded[:, :number].view(features, *positions)


def _usual_scale(moments: DenseSums) -> float:
    """A power of two that brings deviations as large as those before near :data:`_USUAL`."""
    largest = float(moments.second.diagonal().amax())
    if not 0 < largest < math.inf:
        return float(_USUAL)
    exponent = math.frexp(math.sqrt(largest / float(moments.count)))[1]
    return math.ldexp(_USUAL, min(max(-exponent, -100), 100))


def _centre(
    moments: DenseSums, piece: Tensor, dim: int, dtype: torch.dtype, exactly: bool
) -> tuple[Tensor, Tensor]:
    """Rows minus the origin, (n, D), in memory that the next piece reuses, and flags of finite rows, (n, 1).

    Rows are checked before they are centred: a row that overflows in centring held no NaN.
    """
    work = _memory(piece, dim, dtype)
    origin = moments.origin.to(dtype)
    broadcast = origin if dim == -1 else origin[:, None, None]
    if piece.dtype == dtype and dim == -1:
        mask = row_flags(piece)
        torch.sub(piece, broadcast, out=work)
    else:
        mask = row_flags(as_rows(work.copy_(piece), dim))
        work.sub_(broadcast)
    centred = as_rows(work, dim)
    if exactly and dtype == torch.float32:
        # Subtract the digits that rounding the origin has lost: none, if rows of this dtype have set it.
        centred.sub_((moments.origin - origin.to(torch.float64)).to(dtype))
    return centred, mask


def _count(moments: DenseSums, finite: Tensor, valid: Tensor | None) -> Tensor:
    """Count rows; return flags of the rows to keep, shape (N, 1)."""
    mask = finite if valid is None else finite & valid.unsqueeze(1)
    kept = mask.sum()
    moments.count.add_(kept)
    moments.non_finite.add_((mask.shape[0] if valid is None else valid.sum()) - kept)
    return mask


def _add_centred(moments: DenseSums, centred: Tensor, mask: Tensor, fast: bool) -> None:
    clear(centred, mask)
    if fast:
        # aminmax would copy a transposed view, row by row.
        scale = power_of_two_scale(torch.maximum(-centred.amin(), centred.amax()))
        # Float64 rows keep their digits until they are centred and scaled.
        scaled = centred.mul_(scale.to(centred.dtype)).to(torch.float32)
        moments.first.add_(_multiply_in_float32(moments, scaled, scale))
    else:
        _multiply_in_float64(moments, centred)
        moments.first.add_(centred.sum(0))


def _multiply_in_float64(moments: DenseSums, centred: Tensor) -> None:
    # With AVX-512, MKL takes a third longer for wide rows in blocks below 192; with AVX2, as long.
    width = centred.shape[1]
    for start, stop in block_rows(centred, 64 if width <= 512 else 128 if width < 1024 else 192):
        moments.second[start:stop, start:].addmm_(centred[:, start:stop].t(), centred[:, start:])


def _multiply_in_float32(moments: DenseSums, scaled: Tensor, scale: Tensor | float) -> Tensor:
    """Add the products of rows that were scaled by a power of two; return the sum of the rows before."""
    weight = 1 / (scale * scale)
    total, features = scaled.shape
    size = _rows_of_a_sum(total)
    number = total // size
    pieces, rest = scaled[: number * size].view(number, size, features), scaled[number * size :]
    for start, stop in block_rows(scaled, 64 if features <= 256 else 128 if features < 2048 else 256):
        # Add the product while the cache holds it; a product of all features would not fit.
        left, right = pieces[..., start:stop].mT, pieces[..., start:]  # (n, b, size), (n, size, w)
        shape = (number, left.shape[1], right.shape[2])
        product = torch.bmm(left, right, out=workspace(left, "product", shape, torch.float32)).sum(0)
        if len(rest):
            product.addmm_(rest[:, start:stop].t(), rest[:, start:])
        moments.second[start:stop, start:].add_(product.to(torch.float64).mul_(weight))
    ones = scaled.new_ones(size)
    first = (ones @ pieces).sum(0, dtype=torch.float64)  # torch.sum takes four times as long
    if len(rest):
        first += ones[: len(rest)] @ rest
    return first.div_(scale)


@functools.lru_cache
def _rows_of_a_sum(number: int) -> int:
    """The rows of one float32 sum: as many as allowed, or half as many or more if these leave no rest."""
    sizes = range(ROWS_PER_FLOAT32_SUM, ROWS_PER_FLOAT32_SUM // 2, -1)
    return next((size for size in sizes if number % size == 0), ROWS_PER_FLOAT32_SUM)
