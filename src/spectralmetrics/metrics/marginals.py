"""Statistics of each feature by itself, which keep no matrix and take any width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from spectralmetrics.functional import marginals as functional
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import Wanted
from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.sums import SpectralSum, empty_marginals
from spectralmetrics.sums.checks import check_positive_integer

Part = Literal["mean", "variances", "second_moments", "magnitudes", "largest", "zero_shares"]


class MarginalMetric(SpectralMetric):
    """Base class of statistics of each feature by itself.

    The state holds a few numbers for each feature and no matrix, so that a layer may be of any width.
    ``update`` takes rows of shape (N, D) in any floating dtype. In a probe, a metric that needs only variances
    reads them from the covariance, if another metric keeps one.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`. ``center`` is True, ``folds`` 1 and ``sketch_size`` None.

    Raises:
        ValueError: for other values of these three.
    """

    needs_eigenvalues = False
    has_interval = False
    suits_sketches = True
    parts: ClassVar[Sequence[Part]]
    """The parts of a spectrum that :meth:`statistic` reads."""
    _reads_matrix = False

    def __init__(self, num_features: int | None = None, **kwargs: Any) -> None:
        kind = type(self).__name__
        if not kwargs.get("center", True):
            raise ValueError(
                f"expected center=True for {kind}, whose definition says what it is about, got"
                f" {kwargs['center']!r}"
            )
        if kwargs.get("sketch_size") is not None:
            raise ValueError(
                f"expected sketch_size=None for {kind}, which keeps no matrix at any width, got"
                f" {kwargs['sketch_size']!r}"
            )
        super().__init__(num_features, **kwargs)
        if self.folds > 1:
            raise ValueError(f"expected folds=1 for {kind}, of which there are no intervals, got {self.folds}")

    @property
    def can_read_matrix(self) -> bool:
        """True if this metric can be read from a sum that keeps a covariance."""
        return {"mean", "variances", "second_moments"} >= set(self.parts) and not self.other_sums()

    def reading(self, other: SpectralMetric) -> MarginalMetric:
        """A metric with the same settings and without observations, to share the sums of another metric."""
        twin = copy.deepcopy(self)
        twin._reads_matrix = True
        twin.folds, twin.sketch_size, twin.gram_dtype = other.folds, other.sketch_size, other.gram_dtype
        twin.accumulate_instead((twin.spectral_sum(),))
        return twin

    def spectral_sum(self) -> SpectralSum:
        """See :meth:`SpectralMetric.spectral_sum`."""
        return super().spectral_sum() if self._reads_matrix else empty_marginals(0)

    def with_folds(self, folds: int) -> SpectralMetric:
        """See :meth:`SpectralMetric.with_folds`; marginals have no folds."""
        check_positive_integer("folds", folds)
        twin = copy.deepcopy(self)
        twin.reset()
        return twin

    def sketch_instead(self, sketch_size: int) -> None:
        """See :meth:`SpectralMetric.sketch_instead`; marginals stay as they are."""
        if self._reads_matrix:
            super().sketch_instead(sketch_size)

    def wanted(self, device: torch.device | None = None) -> list[Wanted]:
        """See :meth:`SpectralMetric.wanted`."""
        spectrum = self._shared_spectrum(device)
        return [
            Wanted(spectrum.about(center=False), "variances")
            if part == "second_moments"
            else Wanted(spectrum, part)
            for part in self.parts
        ]


class RootMeanSquareMetric(MarginalMetric):
    r"""The scale of a layer's features.

    .. math:: \sqrt{\frac{1}{D} \sum_j E[x_j^2]}

    ``compute`` returns a tensor of shape (), float64, in the unit of the features.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = RootMeanSquareMetric()
        >>> metric.update(torch.tensor([[1.0, 3.0], [1.0, -1.0]]))
        >>> metric.compute()
        tensor(1.7321, dtype=torch.float64)
    """

    short_name = "rms"
    parts = ("second_moments",)
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.root_mean_square(spectrum.second_moments)


class SpreadMetric(MarginalMetric):
    r"""The share of the features' mean square that varies between observations.

    .. math:: \frac{\operatorname{tr} \Sigma}{E \|x\|^2}

    Near 0 where all inputs give about the same output: the layer has collapsed to its mean. ``compute`` returns
    a tensor of shape (), float64, between 0 and 1.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = SpreadMetric()
        >>> metric.update(torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
        >>> metric.compute()
        tensor(0.0714, dtype=torch.float64)
    """

    short_name = "spread"
    parts = ("variances", "second_moments")
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.spread(spectrum.variances, spectrum.second_moments)


class SignalToNoiseMetric(MarginalMetric):
    r"""The squared mean of the observations divided by their variance.

    .. math:: \frac{\|\mu\|^2}{\operatorname{tr} \Sigma}

    For gradients (``observe="gradients"`` of :class:`~spectralmetrics.LayerProbe`) it says how far the
    observations agree. Its inverse is the number of observations whose mean is as large as its error; for
    gradients with respect to parameters, McCandlish et al. (2018) call the inverse the simple noise scale. The
    value is about 1/n for n unrelated observations. ``compute`` returns a tensor of shape (), float64; infinite
    if all observations are the same, and 0 if they are zero.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = SignalToNoiseMetric()
        >>> metric.update(torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
        >>> metric.compute()
        tensor(13., dtype=torch.float64)
    """

    short_name = "signal_to_noise"
    parts = ("mean", "variances")
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.signal_to_noise(spectrum.mean, spectrum.variances)


class MaxAbsMetric(MarginalMetric):
    r"""The largest magnitude of any feature in any observation, :math:`\max |x_{ij}|`.

    ``compute`` returns a tensor of shape (), float64, in the unit of the features.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = MaxAbsMetric()
        >>> metric.update(torch.tensor([[1.0, -3.0], [2.0, 1.0]]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    short_name = "max_abs"
    parts = ("largest",)
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.max_abs(spectrum.largest)


class ZeroShareMetric(MarginalMetric):
    r"""The share of all values that are exactly zero, such as values that a ReLU has cut off.

    .. math:: \frac{1}{n D} \, |\{ (i, j) : x_{ij} = 0 \}|

    ``compute`` returns a tensor of shape (), float64, between 0 and 1.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = ZeroShareMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    short_name = "zero_share"
    parts = ("zero_shares",)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.zero_share(spectrum.zero_shares)


class DeadFeaturesMetric(MarginalMetric):
    r"""The share of features that never change, :math:`\frac{1}{D} |\{ j : \operatorname{Var} x_j = 0 \}|`.

    ``compute`` returns a tensor of shape (), float64, between 0 and 1; 1 for a single observation.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = DeadFeaturesMetric()
        >>> metric.update(torch.tensor([[1.0, 0.1], [2.0, 0.1]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    short_name = "dead_features"
    parts = ("variances",)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.dead_features(spectrum.variances)


class DormantFeaturesMetric(MarginalMetric):
    r"""The share of features that are nearly inactive, compared with the average of their layer.

    Feature j counts if :math:`E|x_j| \le \tau \frac{1}{D} \sum_k E|x_k|` (`arXiv:2302.12902
    <https://arxiv.org/abs/2302.12902>`_). ``compute`` returns a tensor of shape (), float64, between 0 and 1.

    Args:
        num_features: the width D; None reads it from the first rows.
        tau: the threshold :math:`\tau`, not negative.
        kwargs: see :class:`MarginalMetric`.

    Raises:
        ValueError: for a ``tau`` that is negative or no number.

    Example:
        >>> import torch
        >>> metric = DormantFeaturesMetric()
        >>> metric.update(torch.tensor([[1.0, 0.01], [-2.0, 0.02]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    short_name = "dormant_features"
    parts = ("magnitudes",)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, num_features: int | None = None, tau: float = 0.025, **kwargs: Any) -> None:
        tau = functional.check_tau(tau)
        super().__init__(num_features, **kwargs)
        self.tau = tau

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.dormant_features(spectrum.magnitudes, self.tau)


class OutlierFeaturesMetric(MarginalMetric):
    r"""The kurtosis of the features' scales: large if a few features dominate their layer.

    .. math:: \frac{\frac{1}{D} \sum_j E[x_j^2]^2}{\left(\frac{1}{D} \sum_j E[x_j^2]\right)^2}

    (`arXiv:2405.19279 <https://arxiv.org/abs/2405.19279>`_). ``compute`` returns a tensor of shape (), float64:
    1 where all features have the same scale, D where one has all the energy.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`MarginalMetric`.

    Example:
        >>> import torch
        >>> metric = OutlierFeaturesMetric()
        >>> metric.update(torch.tensor([[1.0, 9.0], [-1.0, 9.0]]))
        >>> metric.compute()
        tensor(1.9518, dtype=torch.float64)
    """

    short_name = "outlier_features"
    parts = ("second_moments",)
    plot_lower_bound = 1.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return functional.outlier_features(spectrum.second_moments)
