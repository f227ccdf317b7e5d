"""Statistics that say how many directions a layer's features fill."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmetrics.functional import dimension, sketched
from spectralmetrics.functional.dimension import Rule, check_fit_range, check_rule, check_threshold
from spectralmetrics.functional.held_out import (
    clipped_ratio,
    participation_interval,
    participation_of_products,
)
from spectralmetrics.functional.sketched import Estimate
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.metrics.statistic import Interval


class _ThresholdMetric(SpectralMetric):
    """A statistic with a share of variance to explain and a rule for counting it."""

    counts_directions = True

    def __init__(
        self,
        num_features: int | None = None,
        threshold: float = 0.99,
        rule: Rule = "explained",
        **kwargs: Any,
    ) -> None:
        threshold = check_threshold(threshold)
        check_rule(rule)
        super().__init__(num_features, **kwargs)
        self.threshold = threshold
        self.rule: Rule = rule


class IntrinsicDimensionMetric(_ThresholdMetric):
    r"""The number of leading eigendirections that explain a share of the variance.

    .. math:: \min \{ k : \lambda_1 + \dots + \lambda_k \ge \delta \textstyle\sum_i \lambda_i \}

    (`arXiv:1907.08589 <https://arxiv.org/abs/1907.08589>`_, `arXiv:2006.08679
    <https://arxiv.org/abs/2006.08679>`_). ``compute`` returns a tensor of shape (), int64.

    Args:
        num_features: the width D; None reads it from the first rows.
        threshold: the share :math:`\delta` in (0, 1].
        rule: ``"delve"`` counts as Delve 0.1.50 does, see
            :func:`~spectralmetrics.functional.intrinsic_dimension`.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        ValueError: for a threshold outside (0, 1] or an unknown rule.

    Example:
        >>> import torch
        >>> metric = IntrinsicDimensionMetric(threshold=0.9)
        >>> metric.update(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(1)
    """

    short_name = "intrinsic_dimension"
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dimension.intrinsic_dimension(spectrum.eigenvalues, self.threshold, self.rule)

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """See :meth:`SpectralMetric.from_sketch`."""
        arguments = spectrum.eigenvalues, spectrum.total_variance, spectrum.num_features
        return sketched.intrinsic_dimension(*arguments, self.threshold, self.rule)


class SaturationMetric(_ThresholdMetric):
    r"""The intrinsic dimension as a share of the layer's width, between 0 and 1.

    .. math:: \frac{1}{D} \min \{ k : \lambda_1 + \dots + \lambda_k \ge \delta \textstyle\sum_i \lambda_i \}

    (`arXiv:2006.08679 <https://arxiv.org/abs/2006.08679>`_). ``compute`` returns a tensor of shape (),
    float64.

    Args:
        num_features: the width D; None reads it from the first rows.
        threshold: the share of variance to explain, in (0, 1].
        rule: ``"delve"`` counts as Delve 0.1.50 does, see
            :func:`~spectralmetrics.functional.intrinsic_dimension`.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        ValueError: for a threshold outside (0, 1] or an unknown rule.

    Example:
        >>> import torch
        >>> metric = SaturationMetric(threshold=0.9)
        >>> metric.update(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    short_name = "saturation"
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dimension.saturation(spectrum.eigenvalues, self.threshold, self.rule)

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """See :meth:`SpectralMetric.from_sketch`."""
        arguments = spectrum.eigenvalues, spectrum.total_variance, spectrum.num_features
        return sketched.saturation(*arguments, self.threshold, self.rule)


class EffectiveRankMetric(SpectralMetric):
    r"""The exponential of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007).

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i / \sum_j \sigma_j,
              \quad \sigma_i = \sqrt{n \lambda_i}

    With ``center=False`` it is RankMe (`arXiv:2210.02885 <https://arxiv.org/abs/2210.02885>`_). ``compute``
    returns a tensor of shape (), float64, between 1 and D, or 0 for constant features.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = EffectiveRankMetric()
        >>> metric.update(torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(1.6494, dtype=torch.float64)
    """

    short_name = "effective_rank"
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dimension.effective_rank(spectrum.eigenvalues)


class ParticipationRatioMetric(SpectralMetric):
    r"""The participation ratio :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2` (Gao et al. 2017).

    ``compute`` returns a tensor of shape (), float64, between 1 and D, or 0 for constant features.

    Few observations give too small a ratio. ``unbiased=True`` reads the value for unlimited data from folds,
    see :func:`~spectralmetrics.functional.unbiased_participation_ratio`: 24 observations of 192 independent
    features give 20, and 194 ± 24 without bias. It warns where few observations give a value above D, and
    returns D. The value is NaN until two folds hold two observations.

    Args:
        num_features: the width D; None reads it from the first rows.
        unbiased: True reads the value for unlimited data; needs ``folds``, and no other memory.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        TypeError: for an ``unbiased`` that is not True or False.
        ValueError: for ``unbiased=True`` with a sketch, which keeps no folds.
        RuntimeError: from ``compute``, for ``unbiased=True`` without folds.

    Example:
        >>> import torch
        >>> metric = ParticipationRatioMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)

        96 observations of 50 large and 142 small features, whose ratio is 62:

        >>> rows = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
        >>> rows[:, 50:] *= 0.2
        >>> plain, unbiased = ParticipationRatioMetric(), ParticipationRatioMetric(unbiased=True, folds=8)
        >>> for batch in rows.split(6):
        ...     plain.update(batch)
        ...     unbiased.update(batch)
        >>> plain.compute().round(), unbiased.compute().round()
        (tensor(37., dtype=torch.float64), tensor(61., dtype=torch.float64))
    """

    short_name = "participation_ratio"
    plot_lower_bound = 0.0

    def __init__(self, num_features: int | None = None, unbiased: bool = False, **kwargs: Any) -> None:
        if not isinstance(unbiased, bool):
            raise TypeError(f"expected unbiased to be True or False, got {unbiased!r}")
        super().__init__(num_features, **kwargs)
        if unbiased and self.sketch_size is not None:
            raise ValueError(
                f"expected no sketch with unbiased=True, got sketch_size={self.sketch_size}: it keeps no folds"
            )
        self.unbiased = unbiased
        if unbiased:
            self.needs_eigenvalues = False

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        if not self.unbiased:
            return dimension.participation_ratio(spectrum.eigenvalues)
        return clipped_ratio(self._products(spectrum), spectrum.num_features)

    def interval_of(self, spectrum: Spectrum) -> Interval:
        """See :meth:`SpectralMetric.interval_of`; without bias, a margin on both sides of the value."""
        if not self.unbiased:
            return super().interval_of(spectrum)
        return Interval(*participation_interval(self._products(spectrum), spectrum.num_features))

    def clips(self, spectrum: Spectrum) -> bool:
        """See :meth:`SpectralMetric.clips`."""
        if not self.unbiased:
            return False
        ratio = participation_of_products(self._products(spectrum))
        return bool(ratio > spectrum.num_features * (1 + 1e-9))

    def check_folds(self) -> None:
        """See :meth:`SpectralMetric.check_folds`."""
        if self.unbiased and self.folds < 2:
            raise ValueError(
                f"expected folds with unbiased=True, got folds={self.folds}; give the probe folds=8"
            )

    def _products(self, spectrum: Spectrum) -> Tensor:
        if spectrum.sketch is not None or spectrum.num_folds < 2:
            kept = "a sketch" if spectrum.sketch is not None else "one fold"
            raise RuntimeError(
                f"{type(self).__name__}(unbiased=True) compares folds, but its observations are kept in {kept};"
                " make it with folds=8, say"
            )
        return spectrum.fold_products

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """See :meth:`SpectralMetric.from_sketch`."""
        if self.unbiased:
            self._products(spectrum)
        arguments = spectrum.eigenvalues, spectrum.total_variance, spectrum.square_share
        return sketched.participation_ratio(*arguments)


class StableRankMetric(SpectralMetric):
    r"""The stable rank :math:`\sum_i \lambda_i / \lambda_1` (Rudelson & Vershynin 2007).

    ``compute`` returns a tensor of shape (), float64, between 1 and D, or 0 for constant features.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = StableRankMetric()
        >>> metric.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(1.2500, dtype=torch.float64)
    """

    short_name = "stable_rank"
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dimension.stable_rank(spectrum.eigenvalues)

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """See :meth:`SpectralMetric.from_sketch`."""
        return sketched.stable_rank(spectrum.eigenvalues, spectrum.total_variance)


class PowerLawExponentMetric(SpectralMetric):
    r"""The exponent :math:`\alpha` of :math:`\lambda_i \propto i^{-\alpha}` (α-ReQ, NeurIPS 2022).

    Least squares on :math:`(\log i, \log \lambda_i)` for ``first`` :math:`\le i \le` ``last``. ``compute``
    returns a tensor of shape (), float64, NaN where fewer than two positive eigenvalues lie in the range.

    Args:
        num_features: the width D; None reads it from the first rows.
        first: first index of the fit, counted from 1.
        last: last index of the fit, inclusive; None: up to the last positive eigenvalue.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        ValueError: if ``first`` is below 1 or ``last`` is not above ``first``.

    Example:
        >>> import torch
        >>> metric = PowerLawExponentMetric()
        >>> metric.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    short_name = "power_law_exponent"

    def __init__(
        self, num_features: int | None = None, first: int = 1, last: int | None = None, **kwargs: Any
    ) -> None:
        check_fit_range(first, last)
        super().__init__(num_features, **kwargs)
        self.first = first
        self.last = last

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dimension.power_law_exponent(spectrum.eigenvalues, self.first, self.last)
