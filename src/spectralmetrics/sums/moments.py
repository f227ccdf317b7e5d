r"""Streaming first and second moments of feature vectors: re-base, merge, exchange, read.

Observations :math:`x_i \in \mathbb{R}^D` are summed about an origin :math:`o` near the data,

.. math:: s = \sum_i (x_i - o), \qquad S = \sum_i (x_i - o)(x_i - o)^\top,

so that the covariance :math:`\Sigma = S/n - (s/n)(s/n)^\top` does not depend on the difference of two
large numbers, as it does for sums of :math:`x x^\top` once the mean outweighs the spread. Sums about
two origins :math:`o` and :math:`o'` are added exactly by moving one of them: with :math:`d = o' - o`,

.. math:: \sum_i (x_i - o)(x_i - o)^\top = S' + s' d^\top + d s'^\top + n' d d^\top, \qquad
          \sum_i (x_i - o) = s' + n' d.

Everything here runs on the device of the data without reading from it: no branch and no shape depends
on a value.

>>> import torch
>>> from spectralmetrics.sums import Observations, accumulate
>>> moments = empty_moments(2)
>>> accumulate(moments, Observations(torch.tensor([[1.0, 2.0], [3.0, 2.0], [float("nan"), 0.0]])))
>>> covariance(moments)
tensor([[1., 0.],
        [0., 0.]], dtype=torch.float64)
>>> int(moments.count), int(moments.non_finite)
(2, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spectralmetrics.sums import decomposition
from spectralmetrics.sums.about_origin import DenseSums, rows_at_a_time
from spectralmetrics.sums.arithmetic import workspace
from spectralmetrics.sums.checks import check_real, check_type, is_integer
from spectralmetrics.sums.intake import DenseIntake
from spectralmetrics.sums.merging import Piece
from spectralmetrics.sums.sum import zeros


@dataclass(frozen=True)
class Moments(DenseSums):
    r"""Sums over observations about an origin; the tensors are updated in place by :func:`accumulate`.

    Attributes:
        count: number of finite observations :math:`n`, shape ``()``, int64.
        non_finite: number of observations left out for a NaN or an infinity, shape ``()``, int64.
        origin: :math:`o`, shape ``(D,)``, float64.
        first: :math:`s = \sum_i (x_i - o)`, shape ``(D,)``, float64.
        second: :math:`S = \sum_i (x_i - o)(x_i - o)^\top`, shape ``(D, D)``, float64. Only the upper triangle
            is meaningful: leaving the lower one out saves half the arithmetic.
    """

    states: ClassVar[dict[str, str]] = {
        "second": "second_moment",
        "count": "count",
        "non_finite": "non_finite",
        "origin": "origin",
        "first": "first_moment",
    }
    additive: ClassVar[frozenset[str]] = frozenset({"count", "non_finite", "first", "second"})
    arrays: ClassVar[tuple[str, ...]] = ("covariance", "mean", "count", "non_finite")

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first: Tensor
    second: Tensor

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Moments:
        """See :class:`.Sum`."""
        return empty_moments(num_features, device)

    def intake(self, gram_dtype: torch.dtype | None) -> DenseIntake:
        """See :class:`.Sum`."""
        return DenseIntake(gram_dtype)

    def squares(self) -> Tensor:
        """See :class:`.AboutOrigin`."""
        return self.second.diagonal()

    def about(self, origin: Tensor) -> Moments:
        """See :class:`.AboutOrigin`."""
        return rebase(self, origin)

    def _pieces(self, origin: Tensor) -> Iterator[Piece]:
        """See :class:`.AboutOrigin`: the counts and the vector sum, then rows of the upper triangle."""
        left, right, first = self.moved_by(self.origin - origin)
        yield from map(Piece.of, (self.count, self.non_finite, first))
        for rows in _block_rows(self.num_features):
            yield Piece.of_sum(self.second[rows, rows.start :], left[rows], right[:, rows.start :])

    def _slots(self) -> Iterator[Tensor]:
        """See :class:`.AboutOrigin`."""
        yield from (self.count, self.non_finite, self.first)
        yield from (self.second[rows, rows.start :] for rows in _block_rows(self.num_features))

    def covariance(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        given: Tensor | None = self._given.get("covariance")
        if given is None:
            return covariance(self, center=center)
        return given if center else given.addr(self.origin, self.origin)

    def upper_covariance(self, *, center: bool = True) -> Tensor:
        """Like :meth:`covariance`, but only the upper triangle is meaningful."""
        return self.covariance(center=center) if self._given else upper_covariance(self, center=center)

    def eigenvalues(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        # Skip the passes that make the matrix symmetric: the solver reads one triangle.
        return decomposition.eigenvalues(self._upper_in_workspace(center))

    def eigenvectors(self, *, center: bool = True) -> tuple[Tensor, Tensor]:
        """See :class:`.SpectralSum`."""
        return decomposition.eigenvectors(self._upper_in_workspace(center))

    def ascending_eigenvectors(self, *, center: bool = True) -> tuple[Tensor, Tensor]:
        """See :func:`.decomposition.ascending_eigenvectors`."""
        return decomposition.ascending_eigenvectors(self._upper_in_workspace(center))

    def together_with(self, other: Moments) -> Moments:
        """See :class:`.AboutOrigin`."""
        # As in the base class, but in two passes over the matrices.
        origin = torch.where(self.count >= other.count, self.origin, other.origin)
        (left, left_right, left_first), (right, right_right, right_first) = (
            each.moved_by(each.origin - origin) for each in (self, other)
        )
        second = self.second + other.second
        return Moments(
            count=self.count + other.count,
            non_finite=self.non_finite + other.non_finite,
            origin=origin,
            first=left_first + right_first,
            second=second.addmm_(torch.cat([left, right], 1), torch.cat([left_right, right_right])),
        )

    def _upper_in_workspace(self, center: bool) -> Tensor:
        """Like :meth:`upper_covariance`, in memory that this thread reuses."""
        if self._given:
            return self.covariance(center=center)
        memory = workspace(self.second, "rows", self.second.shape, torch.float64)
        return _upper_covariance(self, center, out=memory)

    def matrix(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.upper_covariance(center=center)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        yield "covariance", self.covariance()
        yield from zip(self.arrays[1:], (self.mean(), self.count, self.non_finite), strict=True)

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Moments:
        """See :class:`.Sum`."""
        return cls.of_covariance(*(read(name) for name in cls.arrays))

    @staticmethod
    def of_covariance(
        covariance: Tensor, mean: Tensor, count: int | Tensor, non_finite: int | Tensor
    ) -> Moments:
        """Like :func:`moments_of_covariance`, without checks: decomposing the covariance checks it."""
        mean = mean.to(torch.float64)
        moments = Moments(
            count=torch.as_tensor(count, dtype=torch.int64, device=covariance.device),
            non_finite=torch.as_tensor(non_finite, dtype=torch.int64, device=covariance.device),
            origin=mean,
            first=torch.zeros_like(mean),
            second=covariance * count,
        )
        return moments._as_given(covariance=covariance)


def moments_of_covariance(
    covariance: Tensor, mean: Tensor, count: int | Tensor, non_finite: int | Tensor = 0
) -> Moments:
    """The moments of data with a known covariance, for example one from a file.

    Args:
        covariance: symmetric, about the mean and divided by n, shape (D, D).
        mean: shape (D,).
        count: the number of observations n.
        non_finite: the number of observations left out.

    Raises:
        TypeError: for a covariance or a mean that is not a tensor of real numbers.
        ValueError: for a covariance that is not square, or not finite; a mean of another width; no count.

    >>> moments_of_covariance(torch.eye(2), torch.zeros(2), 3).second
    tensor([[3., 0.],
            [0., 3.]], dtype=torch.float64)
    """
    covariance = decomposition.check_covariance(covariance)
    check_real("a mean", mean)
    if mean.shape != covariance.shape[-1:]:
        raise ValueError(f"expected a mean of shape ({covariance.shape[-1]},), got {tuple(mean.shape)}")
    if not is_integer(int(count) if isinstance(count, Tensor) else count, 1):
        raise ValueError(f"expected count to be a positive integer, got {count!r}")
    return Moments.of_covariance(covariance, mean, count, non_finite)


def empty_moments(num_features: int, device: torch.device | str | None = None) -> Moments:
    """Moments without observations.

    Args:
        num_features: the width D.
        device: device of the sums; the CPU by default.

    >>> empty_moments(3).second.shape
    torch.Size([3, 3])
    """
    if not is_integer(num_features, 0):
        raise ValueError(f"expected num_features as an integer that is not negative, got {num_features!r}")
    width = (num_features,)
    return Moments(**zeros(device, count=(), non_finite=(), origin=width, first=width, second=2 * width))


def rebase(moments: Moments, origin: Tensor) -> Moments:
    """Return the same sums about another origin, exact up to rounding; the input stays unchanged.

    Args:
        moments: sums about ``moments.origin``.
        origin: the new origin, shape (D,), float64.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [2.0]])))
    >>> rebase(moments, torch.zeros(1, dtype=torch.float64)).second
    tensor([[5.]], dtype=torch.float64)
    """
    check_type("moments", moments, Moments)
    check_real("an origin", origin)
    if origin.shape != moments.origin.shape:
        raise ValueError(f"expected an origin of shape ({moments.num_features},), got {tuple(origin.shape)}")
    left, right, first = moments.moved_by(moments.origin - origin)
    return replace(moments, origin=origin, first=first, second=torch.addmm(moments.second, left, right))


def merge(left: Moments, right: Moments) -> Moments:
    """Merge the moments of two disjoint sets of observations; both inputs stay unchanged.

    A side without observations contributes nothing, not even its origin or its width. The result has the origin
    of one side: it holds the same data, summed in another order.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> left, right = empty_moments(1), empty_moments(1)
    >>> accumulate(left, Observations(torch.tensor([[0.0], [2.0]])))
    >>> accumulate(right, Observations(torch.tensor([[1e6], [1e6 + 2]])))
    >>> merge(left, right).count
    tensor(4)
    """
    for name, side in (("left", left), ("right", right)):
        check_type(name, side, Moments)
    if 0 in (left.num_features, right.num_features):
        return left.merged(right).map(torch.clone)
    if left.num_features != right.num_features:
        raise ValueError(f"expected moments of one width, got {left.num_features} and {right.num_features}")
    return left.together_with(right)


def mean(moments: Moments) -> Tensor:
    """The mean of the observations, shape (D,), float64; NaN where there are none.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [4.0]])))
    >>> mean(moments)
    tensor([2.5000], dtype=torch.float64)
    """
    check_type("moments", moments, Moments)
    return moments.mean()


def variances(moments: Moments, *, center: bool = True) -> Tensor:
    """The diagonal of :func:`covariance`, shape (D,), float64, without building the matrix.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> moments = empty_moments(2)
    >>> accumulate(moments, Observations(torch.tensor([[1.0, 0.0], [3.0, 0.0]])))
    >>> variances(moments)
    tensor([1., 0.], dtype=torch.float64)
    """
    check_type("moments", moments, Moments)
    return moments.variances(center=center)


def covariance(moments: Moments, *, center: bool = True, unbiased: bool = False) -> Tensor:
    r"""The covariance :math:`\frac{1}{n} \sum_i (x_i - \mu)(x_i - \mu)^\top` of the observations.

    Args:
        moments: the sums.
        center: with False, the second moment about zero, :math:`\frac{1}{n}\sum_i x_i x_i^\top`.
        unbiased: divide by :math:`n - 1`.

    Returns:
        Symmetric matrix of shape (D, D), float64; NaN where there are no observations.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [3.0]])))
    >>> covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    >>> covariance(moments, unbiased=True)
    tensor([[2.]], dtype=torch.float64)
    >>> covariance(moments, center=False)
    tensor([[5.]], dtype=torch.float64)
    """
    check_type("moments", moments, Moments)
    return decomposition.symmetrise(upper_covariance(moments, center=center, unbiased=unbiased))


def upper_covariance(moments: Moments, *, center: bool = True, unbiased: bool = False) -> Tensor:
    """Like :func:`covariance`, but only the upper triangle is meaningful; an eigensolver reads no more.

    >>> from spectralmetrics.sums import Observations, accumulate
    >>> moments = empty_moments(1)
    >>> accumulate(moments, Observations(torch.tensor([[1.0], [3.0]])))
    >>> upper_covariance(moments)
    tensor([[1.]], dtype=torch.float64)
    """
    return _upper_covariance(moments, center, unbiased)


def _upper_covariance(
    moments: Moments, center: bool, unbiased: bool = False, out: Tensor | None = None
) -> Tensor:
    count = moments.count.to(torch.float64)
    offset = moments.first / count
    upper = torch.div(moments.second, count, out=out).addr_(offset, offset, alpha=-1)
    if not center:
        average = moments.origin + offset
        upper = upper.addr_(average, average)
    if unbiased:
        upper = upper.mul_(count / (count - 1))
    # Variances cannot be negative; round-off must not make them so.
    upper.diagonal().clamp_(min=0)
    return upper


def _block_rows(width: int) -> list[slice]:
    """Slices of rows that travel together: from width 128 on at most an eighth more than the upper triangle."""
    return rows_at_a_time(width, width, most=min(max(width // 8, 16), 64))
