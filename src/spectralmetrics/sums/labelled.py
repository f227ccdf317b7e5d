r"""Moments of labelled observations, and the sums of each class beside them.

With the observations :math:`x_i` of class :math:`y_i \in \{0, \dots, K - 1\}`, the sums
:math:`\sum_{i: y_i = c} (x_i - o)` and the number of each class are kept beside the moments of all
observations. A linear regression of the classes on the features needs no more, with any intercept and ridge.
Observations with a negative label have no class and are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from spectralmetrics.sums.arithmetic import flags_of_counted
from spectralmetrics.sums.folds import Folds, InFolds
from spectralmetrics.sums.intake import DenseIntake
from spectralmetrics.sums.merging import Piece
from spectralmetrics.sums.moments import Moments, empty_moments
from spectralmetrics.sums.observations import Observations


@dataclass(frozen=True)
class OfClasses(Moments):
    """The moments of labelled observations, and their sums by class: one fold of :class:`Labelled`.

    Attributes:
        class_counts: shape (K,), int64.
        class_origin: origin of the sums of the classes, shape (D,), float64.
        class_firsts: shape (K, D), float64.
        stray: number of labels of K and above, shape (), int64.
    """

    states: ClassVar[dict[str, str]] = {
        **Moments.states,
        "class_counts": "class_count",
        "class_origin": "class_origin",
        "class_firsts": "class_first_moment",
        "stray": "stray_labels",
    }

    class_counts: Tensor
    class_origin: Tensor
    class_firsts: Tensor
    stray: Tensor

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return (f"num_classes={len(self.class_counts)}",)

    def class_sums(self, about: Tensor) -> Tensor:
        """The sum of each class about a point (D,), shape (K, D), float64."""
        numbers = self.class_counts.to(torch.float64)[:, None]
        return self.class_firsts + numbers * (self.class_origin - about)

    def empty(self, num_features: int, device: torch.device | str | None = None) -> OfClasses:
        """See :class:`.Sum`."""
        return _empty(len(self.class_counts), num_features, device)

    def intake(self, gram_dtype: torch.dtype | None) -> LabelledIntake:
        """See :class:`.Sum`."""
        return LabelledIntake(gram_dtype)

    def merged(self, other: Self) -> Self:
        """See :class:`.Sum`."""
        merged = super().merged(other)
        return replace(merged, stray=self.stray + other.stray.to(self.stray.device))

    def together_with(self, other: Moments) -> OfClasses:
        """See :class:`.AboutOrigin`."""
        assert isinstance(other, OfClasses)
        larger = self.class_counts.sum() >= other.class_counts.sum()
        origin = torch.where(larger, self.class_origin, other.class_origin)
        return OfClasses(
            **vars(super().together_with(other)),
            class_counts=self.class_counts + other.class_counts,
            class_origin=origin,
            class_firsts=self.class_sums(origin) + other.class_sums(origin),
            stray=self.stray + other.stray,
        )

    def _pieces(self, origin: Tensor) -> Iterator[Piece]:
        """See :class:`.AboutOrigin`."""
        yield from super()._pieces(origin)
        yield from map(Piece.of, (self.class_counts, self.stray, self.class_sums(origin)))

    def _slots(self) -> Iterator[Tensor]:
        """See :class:`.AboutOrigin`."""
        yield from super()._slots()
        self.class_origin.copy_(self.origin)
        yield from (self.class_counts, self.stray, self.class_firsts)


@dataclass(frozen=True)
class Labelled(InFolds[OfClasses]):
    """The moments of g folds of labelled observations, and their sums by class.

    Attributes:
        counts, non_finites, origins, firsts, seconds: see :class:`~spectralmetrics.sums.Folds`.
        class_counts: shape (g, K), int64.
        class_origins: origin of the sums of the classes, shape (g, D), float64.
        class_firsts: shape (g, K, D), float64.
        strays: number of labels of K and above, shape (g,), int64.

    >>> sums = empty_labelled(2, 3)
    >>> intake = sums.intake(torch.float64)
    >>> rows = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [5.0, 5, 5]])
    >>> intake.add(sums, Observations(rows, labels=torch.tensor([0, 1, -1])), 0)
    >>> sums.class_counts, sums.class_means()
    (tensor([[1, 1]]), tensor([[-1.,  0.,  0.],
            [ 1.,  0.,  0.]], dtype=torch.float64))
    """

    of: ClassVar[type[Moments]] = OfClasses
    states: ClassVar[dict[str, str]] = {
        "seconds": "labelled_second_moment",
        "counts": "labelled_count",
        "non_finites": "labelled_non_finite",
        "origins": "labelled_origin",
        "firsts": "labelled_first_moment",
        "class_counts": "class_count",
        "class_origins": "class_origin",
        "class_firsts": "class_first_moment",
        "strays": "stray_labels",
    }
    additive: ClassVar[frozenset[str]] = InFolds.additive | {"class_counts", "class_firsts", "strays"}
    described: ClassVar[str] = "sums of each class"
    arrays: ClassVar[tuple[str, ...]] = (
        "class_counts",
        "class_deviations",
        "labelled_covariances",
        "labelled_means",
        "labelled_counts",
        "labelled_non_finites",
    )
    describes_layer: ClassVar[bool] = False

    class_counts: Tensor
    class_origins: Tensor
    class_firsts: Tensor
    strays: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.class_counts.shape[-1]

    @property
    def dense(self) -> Folds:
        """The moments, in folds; views of the stacked tensors."""
        return Folds(self.counts, self.non_finites, self.origins, self.firsts, self.seconds)

    @property
    def folds(self) -> tuple[OfClasses, ...]:
        """The sums of each fold; empty if there is only one."""
        return self.each if self.number > 1 else ()

    def class_means(self) -> Tensor:
        """The mean of each class in all folds, about the mean of all observations, shape (K, D), float64.

        Zero for a class without observations.
        """
        total = self.total
        # A mean is kept as origin and offset: their sum would lose the digits of data far from zero.
        sums = self.class_sums(total.origin).sum(0)
        numbers = self.class_counts.sum(0).to(torch.float64)[:, None]
        means = sums / numbers.clamp(min=1) - total.first / total.count.clamp(min=1)
        return torch.where(numbers > 0, means, 0)

    def class_sums(self, about: Tensor) -> Tensor:
        """The sum of each class in each fold about a point, shape (g, K, D), float64.

        Args:
            about: shape (D,), or (g, D) for a point of each fold.
        """
        numbers = self.class_counts.to(torch.float64)[..., None]
        return self.class_firsts + numbers * (self.class_origins - about)[:, None]

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return (f"num_classes={self.num_classes}", f"folds={self.number}")

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Labelled:
        """See :class:`.Sum`."""
        return empty_labelled(self.num_classes, num_features, device, folds=self.number)

    def in_range(self) -> Tensor:
        """True if no square has overflowed and no label was out of range."""
        return super().in_range() & (self.strays.sum() == 0)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        if self._given:  # computing arrays again that were read from a file would lose digits
            yield from self._given.items()
            return
        yield "class_counts", self.class_counts
        numbers = self.class_counts.to(torch.float64)[..., None]
        offsets = self.firsts / self.counts.clamp(min=1)[:, None]
        shifts = (self.class_origins - self.origins) - offsets
        yield "class_deviations", torch.where(numbers > 0, self.class_firsts / numbers + shifts[:, None], 0)
        for name, tensor in self.dense.parts():
            yield f"labelled_{name}", tensor

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Labelled:
        """See :class:`.Sum`."""
        counts, deviations, *parts = arrays = [read(name) for name in cls.arrays]
        dense = Folds.of_parts(*parts)
        restored = cls(
            **vars(dense),
            class_counts=counts,
            class_origins=dense.origins,
            class_firsts=counts.to(torch.float64)[..., None] * deviations,
            strays=torch.zeros_like(dense.counts),
        )
        return restored._as_given(**dict(zip(cls.arrays, arrays, strict=True)))


class LabelledIntake(DenseIntake):
    """Adds labelled batches to moments and to the sums of their classes."""

    reaches_other_devices = False
    keeps_rows = True

    def add(self, sums: Any, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        if observations.labels is None:
            raise ValueError("expected observations with labels")
        # A narrower dtype may not hold the number of classes.
        labels, classes = observations.labels.to(torch.int64), len(sums.class_counts)
        if observations.valid is not None:
            labels = torch.where(observations.valid, labels, -1)
        valid = (labels >= 0) & (labels < classes)
        strays = (labels >= classes).sum()
        with torch.inference_mode(False), torch.no_grad():
            rows = observations.rows().detach()
            if rows.device.type == "cpu" and bool(valid.all()):
                chosen = Observations(observations.values, observations.feature_dim)
            else:
                chosen = Observations(rows, -1, valid)
            super().add(sums, chosen, batch)
            sums.stray.add_(strays)
            self._add_classes(sums, rows, labels, valid)

    @staticmethod
    def _add_classes(sums: OfClasses, rows: Tensor, labels: Tensor, valid: Tensor) -> None:
        kept = flags_of_counted(rows, valid)
        origin = sums.class_origin
        # The first rows set the origin; sums about any origin near the data are exact.
        is_first = sums.class_counts.sum() == 0
        wide = torch.where(kept[:, None], rows, 0).to(torch.float64)
        mean = wide.sum(0) / kept.sum().clamp(min=1)
        origin.copy_(torch.where(is_first, mean, origin))
        centred = torch.where(kept[:, None], wide - origin, 0)
        index = torch.where(kept, labels, 0)
        sums.class_firsts.index_add_(0, index, centred)
        sums.class_counts.index_add_(0, index, kept.to(torch.int64))


def empty_labelled(
    num_classes: int, num_features: int, device: torch.device | str | None = None, *, folds: int = 1
) -> Labelled:
    """Sums by class without observations.

    Args:
        num_classes: number of classes K.
        num_features: the width D.
        device: device of the sums; the CPU by default.
        folds: number of folds g.

    >>> empty_labelled(10, 3).class_firsts.shape
    torch.Size([1, 10, 3])
    """
    return Labelled.stacked([_empty(num_classes, num_features, device)] * folds)


def _empty(num_classes: int, num_features: int, device: torch.device | str | None) -> OfClasses:
    moments = empty_moments(num_features, device)
    with torch.inference_mode(False):
        return OfClasses(
            **vars(moments),
            class_counts=moments.count.new_zeros(num_classes),
            class_origin=torch.zeros_like(moments.origin),
            class_firsts=moments.origin.new_zeros(num_classes, num_features),
            stray=torch.zeros_like(moments.count),
        )
