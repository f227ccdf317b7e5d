"""Sums of disjoint parts of the data (folds), so that a fit to some folds can be tested on the others.

Groups of batches are dealt in turn to g sums. The batches of one forward of a model form a group; a batch
outside of forwards is a group of its own. A group is never divided, so the rows of one input stay together.
All folds are read merged, except through :attr:`InFolds.each` and :attr:`.SpectralSum.folds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from spectralmetrics.sums.about_origin import exchange_about_origins
from spectralmetrics.sums.decomposition import symmetrise
from spectralmetrics.sums.moments import Moments, empty_moments
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import Exchange, Intake, SpectralSum

S = TypeVar("S", bound=Moments)


@dataclass(frozen=True)
class InFolds(SpectralSum, Generic[S]):
    """The g folds of moments or of a subclass; each tensor is stacked in the first dimension.

    See :class:`Folds` for the tensors. The states have the order of one fold's states. A fold has no settings
    besides its tensors. All folds are read together.
    """

    of: ClassVar[type[Moments]] = Moments
    """The kind of each fold."""
    additive: ClassVar[frozenset[str]] = frozenset({"counts", "non_finites", "firsts", "seconds"})
    counts_batches: ClassVar[bool] = True

    counts: Tensor
    non_finites: Tensor
    origins: Tensor
    firsts: Tensor
    seconds: Tensor

    @classmethod
    def stacked(cls, folds: Sequence[S]) -> Self:
        """Folds of copies of these sums."""
        names = zip(cls.states, cls.of.states, strict=True)
        with torch.inference_mode(False):
            return cls(**{name: torch.stack([getattr(fold, one) for fold in folds]) for name, one in names})

    @cached_property  # making five views takes as long as adding a small batch
    def each(self) -> tuple[S, ...]:
        """The sums of each fold; views of the stacked tensors."""
        stacks = [getattr(self, name) for name in self.states]
        with torch.inference_mode(False):
            return tuple(
                cast("S", self.of(**dict(zip(self.of.states, parts, strict=True))))
                for parts in zip(*stacks, strict=True)
            )

    @property
    def total(self) -> S:
        """All folds merged."""
        return reduce(lambda left, right: left.merged(right), self.each)

    @property
    def number(self) -> int:
        """The number of folds g."""
        return self.counts.shape[0]

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.origins.shape[-1]

    @property
    def num_observations(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.counts.sum()

    @property
    def num_left_out(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.non_finites.sum()

    def intake(self, gram_dtype: torch.dtype | None) -> Intake:
        """See :class:`.Sum`."""
        return FoldsIntake([fold.intake(gram_dtype) for fold in self.each])

    def merged(self, other: Self) -> Self:
        """See :class:`.Sum`."""
        if other.number != self.number:
            raise ValueError(f"expected a state with folds={self.number} to merge, got folds={other.number}")
        return self.stacked([left.merged(right) for left, right in zip(self.each, other.each, strict=True)])

    def beside(self, other: Self) -> Self:
        """See :class:`.Sum`."""
        if other.settings() != self.settings():
            return other  # merging refuses it
        # Pair the fullest fold of one side with the emptiest of the other. Nothing is read from the device.
        fullest = other.counts.argsort(descending=True, stable=True)
        order = torch.empty_like(fullest)
        order[self.counts.to(order.device).argsort(stable=True)] = fullest
        return other.map(lambda tensor: tensor.index_select(0, order))

    def exchange(self, known: Self | None, rank: int, world_size: int) -> Exchange:
        """See :class:`.Sum`."""
        return exchange_about_origins(self, known, rank, world_size)

    def __getstate__(self) -> dict[str, Any]:
        # Copied or pickled views would not be views of the copy's tensors.
        return {name: value for name, value in vars(self).items() if name != "each"}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`.Sum`."""
        twin = super().with_tensors(tensors)
        vars(twin).pop("each", None)  # views of the replaced tensors
        return twin

    def in_range(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.seconds.diagonal(dim1=-2, dim2=-1).isfinite().all()

    def mean(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.total.mean()

    def centred(self, rows: Tensor) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.total.centred(rows)

    def variances(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.total.variances(center=center)

    def covariance(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.total.covariance(center=center)

    def eigenvalues(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.total.eigenvalues(center=center)

    def eigenvectors(self, *, center: bool = True) -> tuple[Tensor, Tensor]:
        """See :class:`.SpectralSum`."""
        return self.total.eigenvectors(center=center)

    def matrix(self, *, center: bool = True) -> Tensor | None:
        """See :class:`.SpectralSum`."""
        return self.total.matrix(center=center)


@dataclass(frozen=True)
class Folds(InFolds[Moments]):
    """The moments of g folds, stacked.

    Attributes:
        counts: shape (g,), int64; see :class:`~spectralmetrics.sums.Moments` for what each holds.
        non_finites: shape (g,), int64.
        origins: shape (g, D), float64.
        firsts: shape (g, D), float64.
        seconds: shape (g, D, D), float64.

    >>> folds = empty_folds(2, 3)
    >>> intake = folds.intake(torch.float64)
    >>> for batch in range(4):
    ...     intake.add(folds, Observations(torch.randn(5, 3)), batch)
    >>> _ = intake.flush(folds)
    >>> [int(fold.count) for fold in folds.folds], int(folds.num_observations)
    ([10, 10], 20)
    """

    states: ClassVar[dict[str, str]] = {
        "seconds": "fold_second_moment",
        "counts": "fold_count",
        "non_finites": "fold_non_finite",
        "origins": "fold_origin",
        "firsts": "fold_first_moment",
    }
    arrays: ClassVar[tuple[str, ...]] = ("fold_covariances", "fold_means", "fold_counts", "fold_non_finites")

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return ("folds", self.number)

    @property
    def folds(self) -> tuple[Moments, ...]:
        """The moments of each fold; views of the stacked tensors."""
        return self.each

    @property
    def total(self) -> Moments:
        """All folds merged."""
        return self._given.get("total") or super().total

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Folds:
        """See :class:`.Sum`."""
        return empty_folds(self.number, num_features, device)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        yield from self.total.saved()  # for readers without folds
        for name, tensor in self.parts():
            yield f"fold_{name}", tensor

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Arrays of all folds: upper triangles of covariances, means, counts, and numbers left out."""
        # An empty fold has no mean and no covariance; zeros keep the file free of NaN.
        width = self.num_features
        upper = torch.ones(width, width, dtype=torch.bool, device=self.seconds.device).triu_()
        uppers = self.seconds.new_empty(self.number, width * (width + 1) // 2)
        for fold, row in zip(self.each, uppers, strict=True):  # one by one: together half of the sums' memory
            row.copy_(fold.upper_covariance()[upper])
        yield "covariances", uppers.masked_fill_(self.counts[:, None] == 0, 0)
        del uppers
        means = torch.stack([fold.mean() for fold in self.each])
        yield "means", torch.where(self.counts[:, None] > 0, means, 0)
        yield "counts", self.counts
        yield "non_finites", self.non_finites

    @staticmethod
    def of_parts(uppers: Tensor, means: Tensor, counts: Tensor, non_finites: Tensor) -> Folds:
        """Folds from the arrays of :meth:`parts`."""
        width = means.shape[1]
        covariances = uppers.new_zeros(len(uppers), width, width)
        rows, columns = torch.triu_indices(width, width)
        covariances[:, rows, columns] = uppers
        each = zip(map(symmetrise, covariances), means, counts, non_finites, strict=True)
        return stack([Moments.of_covariance(*parts) for parts in each])

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Folds:
        """See :class:`.Sum`."""
        folds = cls.of_parts(*(read(name) for name in cls.arrays))
        return folds._as_given(total=Moments.restored(read))  # saved beside the folds


class FoldsIntake(Intake):
    """Deals batches to folds in turn.

    Args:
        parts: the intake of each fold.
    """

    def __init__(self, parts: Sequence[Intake]) -> None:
        self._parts = parts
        self.reaches_other_devices = parts[0].reaches_other_devices

    def add(self, sums: InFolds[Any], observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        for index, part in enumerate(self._parts):
            part.phase = (self.phase + index / len(self._parts)) % 1
        turn = (batch if observations.group is None else observations.group) % len(self._parts)
        self._parts[turn].add(sums.each[turn], observations, batch)

    def flush(self, sums: InFolds[Any]) -> bool:
        """See :class:`.Intake`."""
        flushed = [part.flush(fold) for part, fold in zip(self._parts, sums.each, strict=True)]
        return any(flushed)

    def meet(self, sums: InFolds[Any]) -> None:
        """See :class:`.Intake`."""
        for part, fold in zip(self._parts, sums.each, strict=True):
            part.meet(fold)


def first_fold(number: int, replica: int, replicas: int) -> int:
    """The fold that a replica fills first, so that folds are equally full once the replicas' sums are merged.

    Replicas begin evenly apart, and each deals its groups in turn. Once all have dealt equally many groups, the
    folds differ by at most one group.

    Args:
        number: number of folds g.
        replica: number of this replica, from 0.
        replicas: number of replicas that observe different data.

    >>> [first_fold(8, replica, 2) for replica in range(2)]
    [0, 4]
    """
    return replica * number // replicas


def empty_folds(number: int, num_features: int, device: torch.device | str | None = None) -> Folds:
    """Folds without observations.

    Args:
        number: the number of folds g.
        num_features: the width D.
        device: device of the sums; the CPU by default.

    >>> empty_folds(2, 3).seconds.shape
    torch.Size([2, 3, 3])
    """
    return stack([empty_moments(num_features, device) for _ in range(number)])


def stack(folds: Sequence[Moments]) -> Folds:
    """Folds of copies of these moments.

    >>> stack([empty_moments(3), empty_moments(3)]).number
    2
    """
    return Folds.stacked(folds)
