r"""A covariance of any width, reduced to a few random combinations of its columns.

In place of the D x D sum a sketch keeps the image of a random test matrix :math:`\Omega` of k columns,

.. math:: Y = \sum_i (x_i - o) \left((x_i - o)^\top \Omega\right) = S \Omega,

its diagonal, the vector sum and the count. All of these are sums. About another origin :math:`o'` the image
is, with :math:`d = o - o'`,

.. math:: Y' = Y + s\, d^\top\Omega + d\, (s + n d)^\top\Omega ,

and sums of disjoint data add up. They give the Nyström approximation
:math:`\hat\Sigma = \Sigma\Omega (\Omega^\top\Sigma\Omega)^+ (\Sigma\Omega)^\top` (Tropp, Yurtsever, Udell &
Cevher 2017, arXiv:1706.05736), which never exceeds the covariance: its eigenvalues, with the exact trace,
enclose the eigenvalues of the covariance.

The test matrix holds signs, drawn from the raw bits of a numpy generator. Its stream is the same on every
machine and in every release, so the matrix need not be saved, and all processes have the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.sums.about_origin import AboutOrigin, first_of, next_origin, rows_at_a_time
from spectralmetrics.sums.arithmetic import (
    ROWS_PER_FLOAT32_SUM,
    are_finite,
    full_precision,
    power_of_two_below,
    power_of_two_scale,
)
from spectralmetrics.sums.decomposition import with_fixed_signs, without_round_off
from spectralmetrics.sums.intake import DenseIntake, products_dtype
from spectralmetrics.sums.merging import Piece
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import zeros

# Features in a block of a product. The block's result stays in the cache until it is added.
_FEATURES_PER_PRODUCT = 4096
_ROWS_ON_ACCELERATORS = 2048
# Directions of the sketch are left out if the covariance along them is below this many times the error of the
# products: their values would show mostly the error.
_TRUSTED = 100.0


@dataclass(frozen=True)
class Sketch(AboutOrigin):
    """The sketch of a covariance; the intake updates its tensors in place.

    Attributes:
        count: the number of finite observations n, shape (), int64.
        non_finite: the number of observations left out, shape (), int64.
        origin: shape (D,), float64.
        first: the vector sum about the origin, shape (D,), float64.
        diagonal: the sum of squares about the origin, shape (D,), float64.
        image: Y, shape (D, k), float64.
        seed: the seed of the test matrix.

    >>> sketch = empty_sketch(4, 100)
    >>> intake = sketch.intake(torch.float64)
    >>> intake.add(sketch, Observations(torch.randn(50, 2) @ torch.randn(2, 100)), 0)
    >>> _ = intake.flush(sketch)
    >>> values = sketch.eigenvalues()  # of rank 2, which four columns hold
    >>> bool((values[2:] == 0).all()), bool(torch.isclose(values.sum(), sketch.variances().sum()))
    (True, True)
    """

    states: ClassVar[dict[str, str]] = {
        "image": "sketch_image",
        "diagonal": "sketch_diagonal",
        "count": "sketch_count",
        "non_finite": "sketch_non_finite",
        "origin": "sketch_origin",
        "first": "sketch_first_moment",
    }
    described: ClassVar[str] = "a sketch"
    additive: ClassVar[frozenset[str]] = frozenset({"count", "non_finite", "first", "diagonal", "image"})
    arrays: ClassVar[tuple[str, ...]] = (
        "sketch_image",
        "sketch_variances",
        "sketch_mean",
        "sketch_count",
        "sketch_non_finite",
        "sketch_seed",
    )
    keeps_products: ClassVar[bool] = False

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first: Tensor
    diagonal: Tensor
    image: Tensor
    seed: int = 0

    @property
    def size(self) -> int:
        """The number of columns k."""
        return self.image.shape[1]

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return (f"sketch_size={self.size}", f"seed={self.seed}")

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Sketch:
        """See :class:`.Sum`."""
        return empty_sketch(self.size, num_features, device, seed=self.seed)

    def intake(self, gram_dtype: torch.dtype | None) -> SketchIntake:
        """See :class:`.Sum`."""
        return SketchIntake(gram_dtype)

    def test_matrix(self) -> Tensor:
        """The test matrix, shape (D, k), float64, on the device of the sums."""
        return self._signs.to(torch.float64)

    @property
    def _signs(self) -> Tensor:
        return _test_matrix(self.num_features, self.size, self.seed, self.image.device)

    def combine(self, rows: Tensor) -> Tensor:
        """Combine the features of rows (n, D) by the test matrix: (n, k), of the rows' dtype."""
        signs = self._signs
        return sum_of(rows[:, part] @ signs[part].to(rows.dtype) for part in _parts(self.num_features))

    def about(self, origin: Tensor) -> Sketch:
        """See :class:`.AboutOrigin`."""
        left, right, diagonal, first = _shifts(self, origin)
        image = torch.addmm(self.image, left, right)
        return replace(self, origin=origin, image=image, diagonal=diagonal, first=first)

    def squares(self) -> Tensor:
        """See :class:`.AboutOrigin`."""
        return self.diagonal

    def _pieces(self, origin: Tensor) -> Iterator[Piece]:
        """See :class:`.AboutOrigin`: counts and sums of each feature, then the image, some rows at a time."""
        left, right, diagonal, first = _shifts(self, origin)
        yield from map(Piece.of, (self.count, self.non_finite, first, diagonal))
        for rows in rows_at_a_time(*self.image.shape):
            yield Piece.of_sum(self.image[rows], left[rows], right)

    def _slots(self) -> Iterator[Tensor]:
        """See :class:`.AboutOrigin`."""
        yield from (self.count, self.non_finite, self.first, self.diagonal)
        yield from (self.image[rows] for rows in rows_at_a_time(*self.image.shape))

    def covariance(self, *, center: bool = True) -> Tensor:
        """Always raise a RuntimeError: a sketch holds no matrix."""
        raise RuntimeError(
            f"the covariance of {self.num_features} features is not kept: a sketch of {self.size} columns is;"
            " keep it without `sketch_size`, in a probe with a larger `max_features`"
        )

    def covariance_image(self, *, center: bool = True) -> Tensor:
        r"""The image :math:`\Sigma\Omega` of the test matrix, shape (D, k), float64."""
        given: Tensor | None = self._given.get("image")
        if given is not None:
            return given if center else given.addr(self.origin, self.combine(self.origin[None])[0])
        offset = self.first / self.count
        image = (self.image / self.count).addr_(offset, self.combine(offset[None])[0], alpha=-1)
        if not center:
            mean = self.origin + offset
            image.addr_(mean, self.combine(mean[None])[0])
        return image

    def square_sum(self, *, center: bool = True) -> Tensor:
        r"""An unbiased estimate of :math:`\sum_i \lambda_i^2 = \|\Sigma\|_F^2`, shape (), float64."""
        return self.covariance_image(center=center).square().sum() / self.size

    def eigenvalues(self, *, center: bool = True) -> Tensor:
        """The eigenvalues of the approximation, descending, shape (k,), float64: lower bounds."""
        _, values, _, unit = self._factor(center)
        return values * unit

    def eigenvectors(self, *, center: bool = True) -> tuple[Tensor, Tensor]:
        """The eigenvalues (k,) and eigenvectors (D, k) of the approximation, float64.

        The vector of a zero eigenvalue is zero. Signs are fixed as in :func:`.decomposition.eigenvectors`.
        """
        factor, values, rotation, unit = self._factor(center)
        vectors = factor @ (rotation / torch.where(values > 0, values, 1.0).sqrt() * (values > 0))
        return values * unit, with_fixed_signs(vectors)

    def _factor(self, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E (D, k) with Σ̂ = u E Eᵀ, the eigenvalues of EᵀE, descending, its eigenvectors in columns, and u."""
        variances, image = self.variances(center=center), self.covariance_image(center=center)
        unit = power_of_two_below(variances.amax())  # keeps squares in the range of float64
        image = image / unit if self._given else image.div_(unit)
        signs, parts = self._signs, _parts(self.num_features)
        core = sum_of(signs[part].to(torch.float64).mT @ image[part] for part in parts)  # Ωᵀ Σ Ω
        # Exact products would make it symmetric, so the asymmetry shows their error.
        error = torch.linalg.vector_norm(core - core.mT) / 2**0.5
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        least = 16 * self.size * torch.finfo(torch.float64).eps * values.amax()
        # Leaving directions out makes the approximation smaller and never larger, so the bounds stay bounds.
        kept = values > torch.maximum(least, _TRUSTED * error)
        inverse = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0)
        for part in parts:  # in place: memory may have no room for a second image
            image[part] = image[part] @ (vectors * inverse)
        factor = image
        values, rotation = torch.linalg.eigh(factor.mT @ factor)
        values = without_round_off(values.flip(0))
        # The trace is exact: if rounding has made the sum of the values larger, scale all of them down.
        trace = (variances / unit).sum()
        values = values * (trace / values.sum().clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        return factor, values, rotation.flip(1), unit

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        yield "sketch_image", self.covariance_image()
        others = self.variances(), self.mean(), self.count, self.non_finite, torch.tensor(self.seed)
        yield from zip(self.arrays[1:], others, strict=True)

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Sketch:
        """See :class:`.Sum`."""
        image, variances, mean, count, non_finite, seed = map(read, cls.arrays)
        sketch = cls(
            count=count,
            non_finite=non_finite,
            origin=mean,
            first=torch.zeros_like(mean),
            diagonal=variances * count,
            image=image * count,
            seed=int(seed),
        )
        return sketch._as_given(variances=variances, image=image)


class SketchIntake(DenseIntake):
    """Adds batches to a sketch; small ones wait, and the origin follows the data, as for dense moments."""

    reaches_other_devices = False
    waiting_bytes = 2**25

    def _accumulate(self, sums: Any, observations: Observations) -> None:
        gram_dtype = self._gram_dtype or products_dtype(observations.values.device)
        with torch.inference_mode(False), torch.no_grad():
            # The first blocks may hold no row that counts, so every block may move the origin.
            recentre = self._reaches_milestone() or not self._origin_is_near
            rows, valid = observations.rows().detach(), observations.valid
            size = ROWS_PER_FLOAT32_SUM
            if gram_dtype == torch.float64 and rows.device.type != "cpu":  # fewer, larger products are faster
                size = _ROWS_ON_ACCELERATORS
            for start in range(0, len(rows), size):
                block = rows[start : start + size]
                chosen = are_finite(block)
                offered: Tensor | int = len(block)
                if valid is not None:
                    flags = valid[start : start + len(block), None]
                    chosen, offered = chosen & flags, flags.sum()
                if recentre:
                    _recentre(sums, block, chosen)
                with full_precision(rows.device.type, gram_dtype == torch.float32):
                    _add(sums, block, chosen, gram_dtype)
                kept = chosen.sum()
                sums.count.add_(kept)
                sums.non_finite.add_(offered - kept)


def _add(sums: Sketch, rows: Tensor, chosen: Tensor, gram_dtype: torch.dtype) -> None:
    """Add rows, some features at a time, which stay in the cache; no copy of all rows is made."""
    signs, parts = sums._signs, _parts(sums.num_features)

    def centred(part: slice) -> Tensor:
        return torch.where(chosen, rows[:, part].to(torch.float64) - sums.origin[part], 0)

    fast = gram_dtype == torch.float32
    scale = torch.ones((), dtype=torch.float64, device=rows.device)
    if fast:  # scale rows to the middle of the range of float32
        scale = power_of_two_scale(torch.stack([centred(part).abs().amax() for part in parts]).amax())
    combined = torch.zeros(len(rows), sums.size, dtype=gram_dtype, device=rows.device)
    for part in parts:
        block = centred(part)
        sums.first[part] += block.sum(0)
        sums.diagonal[part] += block.square().sum(0)
        combined.addmm_((block * scale).to(gram_dtype), signs[part].to(gram_dtype))
    for part in parts:
        if fast:
            product = (centred(part) * scale).to(gram_dtype).mT @ combined
            sums.image[part].addcmul_(product, scale.square().reciprocal())
        else:
            sums.image[part].addmm_(centred(part).mT, combined)


def _recentre(sums: Sketch, rows: Tensor, chosen: Tensor) -> None:
    """Move the origin, and the sums with it, to the mean of rows, unless these are too few."""
    pivot = rows.index_select(0, first_of(chosen[:, 0]))[0].to(torch.float64)
    total = torch.where(chosen, rows.to(torch.float64) - pivot, 0).sum(0)
    origin = next_origin(sums, pivot, total, chosen.sum())
    # Without observations the sums are zero and the origin has no meaning: a shift must leave them zero.
    moved = sums.about(torch.where(sums.count > 0, origin, sums.origin))
    sums.image.copy_(moved.image)
    sums.diagonal.copy_(moved.diagonal)
    sums.first.copy_(moved.first)
    sums.origin.copy_(origin)


def _shifts(sums: Sketch, origin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two factors whose product moves the image to another origin; the diagonal and the vector sum about it."""
    shift = sums.origin - origin
    first = sums.first + sums.count.to(torch.float64) * shift
    left = torch.stack([sums.first, shift], 1)  # (D, 2)
    right = sums.combine(torch.stack([shift, first]))  # (2, k)
    return left, right, sums.diagonal + shift * (sums.first + first), first


def _parts(features: int) -> list[slice]:
    """Slices of the features, some at a time."""
    starts = range(0, features, _FEATURES_PER_PRODUCT)
    return [slice(start, min(start + _FEATURES_PER_PRODUCT, features)) for start in starts]


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape, made one after the other."""
    total = next(parts)
    for part in parts:
        total += part
    return total


@functools.lru_cache(maxsize=16)
def _test_matrix(features: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Signs (D, k), int8, the same for all sums of one width, size and seed."""
    bits = np.random.Philox(key=[seed, 0]).random_raw(-(-features * size // 64))
    signs = np.unpackbits(bits.astype("<u8").view(np.uint8), count=features * size).reshape(features, size)
    with torch.inference_mode(False):
        return torch.from_numpy(signs).to(device).to(torch.int8).mul_(2).sub_(1)


def empty_sketch(
    size: int, num_features: int, device: torch.device | str | None = None, *, seed: int = 0
) -> Sketch:
    """A sketch without observations.

    Args:
        size: number of columns k.
        num_features: the width D.
        device: device of the sums; the CPU by default.
        seed: the seed of the test matrix.

    >>> empty_sketch(8, 100).image.shape
    torch.Size([100, 8])
    """
    width = (num_features,)
    sums = zeros(
        device, count=(), non_finite=(), origin=width, first=width, diagonal=width, image=(*width, size)
    )
    return Sketch(**sums, seed=seed)
