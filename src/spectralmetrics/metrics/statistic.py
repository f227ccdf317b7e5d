"""A statistic: how a value is read from a spectrum, and what it needs; no state and no sums."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from spectralmetrics.functional.held_out import sampling_margin
from spectralmetrics.functional.sketched import Estimate
from spectralmetrics.functional.spectrum import Spectrum


class Interval(NamedTuple):
    """Two values expected to enclose a statistic's value for unlimited data.

    Attributes:
        low: the smaller, of the statistic's shape; NaN if it is unknown.
        high: the larger, of the statistic's shape; NaN if it is unknown.
    """

    low: Tensor
    high: Tensor


class Statistic:
    """Reads the value of a metric from a spectrum; the metric adds the sums."""

    is_statistic: ClassVar[bool] = True
    """True if the value does not depend on how the observations were divided into batches."""
    short_name: ClassVar[str]
    """The statistic's key in a probe's values and its name in tables; defining it registers the class."""
    needs_eigenvectors: ClassVar[bool] = False
    """True if :meth:`statistic` reads eigenvectors; a probe then decomposes once for all metrics."""
    needs_eigenvalues: bool = True
    """True if :meth:`statistic` reads eigenvalues; if False, a probe decomposes nothing for it."""
    needs_labels: ClassVar[bool] = False
    """True if ``update`` takes labels beside the rows."""
    suits_sketches: ClassVar[bool] = False
    """True if :meth:`statistic` can read a sketch as it is; if False, :meth:`from_sketch` must read it."""
    counts_directions: ClassVar[bool] = False
    """True if the value is a number or share of directions, which other draws of the data hardly change."""
    has_interval: ClassVar[bool] = True
    """True if :meth:`statistic` can also read held-out eigenvalues."""
    sketch_size: int | None
    plot_lower_bound: float | None

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """The value of this metric for the given spectrum; every subclass defines it."""
        raise NotImplementedError(f"{type(self).__name__} must define `statistic(self, spectrum)`")

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """The value for a sketched spectrum, with bounds that hold for certain.

        Raises:
            RuntimeError: for a statistic that needs the whole spectrum.
        """
        if not self.suits_sketches:
            raise RuntimeError(
                f"{type(self).__name__} cannot be read from a sketch: it needs the whole spectrum or the matrix"
            )
        value = self._tensor(self.statistic(spectrum), spectrum)
        return Estimate(value, value, value)

    def value_of(self, spectrum: Spectrum) -> Tensor:
        """The value for a given spectrum, exact or sketched."""
        if spectrum.sketch is not None:
            return self.from_sketch(spectrum).value
        return self._tensor(self.statistic(spectrum), spectrum)

    def interval_of(self, spectrum: Spectrum) -> Interval:
        """The value of :meth:`interval` for a given spectrum.

        Raises:
            RuntimeError: if the observations were kept in one fold.
        """
        if spectrum.sketch is not None:
            return Interval(*self.from_sketch(spectrum)[1:])
        held_out = spectrum.held_out()
        plain = self.value_of(spectrum)
        if held_out is None:
            low = plain.to(torch.float64)
            return Interval(low, torch.full_like(low, torch.nan))
        other = self.value_of(held_out)
        low, high = torch.minimum(plain, other), torch.maximum(plain, other)
        if not self.counts_directions:
            margin = sampling_margin([self.value_of(each) for each in spectrum.without_each_fold()])
            low, high = low - margin, high + margin
            if self.plot_lower_bound is not None:
                low = low.clamp(min=self.plot_lower_bound)
        return Interval(low, high)

    def clips(self, spectrum: Spectrum) -> bool:
        """True if few observations gave an impossible value, which the limit replaces."""
        return False

    def misses(self, value: Tensor) -> bool:
        """True if a value shows that a sketch was too small."""
        return self.sketch_size is not None and self.counts_directions and bool(value.isnan().any())

    def check_folds(self) -> None:
        """Raise a ValueError if :meth:`statistic` compares folds and there is only one; a probe calls it."""

    @staticmethod
    def _tensor(value: Any, spectrum: Spectrum) -> Tensor:
        if isinstance(value, Tensor):
            return value
        # A user's statistic may return a number.
        dtype = torch.float64 if isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device=spectrum.num_observations.device)
