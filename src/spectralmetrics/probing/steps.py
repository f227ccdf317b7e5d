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
from spectralmetrics.probing.facts import STAGES
from spectralmetrics.probing.hooks import Hooks, Select
from spectralmetrics.probing.sampling import is_observed
from spectralmetrics.sums.merging import communication_device
from spectralmetrics.torch_private import calls_itself, in_backward, is_inferring_shapes


@dataclass
class Forward:
    """A forward of the model that runs.

    Attributes:
        number: the number of the forward, in its stage and since the last reset.
        is_observed: True if its layers are observed.
        ever: its number in its stage since the beginning; -1 if histories leave it out.
        stage: its stage.
        stages: the stages in which layers count whose ``training`` flag is False, and True; empty for no stage.
        is_news: True until a budget knows that a layer has run in it, if it is not observed.
        groups: ``id`` of a metric -> number of the group for the metric's observations in this forward.
        calls: layer -> number of its calls in this forward, where processes share it.
        inner: number of calls that the model makes of itself, inside one another, and that now run.
    """

    number: int
    is_observed: bool
    ever: int
    stage: str
    stages: tuple[str, str]
    is_news: bool = True
    groups: dict[int, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    inner: int = 0


class Moment(NamedTuple):
    """The circumstances of one forward of a layer.

    Attributes:
        forward: number of the forward, of the layer and since the last reset; decides which rows are drawn.
        groups: see :meth:`Steps.groups`.
        number: number of the model's forward for histories; None where no metric keeps one.
        step: step of the optimiser.
        mask: the mask given beside the model.
        labels: the labels given beside the model.
        is_idle: True if this process only takes part, since others share the forward, and keeps nothing.
        call: number of earlier calls of the layer in this forward of the model, where processes share it.
    """

    forward: int
    groups: dict[int, int]
    number: int | None = None
    step: int | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    is_idle: bool = False
    call: int = 0


class Here:
    """The state of one thread.

    Attributes:
        current: the forward of the model that runs in the thread.
        is_observing: True while the thread observes an output.
    """

    __slots__ = ("current", "is_observing")

    def __init__(self) -> None:
        self.current: Forward | None = None
        self.is_observing = False


class Thread(threading.local):
    """The state of this thread; reading it once takes less time than each of its parts would."""

    def __init__(self) -> None:
        self.here = Here()


class Steps:
    """Counts the forwards of a model and decides which are observed.

    Args:
        every: one in so many forwards is observed.
        seed: seed of the random draws.
        budget: must allow an observed forward, too; None for no budget.

    Attributes:
        stage_of: training flag -> stage in which a forward counts, None for no stage. A trainer's callback may
            replace it.
        shares: returns True if other processes share forwards of the model, and so must observe the same.
        thread: the state of this thread, with the forward of the model that runs in it.
        pools: the stages whose forwards of one step of the optimiser histories take as one.
        agreed: ``every`` and ``seed`` on which processes that share forwards have agreed; None uses their own.
    """

    stage_of: Callable[[bool], str | None]
    shares: Callable[[], bool]

    def __init__(self, every: int, seed: int, budget: Budget | None = None) -> None:
        self.stage_of = stage_by_flag
        self.shares = _never
        self.every = every
        self.seed = seed
        self.budget = budget
        self.counts = dict.fromkeys(STAGES, 0)  # since the last reset
        self.epochs = dict.fromkeys(STAGES, 0)  # resets so far
        self._is_watching = False
        self.forwards = dict.fromkeys(STAGES, 0)  # ever
        self.alone = dict.fromkeys(STAGES, 0)  # one more than the last number of a layer run by itself
        self.step: int | None = None  # of the optimiser; None until it is set
        self.pools: set[str] = set()
        self._firsts: dict[tuple[str, str], tuple[int, int]] = {}  # stage, layer -> step, its first forward
        self.counted: int | None = None  # the step that a monitor has set
        self.counted_by: dict[str, Any] = {}  # the monitors that have counted it -> their recorders
        self.agreed: tuple[int, int] | None = None
        self.thread = Thread()

    def enter(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """Begin a forward of the model."""
        if in_backward() or is_inferring_shapes():  # a checkpoint's recomputation
            return
        stages = (self.stage_of(False) or "", self.stage_of(True) or "")
        stage = stages[training]
        if not stage:
            self.thread.here.current = None
            return
        current = self.thread.here.current
        if current is not None and calls_itself(module):
            current.inner += 1
            return
        step = self.counts[stage]
        self.counts[stage] += 1
        every, seed = self.agreed or (self.every, self.seed)
        is_due = is_observed(step, every, (seed, stage, self.epochs[stage]))
        if self.budget is not None:
            is_due = self._allows(stage, step) and is_due
        # The mode inside the model does not decide: a checkpoint first runs its layers without gradients.
        counts = stage != "train" or torch.is_grad_enabled()
        self.forwards[stage] = max(self.forwards[stage], self.alone[stage])
        # A forward that the keyboard interrupts calls no hook at its end: this replaces it.
        ever = self.first_in_step(self.forwards[stage], stage) if counts else -1
        self.thread.here.current = Forward(step, is_due, ever, stage, stages)
        self.forwards[stage] += counts

    def leave(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """End the forward that began last."""
        if in_backward():
            return
        current = self.thread.here.current
        if current is not None and current.inner:
            current.inner -= 1
        else:
            self.thread.here.current = None

    def groups(self) -> dict[int, int]:
        """The groups of the model's forward that runs in this thread; a new dict outside of one."""
        current = self.thread.here.current
        return {} if current is None else current.groups

    def forward(self) -> int | None:
        """The number of the model's forward for histories, which no reset changes; None outside of one.

        -1 for a forward in training mode without gradients, such as a rollout.
        """
        current = self.thread.here.current
        return None if current is None else current.ever

    def call(self, layer: str) -> int:
        """Count a call of a layer; return how many there were before in this forward of the model."""
        current = self.thread.here.current
        if current is None:
            return 0
        current.calls[layer] += 1
        return current.calls[layer] - 1

    def alone_after(self, number: int, stage: str) -> int:
        """The number, for histories, of a layer's forward outside the model's: larger than all earlier numbers.

        Args:
            number: the smallest number to return, one more than the layer's last.
            stage: the stage of the layer.
        """
        number = max(number, self.forwards[stage])
        self.alone[stage] = max(self.alone[stage], number + 1)
        return number

    def first_in_step(self, number: int, stage: str, layer: str = "") -> int:
        """The number for histories of the first forward in this step, if they take a step's forwards as one.

        Args:
            number: the number of the forward.
            stage: its stage.
            layer: the layer that is run by itself; empty for the model.
        """
        if self.step is None or stage not in self.pools:
            return number
        step, first = self._firsts.get((stage, layer), (None, number))
        if step != self.step:
            self._firsts[stage, layer] = self.step, number
            return number
        return first

    def observes(self, stage: str, layer: str, forward: int) -> bool:
        """True if a layer's forward is observed; its number only matters outside of the model's forwards."""
        current = self.thread.here.current
        if current is not None:
            return current.is_observed
        if self.budget is not None and not self._allows(stage, forward):
            return False
        every, seed = self.agreed or (self.every, self.seed)
        return is_observed(forward, every, (seed, stage, layer, self.epochs[stage]))

    def passes(self) -> bool:
        """True if the forward of the model that runs in this thread is not observed."""
        current = self.thread.here.current
        return current is not None and not current.is_observed

    @property
    def leaves_out(self) -> bool:
        """True if some forwards may not be observed."""
        return self.every > 1 or self.budget is not None or (self.agreed is not None and self.agreed[0] > 1)

    def rows_per_feature(self, stage: str, wanted: float | None) -> float | None:
        """The rows to draw for each feature: as wanted, or fewer if the budget allows fewer; None for all."""
        if self.budget is None:
            return wanted
        allowed = self.budget.rows_per_feature(stage)
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
        """Number the next forwards, for histories, after all that other steps have counted."""
        for own, others in ((self.forwards, other.forwards), (self.alone, other.alone)):
            own.update({stage: max(number, others[stage]) for stage, number in own.items()})

    def agree_on_plans(self, group: Any) -> None:
        """Follow the plans of the group's first process if forwards are shared; all processes call it."""
        if self.budget is None:
            return
        plans = [self.budget.propose(stage) for stage in self.counts]
        proposed = [
            number for plan in plans for number in (plan.every, plan.draws, round(1024 * plan.rows_per_feature))
        ]
        own = proposed if dist.get_rank(group) == 0 else [-1] * len(proposed)
        numbers = torch.tensor(own, device=communication_device(group))
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        if self.shares():
            for stage, (every, draws, rows) in zip(self.counts, numbers.view(-1, 3).tolist(), strict=True):
                self.budget.follow(stage, Plan(0, every, bool(draws), rows / 1024))

    def watch(self, model: nn.Module, hooks: Hooks) -> None:
        """Put hooks on the model, once; call it after its layers have theirs."""
        if self._is_watching:
            return
        self._is_watching = True
        hooks.before(model, self.enter)
        hooks.behind(model, self.leave, needs_values=False, always_call=True)

    def _allows(self, stage: str, number: int) -> bool:
        """True if the budget allows to observe the forward that begins."""
        assert self.budget is not None
        # A shared forward is found by its number, which is the same on all its processes.
        return self.budget.begins(stage, number) if self.shares() else self.budget.begins(stage)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "thread"}
        # A copy has no trainer and no recorder.
        return state | {
            "stage_of": stage_by_flag,
            "shares": _never,
            "counted_by": dict.fromkeys(self.counted_by),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.thread = Thread()


def _never() -> bool:
    return False


def stage_by_flag(training: bool) -> str:
    """The stage by a layer's own ``training`` flag."""
    return "train" if training else "eval"
