"""Agreement of the processes that share a layer, before the first rows travel: on settings and selected parts.

Settings decide how many rows travel, and in which forwards. With unequal settings, processes would wait for
each other, or end. So processes that share a layer compare them once, and again whenever values are read. A
setting that is changed between two readings applies to shared layers from the next reading on. The user's
functions that select from a layer's output fail on all processes or on none.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.probing.hooks import Select, warn_user
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import LeftOut, Part, is_dtensor, part_of, reason_of
from spectralmetrics.probing.processes import digest, extremes, is_one_of_several
from spectralmetrics.probing.rendezvous import key_of_probe
from spectralmetrics.probing.sampling import Limits
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.merging import gather_objects
from spectralmetrics.torch_private import default_store

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
        """Compare the settings of all processes that share a layer; a LeftOut if they differ."""
        if words := self._conflicts(by_rank):
            raise LeftOut(_REFUSED.format(words))
        self._take_over()

    def check(self, groups: Sequence[Any]) -> None:
        """Compare once the settings of the processes of some groups; a LeftOut if they differ. All call it."""
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
        high = low = digest(repr(sorted(own.items())))
        for group in groups:  # in turn, so that the result reaches all processes
            (high, _), (_, low) = extremes([high, low], group)
        if high != low:
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


class Selecting:
    """The results of the user's functions, and their failures.

    Args:
        selected: layers with a function.
        alike: the settings that must be equal on the processes of a layer.
    """

    def __init__(self, selected: Collection[str], alike: Alike) -> None:
        self._alike = alike
        self._forms: dict[str, Part] = {}  # layer -> the part that was selected, without its values
        self._sent: set[str] = set()  # layers whose settings this process has sent
        self._exchanged: set[str] = set()  # layers for which all processes have exchanged success or failure
        self._failed: dict[str, str] = {}  # layer -> why it failed in its first forward, on some process
        self._checked: set[str] = set()  # layers whose forms have been compared
        self._key = key_of_probe("select", selected)

    def send_settings(self, name: str) -> None:
        """Send this process' settings to the processes that share a layer, which are not known yet."""
        self._sent.add(name)
        self._send(f"{name}/settings", pickle.dumps(self._alike.settings()))

    def select(self, name: str, output: Any, function: Select) -> tuple[Any, Exception | None]:
        """Call the user's function on an output.

        In the first forward, success or failure goes into the store for all processes: it is not known yet
        which of them wait for this one.

        Raises:
            LeftOut: if the function failed in the first forward on some process; then in all later ones, too.

        Returns:
            Result and None. If the function raises: the part of a DTensor that other processes expect, in its
            last form and with values of NaN, and the error.
        """
        if name in self._failed:
            raise LeftOut(self._failed[name])
        try:
            chosen = function(output)
        except Exception as error:
            before = self._forms.get(name)
            values = first_tensor(output)
            if before is None or not isinstance(values, Tensor):
                if name not in self._exchanged and is_one_of_several():
                    self._failed[name] = f"`select` failed in the first forward: {reason_of(error)}"
                    self._send(name, self._failed[name].encode())
                raise
            sizes = zip(values.shape, before.shape, before.local.shape, strict=True)
            shape = tuple(size if whole == local else whole for size, whole, local in sizes)
            return replace(before, local=torch.full_like(values, math.nan), shape=shape), error
        if is_dtensor(chosen):
            part, values = part_of(chosen), first_tensor(output)
            if name not in self._exchanged:
                self._exchanged.add(name)
                self._send(name, b"")
                self._check_others(name, chosen.device_mesh.mesh.flatten().tolist())
            if isinstance(values, Tensor) and part.local.shape == values.shape:
                self._forms[name] = replace(part, local=part.local.new_empty(()).expand(part.local.shape))
        return chosen, None

    def _send(self, name: str, message: bytes) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # the store does not support it, or is missing
            default_store().set(f"{self._key}/{name}/{dist.get_rank()}", b"." + message)

    def _received(self, name: str, ranks: list[int]) -> dict[int, bytes]:
        try:
            store = default_store()
            return {rank: store.get(f"{self._key}/{name}/{rank}")[1:] for rank in ranks}
        except (RuntimeError, AttributeError):
            return {}

    def _check_others(self, name: str, ranks: list[int]) -> None:
        """Raise a LeftOut if the user's function has failed on one of these processes, or settings differ."""
        try:
            if settings := self._received(f"{name}/settings", ranks) if name in self._sent else {}:
                self._alike.compare({rank: pickle.loads(each) for rank, each in settings.items()})
            reasons = self._received(name, ranks)
            if failures := [f"{why.decode()} on process {rank}" for rank, why in reasons.items() if why]:
                raise LeftOut("; ".join(failures))
        except LeftOut as error:
            self._failed[name] = str(error)
            raise

    def check_form(self, name: str, part: Part) -> None:
        """Compare, once, the shapes that the user's function has returned on all processes."""
        if name in self._checked:
            return
        self._checked.add(name)
        for split in part.splits:
            spans = [part.spans(dim) for dim in range(part.local.ndim)]
            fits = tuple(part.local.shape) == tuple(span.stop - span.start for span in spans)
            high, low = extremes([hash(part.shape) % 2**40, not fits], split.group)
            if high != low or high[1]:
                raise LeftOut(
                    f"`select` returned a DTensor of shape {part.shape} whose part on this process is"
                    f" {tuple(part.local.shape)}, which does not fit the other processes': give"
                    " DTensor.from_local the shape and stride of the whole where parts are uneven"
                )
