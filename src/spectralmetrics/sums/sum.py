"""The interface of every kind of sum; metrics, probes, merging and recorders know no more of them.

A sum over observations is a few tensors of constant size and the settings that they were made with. A new kind
is one file: a frozen dataclass that subclasses :class:`Sum` (or :class:`SpectralSum`, if eigenvalues can be
read from it) and defines the methods below. Defining it registers it, so that runs keep it and read it again.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from spectralmetrics.sums.observations import Observations

Exchange: TypeAlias = Generator[Any, Any, Any]
"""Yields what this process sends and receives the sum of what all sent; see :mod:`~.sums.merging`."""

_KINDS: list[type[Sum]] = []


class Sum(ABC):
    """A sum over observations: tensors, of width zero until a width is known, and settings."""

    states: ClassVar[Mapping[str, str]]
    """Attribute -> name of the metric's state that holds it. The first one tells sums apart: it is replaced
    whenever the sum is, and updated in place otherwise."""
    described: ClassVar[str] = "sums"
    """What it is, for messages, with an article."""
    additive: ClassVar[frozenset[str]] = frozenset()
    """The attributes that add up as they are, if the origins of both sides agree."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """Names under which a run keeps it, the first of which is in no other kind."""
    counts_batches: ClassVar[bool] = False
    """Whether what is added depends on the number of the batch."""
    takes_all_rows: ClassVar[bool] = False
    """Whether a probe gives it every row of a forward, also where it draws some for others."""
    _given: Mapping[str, Any] = MappingProxyType({})
    """Values that a file has of sums that were restored from it: sums divided by n again would lose a digit.

    It is no field of the dataclass, so that sums which are made of these, as when others are added, have none.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "arrays" in cls.__dict__:
            _KINDS.append(cls)

    @property
    @abstractmethod
    def num_features(self) -> int:
        """The width D of an observation; 0 while it is unknown."""

    @abstractmethod
    def empty(self, num_features: int, device: torch.device | str | None = None) -> Self:
        """The same kind with the same settings, of no observations of this width."""

    def settings(self) -> tuple[object, ...]:
        """Settings that must agree for two sums to be added or shared."""
        return ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of the states."""
        return {state: getattr(self, name) for name, state in self.states.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same kind with the same settings and these tensors, by the names of the states."""
        changes: dict[str, Any] = {name: tensors[state] for name, state in self.states.items()}
        twin = copy.copy(self)
        for name, tensor in changes.items():
            object.__setattr__(twin, name, tensor)  # a frozen dataclass, and this is its constructor
        return twin

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The sum with a function applied to each tensor, such as a move to another device."""
        return self.with_tensors({state: function(tensor) for state, tensor in self.tensors().items()})

    @abstractmethod
    def intake(self, gram_dtype: torch.dtype | None) -> Intake:
        """Adds observations to this sum, and remembers between batches what that needs.

        Args:
            gram_dtype: dtype of products; None: float64 on the CPU, float32 on accelerators.
        """

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """The sum of two disjoint sets of observations together, on the device of this one.

        Neither is changed. A side of width zero contributes nothing that needs a width.

        Raises:
            ValueError: if their settings differ.
        """

    def beside(self, other: Self) -> Self:
        """The other sum, in the arrangement in which it is best merged with this one."""
        return other

    @abstractmethod
    def exchange(self, known: Self | None, rank: int, world_size: int) -> Exchange:
        """The sum of all processes' observations, as an exchange for :func:`~.sums.merging.run_together`.

        Args:
            known: the result of an earlier exchange, if nothing has been added on this process since. It is
                returned if all processes have one.
            rank: the rank of this process in the group.
            world_size: the number of processes in the group.

        Returns:
            The sum, the same on all processes; None if none knows a width.

        Raises:
            ValueError: on every process, if the widths differ between processes.
        """

    def num_exchanged(self, num_features: int, world_size: int) -> int:
        """About how many numbers an exchange of sums of this width has in memory at a time."""
        return sum(tensor.numel() for tensor in self.empty(num_features, "meta").tensors().values())

    def plain(self) -> Self:
        """The sum without what a file said of it besides, which no longer holds once others are added."""
        return copy.copy(self)._as_given()

    def _as_given(self, **values: Any) -> Self:
        """This sum, which nobody else has yet, with the values that a file has of it."""
        vars(self)["_given"] = values
        return self

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a run keeps, by the names in :attr:`arrays`, one in memory at a time."""
        yield from ()

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Sum:
        """The sum that :meth:`saved` gave, as far as a statistic can tell.

        Args:
            read: gives the tensor of a name.
        """
        raise NotImplementedError(f"{cls.__name__} is not kept by runs")


class SpectralSum(Sum):
    """A sum from which the mean, the variances and the spectrum of the observations can be read.

    Where there are no observations, what is read is NaN. ``center=False`` reads the second moment about zero.
    """

    describes_layer: ClassVar[bool] = True
    """Whether the spectrum of a layer is read from it; False for one of other observations, such as means."""
    keeps_products: ClassVar[bool] = True
    """Whether its memory grows with the square of the width."""

    @property
    @abstractmethod
    def num_observations(self) -> Tensor:
        """The number of finite observations n, shape (), int64."""

    @property
    @abstractmethod
    def num_left_out(self) -> Tensor:
        """The number of observations left out for a NaN or an infinity, shape (), int64."""

    @property
    def total(self) -> SpectralSum:
        """All folds together."""
        return self

    @property
    def folds(self) -> tuple[SpectralSum, ...]:
        """The sums of disjoint parts of the data; empty if they are kept in one."""
        return ()

    @abstractmethod
    def in_range(self) -> Tensor:
        """True if no square of an observation has overflowed, shape (), boolean."""

    @abstractmethod
    def mean(self) -> Tensor:
        """The mean, shape (D,), float64."""

    @abstractmethod
    def centred(self, rows: Tensor) -> Tensor:
        """Rows (N, D) about the mean, float64, with the digits that the mean as one number would lose."""

    @abstractmethod
    def variances(self, *, center: bool = True) -> Tensor:
        """The diagonal of the covariance, shape (D,), float64."""

    @abstractmethod
    def covariance(self, *, center: bool = True) -> Tensor:
        """The covariance, divided by n, shape (D, D), float64, symmetric."""

    @abstractmethod
    def eigenvalues(self, *, center: bool = True) -> Tensor:
        """Descending eigenvalues of the covariance, shape (D,), float64."""

    @abstractmethod
    def eigenvectors(self, *, center: bool = True) -> tuple[Tensor, Tensor]:
        """Eigenvalues and, in columns, eigenvectors (D, D), float64."""

    def matrix(self, *, center: bool = True) -> Tensor | None:
        """The matrix whose decomposition these are, so that several sums can be decomposed as one batch.

        Shape (D, D), float64; only the upper triangle counts. None for a sum with a way of its own.
        """
        return None


class Intake(ABC):
    """Adds observations to one sum, in place, and remembers what that needs between batches."""

    reaches_other_devices: bool = False
    """Whether observations may be on a device without float64 while the sum is in the memory of the CPU."""
    phase: float = 0.0
    """From 0 to 1; streams of different phase have their dear moments at different steps."""

    @abstractmethod
    def add(self, sums: Any, observations: Observations, batch: int) -> None:
        """Add a batch, or let it wait.

        Args:
            sums: the sum, of the observations' width and on their device.
            observations: floating, at least one.
            batch: number of the batch in its stream, from 0.
        """

    def flush(self, sums: Any) -> bool:
        """Add what waits; return whether anything did."""
        return False

    def meet(self, sums: Any) -> None:  # noqa: B027  # most need not look
        """Look at a sum that was made elsewhere, or has its first rows; may read from the device."""


def kinds() -> tuple[type[Sum], ...]:
    """All kinds of sums that a run keeps; of those that give a spectrum, the most detailed comes last."""
    return tuple(_KINDS)
