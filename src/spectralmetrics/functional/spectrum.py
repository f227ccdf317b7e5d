"""The lazily decomposed :class:`Spectrum`: everything that a statistic may read from a layer's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from spectralmetrics.functional.held_out import LeftOut, fold_products, leave_one_out
from spectralmetrics.sums import (
    Marginals,
    Moments,
    Sketch,
    SpectralSum,
    Sum,
    eigenvalues,
    eigenvectors,
    moments_of_covariance,
)
from spectralmetrics.sums.checks import check_positive_integer, check_real, check_type

__all__ = ["Spectrum", "eigenvalues", "eigenvectors"]

S = TypeVar("S", bound=Sum)
_LEFT_OUT = LeftOut._fields  # keys in the cache of a spectrum, read with one fold left out at a time


class Spectrum:
    """Everything that a statistic may read from a layer's features; each part is computed once, on first use.

    Args:
        sums: sums over at least one observation, such as ``Moments``.
        center: False reads the second moment about zero instead of the covariance.
        cache: dict that keeps decompositions, so that several spectra of the same sums share them.
        others: sums of other kinds over the same observations, see :meth:`part`.
        device: device of everything that is read; None: the device of the sums.

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
        device: torch.device | None = None,
    ) -> None:
        check_type("sums", sums, SpectralSum)
        self.sums = sums
        self.center = center
        self._cache = {} if cache is None else cache
        self._others = others
        self._device = device

    def at(self, device: torch.device | None) -> Spectrum:
        """The same spectrum, with everything that is read on a device; None: on the device of the sums."""
        return Spectrum(self.sums, center=self.center, cache=self._cache, others=self._others, device=device)

    def about(self, *, center: bool) -> Spectrum:
        """The spectrum of the same observations about their mean, or about zero."""
        return Spectrum(self.sums, center=center, cache=self._cache, others=self._others, device=self._device)

    @classmethod
    def of_covariance(
        cls, covariance: Tensor, mean: Tensor, count: int | Tensor, *, center: bool = True
    ) -> Spectrum:
        """The spectrum of a known covariance, for example one from a file.

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
        if not self.sums.folds:
            return self.sums  # not cached: a cache that holds the sums would keep them alive
        if "total" not in self._cache:
            self._cache["total"] = self.sums.total
        total: SpectralSum = self._cache["total"]
        return total

    @property
    def moments(self) -> Moments:
        """The dense sums themselves, all folds merged."""
        total = self._total
        if not isinstance(total, Moments):
            raise TypeError(f"expected dense sums, got {type(total).__name__}, which keep no moments")
        return total if self._device is None else total.map(self._on_device)

    @property
    def sketch(self) -> Sketch | None:
        """The sketch that is kept in place of the covariance; None if the covariance itself is kept.

        With a sketch, :attr:`eigenvalues` are lower bounds of the leading k, and :attr:`eigenvectors` has k
        columns.
        """
        total = self._total
        return total if isinstance(total, Sketch) else None

    def part(self, kind: type[S]) -> S:
        """The sum of another kind over the same observations.

        Raises:
            TypeError: for anything but a kind of sum.
            ValueError: if there is none.
        """
        if not (isinstance(kind, type) and issubclass(kind, Sum)):
            raise TypeError(f"expected a kind of sum, a subclass of Sum, got {kind!r}")
        for each in (self.sums, *self._others):
            if isinstance(each, kind):
                return each if self._device is None else each.map(self._on_device)
        raise ValueError(f"expected {kind.described} beside the moments; none was kept")

    def has(self, kind: type[Sum]) -> bool:
        """True if :meth:`part` has a sum of another kind."""
        return any(isinstance(each, kind) for each in (self.sums, *self._others))

    @property
    def num_features(self) -> int:
        """The width D."""
        return self.sums.num_features

    @property
    def num_observations(self) -> Tensor:
        """The number of observations n, shape (), int64."""
        return self._on_device(self.sums.num_observations)

    @property
    def num_left_out(self) -> Tensor:
        """The number of observations left out for a NaN or an infinity, shape (), int64."""
        return self._on_device(self.sums.num_left_out)

    @property
    def mean(self) -> Tensor:
        """The mean of the observations, shape (D,), float64, also where ``center`` is False."""
        return self._kept("mean", lambda: self._total.mean())

    @property
    def variances(self) -> Tensor:
        """The diagonal of :attr:`covariance`, shape (D,), float64."""
        return self._kept("variances", lambda: self._total.variances(center=self.center))

    @property
    def total_variance(self) -> Tensor:
        """The trace of :attr:`covariance`, shape (), float64."""
        return self.variances.sum()

    @property
    def second_moments(self) -> Tensor:
        """The mean square of each feature, about zero, shape (D,), float64."""
        return self.about(center=False).variances

    @property
    def magnitudes(self) -> Tensor:
        """The mean magnitude of each feature, from marginals, shape (D,), float64."""
        return self._kept("magnitudes", lambda: self.part(Marginals).magnitudes())

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each feature, from marginals, shape (D,), float64."""
        return self._kept("largest", lambda: self.part(Marginals).largest)

    @property
    def zero_shares(self) -> Tensor:
        """The share of zeros among the values of each feature, from marginals, shape (D,), float64."""
        return self._kept("zero_shares", lambda: self.part(Marginals).zero_shares())

    @property
    def square_sum(self) -> Tensor:
        """An estimate of the sum of squared eigenvalues, from a sketch, shape (), float64."""
        return self.square_share * self.total_variance.square()

    @property
    def square_share(self) -> Tensor:
        """The :attr:`square_sum` as a share of the squared trace, which no magnitude takes out of range."""
        sketch = self.sketch
        assert sketch is not None

        def read() -> Tensor:
            image = sketch.covariance_image(center=self.center)
            return (image / sketch.variances(center=self.center).sum()).square_().sum() / sketch.size

        return self._kept("square_share", read)

    @property
    def covariance(self) -> Tensor:
        """The covariance, shape (D, D), float64; computed each time, since it is as large as the state."""
        return self._on_device(self._total.covariance(center=self.center))

    @property
    def eigenvalues(self) -> Tensor:
        """Descending eigenvalues, shape (D,), float64."""
        return self._kept("eigenvalues", lambda: self._total.eigenvalues(center=self.center))

    @property
    def eigenvectors(self) -> Tensor:
        """Orthonormal eigenvectors in columns, shape (D, D), float64, in the order of the eigenvalues."""

        def decompose() -> Tensor:
            values, vectors = self._total.eigenvectors(center=self.center)
            self._cache["eigenvalues", self.center] = values
            return vectors

        return self._kept("eigenvectors", decompose)

    # -- to decompose several spectra at once, see `together` --------------------------------------------

    @property
    def home(self) -> torch.device:
        """The device of the sums."""
        return self.sums.num_observations.device

    @property
    def identity(self) -> tuple[int, bool]:
        """A key that is equal for spectra with the same cache and ``center``."""
        return id(self._cache), self.center

    def knows(self, name: str, device: torch.device | None = None) -> bool:
        """True if the cache holds a part such as ``"eigenvalues"``, or its copy on a device."""
        return ((name, self.center) if device is None else (name, self.center, device)) in self._cache

    def matrix(self) -> Tensor | None:
        """See :meth:`.SpectralSum.matrix`."""
        return self._total.matrix(center=self.center)

    def learn(self, name: str, value: Tensor, device: torch.device | None = None) -> None:
        """Store a value that was read elsewhere."""
        self._cache[(name, self.center) if device is None else (name, self.center, device)] = value

    def known(self) -> dict[tuple[str, bool], Tensor]:
        """The eigenvalues in the cache, also of folds: (name, center) -> values on the CPU."""
        names = ("eigenvalues", *_LEFT_OUT)
        return {key[:2]: value.cpu() for key, value in self._cache.items() if key[0] in names}

    def learn_known(self, known: Mapping[tuple[str, bool], Tensor]) -> None:
        """Store the :meth:`known` values of another spectrum of these sums."""
        for (name, center), value in known.items():
            self.about(center=center).learn(name, value.to(self.home))

    def _kept(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """Read a value once from the sums, and copy it once to each device."""
        if self._device is not None and self.home != self._device:
            copied: Tensor | None = self._cache.get((name, self.center, self._device))
            if copied is None:
                copied = getattr(self.at(None), name).to(self._device)
                self.learn(name, copied, self._device)
            return copied
        if not self.knows(name):
            self.learn(name, read())
        value: Tensor = self._cache[name, self.center]
        return value

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)

    def coordinates(self, rows: Tensor, num_components: int | None = None) -> Tensor:
        """Observations about the mean in the basis of the leading eigenvectors.

        Args:
            rows: shape (N, D), floating; observations of the same layer, these or others.
            num_components: number of eigenvectors k; None: all D.

        Returns:
            Shape (N, k), float64.

        Raises:
            TypeError: for rows that are not a tensor of real numbers.
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
        total = self._total if self._device is None else self._total.map(self._on_device)
        return total.centred(self._on_device(rows)) @ self.eigenvectors[:, :num_components]

    @property
    def fold_products(self) -> Tensor:
        """See :func:`~.functional.held_out.fold_products`; shape (g, 1 + g), float64."""
        folds: Any = self.sums.folds  # of moments
        return self._kept("fold_products", lambda: fold_products(folds, self.center))

    @property
    def num_folds(self) -> int:
        """The number of folds g in which the observations were kept; 1 without folds."""
        return max(len(self.sums.folds), 1)

    def held_out(self) -> Spectrum | None:
        """A spectrum of variances of a fold along directions of the others; None if a fold is empty.

        Its eigenvalues are the result of
        :func:`~spectralmetrics.functional.held_out_eigenvalues`, and its covariance has them along the
        eigenvectors of all data.

        Raises:
            RuntimeError: if the observations were kept in one fold.
        """
        values = self._left_out("held_out")
        return None if values is None else _OtherEigenvalues(self, values)

    def without_each_fold(self) -> list[Spectrum]:
        """The spectra of all folds but one, each along the eigenvectors of all; empty if a fold is empty.

        Raises:
            RuntimeError: if the observations were kept in one fold.
        """
        values = self._left_out("others")
        return [] if values is None else [_OtherEigenvalues(self, each) for each in values]

    def _left_out(self, name: str) -> Tensor | None:
        """A field of :class:`LeftOut`; None if a fold is empty."""
        if self.num_folds < 2:
            raise RuntimeError("expected observations kept in folds, got one: give the metric folds=8, say")
        if not self.knows(name):
            folds: Any = self.sums.folds
            if any(int(fold.num_observations) == 0 for fold in folds):
                return None
            left_out = leave_one_out(folds, self.center)
            for each, value in zip(_LEFT_OUT, left_out, strict=True):
                self.learn(each, value)
        return self._on_device(self._cache[name, self.center])


class _OtherEigenvalues(Spectrum):
    """A spectrum with other eigenvalues along the same eigenvectors."""

    def __init__(self, plain: Spectrum, values: Tensor) -> None:
        super().__init__(plain.sums, center=plain.center, others=plain._others, device=plain._device)
        self._plain = plain
        self._values = values

    @property
    def _total(self) -> SpectralSum:
        return self._plain._total

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

    @property
    def variances(self) -> Tensor:
        return self._plain.eigenvectors.square() @ self._values

    @property
    def total_variance(self) -> Tensor:
        return self._values.sum()
