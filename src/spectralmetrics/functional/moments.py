r"""Streaming first and second moments of feature vectors: accumulate, re-base, merge, read.

Observations :math:`x_i \in \mathbb{R}^D` are summed about an origin :math:`o` near the data,

.. math:: s = \sum_i (x_i - o), \qquad S = \sum_i (x_i - o)(x_i - o)^\top,

so that the covariance :math:`\Sigma = S/n - (s/n)(s/n)^\top` does not depend on the difference of two
large numbers, as it does for sums of :math:`x x^\top` once the mean outweighs the spread. Sums about
two origins :math:`o` and :math:`o'` are added exactly by moving one of them: with :math:`d = o' - o`,

.. math:: \sum_i (x_i - o)(x_i - o)^\top = S' + s' d^\top + d s'^\top + n' d d^\top, \qquad
          \sum_i (x_i - o) = s' + n' d.

Everything here runs on the device of the data without reading from it: no branch and no shape depends
on a value. Rows that hold NaN or an infinity are counted and left out.

>>> import torch
>>> moments = empty_moments(2)
>>> accumulate(moments, Observations(torch.tensor([[1.0, 2.0], [3.0, 2.0], [float("nan"), 0.0]])))
>>> covariance(moments)
tensor([[1., 0.],
        [0., 0.]], dtype=torch.float64)
>>> int(moments.count), int(moments.non_finite)
(2, 1)
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.functional import compiled

# Memory that one pass may use for centred rows. On a CPU it is small enough to stay in the cache between
# centring and product; an accelerator wants fewer, larger products.
_CPU_WORKSPACE_BYTES = 2**21
_ACCELERATOR_WORKSPACE_BYTES = 2**26
# Products of fewer rows than this are bound by the pass over the D x D sum and not by arithmetic.
_MINIMUM_ROWS_PER_PRODUCT = 2048
# Memory of a thread for one role, kept between updates.
_KEPT_WORKSPACE_BYTES = 2**26
_KEPT = threading.local()


@dataclass(frozen=True)
class Moments:
    r"""Sums over observations about an origin; the tensors are updated in place by :func:`accumulate`.

    Attributes:
        count: number of finite observations :math:`n`, shape ``()``, int64.
        non_finite: number of observations left out for a NaN or an infinity, shape ``()``, int64.
        origin: :math:`o`, shape ``(D,)``, float64.
        first: :math:`s = \sum_i (x_i - o)`, shape ``(D,)``, float64.
        second: :math:`S = \sum_i (x_i - o)(x_i - o)^\top`, shape ``(D, D)``, float64. Only its upper triangle
            is meaningful: half the arithmetic is saved by leaving the lower one alone.
    """

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first: Tensor
    second: Tensor

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.second.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Moments:
        """The moments with a function applied to each tensor, such as a move to another device."""
        return Moments(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Observations:
    """Observations in the memory layout in which a layer produced them.

    Attributes:
        values: floating tensor; every dimension but ``feature_dim`` enumerates observations.
        feature_dim: the dimension of size D that holds the features of one observation.
        valid: shape (N,), boolean, False for rows to pass over, such as padding; None if all count.

    >>> Observations(torch.zeros(8, 3, 4, 4), feature_dim=1).rows().shape
    torch.Size([128, 3])
    """

    values: Tensor
    feature_dim: int = -1
    valid: Tensor | None = None

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.values.shape[self.feature_dim]

    @property
    def num_observations(self) -> int:
        """The number of observations N, those passed over included."""
        return self.values.numel() // max(self.num_features, 1)

    def rows(self) -> Tensor:
        """All observations as a matrix of shape (N, D); a view where the layout allows it."""
        return self.values.movedim(self.feature_dim, -1).reshape(-1, self.num_features)

    def take(self, index: Tensor) -> Observations:
        """The observations at the positions ``index`` of :meth:`rows`, without building all rows."""
        valid = None if self.valid is None else self.valid[index]
        moved = self.values.movedim(self.feature_dim, -1)
        if moved.is_contiguous():
            rows = moved.reshape(-1, self.num_features).index_select(0, index)
            return Observations(rows, valid=valid)
        positions = []
        for size in reversed(moved.shape[:-1]):
            positions.append(index % size)
            index = index // size
        return Observations(moved[tuple(reversed(positions))], valid=valid)

    def to(self, device: torch.device) -> Observations:
        """The observations on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Observations(self.values.to(device), self.feature_dim, valid)


def empty_moments(num_features: int, device: torch.device | str | None = None) -> Moments:
    """Moments of no observations.

    Args:
        num_features: the width D.
        device: where the sums live; the CPU by default.

    >>> empty_moments(3).second.shape
    torch.Size([3, 3])
    """
    device = torch.device(device or "cpu")
    # Tensors made in inference mode could never be updated outside it.
    with torch.inference_mode(False):
        return Moments(
            count=torch.zeros((), dtype=torch.int64, device=device),
            non_finite=torch.zeros((), dtype=torch.int64, device=device),
            origin=torch.zeros(num_features, dtype=torch.float64, device=device),
            first=torch.zeros(num_features, dtype=torch.float64, device=device),
            second=torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
        )


def accumulate(
    moments: Moments,
    observations: Observations,
    gram_dtype: torch.dtype = torch.float64,
    *,
    recentre: bool = True,
) -> None:
    r"""Add observations to ``moments``, in place.

    Rows are centred on the origin, masked, and multiplied in blocks that fit a bounded workspace; no copy
    of all observations is made. On the CPU this is compiled where it could be, see
    :mod:`spectralmetrics.functional.compiled`; the same is done in PyTorch everywhere else.

    Args:
        moments: the sums so far.
        observations: floating observations of the same width, on the same device.
        gram_dtype: dtype of the products. ``torch.float64``, or ``torch.float32`` for speed: then the centred
            rows are scaled by a power of two to the middle of the range of float32 and each block's product
            is added to the float64 sum.
        recentre: first move the origin to the mean of these rows, which re-bases the sums exactly, unless they
            are fewer than the root of the number of rows before them. False saves that; right if the origin
            lies near the data and rows of this dtype have set it.

    Raises:
        TypeError: for observations that are not floating.
        ValueError: for observations of another width, or a ``valid`` of another length.

    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1e9], [1e9 + 2]], dtype=torch.float64)))
    >>> covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    """
    values, valid = observations.values.detach(), observations.valid
    if not values.is_floating_point():
        raise TypeError(
            f"expected observations of a floating dtype, got {values.dtype}; cast them to float first"
        )
    if observations.num_features != moments.num_features:
        raise ValueError(
            f"expected observations with {moments.num_features} features, got {observations.num_features}"
            f" (shape {tuple(values.shape)}, feature_dim {observations.feature_dim})"
        )
    if valid is not None and valid.shape != (observations.num_observations,):
        raise ValueError(
            f"expected valid of shape ({observations.num_observations},), got {tuple(valid.shape)}"
        )
    if values.numel() == 0:
        return
    fast = gram_dtype == torch.float32
    # Half precision is exact in float32, and float64 rows keep their digits until they are centred.
    dtype = torch.float32 if fast and values.dtype != torch.float64 else torch.float64
    budget = _CPU_WORKSPACE_BYTES if values.device.type == "cpu" else _ACCELERATOR_WORKSPACE_BYTES
    limit = max(budget // (moments.num_features * gram_dtype.itemsize), _MINIMUM_ROWS_PER_PRODUCT)
    if valid is not None:  # its rows are enumerated with the features last
        values = observations.rows()
    is_compiled = compiled.takes(moments, values, gram_dtype)
    if is_compiled and not recentre and values.dtype in (torch.float32, torch.float64):
        limit = values.numel()  # cuts them by itself
    # State tensors are no inference tensors, so they may be updated inside and outside of inference mode.
    with torch.inference_mode(False), torch.no_grad(), full_precision(values.device.type, fast):
        feature_dim = observations.feature_dim if valid is None else -1
        for piece, dim, start in _blocks(values, feature_dim, limit):
            chosen = None if valid is None else valid[start : start + piece.shape[0]]
            if recentre:
                copy = _workspace(piece, "rows", piece.shape, dtype).copy_(piece)
                _recentre(moments, _as_rows(copy, dim), chosen, rounded=values.dtype != torch.float64)
            if is_compiled:
                _add_compiled(moments, piece, dim, chosen, gram_dtype)
            else:
                centred = _centre(moments, piece, dim, dtype, exactly=recentre)
                (_add_in_float32 if fast else _add_in_float64)(moments, centred, chosen)


def rebase(moments: Moments, origin: Tensor) -> Moments:
    """The same sums about another origin, exactly up to rounding; the input is left as it was.

    Args:
        moments: sums about ``moments.origin``.
        origin: the new origin, shape (D,), float64.

    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [2.0]])))
    >>> rebase(moments, torch.zeros(1, dtype=torch.float64)).second
    tensor([[5.]], dtype=torch.float64)
    """
    shift = moments.origin - origin
    count = moments.count.to(torch.float64)
    # S + s d' + d s' + n d d'  =  S + (s + n d / 2) d' + d (s + n d / 2)'
    half = moments.first + 0.5 * count * shift
    left = torch.stack([half, shift], dim=1)
    right = torch.stack([shift, half], dim=0)
    return replace(
        moments,
        origin=origin,
        first=moments.first + count * shift,
        second=torch.addmm(moments.second, left, right),
    )


def merge(left: Moments, right: Moments) -> Moments:
    """The moments of two disjoint sets of observations together; neither input is changed.

    A side without observations contributes nothing, not even its origin, and the result's origin is one of
    the two given: it is the same data summed in another order.

    >>> left, right = empty_moments(1), empty_moments(1)
    >>> accumulate(left, Observations(torch.tensor([[0.0], [2.0]])))
    >>> accumulate(right, Observations(torch.tensor([[1e6], [1e6 + 2]])))
    >>> merge(left, right).count
    tensor(4)
    """
    # The origin of the larger side lies nearer to the common mean.
    origin = torch.where(left.count >= right.count, left.origin, right.origin)
    left, right = rebase(left, origin), rebase(right, origin)
    return Moments(
        count=left.count + right.count,
        non_finite=left.non_finite + right.non_finite,
        origin=origin,
        first=left.first + right.first,
        second=left.second + right.second,
    )


def mean(moments: Moments) -> Tensor:
    """The mean of the observations, shape (D,), float64; NaN where there are none.

    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [4.0]])))
    >>> mean(moments)
    tensor([2.5000], dtype=torch.float64)
    """
    return moments.origin + moments.first / moments.count


def variances(moments: Moments, *, center: bool = True) -> Tensor:
    """The diagonal of :func:`covariance`, shape (D,), float64, without building the matrix.

    >>> moments = empty_moments(2)
    >>> accumulate(moments, Observations(torch.tensor([[1.0, 0.0], [3.0, 0.0]])))
    >>> variances(moments)
    tensor([1., 0.], dtype=torch.float64)
    """
    offset = moments.first / moments.count
    about_mean = (moments.second.diagonal() / moments.count - offset.square()).clamp_(min=0)
    return about_mean if center else about_mean + (moments.origin + offset).square()


def covariance(moments: Moments, *, center: bool = True, unbiased: bool = False) -> Tensor:
    r"""The covariance :math:`\frac{1}{n} \sum_i (x_i - \mu)(x_i - \mu)^\top` of the observations.

    Args:
        moments: the sums.
        center: with False, the second moment about zero, :math:`\frac{1}{n}\sum_i x_i x_i^\top`.
        unbiased: divide by :math:`n - 1`.

    Returns:
        Symmetric matrix of shape (D, D), float64; NaN where there are no observations.

    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [3.0]])))
    >>> covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    >>> covariance(moments, unbiased=True)
    tensor([[2.]], dtype=torch.float64)
    >>> covariance(moments, center=False)
    tensor([[5.]], dtype=torch.float64)
    """
    return symmetrise(upper_covariance(moments, center=center, unbiased=unbiased))


def upper_covariance(moments: Moments, *, center: bool = True, unbiased: bool = False) -> Tensor:
    """As :func:`covariance`, but only the upper triangle is meaningful: all that an eigensolver reads.

    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [3.0]])))
    >>> upper_covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    """
    count = moments.count.to(torch.float64)
    offset = moments.first / count
    upper = (moments.second / count).addr_(offset, offset, alpha=-1)
    if not center:
        average = moments.origin + offset
        upper = upper.addr_(average, average)
    if unbiased:
        upper = upper.mul_(count / (count - 1))
    # Variances cannot be negative; round-off must not make them so.
    upper.diagonal().clamp_(min=0)
    return upper


def symmetrise(upper: Tensor) -> Tensor:
    """The symmetric matrix with the given upper triangle, whatever stands below the diagonal.

    >>> symmetrise(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    return upper.triu() + upper.triu(1).mT


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
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
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


def _blocks(values: Tensor, feature_dim: int, limit: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut observations into pieces of at most about ``limit`` rows, without copying where the layout allows it.

    Yields each piece with the dimension of its features, which is the first or the last, and the place of its
    first row among all rows (meaningful if the features come last).
    """
    features = values.shape[feature_dim]
    moved = values.movedim(feature_dim, -1)
    if moved.is_contiguous() or moved.ndim == 2:
        start = 0
        for rows in torch.split(moved.reshape(-1, features), limit):
            yield rows, -1, start
            start += rows.shape[0]
        return
    # (B, D, *positions) -> (D, b, p) for b samples at a time, so that runs of positions stay contiguous
    maps = values.movedim(feature_dim, 1).flatten(2)
    for samples in torch.split(maps, max(limit // max(maps.shape[2], 1), 1)):
        for piece in torch.split(samples, limit, dim=2):
            yield piece.transpose(0, 1), 0, 0


def _as_rows(piece: Tensor, dim: int) -> Tensor:
    """A view of shape (n, D) of what `_blocks` yields, or of contiguous memory of that shape."""
    return piece if dim == -1 else piece.flatten(1).t()


def _workspace(like: Tensor, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of any content, on a CPU the same again for the same role, since fresh pages are dear there."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size * dtype.itemsize > _KEPT_WORKSPACE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)
    name = f"{role}, {dtype}"
    kept: Tensor | None = getattr(_KEPT, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype, device="cpu")
        setattr(_KEPT, name, kept)
    return kept[:size].view(tuple(shape))


def _add_compiled(
    moments: Moments, piece: Tensor, dim: int, valid: Tensor | None, gram_dtype: torch.dtype
) -> None:
    if piece.dtype not in (torch.float32, torch.float64):
        piece = _workspace(piece, "rows", piece.shape, torch.float32).copy_(piece)
    maps = piece.t().unsqueeze(0) if dim == -1 else piece.transpose(0, 1)
    compiled.add(moments, maps, valid, gram_dtype, functools.partial(_bytes, piece))


def _bytes(like: Tensor, size: int) -> Tensor:
    return _workspace(like, "panels", (size,), torch.uint8)


def _centre(moments: Moments, piece: Tensor, dim: int, dtype: torch.dtype, exactly: bool) -> Tensor:
    """Rows minus the origin, shape (n, D), in memory that the next piece will use."""
    work = _workspace(piece, "rows", piece.shape, dtype)
    origin = moments.origin.to(dtype)
    broadcast = origin if dim == -1 else origin[:, None, None]
    if piece.dtype == dtype:
        torch.sub(piece, broadcast, out=work)
    else:
        work.copy_(piece).sub_(broadcast)
    centred = _as_rows(work, dim)
    if exactly and dtype == torch.float32:
        # What rounding the origin has lost: nothing, if rows of this dtype have set it.
        centred.sub_((moments.origin - origin.to(torch.float64)).to(dtype))
    return centred


def _count(moments: Moments, centred: Tensor, valid: Tensor | None) -> Tensor:
    """Count rows; return which to keep, shape (N, 1)."""
    mask = _are_finite(centred)
    if valid is not None:
        mask = mask & valid.unsqueeze(1)
    kept = mask.sum()
    moments.count.add_(kept)
    moments.non_finite.add_((centred.shape[0] if valid is None else valid.sum()) - kept)
    return mask


def _are_finite(rows: Tensor) -> Tensor:
    """Which rows hold neither NaN nor infinities, shape (N, 1)."""
    # These show in the sum of the row. The summands are made so small that nothing else does.
    small = torch.full_like(rows[0], 2.0 ** -(rows.shape[1].bit_length() + 1))
    return torch.mv(rows, small).isfinite().unsqueeze(1)


def _clear(centred: Tensor, mask: Tensor) -> None:
    """Set the rows to leave out to zero, whatever they hold."""
    # As bits, in one vectorised pass: a product would leave NaN, and a masked fill is several times slower.
    bits = torch.int64 if centred.dtype == torch.float64 else torch.int32
    centred.view(bits).bitwise_and_(mask.to(bits).neg_())


def _recentre(moments: Moments, rows: Tensor, valid: Tensor | None, rounded: bool) -> None:
    """Move the origin to the mean of ``rows`` and the sums with it, unless these rows are too few to follow.

    The memory of ``rows`` is used for the work and holds something else afterwards. Where the rows came in
    float32, the origin is ``rounded`` to it, so that rows minus the origin is exactly one float32 subtraction.
    """
    mask = _are_finite(rows)
    mask = mask if valid is None else mask & valid.unsqueeze(1)
    # The mean is taken about a row, so that constant features are centred to exactly zero.
    pivot = rows.index_select(0, mask[:, 0].to(torch.uint8).argmax().reshape(1))[0].to(torch.float64)
    rows.sub_(pivot.to(rows.dtype))
    _clear(rows, mask)
    kept = mask.sum()
    # An origin need not be the mean to the last digit: whatever it is, the sums are exact about it.
    mean_about_pivot = rows.sum(0).to(torch.float64) / kept.clamp(min=1)
    origin = pivot + torch.where(mean_about_pivot.isfinite(), mean_about_pivot, 0)
    if rounded:
        nearest = origin.to(torch.float32).to(torch.float64)
        origin = torch.where(nearest.isfinite(), nearest, origin)
    # A few rows that are unlike the rest, such as a last incomplete batch, must not carry the origin away.
    followed = (kept > 0) & (kept.square() >= moments.count)
    origin = torch.where(followed, origin, moments.origin)
    # As in `rebase`, in place. Without observations the sums are zero, and a shift from an origin that means
    # nothing must leave them so.
    shift = torch.where(moments.count > 0, moments.origin - origin, 0)
    count = moments.count.to(torch.float64)
    half = moments.first + 0.5 * count * shift
    left, right = torch.stack([half, shift], dim=1), torch.stack([shift, half], dim=0)
    for start, stop in _block_rows(rows, 256):
        moments.second[start:stop, start:].addmm_(left[start:stop], right[:, start:])
    moments.first.add_(count * shift)
    moments.origin.copy_(origin)


def _add_in_float64(moments: Moments, centred: Tensor, valid: Tensor | None) -> None:
    _clear(centred, _count(moments, centred, valid))
    for start, stop in _block_rows(centred, 64 if centred.shape[1] <= 512 else 128):
        moments.second[start:stop, start:].addmm_(centred[:, start:stop].t(), centred[:, start:])
    moments.first.add_(centred.sum(0))


def _add_in_float32(moments: Moments, centred: Tensor, valid: Tensor | None) -> None:
    # Float64 rows keep their digits until they are centred and scaled.
    _clear(centred, _count(moments, centred, valid))
    # Of a transposed view this would make a copy, row by row.
    least, most = torch.aminmax(centred if centred.is_contiguous() else centred.t())
    scale = _power_of_two_scale(torch.maximum(-least, most))
    centred.mul_(scale.to(centred.dtype))
    centred = centred.to(torch.float32)
    weight = scale.square().reciprocal()
    for start, stop in _block_rows(centred, 128 if centred.shape[1] < 2048 else 256):
        # Added while it is in the cache; a product of all features would not be.
        shape = (stop - start, centred.shape[1] - start)
        product = _workspace(centred, "product", shape, torch.float32)
        torch.mm(centred[:, start:stop].t(), centred[:, start:], out=product)
        weighed = _workspace(centred, "weighed product", shape, torch.float64)
        moments.second[start:stop, start:].add_(weighed.copy_(product).mul_(weight))
    moments.first.add_(centred.sum(0).to(torch.float64).div_(scale))


def _power_of_two_scale(largest: Tensor) -> Tensor:
    """A float64 power of two that brings rows of this largest magnitude near one; 1 if they are all zero."""
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    if largest.dtype == torch.float32:
        exponent = exponent.clamp(min=-120, max=120)  # the scale itself must be a float32
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), -exponent)


def _block_rows(rows: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """The upper triangle of a product as block rows ``[start:stop, start:]``: half the work."""
    features = rows.shape[1]
    if rows.device.type != "cpu":
        size = max(128, min(256, features // 4))  # fewer, larger products
    for start in range(0, features, size):
        yield start, min(start + size, features)
