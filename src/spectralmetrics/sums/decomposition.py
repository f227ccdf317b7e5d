r"""Eigenvalues and eigenvectors of a covariance.

The eigenvalues of a covariance are not negative; values that a symmetric eigensolver returns below zero, or
within its error bound of zero, are round-off and count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.sums.checks import are_all_finite, check_real


def eigenvalues(covariance: Tensor) -> Tensor:
    r"""Eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D \ge 0` of a covariance matrix.

    Values below :math:`16 \max(D, 16)\, \epsilon \lambda_1` (:math:`\epsilon` of float64), the round-off of
    sums of many products and of the eigensolver, are returned as zero.

    Args:
        covariance: symmetric positive semi-definite, shape (..., D, D), floating.

    Returns:
        Shape (..., D), float64, descending.

    Raises:
        ValueError: if the last two dimensions are not square, or a value is not finite.

    >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([3., 1.], dtype=torch.float64)
    """
    values = torch.linalg.eigvalsh(check_covariance(covariance), UPLO="U")
    return without_round_off(values.flip(-1))


def eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues as :func:`eigenvalues` gives them, and the orthonormal eigenvectors.

    The sign of each eigenvector is fixed: its entry of largest magnitude is positive (the first of them
    where several are equal), so that the result is reproducible across machines.

    Args:
        covariance: symmetric positive semi-definite, shape (..., D, D), floating.

    Returns:
        Eigenvalues (..., D) and eigenvectors (..., D, D), one in each column, both float64.

    Raises:
        ValueError: if the last two dimensions are not square, or a value is not finite.

    >>> values, vectors = eigenvectors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> values
    tensor([4., 3.], dtype=torch.float64)
    >>> vectors
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    values, vectors = ascending_eigenvectors(covariance)
    return values, with_fixed_signs(vectors.flip(-1)).add_(0.0)


def ascending_eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`eigenvectors`, but vectors keep the solver's order, last first, and the solver's signs."""
    values, vectors = torch.linalg.eigh(check_covariance(covariance), UPLO="U")
    return without_round_off(values.flip(-1)), vectors


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """Vectors, one in each column, turned so that the entry of largest magnitude is positive."""
    # Prefer the first of entries that are equal up to round-off: round-off must not decide the sign.
    magnitude = vectors.abs()
    nearly_largest = magnitude >= magnitude.amax(-2, keepdim=True) * (1 - 1e-6)
    leading = nearly_largest.to(torch.uint8).argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, leading) < 0, -1.0, 1.0)


def check_square(covariance: Tensor) -> None:
    """Raise a TypeError or ValueError unless these are real numbers of shape (..., D, D)."""
    check_real("a covariance", covariance)
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2] or covariance.shape[-1] == 0:
        raise ValueError(f"expected a covariance of shape (..., D, D), got {tuple(covariance.shape)}")


def check_covariance(covariance: Tensor) -> Tensor:
    """The covariance in float64; a TypeError or ValueError unless it is real, square and finite."""
    check_square(covariance)
    covariance = covariance.to(torch.float64)
    if not are_all_finite(covariance):
        raise ValueError("expected a finite covariance, got one that holds NaN or infinite values")
    return covariance


def without_round_off(values: Tensor) -> Tensor:
    """Descending eigenvalues, with zero for values that may be the round-off of a zero."""
    return torch.where(values > values[..., :1] * round_off(values.shape[-1]), values, 0)


def round_off(features: int) -> float:
    """The round-off of many float64 products and an eigensolver, relative to the largest eigenvalue."""
    return 16 * max(features, 16) * torch.finfo(torch.float64).eps


def symmetrise(upper: Tensor) -> Tensor:
    """The symmetric matrix with the given upper triangle; values below the diagonal are ignored.

    >>> symmetrise(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    return upper.triu().add_(upper.triu(1).mT)
