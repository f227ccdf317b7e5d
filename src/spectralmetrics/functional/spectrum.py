r"""Eigenvalues and eigenvectors of a covariance, and the lazily decomposed :class:`Spectrum`.

The eigenvalues of a covariance are not negative; what a symmetric eigensolver returns below zero, or
within its error bound of zero, is round-off and counts as zero.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from spectralmetrics.functional import moments as _moments
from spectralmetrics.functional.moments import Moments


def eigenvalues(covariance: Tensor) -> Tensor:
    r"""Eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D \ge 0` of a covariance matrix.

    Values below :math:`16 \max(D, 16)\, \epsilon \lambda_1` (:math:`\epsilon` of float64), which sums of many
    products and the eigensolver cannot tell from zero, are returned as zero.

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
    return _without_round_off(values.flip(-1))


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
    values, vectors = torch.linalg.eigh(check_covariance(covariance), UPLO="U")
    vectors = vectors.flip(-1)
    # Entries that agree up to round-off must not take turns at being the largest: prefer the first.
    magnitude = vectors.abs()
    nearly_largest = magnitude >= magnitude.amax(-2, keepdim=True) * (1 - 1e-6)
    leading = nearly_largest.to(torch.uint8).argmax(-2, keepdim=True)
    sign = torch.where(vectors.gather(-2, leading) < 0, -1.0, 1.0)
    return _without_round_off(values.flip(-1)), vectors * sign + 0.0


class Spectrum:
    """Everything that a statistic may read of a layer's features, each part computed once, when asked for.

    Args:
        moments: sums over the observations, at least one of them.
        center: False reads the second moment about zero instead of the covariance.
        cache: where decompositions are kept, so that several spectra of the same moments share them.

    >>> from spectralmetrics.functional.moments import Observations, accumulate, empty_moments
    >>> moments = empty_moments(2)
    >>> accumulate(moments, Observations(torch.tensor([[0.0, 1.0], [2.0, 1.0]])))
    >>> spectrum = Spectrum(moments)
    >>> spectrum.eigenvalues
    tensor([1., 0.], dtype=torch.float64)
    >>> spectrum.mean
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self, moments: Moments, *, center: bool = True, cache: dict[str, Tensor] | None = None
    ) -> None:
        self._moments = moments
        self.center = center
        self._cache = {} if cache is None else cache
        self._given: Tensor | None = None

    @classmethod
    def of_covariance(
        cls, covariance: Tensor, mean: Tensor, count: int | Tensor, *, center: bool = True
    ) -> Spectrum:
        """The spectrum of a covariance that is already there, such as one read from a file.

        Args:
            covariance: symmetric, about the mean and divided by n, shape (D, D).
            mean: shape (D,).
            count: the number of observations n.
            center: False reads the second moment about zero.

        >>> Spectrum.of_covariance(torch.diag(torch.tensor([1.0, 4.0])), torch.zeros(2), 10).eigenvalues
        tensor([4., 1.], dtype=torch.float64)
        """
        covariance, mean = check_covariance(covariance), mean.to(torch.float64)
        moments = Moments(
            count=torch.as_tensor(count, dtype=torch.int64, device=covariance.device),
            non_finite=torch.zeros((), dtype=torch.int64, device=covariance.device),
            origin=mean,
            first=torch.zeros_like(mean),
            second=covariance * count,
        )
        spectrum = cls(moments, center=center)
        # Multiplied by n and divided again it would differ in its last digits.
        spectrum._given = covariance if center else covariance.addr(mean, mean)
        return spectrum

    @property
    def moments(self) -> Moments:
        """The sums themselves."""
        return self._moments

    @property
    def num_features(self) -> int:
        """The width D."""
        return self._moments.num_features

    @property
    def num_observations(self) -> Tensor:
        """The number of observations n, shape (), int64."""
        return self._moments.count

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the observations, shape (D,), float64, also where ``center`` is False."""
        return _moments.mean(self._moments)

    @cached_property
    def variances(self) -> Tensor:
        """The diagonal of :attr:`covariance`, shape (D,), float64."""
        return _moments.variances(self._moments, center=self.center)

    @property
    def covariance(self) -> Tensor:
        """The covariance, shape (D, D), float64; made anew each time, since it is as large as the state."""
        if self._given is not None:
            return self._given
        return _moments.covariance(self._moments, center=self.center)

    @property
    def eigenvalues(self) -> Tensor:
        """Descending eigenvalues, shape (D,), float64."""
        if "eigenvalues" not in self._cache:
            self._cache["eigenvalues"] = eigenvalues(self._upper_covariance())
        return self._cache["eigenvalues"]

    @property
    def eigenvectors(self) -> Tensor:
        """Orthonormal eigenvectors in columns, shape (D, D), float64, in the order of the eigenvalues."""
        if "eigenvectors" not in self._cache:
            self._cache["eigenvalues"], self._cache["eigenvectors"] = eigenvectors(self._upper_covariance())
        return self._cache["eigenvectors"]

    def _upper_covariance(self) -> Tensor:
        """All that the eigensolver reads of the covariance, without the passes that make it symmetric."""
        if self._given is not None:
            return self._given
        return _moments.upper_covariance(self._moments, center=self.center)

    def coordinates(self, rows: Tensor, num_components: int | None = None) -> Tensor:
        """Observations about the mean in the basis of the leading eigenvectors.

        Args:
            rows: shape (N, D), floating; observations of the same layer, these or others.
            num_components: number of eigenvectors k; None: all D.

        Returns:
            Shape (N, k), float64.

        >>> spectrum = Spectrum.of_covariance(torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2), 10)
        >>> spectrum.coordinates(torch.tensor([[3.0, 2.0]]), 1)
        tensor([[1.]], dtype=torch.float64)
        """
        # The mean as one number per feature loses digits that origin and offset keep.
        centred = (rows.to(torch.float64) - self._moments.origin) - self._moments.first / self._moments.count
        return centred @ self.eigenvectors[:, :num_components]


def check_covariance(covariance: Tensor) -> Tensor:
    """The covariance in float64; a ValueError unless it is square and finite."""
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"expected a covariance of shape (..., D, D), got {tuple(covariance.shape)}")
    covariance = covariance.to(torch.float64)
    if not torch.isfinite(covariance).all():
        raise ValueError("expected a finite covariance, got one that holds NaN or infinite values")
    return covariance


def _without_round_off(values: Tensor) -> Tensor:
    return torch.where(values > values[..., :1] * round_off(values.shape[-1]), values, 0)


def round_off(features: int) -> float:
    """What a sum of many float64 products and an eigensolver may leave of a zero, relative to the largest."""
    return 16 * max(features, 16) * torch.finfo(torch.float64).eps
