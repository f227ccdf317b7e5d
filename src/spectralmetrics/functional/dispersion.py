r"""The spread of features: traces and the determinant of a covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.functional.dimension import check_eigenvalues
from spectralmetrics.sums.decomposition import check_covariance, check_square, round_off


def trace(covariance: Tensor) -> Tensor:
    r"""The total variance :math:`\operatorname{tr} \Sigma`.

    Args:
        covariance: shape (..., D, D).

    Returns:
        Shape (...), float64.

    Raises:
        ValueError: if the last two dimensions are not square.

    >>> trace(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    tensor(5., dtype=torch.float64)
    """
    check_square(covariance)
    return covariance.to(torch.float64).diagonal(dim1=-2, dim2=-1).sum(-1)


def determinant(covariance: Tensor, log: bool = False) -> Tensor:
    r"""The generalised variance :math:`\det \Sigma` (Wilks 1932), or its logarithm.

    With the standard deviations :math:`s_i` and the correlation matrix :math:`R = L L^\top`,

    .. math:: \log \det \Sigma = 2 \sum_i \log s_i + 2 \sum_i \log L_{ii},

    which neither underflows nor depends on the features' units. The covariance counts as singular where a
    feature is constant, or a linear combination of the features before it up to round-off.

    Args:
        covariance: symmetric positive semi-definite, shape (..., D, D).
        log: return the logarithm, −inf where singular. The determinant itself underflows to 0 in any wide
            layer.

    Returns:
        Shape (...), float64.

    Raises:
        ValueError: if the last two dimensions are not square, or a value is not finite.

    >>> covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> determinant(covariance)
    tensor(5.0000, dtype=torch.float64)
    >>> determinant(covariance, log=True)
    tensor(1.6094, dtype=torch.float64)
    """
    covariance = check_covariance(covariance)
    deviations = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    units = torch.where(deviations > 0, deviations, 1.0)
    # Divided one side at a time: the product of two tiny deviations could underflow.
    correlation = covariance / units[..., :, None] / units[..., None, :]
    factor, failed = torch.linalg.cholesky_ex(correlation)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # Row k of L⁻¹ is (−x, 1) / Lₖₖ, with x the regression of feature k on the features before it. The round-off
    # in a pivot Lₖₖ² of zero grows with (1 + Σ|x|)².
    unit = torch.eye(covariance.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    certain = inverse.abs().sum(-1).square() * round_off(covariance.shape[-1]) < 1
    regular = (failed == 0) & certain.all(-1) & (deviations > 0).all(-1)
    logarithm = 2 * (units.log().sum(-1) + pivots.log().sum(-1))
    logarithm = torch.where(regular, logarithm, -torch.inf)
    return logarithm if log else logarithm.exp()


def diagonal_trace(eigenvalues: Tensor) -> Tensor:
    r"""The trace of the diagonalised covariance, :math:`\sum_i \max(\lambda_i, 0)`.

    Args:
        eigenvalues: shape (..., D).

    Returns:
        Shape (...), float64.

    >>> diagonal_trace(torch.tensor([2.0, 1.0, -1e-17]))
    tensor(3., dtype=torch.float64)
    """
    check_eigenvalues(eigenvalues)
    return eigenvalues.to(torch.float64).clamp(min=0).sum(-1)
