"""Metrics that read the states of another metric in place of their own."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spectralmetrics.metrics.overrides import STATES, OverriddenMetric, count_of_updates


def state(name: str) -> Any:
    """A property for a state; reading it first adds the waiting rows."""
    STATES.add(name)

    def read(metric: FollowingMetric) -> Tensor:
        metric.flush()
        value: Tensor | None = metric.all_states().get(name)
        value = metric.derived_state(name) if value is None else value
        if value is None:
            raise AttributeError(f"{type(metric).__name__!r} object has no attribute {name!r}")
        return value

    def write(metric: FollowingMetric, value: Tensor) -> None:
        metric.refresh()  # first, or a later refresh would drop the new value
        own = metric.__dict__
        if metric._leader is not None and metric._leader.__dict__.get(name) is value:
            own.pop(name, None)
        elif own.get(name) is not value:  # a collection often sets states to the tensors that they are already
            own[name] = value
            own["_live"] = None
            own["_changes"] = metric._changes + 1

    return property(read, write)


class FollowingMetric(OverriddenMetric):
    """A metric that may read the states of another metric, its leader, which has all states that it needs.

    A change of this metric alone, such as an update, lasts until the leader's states change. It also lasts when
    the user updates the leader, since each metric of a collection may be given the same rows.
    """

    _leader: FollowingMetric | None = None
    _changes = 0  # number of times that the states were replaced or added to
    _by_user = 0  # number of these changes that the user made
    _seen = (0, 0)  # both numbers of the leader at the last refresh

    def follow(self, leader: FollowingMetric) -> None:
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

    @contextlib.contextmanager
    def changed_by_user(self) -> Iterator[None]:
        """Inside, metrics that follow this one and were changed alone keep their states."""
        before = self._changes - self._by_user
        try:
            yield
        finally:
            self.__dict__["_by_user"] = self._changes - before

    @abstractmethod
    def state_names(self) -> Iterable[str]:
        """The names of the states that this metric may read from its leader."""

    @abstractmethod
    def derived_state(self, name: str) -> Tensor | None:
        """The value that the states give for a name that is not a state; None if they give none."""

    def all_states(self) -> Mapping[str, Any]:
        """The states by name, the leader's where this metric has none."""
        return self.__dict__ if self._leader is None else ChainMap(self.__dict__, self._leader.__dict__)

    def is_borrowed(self) -> bool:
        """True if other metrics share the states: the leader's states, or states merged for all."""
        return self._is_synced or (
            self._leader is not None and next(iter(self.state_names())) not in self.__dict__
        )
