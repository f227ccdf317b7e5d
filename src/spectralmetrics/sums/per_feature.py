r"""Sums of single features, a few numbers each, in one pass over the observations.

For each feature: the sums of :math:`x - o` and :math:`(x - o)^2` about an origin :math:`o` near the data, which
give mean and variance with all their digits; and about zero the sum of :math:`|x|`, the number of values that
are not zero and the largest :math:`|x|`. On x86-64 the pass is compiled, see
:mod:`~spectralmetrics.sums.compiled`; PyTorch does the same everywhere else. Nothing is read from a device.

>>> import torch
>>> marginals = empty_marginals(2)
>>> intake = marginals.intake(None)
>>> intake.add(marginals, Observations(torch.tensor([[1.0, 0.0], [-3.0, 0.0], [torch.nan, 0.0]])), 0)
>>> marginals.mean(), marginals.variances()
(tensor([-1.,  0.], dtype=torch.float64), tensor([4., 0.], dtype=torch.float64))
>>> marginals.largest, marginals.zeros(), int(marginals.non_finite)
(tensor([3., 0.], dtype=torch.float64), tensor([0., 2.], dtype=torch.float64), 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from spectralmetrics.sums.about_origin import AboutOrigin, first_of, next_origin
from spectralmetrics.sums.arithmetic import flags_of_counted
from spectralmetrics.sums.measuring import measure
from spectralmetrics.sums.merging import ForReader, Largest, agree
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import Exchange, Intake, zeros


@dataclass(frozen=True)
class Marginals(AboutOrigin):
    """Sums of each feature on its own; the intake updates the tensors in place.

    Attributes:
        count: the number of finite observations n, shape (), int64.
        non_finite: the number of observations left out, shape (), int64.
        origin: shape (D,), float64.
        totals: for each feature the sums of x − o, (x − o)² and |x|, and the number of values that are not
            zero; shape (4, D), float64.
        largest: the largest magnitude of each feature, shape (D,), float64.
    """

    states: ClassVar[dict[str, str]] = {
        "totals": "marginal_totals",
        "largest": "marginal_largest",
        "count": "marginal_count",
        "non_finite": "marginal_non_finite",
        "origin": "marginal_origin",
    }
    described: ClassVar[str] = "marginals"
    additive: ClassVar[frozenset[str]] = frozenset({"count", "non_finite", "totals"})
    arrays: ClassVar[tuple[str, ...]] = (
        "marginal_variances",
        "marginal_mean",
        "marginal_magnitudes",
        "marginal_nonzeros",
        "marginal_largest",
        "marginal_count",
        "marginal_non_finite",
    )
    describes_layer: ClassVar[bool] = False
    keeps_products: ClassVar[bool] = False

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    totals: Tensor
    largest: Tensor

    @property
    def first(self) -> Tensor:  # type: ignore[override]  # a row of `totals`
        """The vector sum about the origin, shape (D,), float64."""
        return self.totals[0]

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Marginals:
        """See :class:`.Sum`."""
        return empty_marginals(num_features, device)

    def intake(self, gram_dtype: torch.dtype | None) -> MarginalsIntake:
        """See :class:`.Sum`."""
        return MarginalsIntake()

    def squares(self) -> Tensor:
        """See :class:`.AboutOrigin`."""
        return self.totals[1]

    def about(self, origin: Tensor) -> Marginals:
        """See :class:`.AboutOrigin`."""
        first, squares, *about_zero = self.totals
        shift = self.origin - origin
        moved = first + self.count.to(torch.float64) * shift
        totals = torch.stack([moved, squares + shift * (first + moved), *about_zero])
        return replace(self, origin=origin, totals=totals)

    def together_with(self, other: Marginals) -> Marginals:
        """See :class:`.AboutOrigin`."""
        return replace(super().together_with(other), largest=torch.maximum(self.largest, other.largest))

    def exchange(self, known: Marginals | None, rank: int, world_size: int) -> Exchange:
        """See :class:`.Sum`.

        The origin is the mean of the process with most observations, so that features which are constant
        everywhere keep a variance of exactly zero. Only the few numbers of the first step grow with the number
        of processes.
        """
        own = self.count.reshape(1)
        width, counts = yield from agree(self.num_features, known is not None, rank, world_size, own)
        if not width:
            return known if width is None else None
        mine = self if self.num_features else self.empty(width, self.count.device)
        mean = torch.full_like(mine.origin, -torch.inf)  # below every mean
        if rank == int(counts.argmax()):
            mean = mine.origin + mine.first / mine.count.clamp(min=1)
        extremes = yield torch.stack([mine.largest, mean]).as_subclass(Largest)
        largest, origin = extremes
        numbers = torch.stack([mine.count, mine.non_finite]).to(torch.float64)
        received = yield torch.cat([numbers, mine.about(origin).totals.flatten()]).as_subclass(ForReader)
        if received is None:
            return None
        count, non_finite = received[:2].to(torch.int64)
        totals = received[2:].reshape(mine.totals.shape)
        return replace(mine, count=count, non_finite=non_finite, origin=origin, totals=totals, largest=largest)

    def num_exchanged(self, num_features: int, world_size: int) -> int:
        """See :class:`.Sum`."""
        return 6 * num_features

    def magnitudes(self) -> Tensor:
        """The mean magnitude of each feature, shape (D,), float64."""
        given: Tensor | None = self._given.get("magnitudes")
        return self.totals[2] / self.count if given is None else given

    def zeros(self) -> Tensor:
        """The number of values of each feature that are zero, shape (D,), float64."""
        return self.count - self.totals[3]

    def zero_shares(self) -> Tensor:
        """The share of each feature's values that are zero, shape (D,), float64."""
        return self.zeros() / self.count

    def covariance(self, *, center: bool = True) -> NoReturn:
        """Always raise a RuntimeError: marginals hold no matrix."""
        raise RuntimeError(
            f"the covariance of {self.num_features} features is not kept, only sums of each feature: add a"
            " metric that keeps it, such as SaturationMetric()"
        )

    def eigenvalues(self, *, center: bool = True) -> NoReturn:
        """See :meth:`covariance`."""
        self.covariance()

    def eigenvectors(self, *, center: bool = True) -> NoReturn:
        """See :meth:`covariance`."""
        self.covariance()

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        means = self.variances(), self.mean(), self.magnitudes()
        rest = self.totals[3], self.largest, self.count, self.non_finite
        yield from zip(self.arrays, (*means, *rest), strict=True)

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Marginals:
        """See :class:`.Sum`."""
        variances, mean, magnitudes, nonzeros, largest, count, non_finite = map(read, cls.arrays)
        marginals = cls(
            count=count,
            non_finite=non_finite,
            origin=mean,
            totals=torch.stack([torch.zeros_like(mean), variances * count, magnitudes * count, nonzeros]),
            largest=largest,
        )
        return marginals._as_given(variances=variances, magnitudes=magnitudes)


class MarginalsIntake(Intake):
    """Adds batches; moves the origin to the data, ever less often."""

    reaches_other_devices = True
    keeps_rows = False

    def __init__(self) -> None:
        self._origin_is_near = False
        self._accumulations = 0

    def add(self, sums: Marginals, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        self._accumulations += 1
        with torch.inference_mode(False), torch.no_grad():
            milestone = self._accumulations <= 4 or self._accumulations.bit_count() == 1
            if milestone or not self._origin_is_near:
                _follow(sums, observations)
            measured = measure(observations, sums.origin)
            sums.totals.add_(measured.totals)
            torch.maximum(sums.largest, measured.largest, out=sums.largest)
            if measured.counts.is_cpu:  # adding Python numbers is faster than adding tensors
                count, left_out = measured.counts.tolist()
                sums.count.add_(count)
                if left_out:
                    sums.non_finite.add_(left_out)
            else:
                sums.count.add_(measured.counts[0])
                sums.non_finite.add_(measured.counts[1])
        if self._accumulations == 1:
            self.meet(sums)

    def meet(self, sums: Marginals) -> None:
        """See :class:`.Intake`."""
        self._accumulations = max(self._accumulations, 1)
        self._origin_is_near = int(sums.count) > 0


def empty_marginals(num_features: int, device: torch.device | str | None = None) -> Marginals:
    """Marginals without observations.

    Args:
        num_features: the width D.
        device: device of the sums; the CPU by default.

    >>> empty_marginals(3).totals.shape
    torch.Size([4, 3])
    """
    width = (num_features,)
    return Marginals(**zeros(device, count=(), non_finite=(), origin=width, totals=(4, *width), largest=width))


def _follow(sums: Marginals, observations: Observations) -> None:
    """Move the origin, and the sums with it, to the mean of a batch, unless its rows are too few."""
    # Measure about a row, so that constant features are centred to exactly zero.
    rows = observations.rows().detach()
    first = first_of(flags_of_counted(rows, observations.valid))
    pivot = rows.index_select(0, first)[0].to(sums.origin.device, torch.float64)
    origin = torch.where(sums.count > 0, sums.origin, torch.where(pivot.isfinite(), pivot, 0))
    measured = measure(observations, origin)
    nearer = next_origin(sums, origin, measured.totals[0], measured.counts[0])
    # Without observations the sums are zero and the origin has no meaning: a shift must leave them zero.
    sums.totals.copy_(sums.about(torch.where(sums.count > 0, nearer, sums.origin)).totals)
    sums.origin.copy_(nearer)
