"""Selection of forwards: all calls of layers inside one are observed, or none."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.probing.budget import Budget, Plan
from spectralmetrics.probing.hooks import Hooks, Select
from spectralmetrics.probing.sampling import is_observed
from spectralmetrics.sums.merging import communication_device
from spectralmetrics.torch_private import in_backward, is_inferring_shapes


@dataclass
class Forward:
    """A forward of the model that runs.

    Attributes:
        number: the number of the forward, in its stage and since the last reset.
        is_observed: whether its layers are.
        ever: its number in its stage since the beginning; -1 if no history is to hold it.
        groups: metric, by its ``id`` -> number of the group that it keeps what it is shown in this forward in.
        calls: layer -> how often it has run in this forward, where processes share it.
    """

    number: int
    is_observed: bool
    ever: int
    groups: dict[int, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


class Moment(NamedTuple):
    """The circumstances of one forward of a layer.

    Attributes:
        forward: number of the forward, of the layer and since the last reset; decides which rows are drawn.
        groups: see :meth:`Steps.groups`.
        number: number of the model's forward for histories; None where no metric keeps one.
        step: step of the optimiser.
        mask: laid beside the model.
        labels: likewise.
        is_idle: whether this process only takes part, since others share the forward, and keeps nothing.
        call: how many times the layer has run before in this forward of the model, where processes share it.
    """

    forward: int
    groups: dict[int, int]
    number: int | None = None
    step: int | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    is_idle: bool = False
    call: int = 0


class Thread(threading.local):
    """The state of one thread: the forward that runs in it, and whether it observes."""

    current: Forward | None = None
    observing = False


class Steps:
    """Counts the forwards of a model and says which are observed.

    Args:
        every: one in so many is observed.
        seed: seed of the random draws.
        budget: that must allow it, too.

    Attributes:
        stage_of: training flag -> stage in which a forward counts, None for no stage. A trainer's callback sets
            it, which knows more than the flag.
        shares: says whether other processes share forwards of the model, and so must observe the same.
        thread: the forward of the model that runs in this thread.
        agreed: one in how many, and the seed, as processes that share forwards have agreed; None goes by what
            is set.
    """

    stage_of: Callable[[bool], str | None]
    shares: Callable[[], bool]

    def __init__(self, every: int, seed: int, budget: Budget | None = None) -> None:
        self.stage_of = stage_by_flag
        self.shares = _never
        self.every = every
        self.seed = seed
        self.budget = budget
        self.counts = {"train": 0, "eval": 0}  # since the last reset
        self.epochs = {"train": 0, "eval": 0}  # resets so far
        self._is_watching = False
        self.forwards = {"train": 0, "eval": 0}  # ever
        self.alone = {"train": 0, "eval": 0}  # one more than the last number of a layer run by itself
        self.step: int | None = None  # of the optimiser, as far as somebody tells
        self.agreed: tuple[int, int] | None = None
        self.thread = Thread()

    def enter(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """A forward of the model begins."""
        if in_backward() or is_inferring_shapes():  # a checkpoint's recomputation
            return
        stage = self.stage_of(training)
        if stage is None:
            self.thread.current = None
            return
        step = self.counts[stage]
        self.counts[stage] += 1
        # In the place of what an interrupted forward, after which no hook is called, has left.
        every, seed = self.agreed or (self.every, self.seed)
        is_seen = is_observed(step, every, (seed, stage, self.epochs[stage]))
        if self.budget is not None:
            is_seen = self._allows(stage, step) and is_seen
        # Not the mode inside: a checkpoint that recomputes runs its layers without gradients the first time.
        counts = stage != "train" or torch.is_grad_enabled()
        self.forwards[stage] = max(self.forwards[stage], self.alone[stage])
        self.thread.current = Forward(step, is_seen, self.forwards[stage] if counts else -1)
        self.forwards[stage] += counts

    def leave(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """The forward that began last ends."""
        if not in_backward():
            self.thread.current = None

    def groups(self) -> dict[int, int]:
        """The groups of the forward of the model that runs in this thread; of its own for a call outside."""
        current = self._current()
        return {} if current is None else current.groups

    def forward(self) -> int | None:
        """The number of the model's forward for histories, which no reset changes; None outside of one.

        -1 for one of a training mode that has no gradients, such as a rollout.
        """
        current = self._current()
        return None if current is None else current.ever

    def call(self, layer: str) -> int:
        """Count a call of a layer; return how many there were before in this forward of the model."""
        current = self._current()
        if current is None:
            return 0
        current.calls[layer] += 1
        return current.calls[layer] - 1

    def alone_after(self, number: int, stage: str) -> int:
        """The number for histories of a forward of a layer by itself: later than all before it.

        Args:
            number: the least that it may be, one more than the layer's last.
            stage: the stage of the layer.
        """
        number = max(number, self.forwards[stage])
        self.alone[stage] = max(self.alone[stage], number + 1)
        return number

    def observes(self, stage: str, layer: str, forward: int) -> bool:
        """Decides whether to observe a layer's forward; its number counts where the model itself is not run."""
        current = self._current()
        if current is not None:
            return current.is_observed
        if self.budget is not None and not self._allows(stage, forward):
            return False
        every, seed = self.agreed or (self.every, self.seed)
        return is_observed(forward, every, (seed, stage, layer, self.epochs[stage]))

    def passes(self) -> bool:
        """True if the forward of the model that runs in this thread is not observed."""
        current = self.thread.current
        return current is not None and not current.is_observed

    @property
    def leaves_out(self) -> bool:
        """True if some forwards may not be observed."""
        return self.every > 1 or self.budget is not None or (self.agreed or (1,))[0] > 1

    def rows_per_feature(self, stage: str, wanted: float | None) -> float | None:
        """The number of rows to draw for each feature, as asked for and as the budget allows; None for all."""
        allowed = None if self.budget is None else self.budget.rows_per_feature(stage)
        if allowed is None or wanted is None:
            return wanted if allowed is None else allowed
        return min(wanted, allowed)

    def reset(self, stage: str) -> None:
        """Count a stage from the beginning, with other draws."""
        if self.budget is not None:
            self.budget.reset(stage)
        self.counts[stage] = 0
        self.epochs[stage] += 1

    def go_beyond(self, other: Steps) -> None:
        """Number the next forwards for histories behind those that other steps have counted, too."""
        for mine, its in ((self.forwards, other.forwards), (self.alone, other.alone)):
            mine.update({stage: max(number, its[stage]) for stage, number in mine.items()})

    def agree_on_plans(self, group: Any) -> None:
        """Have processes that share forwards follow the plan of the group's first; all call it together."""
        if self.budget is None:
            return
        plans = [self.budget.propose(stage) for stage in self.counts]
        told = [
            number for plan in plans for number in (plan.every, plan.draws, round(1024 * plan.rows_per_feature))
        ]
        is_first = dist.get_rank(group) == 0
        numbers = torch.tensor(told if is_first else [-1] * len(told), device=communication_device(group))
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        if self.shares():
            for stage, (every, draws, rows) in zip(self.counts, numbers.view(-1, 3).tolist(), strict=True):
                self.budget.follow(stage, Plan(0, every, bool(draws), rows / 1024))

    def watch(self, model: nn.Module, hooks: Hooks) -> None:
        """Put hooks on the model, once. To be called after its layers have theirs."""
        if self._is_watching:
            return
        self._is_watching = True
        hooks.before(model, self.enter)
        hooks.behind(model, self.leave, looks=False, always_call=True)

    def _allows(self, stage: str, number: int) -> bool:
        """True if the budget allows to observe the forward that begins."""
        assert self.budget is not None
        # What others share goes by its number, which is theirs, too.
        return self.budget.begins(stage, number) if self.shares() else self.budget.begins(stage)

    def _current(self) -> Forward | None:
        """The forward of the model that runs in this thread."""
        return self.thread.current

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "thread"}
        return state | {"stage_of": stage_by_flag, "shares": _never}  # who knows better knows of the original

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.thread = Thread()


def _never() -> bool:
    return False


def stage_by_flag(training: bool) -> str:
    """The stage that a layer's own ``training`` flag says."""
    return "train" if training else "eval"
