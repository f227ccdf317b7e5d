"""The interface of every kind of sum; metrics, probes, merging and recorders use no more of them.

A sum over observations is a few tensors of constant size and the settings that they were made with. A new kind
is one file: a frozen dataclass that subclasses :class:`Sum` (or :class:`SpectralSum`, if eigenvalues can be
read from it) and defines the methods below. Defining the class registers it, so that runs save and restore it.
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
"""Yields a tensor to send, and receives the sum over all processes; see :mod:`~.sums.merging`."""

_KINDS: list[type[Sum]] = []


class Sum(ABC):
    """A sum over observations: tensors, of width zero until a width is known, and settings."""

    states: ClassVar[Mapping[str, str]]
    """Attribute -> name of the metric's state that holds it; the first is the :attr:`anchor`."""
    described: ClassVar[str] = "sums"
    """The kind in words, with an article, for messages."""
    additive: ClassVar[frozenset[str]] = frozenset()
    """The attributes that add up as they are, if the origins of both sides agree."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays in which a run keeps the sum; no other kind has the first one."""
    counts_batches: ClassVar[bool] = False
    """True if adding a batch depends on the number of the batch."""
    takes_all_rows: ClassVar[bool] = False
    """True if a probe gives the sum every row of a forward, also where other sums get some rows."""
    _given: Mapping[str, Any] = MappingProxyType({})
    """Values from the file that a sum was restored from: dividing the sums by n again would lose a digit.

    This is not a field of the dataclass, so that sums made from this one, for example by adding, have none.
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
        """A sum of the same kind and settings, of this width, without observations."""

    def settings(self) -> tuple[object, ...]:
        """Settings that must agree for two sums to be added or shared."""
        return ()

    @property
    def anchor(self) -> Tensor:
        """The tensor that identifies the sum: replaced whenever the sum is, and updated in place otherwise."""
        first: Tensor = getattr(self, next(iter(self.states)))
        return first

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of the states."""
        return {state: getattr(self, name) for name, state in self.states.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same kind with the same settings and these tensors, by the names of the states."""
        twin = copy.copy(self)
        vars(twin).update({name: tensors[state] for name, state in self.states.items()})
        return twin

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The sum with a function applied to each tensor, such as a move to another device."""
        return self.with_tensors({state: function(tensor) for state, tensor in self.tensors().items()})

    @abstractmethod
    def intake(self, gram_dtype: torch.dtype | None) -> Intake:
        """Make the intake that adds observations to this sum.

        Args:
            gram_dtype: dtype of products; None: float64 on the CPU, float32 on accelerators.
        """

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """Merge this sum with one of other observations, on the device of this one.

        Both stay unchanged. A side of width zero contributes nothing that needs a width.

        Raises:
            ValueError: if their settings differ.
        """

    def beside(self, other: Self) -> Self:
        """The other sum, rearranged so that it merges best with this one."""
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
            The sum, the same on all processes; None if no process has a width.

        Raises:
            ValueError: on every process, if the widths differ between processes.
        """

    def num_exchanged(self, num_features: int, world_size: int) -> int:
        """The approximate number of values that an exchange of sums of this width has in memory at a time."""
        return sum(tensor.numel() for tensor in self.empty(num_features, "meta").tensors().values())

    def plain(self) -> Self:
        """The sum without values from its file, which are no longer right once observations are added."""
        return copy.copy(self)._as_given()

    def _as_given(self, **values: Any) -> Self:
        """Attach values from a file to this sum, which must be new."""
        vars(self)["_given"] = values
        return self

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a run keeps, by the names in :attr:`arrays`, one in memory at a time."""
        yield from ()

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Sum:
        """Restore the sum that :meth:`saved` wrote; statistics get the same values.

        Args:
            read: returns the tensor of a name.
        """
        raise NotImplementedError(f"{cls.__name__} is not kept by runs")


class SpectralSum(Sum):
    """A sum from which the mean, the variances and the spectrum of the observations can be read.

    Without observations all readings are NaN. ``center=False`` reads the second moment about zero.
    """

    describes_layer: ClassVar[bool] = True
    """True if a layer's spectrum is read from this kind; False for sums over other observations."""
    keeps_products: ClassVar[bool] = True
    """True if the memory grows with the square of the width."""

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
        """All folds merged."""
        return self

    @property
    def folds(self) -> tuple[SpectralSum, ...]:
        """The sums of disjoint parts of the data; empty if one sum holds all data."""
        return ()

    @abstractmethod
    def in_range(self) -> Tensor:
        """True if no square of an observation has overflowed, shape (), boolean."""

    @abstractmethod
    def mean(self) -> Tensor:
        """The mean, shape (D,), float64."""

    @abstractmethod
    def centred(self, rows: Tensor) -> Tensor:
        """Rows (N, D) minus the mean, float64, with the digits that subtracting it at once would lose."""

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
        """The matrix that :meth:`eigenvectors` decomposes, so that several sums can be decomposed as one batch.

        Shape (D, D), float64; only the upper triangle counts. None for a sum that is decomposed in another way.
        """
        return None


class Intake(ABC):
    """Adds observations to one sum, in place, and keeps the state that this needs between batches."""

    reaches_other_devices: bool = False
    """True if observations may be on a device without float64 while the sum is in the memory of the CPU."""
    keeps_rows: bool = True
    """False if nothing of a batch is kept but copies: its values may then belong to autograd's graph."""
    phase: float = 0.0
    """From 0 to 1; streams of different phases do their costly work at different steps."""

    @abstractmethod
    def add(self, sums: Any, observations: Observations, batch: int) -> None:
        """Add a batch, or keep it to be added later.

        Args:
            sums: the sum, of the observations' width and on their device.
            observations: at least one floating observation.
            batch: number of the batch in its stream, from 0.
        """

    def flush(self, sums: Any) -> bool:
        """Add the rows that wait; True if there were any."""
        return False

    def meet(self, sums: Any) -> None:  # noqa: B027  # most kinds need nothing
        """Prepare for a sum that was made elsewhere, or has its first rows; may read from the device."""


def kinds() -> tuple[type[Sum], ...]:
    """All kinds of sums that a run keeps; among kinds with a spectrum, the most detailed comes last."""
    return tuple(_KINDS)


def zeros(device: torch.device | str | None, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of a sum without observations, float64, and int64 for a count, which has no dimension.

    Args:
        device: their device; the CPU by default.
        shapes: their names and shapes.
    """
    # Tensors made in inference mode could never be updated outside it.
    with torch.inference_mode(False):
        return {
            name: torch.zeros(shape, dtype=torch.float64 if shape else torch.int64, device=device or "cpu")
            for name, shape in shapes.items()
        }
