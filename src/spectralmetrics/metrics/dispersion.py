"""Statistics that say how widely a layer's features spread."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmetrics.functional import dispersion
from spectralmetrics.functional.sketched import Estimate
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.base import SpectralMetric


class CovarianceTraceMetric(SpectralMetric):
    r"""The total variance :math:`\operatorname{tr} \Sigma`, in squared units of the features.

    ``compute`` returns a tensor of shape (), float64.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = CovarianceTraceMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    short_name = "covariance_trace"
    suits_sketches = True
    needs_eigenvalues = False
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return spectrum.total_variance


class CovarianceDeterminantMetric(SpectralMetric):
    r"""The generalised variance :math:`\det \Sigma` (Wilks 1932), or its logarithm.

    ``compute`` returns a tensor of shape (), float64. The determinant itself underflows to 0 in any wide
    layer: prefer ``log=True``.

    Args:
        num_features: the width D; None reads it from the first rows.
        log: return :math:`\log \det \Sigma`, −inf where the covariance is singular.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> metric = CovarianceDeterminantMetric()
        >>> metric.update(rows)
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)
        >>> metric = CovarianceDeterminantMetric(log=True)
        >>> metric.update(rows[:2])
        >>> metric.compute()
        tensor(-inf, dtype=torch.float64)
    """

    short_name = "covariance_determinant"
    needs_eigenvalues = False

    def __init__(self, num_features: int | None = None, log: bool = False, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.log = log

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dispersion.determinant(spectrum.covariance, log=self.log)


class DiagonalTraceMetric(SpectralMetric):
    r"""The trace of the diagonalised covariance, :math:`\sum_i \max(\lambda_i, 0)`.

    ``compute`` returns a tensor of shape (), float64. It equals the total variance up to round-off.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = DiagonalTraceMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    short_name = "diagonal_trace"
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return dispersion.diagonal_trace(spectrum.eigenvalues)

    def from_sketch(self, spectrum: Spectrum) -> Estimate:
        """See :meth:`SpectralMetric.from_sketch`."""
        return Estimate(*[spectrum.total_variance] * 3)
