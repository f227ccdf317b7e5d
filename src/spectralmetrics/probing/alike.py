"""Settings that processes must have alike where they share a layer: agreed on before the first rows travel.

How many rows travel, and in which forwards, follows from these. Processes that disagree would wait for each
other, or end. So the processes that share a layer compare them once, and again whenever values are read; a
setting that is changed between two readings counts for what they share from the next reading on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from spectralmetrics.probing.hooks import tell
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.parts import LeftOut
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.merging import communication_device, gather_objects

Settings = Mapping[str, Hashable]

# These may differ: a process that has reached its limit, or that plans otherwise, takes part all the same.
_MAY_DIFFER = {
    "max_samples": "what a process that has reached its own would observe is lost",
    "budget": "all follow the plan of the first process",
}

_REFUSED = (
    "the processes that share it have other settings, and would wait for each other: {}. Give the probes of all"
    " processes the same"
)


class Alike:
    """The settings of a probe, as the processes that share its layers have agreed on them.

    Args:
        limits: as they are set now.
        steps: likewise.
        others: what cannot be set later.
    """

    def __init__(self, limits: Limits, steps: Steps, others: Settings) -> None:
        self._limits = limits
        self._steps = steps
        self._others = others
        self._agreed: Limits | None = None
        self._results: dict[tuple[str, ...], str] = {}  # names of process groups -> what differs between them
        self._is_told = False

    @property
    def limits(self) -> Limits:
        """The limits that count for what processes share; how many samples is each process' own matter."""
        if self._agreed is None:
            return self._limits
        self._agreed.max_samples = self._limits.max_samples
        return self._agreed

    def settings(self) -> dict[str, Hashable]:
        """As they are set now."""
        return {
            **vars(self._limits),
            "every_n_steps": self._steps.every,
            "budget": None if self._steps.budget is None else self._steps.budget.share,
            **self._others,
        }

    def compare(self, of_processes: Mapping[int, Settings]) -> None:
        """Compare what other processes have told with what this one has.

        Args:
            of_processes: rank -> settings of all processes that share a layer.

        Raises:
            LeftOut: if they differ.
        """
        if words := self._judge(of_processes):
            raise LeftOut(_REFUSED.format(words))
        self._take_over()

    def check(self, groups: Sequence[Any]) -> None:
        """Compare the settings of all processes along these groups, once; all of them call it.

        Raises:
            LeftOut: if they differ.
        """
        names = tuple(group.group_name for group in groups)
        if names not in self._results:
            self._results[names] = self._compare(groups)
        if self._results[names]:
            raise LeftOut(_REFUSED.format(self._results[names]))

    def renew(self, of_processes: Sequence[Settings]) -> None:
        """Agree anew, where values are read, by the settings of all processes that share layers."""
        _, differing = _differing(dict(enumerate(of_processes)))
        if differing:
            if not self._is_told:
                self._is_told = True
                now = _words(differing)
                tell(f"layers that processes share go on with earlier settings, which differ now: {now}")
            return
        self._is_told = False
        self._take_over()
        self._results = dict.fromkeys(self._results, "")

    def _compare(self, groups: Sequence[Any]) -> str:
        own = self.settings()
        digest = int.from_bytes(hashlib.sha256(repr(sorted(own.items())).encode()).digest()[:7], "little")
        both = torch.tensor([digest, -digest], device=communication_device(groups[0]))
        for group in groups:  # one after the other, so that all along all of them know
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        high, low = both.tolist()
        if high != -low:
            known = {dist.get_rank(): own}
            for group in groups:
                known = {rank: each for some in gather_objects(known, group) for rank, each in some.items()}
            if words := self._judge(known):
                return words
        self._take_over()
        return ""

    def _judge(self, of_processes: Mapping[int, Settings]) -> str:
        """Settings that differ and may not, in words; warns of those that may."""
        allowed, differing = _differing(dict(sorted(of_processes.items())))
        for name, values in allowed.items():
            tell(f"processes that share layers differ in {_words({name: values})}: {_MAY_DIFFER[name]}")
        return _words(differing)

    def _take_over(self) -> None:
        self._agreed = replace(self._limits)
        self._steps.agreed = self._steps.every, self._steps.seed


_Differing = dict[str, dict[Hashable, int]]


def _differing(of_processes: Mapping[int, Settings]) -> tuple[_Differing, _Differing]:
    """Name -> value -> the first process that has it: of settings that may differ, and of others."""
    found: dict[str, dict[Hashable, int]] = {}
    for rank, settings in of_processes.items():
        for name, value in settings.items():
            found.setdefault(name, {}).setdefault(value, rank)
    differing = {name: values for name, values in found.items() if len(values) > 1}
    # Without a budget a process observes forwards that those with one pass over.
    allowed = {name for name in _MAY_DIFFER if name == "max_samples" or None not in found[name]}
    return (
        {name: values for name, values in differing.items() if name in allowed},
        {name: values for name, values in differing.items() if name not in allowed},
    )


def _words(differing: Mapping[str, Mapping[Hashable, int]]) -> str:
    return ", ".join(
        f"{name}={' and '.join(f'{value!r} on process {rank}' for value, rank in values.items())}"
        for name, values in differing.items()
    )
