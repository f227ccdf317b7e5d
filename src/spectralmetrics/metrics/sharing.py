"""The sums of metrics, their own or those of a leader, and their stream: the intakes and cached readings."""

from __future__ import annotations

import contextlib
import weakref
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.overrides import STATES, OverriddenMetric, count_of_updates
from spectralmetrics.sums import Intake, Marginals, Moments, Observations, SpectralSum, Sum
from spectralmetrics.sums.observations import detached

# A stream is found by the tensor that anchors its sums, and lives as long as this tensor. There is no other
# way: the metrics of a compute group share sums because torchmetrics sets the state tensors of one metric on
# the others, one by one and by reference. Only the tensor shows which metrics share.
_STREAMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def group_object(group: Any) -> Any:
    """The process group itself; None stands for the current default group."""
    return dist.group.WORLD if group is None else group


def stream_of(sums: Sequence[Sum]) -> Stream | None:
    """The stream of these sums; None while they have no width."""
    if not sums or not sums[0].num_features:
        return None
    return Stream.of(sums[0].anchor)


def spectrum_of(sums: Sequence[Sum]) -> Spectrum | None:
    """The spectrum of sums on the CPU, with all earlier readings; None if the first sum has no spectrum."""
    stream = stream_of(sums)
    if stream is None or not isinstance(sums[0], SpectralSum):
        return None
    return Spectrum(sums[0], others=sums[1:], cache=stream.cache, device=torch.device("cpu"))


class Stream:
    """The intakes of sums, and a cache of readings, shared by all metrics that share the sums.

    It must not hold the sums themselves, or it would keep them alive for ever.

    Attributes:
        cache: readings since the last observation, such as decompositions, see
            :class:`~.functional.Spectrum`.
        noted: a note of a reader of the sums since then.
    """

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}
        self._merged: MutableMapping[Any, list[Sum]] | None = None
        self.noted: Any = None
        self._intakes: dict[type[Sum], Intake] = {}
        self._keeps_rows = True
        self._may_wait = False  # True if rows may wait in an intake

    @property
    def merged(self) -> MutableMapping[Any, list[Sum]]:
        """Process group -> sums of all processes, exchanged since the last observation; gone with the group."""
        if self._merged is None:
            self._merged = weakref.WeakKeyDictionary()
        return self._merged

    @staticmethod
    def of(anchor: Tensor) -> Stream:
        """The stream of the sums that a tensor anchors."""
        stream: Stream | None = _STREAMS.get(anchor)
        if stream is None:
            stream = _STREAMS[anchor] = Stream()
        return stream

    def begin(self, sums: Sequence[Sum], gram_dtype: torch.dtype | None, phase: float) -> None:
        """Prepare for the first observations of sums that have just been made."""
        self._intakes = {type(each): each.intake(gram_dtype) for each in sums}
        self._keeps_rows = any(intake.keeps_rows for intake in self._intakes.values())
        for intake in self._intakes.values():
            intake.phase = phase

    def add(
        self,
        sums: Sequence[Sum],
        observations: Observations,
        everything: Observations | None,
        batch: int,
        gram_dtype: torch.dtype | None,
        phase: float,
        home: torch.device | None,
    ) -> None:
        """Add observations to each sum; intakes of sums that were made elsewhere are prepared first.

        Args:
            sums: the sums of this stream.
            observations: observations that fit them.
            everything: observations for sums that take all rows; None: the same.
            batch: number of the batch.
            gram_dtype: dtype of products; None chooses by the device of the observations.
            phase: the phase of the intakes.
            home: the device of the sums, if the observations are on another device without float64.
        """
        if not self._intakes:
            self.begin(sums, gram_dtype, phase)
            for made in sums:
                self._intakes[type(made)].meet(made)
        self._may_wait = True
        if self._keeps_rows:
            observations = detached(observations)
        for each in sums:
            intake, chosen = self._intakes[type(each)], observations
            if everything is not None:
                chosen = everything if each.takes_all_rows else observations
                if chosen.values.numel() == 0:  # none was drawn
                    continue
            if home is not None and not intake.reaches_other_devices:
                chosen = chosen.to(home)
            intake.add(each, chosen, batch)
        self.forget()

    def flush(self, sums: Sequence[Sum]) -> None:
        """Add the rows that wait."""
        if not self._may_wait:
            return
        for each in sums:
            intake = self._intakes.get(type(each))
            if intake is not None and intake.flush(each):
                self.forget()
        self._may_wait = False

    def forget(self) -> None:
        """Forget all readings: there are more observations now."""
        if self.cache:
            self.cache = {}
        self._merged = self.noted = None


class Live(NamedTuple):
    """The sums of a metric as objects, their stream, and facts of their anchor, until a state is replaced."""

    sums: tuple[Sum, ...]
    stream: Stream
    num_features: int
    device: torch.device
    is_inference: bool


def _state(name: str) -> Any:
    """A property for a state; reading it first adds the waiting rows."""
    STATES.add(name)

    def read(metric: SharingMetric) -> Tensor:
        metric.flush()
        value: Tensor | None = metric.all_states().get(name)
        value = metric.derived_state(name) if value is None else value
        if value is None:
            raise AttributeError(f"{type(metric).__name__!r} object has no attribute {name!r}")
        return value

    def write(metric: SharingMetric, value: Tensor) -> None:
        metric.refresh()  # first, or a later refresh would drop the new value
        own = metric.__dict__
        if metric._leader is not None and metric._leader.__dict__.get(name) is value:
            own.pop(name, None)
        elif own.get(name) is not value:  # a collection often sets states to the tensors that they are already
            own[name] = value
            own["_live"] = None
            own["_changes"] = metric._changes + 1

    return property(read, write)


class SharingMetric(OverriddenMetric):
    """A metric whose states are the tensors of sums: its own, or those of another metric, its leader.

    The leader has all states that its followers need. A change of a follower alone, such as an update, lasts
    until the leader's states change. It also lasts when the user updates the leader, since each metric of a
    collection may be given the same rows.
    """

    _prototypes: tuple[Sum, ...] = ()
    _live: Live | None = None
    _leader: SharingMetric | None = None
    _changes = 0  # number of times that the states were replaced or added to
    _by_user = 0  # number of these changes that the user made
    _seen = (0, 0)  # both numbers of the leader at the last refresh

    @classmethod
    def declare(cls, names: Iterable[str]) -> None:
        """Make reading states of these names add the waiting rows first, in all metrics."""
        for name in names:
            if not isinstance(getattr(cls, name, None), property):
                setattr(SharingMetric, name, _state(name))

    # -- the states as sums ------------------------------------------------------------------------------

    @property
    def prototypes(self) -> tuple[Sum, ...]:
        """The sums that are kept, empty and of width zero."""
        return self._prototypes

    @property
    def sums(self) -> tuple[Sum, ...]:
        """The sums, the spectral one first; their tensors are the states themselves."""
        live = self.flush()
        return self._current() if live is None else live.sums

    @property
    def moments(self) -> Moments | None:
        """The moments of all folds together; None before the first rows. One fold gives the state itself."""
        total = self._spectral.total
        return total if isinstance(total, Moments) and total.num_features else None

    @property
    def _spectral(self) -> SpectralSum:
        first = self.sums[0]
        assert isinstance(first, SpectralSum)
        return first

    def has_observed(self) -> bool:
        """True if there are sums of a known width."""
        return self._current()[0].num_features > 0

    def sums_of(self, states: Mapping[str, Tensor]) -> list[Sum]:
        """The sums of saved states; kinds of sums that were not saved are empty."""
        first, *others = self._prototypes
        sums = [first.with_tensors(states)]
        width, home = sums[0].num_features, sums[0].anchor.device
        for each in others:
            is_there = states.keys() >= each.tensors().keys()
            sums.append(each.with_tensors(states) if is_there else each.empty(width, home))
        return sums

    def replace_sums(self, sums: Sequence[Sum]) -> None:
        """Replace the states by the tensors of other sums."""
        for each in sums:
            for name, tensor in each.tensors().items():
                setattr(self, name, tensor)

    def flush(self) -> Live | None:
        """Add the rows that wait; every reading of a state calls it first. None before the first rows."""
        live = self._revive()
        if live is not None:
            live.stream.flush(live.sums)
        return live

    def state_names(self) -> list[str]:
        """The names of the states of the sums."""
        return [name for each in self._prototypes for name in each.states.values()]

    def all_states(self) -> Mapping[str, Any]:
        """The states by name, the leader's where this metric has none."""
        return self.__dict__ if self._leader is None else ChainMap(self.__dict__, self._leader.__dict__)

    def derived_state(self, name: str) -> Tensor | None:
        """The value that the sums give for the name of another metric's state; None if they give none.

        A metric that keeps folds has the states of one that keeps none.
        """
        spectral = self._current()[0] if self._prototypes else None
        if not isinstance(spectral, SpectralSum):
            return None
        if name == "count":  # read most often, and needs no merge of matrices
            return spectral.num_observations
        return spectral.num_left_out if name == "non_finite" else spectral.total.tensors().get(name)

    def _current(self) -> tuple[Sum, ...]:
        """The sums without the rows that wait."""
        self.refresh()
        live = self._live or self._borrowed()
        return self._made() if live is None else live.sums

    def _revive(self) -> Live | None:
        """The sums as objects and their stream; None before the first rows."""
        self.refresh()
        live = self._live or self._borrowed()
        if live is None and (sums := self._made()) and (width := sums[0].num_features):
            anchor = sums[0].anchor
            live = Live(sums, Stream.of(anchor), width, anchor.device, anchor.is_inference())
            if self._leader is None:  # a leader may replace them
                self.__dict__["_live"] = live
        return live

    def _made(self) -> tuple[Sum, ...]:
        states = self.all_states()
        return tuple(each.with_tensors(states) for each in self._prototypes)

    # -- the states of a leader --------------------------------------------------------------------------

    def _borrowed(self) -> Live | None:
        """The leader's sums of this metric's kinds, if its states are the leader's and hold rows."""
        leader = self._leader
        live = None if leader is None or self._is_synced or not self.is_borrowed() else leader._revive()
        if live is None:
            return None
        kept = {type(each): each for each in live.sums}
        return live._replace(sums=tuple(kept[type(each)] for each in self._prototypes))

    def follow(self, leader: SharingMetric) -> None:
        """Read the states of another metric from now on."""
        self.__dict__.update(_leader=leader, _seen=(-1, 0))  # setattr would make the leader a submodule

    def refresh(self) -> None:
        """Read the leader's states again, if these have changed."""
        leader = self._leader
        if leader is None or self._is_synced or self._seen[0] == leader._changes:
            return
        (changes, by_user), self.__dict__["_seen"] = self._seen, (leader._changes, leader._by_user)
        if leader._changes - leader._by_user != changes - by_user:
            for name in self.state_names():
                self.__dict__.pop(name, None)
        if self.is_borrowed():
            count_of_updates(self, count_of_updates(leader))

    def is_borrowed(self) -> bool:
        """True if other metrics share the states: the leader's states, or states merged for all."""
        return self._is_synced or (self._leader is not None and self.state_names()[0] not in self.__dict__)

    @contextlib.contextmanager
    def changed_by_user(self) -> Iterator[None]:
        """Inside, metrics that follow this one and were changed alone keep their states."""
        before = self._changes - self._by_user
        try:
            yield
        finally:
            self.__dict__["_by_user"] = self._changes - before


for _kind in (Moments, Marginals):  # metrics that keep other sums give their values for these states
    SharingMetric.declare(_kind.states.values())
