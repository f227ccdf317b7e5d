"""What sums about an origin near the data have in common, whatever they keep of the products."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from spectralmetrics.sums.sum import SpectralSum


class AboutOrigin(SpectralSum):
    """A sum over deviations from an origin: their number, their vector sum and their squares are known exactly.

    Attributes:
        count: the number of finite observations n, shape (), int64.
        non_finite: the number left out, shape (), int64.
        origin: shape (D,), float64.
        first: the vector sum about the origin, shape (D,), float64.
    """

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first: Tensor

    @property
    def num_observations(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.count

    @property
    def num_left_out(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.non_finite

    @abstractmethod
    def squares(self) -> Tensor:
        """The sum of the squares of each feature about the origin, shape (D,), float64."""

    @abstractmethod
    def about(self, origin: Tensor) -> Self:
        """The same sums about another origin, exactly up to rounding; this one is left as it was.

        Args:
            origin: shape (D,), float64.
        """

    def together_with(self, other: Self) -> Self:
        """The sums of two disjoint sets of observations of one width, on one device; neither is changed."""
        # The origin of the larger side lies nearer to the common mean.
        origin = torch.where(self.count >= other.count, self.origin, other.origin)
        plain: tuple[Any, Any] = (self.plain(), other.plain())
        left, right = (each.about(origin) for each in plain)
        added = {name: getattr(left, name) + getattr(right, name) for name in self.additive}
        return cast("Self", replace(left, **added))

    def merged(self, other: Self) -> Self:
        """See :class:`.Sum`."""
        if other.settings() != self.settings():
            raise ValueError(f"expected a state of {self.settings()} to merge, got one of {other.settings()}")
        other = other.map(lambda tensor: tensor.to(self.count.device))
        if other.num_features == 0:
            return replace(self, non_finite=self.non_finite + other.non_finite)  # type: ignore[type-var]
        if self.num_features == 0:
            copied = other.map(torch.clone)
            return replace(copied, non_finite=copied.non_finite + self.non_finite)  # type: ignore[type-var]
        return self.together_with(other)

    def in_range(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.squares().isfinite().all()

    def mean(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.origin + self.first / self.count

    def centred(self, rows: Tensor) -> Tensor:
        """See :class:`.SpectralSum`."""
        return (rows.to(torch.float64) - self.origin) - self.first / self.count

    def variances(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        offset = self.first / self.count
        about_mean = (self.squares() / self.count - offset.square()).clamp_(min=0)
        return about_mean if center else about_mean + (self.origin + offset).square()
