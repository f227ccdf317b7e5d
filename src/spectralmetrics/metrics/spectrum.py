"""The covariance, its spectrum, and observations in the basis of its leading eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.plotting import plot_covariance, plot_embedding, plot_spectrum
from spectralmetrics.sums import Reservoir, Sum, empty_reservoir, kept_rows
from spectralmetrics.sums.checks import check_positive_integer, check_seed


class CovarianceMetric(SpectralMetric):
    r"""The covariance :math:`\Sigma = \frac{1}{n} \sum_i (x_i - \mu)(x_i - \mu)^\top`.

    ``compute`` returns a symmetric tensor of shape (D, D), float64.

    Args:
        num_features: the width D; None reads it from the first rows.
        unbiased: divide by :math:`n - 1`; ``compute`` then needs two observations.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        RuntimeError: from ``compute``, if ``unbiased`` and a single observation has been counted.

    Example:
        >>> import torch
        >>> metric = CovarianceMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> metric.compute()
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """

    short_name = "covariance"
    needs_eigenvalues = False
    has_interval = False

    def __init__(self, num_features: int | None = None, unbiased: bool = False, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.unbiased = unbiased

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        if not self.unbiased:
            return spectrum.covariance
        count = int(spectrum.num_observations)
        if count < 2:
            raise RuntimeError(f"expected at least 2 observations for unbiased=True, got {count}")
        return spectrum.covariance * (count / (count - 1))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the covariance as an image, the last of a sequence. See :meth:`SpectralMetric.plot`."""
        values = self.compute() if val is None else val
        return plot_covariance(values if isinstance(values, Tensor) else values[-1], ax=ax)


class SpectrumMetric(SpectralMetric):
    r"""The eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D` of the covariance.

    ``compute`` returns a tensor of shape (D,), float64; from a sketch the leading k, each a lower bound.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = SpectrumMetric()
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute()
        tensor([1., 0.], dtype=torch.float64)
    """

    short_name = "spectrum"
    suits_sketches = True
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return spectrum.eigenvalues

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the eigenvalues, one line for each spectrum. See :meth:`SpectralMetric.plot`."""
        return plot_spectrum(self.compute() if val is None else val, ax=ax)


class EigenspaceEmbeddingMetric(SpectralMetric):
    r"""A uniform sample of the observations, centred, in the basis of the leading eigenvectors.

    .. math:: z_i = (v_1, \dots, v_k)^\top (x_i - \mu)

    ``compute`` returns a tensor of shape (m, k), float64: m is the smaller of ``max_samples`` and the number of
    finite observations, k the smaller of ``num_components`` and D. Besides the sums, the state holds the
    sample and its random keys, drawn from a generator of the metric's own (the global random state is left
    alone), so this metric shares no state with others in a ``MetricCollection``.

    Args:
        num_features: the width D; None reads it from the first rows.
        num_components: number of eigenvectors k.
        max_samples: largest number of observations m.
        seed: seed of the sample. Give different seeds to metrics that you merge yourself (``merge_state``), or
            they sample the same positions of both streams; processes of a group draw differently by themselves.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        ValueError: if ``num_components`` or ``max_samples`` is not a positive integer, or ``seed`` is negative.

    Example:
        >>> import torch
        >>> metric = EigenspaceEmbeddingMetric(num_components=1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [5.0, 0.0]]))
        >>> metric.compute().abs()
        tensor([[2.],
                [2.]], dtype=torch.float64)
    """

    short_name = "embedding"
    suits_sketches = True
    needs_eigenvectors = True
    has_interval = False

    sample_keys: Tensor
    sample_rows: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        num_components: int = 2,
        max_samples: int = 1024,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_positive_integer("num_components", num_components)
        check_positive_integer("max_samples", max_samples)
        check_seed(seed)
        self.num_components = num_components
        self.max_samples = max_samples
        self.seed = seed
        super().__init__(num_features, **kwargs)

    def other_sums(self) -> Sequence[Sum]:
        """See :meth:`SpectralMetric.other_sums`."""
        return (empty_reservoir(self.max_samples, 0, seed=self.seed),)

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return spectrum.coordinates(kept_rows(spectrum.part(Reservoir)), self.num_components)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the first two components, the last of a sequence. See :meth:`SpectralMetric.plot`."""
        values = self.compute() if val is None else val
        return plot_embedding(values if isinstance(values, Tensor) else values[-1], ax=ax)
