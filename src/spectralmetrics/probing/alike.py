"""Settings that must be equal on processes that share a layer: compared before the first rows travel.

Settings decide how many rows travel, and in which forwards. With unequal settings, processes would wait for
each other, or end. So processes that share a layer compare them once, and again whenever values are read. A
setting that is changed between two readings applies to shared layers from the next reading on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.parts import LeftOut
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.merging import communication_device, gather_objects

Settings = Mapping[str, Hashable]

# These may differ: a process that has reached its limit, or has another plan, still takes part.
_MAY_DIFFER = {
    "max_samples": "the rows of a process that has reached its own limit are lost",
    "budget": "all follow the plan of the first process",
}

_REFUSED = (
    "the processes that share it have other settings, and would wait for each other: {}. Give the probes of all"
    " processes the same"
)


class Alike:
    """The settings of a probe, as the processes that share its layers have agreed on them.

    Args:
        limits: the limits, as set now.
        steps: the steps of the model, as set now.
        others: settings that cannot change later.
    """

    def __init__(self, limits: Limits, steps: Steps, others: Settings) -> None:
        self._limits = limits
        self._steps = steps
        self._others = others
        self._agreed: Limits | None = None
        self._results: dict[tuple[str, ...], str] = {}  # names of process groups -> differing settings
        self._has_warned = False

    @property
    def limits(self) -> Limits:
        """The limits for layers that processes share; ``max_samples`` is this process' own."""
        if self._agreed is None:
            return self._limits
        self._agreed.max_samples = self._limits.max_samples
        return self._agreed

    def settings(self) -> dict[str, Hashable]:
        """The settings, as set now."""
        return {
            **vars(self._limits),
            "every_n_steps": self._steps.every,
            "budget": None if self._steps.budget is None else self._steps.budget.share,
            **self._others,
        }

    def compare(self, by_rank: Mapping[int, Settings]) -> None:
        """Compare the settings of all processes that share a layer.

        Args:
            by_rank: rank -> settings, of each of these processes.

        Raises:
            LeftOut: if settings differ.
        """
        if words := self._conflicts(by_rank):
            raise LeftOut(_REFUSED.format(words))
        self._take_over()

    def check(self, groups: Sequence[Any]) -> None:
        """Compare the settings of all processes of some groups, once; all these processes call it.

        Raises:
            LeftOut: if settings differ.
        """
        names = tuple(group.group_name for group in groups)
        if names not in self._results:
            self._results[names] = self._compare(groups)
        if self._results[names]:
            raise LeftOut(_REFUSED.format(self._results[names]))

    def renew(self, by_rank: Mapping[int, Settings]) -> None:
        """Agree again, when values are read, given the settings of all processes that share layers."""
        _, differing = _differing(by_rank)
        if differing:
            if not self._has_warned:
                self._has_warned = True
                now = _words(differing)
                warn_user(f"layers that processes share go on with earlier settings, which differ now: {now}")
            return
        self._has_warned = False
        self._take_over()
        self._results = dict.fromkeys(self._results, "")

    def _compare(self, groups: Sequence[Any]) -> str:
        own = self.settings()
        digest = int.from_bytes(hashlib.sha256(repr(sorted(own.items())).encode()).digest()[:7], "little")
        both = torch.tensor([digest, -digest], device=communication_device(groups[0]))
        for group in groups:  # in turn, so that the result reaches all processes
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        high, low = both.tolist()
        if high != -low:
            by_rank = {dist.get_rank(): own}
            for group in groups:
                by_rank = {rank: each for some in gather_objects(by_rank, group) for rank, each in some.items()}
            if words := self._conflicts(by_rank):
                return words
        self._take_over()
        return ""

    def _conflicts(self, by_rank: Mapping[int, Settings]) -> str:
        """Settings that differ but must not, in words; warns about settings that may differ."""
        allowed, differing = _differing(dict(sorted(by_rank.items())))
        for name, values in allowed.items():
            warn_user(f"processes that share layers differ in {_words({name: values})}: {_MAY_DIFFER[name]}")
        return _words(differing)

    def _take_over(self) -> None:
        self._agreed = replace(self._limits)
        self._steps.agreed = self._steps.every, self._steps.seed


_Differing = dict[str, dict[Hashable, int]]


def _differing(by_rank: Mapping[int, Settings]) -> tuple[_Differing, _Differing]:
    """Settings that differ and may, and that differ but must not: name -> value -> first process with it."""
    first_ranks: dict[str, dict[Hashable, int]] = {}
    for rank, settings in by_rank.items():
        for name, value in settings.items():
            first_ranks.setdefault(name, {}).setdefault(value, rank)
    differing = {name: values for name, values in first_ranks.items() if len(values) > 1}
    # A process without a budget observes forwards that processes with a budget leave out.
    allowed = {name for name in _MAY_DIFFER if name == "max_samples" or None not in first_ranks[name]}
    return (
        {name: values for name, values in differing.items() if name in allowed},
        {name: values for name, values in differing.items() if name not in allowed},
    )


def _words(differing: Mapping[str, Mapping[Hashable, int]]) -> str:
    return ", ".join(
        f"{name}={' and '.join(f'{value!r} on process {rank}' for value, rank in values.items())}"
        for name, values in differing.items()
    )
