r"""Moments of labelled observations, and the sums of each class beside them.

With the observations :math:`x_i` of class :math:`y_i \in \{0, \dots, K - 1\}`, the sums
:math:`\sum_{i: y_i = c} (x_i - o)` and the number of each class are kept besides the moments of all of them.
That is all that a linear regression of the classes on the features needs, with any intercept and any ridge.
Observations without a label, of a negative one, are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from spectralmetrics.sums.folds import Folds, FoldsIntake, InFolds, empty_folds
from spectralmetrics.sums.merging import ForReader, agree, together
from spectralmetrics.sums.moments import Moments
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.precision import are_finite
from spectralmetrics.sums.sum import Exchange, Intake


@dataclass(frozen=True)
class Labelled(InFolds):
    """The moments of g folds of labelled observations, and their sums by class.

    Attributes:
        counts, non_finites, origins, firsts, seconds: see :class:`~spectralmetrics.sums.Folds`.
        class_counts: shape (g, K), int64.
        class_origins: what the sums of the classes are about, shape (g, D), float64.
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
    additive: ClassVar[frozenset[str]] = frozenset(
        {"counts", "non_finites", "firsts", "seconds", "class_counts", "class_firsts", "strays"}
    )
    described: ClassVar[str] = "sums of each class"
    arrays: ClassVar[tuple[str, ...]] = (
        "class_counts",
        "class_deviations",
        "labelled_covariances",
        "labelled_means",
        "labelled_counts",
        "labelled_non_finites",
    )
    counts_batches: ClassVar[bool] = True
    describes_layer: ClassVar[bool] = False
    views: ClassVar[str] = "dense"

    counts: Tensor
    non_finites: Tensor
    origins: Tensor
    firsts: Tensor
    seconds: Tensor
    class_counts: Tensor
    class_origins: Tensor
    class_firsts: Tensor
    strays: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.class_counts.shape[-1]

    @cached_property
    def dense(self) -> Folds:
        """The moments, in folds; views of the tensors here."""
        return Folds(self.counts, self.non_finites, self.origins, self.firsts, self.seconds)

    @property
    def total(self) -> Moments:
        """The moments of all folds together."""
        return self.dense.total

    @property
    def folds(self) -> tuple[Moments, ...]:
        """The moments of each fold; empty if there is one."""
        return self.dense.folds if self.dense.number > 1 else ()

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

    def intake(self, gram_dtype: torch.dtype | None) -> LabelledIntake:
        """See :class:`.Sum`."""
        return LabelledIntake(self.dense.intake(gram_dtype))

    def merged(self, other: Labelled) -> Labelled:
        """See :class:`.Sum`."""
        if other.settings() != self.settings():
            raise ValueError(f"expected a state of {self.settings()} to merge, got one of {other.settings()}")
        home = self.seconds.device
        other = other.map(lambda tensor: tensor.to(home))
        if not other.num_features:
            return replace(
                self, non_finites=self.non_finites + other.non_finites, strays=self.strays + other.strays
            )
        mine = self if self.num_features else self.empty(other.num_features, home)
        dense = mine.dense.merged(other.dense)
        larger = mine.class_counts.sum(1, keepdim=True) >= other.class_counts.sum(1, keepdim=True)  # (g, 1)
        origins = torch.where(larger, mine.class_origins, other.class_origins)
        return Labelled(
            **vars(dense),
            class_counts=mine.class_counts + other.class_counts,
            class_origins=origins,
            class_firsts=mine.class_sums(origins) + other.class_sums(origins),
            strays=self.strays + other.strays,
        )

    def exchange(
        self, known: Labelled | None, rank: int, world_size: int
    ) -> Generator[Tensor, Tensor | None, Labelled | None]:
        """See :class:`.Sum`."""
        dense, classes = yield from together(
            [
                self.dense.exchange(None if known is None else known.dense, rank, world_size),
                self._exchange_classes(known, rank, world_size),
            ],
            self.seconds.device,
        )
        if known is not None and classes is known:
            return known
        if dense is None or classes is None:
            return None
        return replace(self, **{name: getattr(dense, name) for name in Folds.states}, **classes)

    def _exchange_classes(self, known: Labelled | None, rank: int, world_size: int) -> Exchange:
        width = yield from agree(self.num_features, known is not None, rank, world_size)
        if not width:
            return known if width is None else None
        mine = self if self.num_features else self.empty(width, self.seconds.device)
        # The sums of the classes, too, are moved to an origin that is agreed on.
        numbers = mine.class_counts.sum(1, keepdim=True).to(torch.float64)  # (g, 1)
        means = mine.class_firsts.sum(1) + numbers * mine.class_origins
        sums = yield torch.cat([numbers, means], 1)
        origins = sums[:, 1:] / sums[:, :1].clamp(min=1)
        counts = torch.cat([mine.class_counts.flatten(), mine.strays]).to(torch.float64)
        packed = torch.cat([counts, mine.class_sums(origins).flatten()])
        received = yield packed.as_subclass(ForReader)
        if received is None:
            return None
        class_counts, strays, firsts = received.split(
            [mine.class_counts.numel(), len(mine.strays), mine.class_firsts.numel()]
        )
        return {
            "class_counts": class_counts.reshape(mine.class_counts.shape).to(torch.int64),
            "class_origins": origins,
            "class_firsts": firsts.reshape(mine.class_firsts.shape).clone(),
            "strays": strays.to(torch.int64),
        }

    def in_range(self) -> Tensor:
        """Whether no square has overflowed and no label was out of range."""
        return super().in_range() & (self.strays.sum() == 0)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
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
        counts, deviations, *parts = (read(name) for name in cls.arrays)
        dense = Folds.of_parts(*parts)
        given = dict(zip(cls.arrays, (counts, deviations, *parts), strict=True))
        return _RestoredLabelled(
            given=given,
            **vars(dense),
            class_counts=counts,
            class_origins=dense.origins,
            class_firsts=counts.to(torch.float64)[..., None] * deviations,
            strays=torch.zeros_like(dense.counts),
        )


@dataclass(frozen=True)
class _RestoredLabelled(Labelled):
    """Sums that were read from a file: made of sums again, what was read would lose digits."""

    given: Mapping[str, Tensor]

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """What was read."""
        yield from self.given.items()


class LabelledIntake(Intake):
    """Adds labelled batches to the moments of a fold and to the sums of its classes.

    Args:
        dense: of the moments.
    """

    def __init__(self, dense: FoldsIntake) -> None:
        self._dense = dense

    def add(self, sums: Labelled, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        self._dense.phase = self.phase
        labels = observations.labels
        if labels is None:
            raise ValueError("expected observations with labels")
        fold = (batch if observations.group is None else observations.group) % sums.number
        known = (labels >= 0) & (labels < sums.num_classes)
        valid = known if observations.valid is None else known & observations.valid
        strays = (labels >= sums.num_classes).sum()
        with torch.inference_mode(False), torch.no_grad():
            rows = observations.rows().detach()
            if rows.device.type == "cpu" and bool(valid.all()):
                chosen = Observations(observations.values, observations.feature_dim, None, observations.group)
            else:
                chosen = Observations(rows, -1, valid, observations.group)
            self._dense.add(sums.dense, chosen, batch)
            sums.strays[fold].add_(strays)
            self._add_classes(sums, fold, rows, labels, valid)

    def flush(self, sums: Labelled) -> bool:
        """See :class:`.Intake`."""
        return self._dense.flush(sums.dense)

    def meet(self, sums: Labelled) -> None:
        """See :class:`.Intake`."""
        self._dense.meet(sums.dense)

    @staticmethod
    def _add_classes(sums: Labelled, fold: int, rows: Tensor, labels: Tensor, valid: Tensor) -> None:
        kept = valid & are_finite(rows)[:, 0]
        origin = sums.class_origins[fold]
        # The first rows give the origin; the sums are exact about any, as long as it lies near the data.
        is_first = sums.class_counts[fold].sum() == 0
        wide = torch.where(kept[:, None], rows, 0).to(torch.float64)
        mean = wide.sum(0) / kept.sum().clamp(min=1)
        origin.copy_(torch.where(is_first, mean, origin))
        centred = torch.where(kept[:, None], wide - origin, 0)
        place = torch.where(kept, labels, 0).to(torch.int64)
        sums.class_firsts[fold].index_add_(0, place, centred)
        sums.class_counts[fold].index_add_(0, place, kept.to(torch.int64))


def empty_labelled(
    num_classes: int, num_features: int, device: torch.device | str | None = None, *, folds: int = 1
) -> Labelled:
    """Sums of no labelled observations.

    Args:
        num_classes: K.
        num_features: the width D.
        device: where the sums live; the CPU by default.
        folds: number of folds g.

    >>> empty_labelled(10, 3).class_firsts.shape
    torch.Size([1, 10, 3])
    """
    dense = empty_folds(folds, num_features, device)
    home = dense.counts.device
    with torch.inference_mode(False):
        return Labelled(
            **vars(dense),
            class_counts=torch.zeros(folds, num_classes, dtype=torch.int64, device=home),
            class_origins=torch.zeros(folds, num_features, dtype=torch.float64, device=home),
            class_firsts=torch.zeros(folds, num_classes, num_features, dtype=torch.float64, device=home),
            strays=torch.zeros(folds, dtype=torch.int64, device=home),
        )
