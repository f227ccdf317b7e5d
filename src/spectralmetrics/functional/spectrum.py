"""The lazily decomposed :class:`Spectrum`: everything that a statistic may read of a layer's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from spectralmetrics.functional.held_out import LeftOut, leave_one_out
from spectralmetrics.sums import Moments, SpectralSum, Sum, eigenvalues, eigenvectors, moments_of_covariance
from spectralmetrics.sums.checks import check_positive_integer, check_real, check_type

__all__ = ["Spectrum", "eigenvalues", "eigenvectors"]

S = TypeVar("S", bound=Sum)


class Spectrum:
    """Everything that a statistic may read of a layer's features, each part computed once, when asked for.

    Args:
        sums: over the observations, at least one of them; such as ``Moments``.
        center: False reads the second moment about zero instead of the covariance.
        cache: where decompositions are kept, so that several spectra of the same sums share them.
        others: sums of other kinds over the same observations, see :meth:`part`.

    >>> import torch
    >>> from spectralmetrics.functional import Observations, accumulate, empty_moments
    >>> moments = empty_moments(2)
    >>> accumulate(moments, Observations(torch.tensor([[0.0, 1.0], [2.0, 1.0]])))
    >>> spectrum = Spectrum(moments)
    >>> spectrum.eigenvalues
    tensor([1., 0.], dtype=torch.float64)
    >>> spectrum.mean
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        sums: SpectralSum,
        *,
        center: bool = True,
        cache: dict[Any, Any] | None = None,
        others: Sequence[Sum] = (),
    ) -> None:
        check_type("sums", sums, SpectralSum)
        self._sums = sums
        self.center = center
        self._cache = {} if cache is None else cache
        self._others = others

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

        >>> import torch
        >>> Spectrum.of_covariance(torch.diag(torch.tensor([1.0, 4.0])), torch.zeros(2), 10).eigenvalues
        tensor([4., 1.], dtype=torch.float64)
        """
        return cls(moments_of_covariance(covariance, mean, count), center=center)

    @property
    def _total(self) -> SpectralSum:
        if not self._sums.folds:
            return self._sums  # not to be cached: a cache that holds the sums would keep them alive
        if "total" not in self._cache:
            self._cache["total"] = self._sums.total
        total: SpectralSum = self._cache["total"]
        return total

    @property
    def moments(self) -> Moments:
        """The dense sums themselves, all folds together."""
        total = self._total
        if not isinstance(total, Moments):
            raise TypeError(f"expected dense sums, got {type(total).__name__}, which keep no moments")
        return total

    def part(self, kind: type[S]) -> S:
        """The sum of another kind over the same observations.

        Raises:
            TypeError: for what is no kind of sum.
            ValueError: if there is none.
        """
        if not (isinstance(kind, type) and issubclass(kind, Sum)):
            raise TypeError(f"expected a kind of sum, a subclass of Sum, got {kind!r}")
        for each in self._others:
            if isinstance(each, kind):
                return each
        raise ValueError(f"expected {kind.described} beside the moments; none was kept")

    def has(self, kind: type[Sum]) -> bool:
        """Whether there is a sum of another kind for :meth:`part`."""
        return any(isinstance(each, kind) for each in self._others)

    @property
    def num_features(self) -> int:
        """The width D."""
        return self._sums.num_features

    @property
    def num_observations(self) -> Tensor:
        """The number of observations n, shape (), int64."""
        return self._sums.num_observations

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the observations, shape (D,), float64, also where ``center`` is False."""
        return self._total.mean()

    @cached_property
    def variances(self) -> Tensor:
        """The diagonal of :attr:`covariance`, shape (D,), float64."""
        return self._total.variances(center=self.center)

    @property
    def total_variance(self) -> Tensor:
        """The trace of :attr:`covariance`, shape (), float64."""
        return self.variances.sum()

    @property
    def covariance(self) -> Tensor:
        """The covariance, shape (D, D), float64; made anew each time, since it is as large as the state."""
        return self._total.covariance(center=self.center)

    @property
    def eigenvalues(self) -> Tensor:
        """Descending eigenvalues, shape (D,), float64."""
        key = ("eigenvalues", self.center)
        if key not in self._cache:
            self._cache[key] = self._total.eigenvalues(center=self.center)
        found: Tensor = self._cache[key]
        return found

    @property
    def eigenvectors(self) -> Tensor:
        """Orthonormal eigenvectors in columns, shape (D, D), float64, in the order of the eigenvalues."""
        key = ("eigenvectors", self.center)
        if key not in self._cache:
            values, vectors = self._total.eigenvectors(center=self.center)
            self._cache["eigenvalues", self.center], self._cache[key] = values, vectors
        found: Tensor = self._cache[key]
        return found

    def coordinates(self, rows: Tensor, num_components: int | None = None) -> Tensor:
        """Observations about the mean in the basis of the leading eigenvectors.

        Args:
            rows: shape (N, D), floating; observations of the same layer, these or others.
            num_components: number of eigenvectors k; None: all D.

        Returns:
            Shape (N, k), float64.

        Raises:
            TypeError: for rows that are no tensor of real numbers.
            ValueError: for rows of another shape, or a number of eigenvectors below 1.

        >>> import torch
        >>> spectrum = Spectrum.of_covariance(torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2), 10)
        >>> spectrum.coordinates(torch.tensor([[3.0, 2.0]]), 1)
        tensor([[1.]], dtype=torch.float64)
        """
        check_real("rows", rows)
        if rows.ndim != 2 or rows.shape[1] != self.num_features:
            raise ValueError(f"expected rows of shape (N, {self.num_features}), got {tuple(rows.shape)}")
        check_positive_integer("num_components", num_components, or_none=True)
        return self._total.centred(rows) @ self.eigenvectors[:, :num_components]

    @property
    def num_folds(self) -> int:
        """The number of folds g in which the observations were kept; 1 if they were kept in one."""
        return max(len(self._sums.folds), 1)

    def held_out(self) -> Spectrum | None:
        """What the directions fitted to some folds hold of the variance of the others; None with an empty fold.

        Its eigenvalues are those of
        :func:`~spectralmetrics.functional.held_out_eigenvalues`, and its covariance has them along the
        eigenvectors of all data.

        Raises:
            RuntimeError: if the observations were kept in one fold.
        """
        left_out = self._left_out()
        return None if left_out is None else _OtherEigenvalues(self, left_out.held_out)

    def without_each_fold(self) -> list[Spectrum]:
        """The spectra of all folds but one, each along the eigenvectors of all; empty with an empty fold.

        Raises:
            RuntimeError: if the observations were kept in one fold.
        """
        left_out = self._left_out()
        return [] if left_out is None else [_OtherEigenvalues(self, values) for values in left_out.others]

    def _left_out(self) -> LeftOut | None:
        if self.num_folds < 2:
            raise RuntimeError("expected observations kept in folds, got one: give the metric folds=8, say")
        key = ("left out", self.center)
        if key not in self._cache:
            folds = self._sums.folds
            if any(int(fold.num_observations) == 0 for fold in folds):
                return None
            self._cache[key] = leave_one_out([_dense(fold) for fold in folds], center=self.center)
        found: LeftOut = self._cache[key]
        return found


class _OtherEigenvalues(Spectrum):
    """A spectrum with other eigenvalues along the same eigenvectors."""

    def __init__(self, plain: Spectrum, values: Tensor) -> None:
        super().__init__(plain._sums, center=plain.center, others=plain._others)
        self._plain = plain
        self._values = values

    @property
    def eigenvalues(self) -> Tensor:
        return self._values

    @property
    def eigenvectors(self) -> Tensor:
        return self._plain.eigenvectors

    @property
    def covariance(self) -> Tensor:
        vectors = self._plain.eigenvectors
        return (vectors * self._values) @ vectors.mT

    @cached_property
    def variances(self) -> Tensor:
        return self._plain.eigenvectors.square() @ self._values

    @property
    def total_variance(self) -> Tensor:
        return self._values.sum()


def _dense(fold: SpectralSum) -> Moments:
    assert isinstance(fold, Moments)
    return fold
