"""Budgets: the share of a training's time that a probe may take, and the forwards it then observes.

The choice of forwards does not depend on the time within a training step: one forward is drawn from each block.
Where a block ends, averages over many forwards set the length of the next block, and the rows to draw from each
layer. A rule that waits until enough time has passed would always choose the forward after the longest pause,
for example always a forward of the same one of two networks.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from spectralmetrics.probing.facts import STAGES
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.sampling import draw_place

# The probe's clock misses the effect of its work on caches: trainings became slower by up to 1.7 times the time
# that the probe had counted. So it uses only this share of the budget.
_USED = 0.5
# At least one in so many forwards should be observed, as long as rows can be left out instead.
_SELDOM, _OFTEN = 8, 2
_LEAST_ROWS_PER_FEATURE, _ALL_ROWS_PER_FEATURE = 0.5, 2.0**20
# The time of a pause, such as an evaluation elsewhere, must not be spent: a forward earns at most this.
_LONGEST_STEP = 32  # times the mean one
_REMEMBERED = 256  # forwards over which times are averaged
_EVENED_OUT = 64  # forwards over which overspending and underspending are evened out
_FIRST_BLOCK = 4  # forwards in a block while no price is known
_NOTHING = contextlib.nullcontext()


class Plan(NamedTuple):
    """The plan of a stage: which forwards are observed, and how many rows of each.

    Processes that follow the same plan observe the same forwards.

    Attributes:
        start: number of the forward with which the first block begins.
        every: number of forwards in a block.
        draws: True if one forward of each block is observed, False if none is.
        rows_per_feature: number of rows to draw for each feature of a layer.
    """

    start: int = 0
    every: int = _FIRST_BLOCK
    draws: bool = True
    rows_per_feature: float = 1.0

    def observes(self, number: int, seed: object) -> bool:
        """True if a forward is observed, by its number in its stage, ``start`` or later.

        >>> [Plan(every=3).observes(number, seed=0) for number in range(6)]
        [False, True, False, False, True, False]
        """
        block, place = divmod(number - self.start, self.every)
        return self.draws and place == draw_place(self.every, (seed, self.start, block))


class Spent(NamedTuple):
    """The time that a probe with a budget has taken in one stage since the last reset.

    Attributes:
        share: the probe's time, as a share of the training's time without the probe.
        forwards: the number of forwards of the model.
        observed: the number of observed forwards.
    """

    share: float
    forwards: int
    observed: int


class Budget:
    """Decides which forwards are observed, and how many rows of each, by the time that observing takes.

    Each forward earns a share of the mean time from one forward to the next. A block of forwards earns the cost
    of one observed forward, and one of the block is drawn. Long blocks draw fewer rows, short ones more.

    Args:
        share: share of the time that the probe may take, such as 0.03.
        seed: seed of the draws.
        clock: gives the time in seconds.
    """

    def __init__(self, share: Any, seed: int, clock: Callable[[], float] = time.perf_counter) -> None:
        if not (isinstance(share, numbers.Real) and 0 < float(share) < 1):
            raise ValueError(f"expected budget to be a share of the time between 0 and 1, got {share!r}")
        self.share: float = share  # type: ignore[assignment]  # a number of any kind
        self._seed = seed
        self._now = clock
        self._stages = {stage: _Account(self.share, (seed, stage)) for stage in STAGES}
        self._last: tuple[_Account, float] | None = None
        self._pending: deque[tuple[_Account, Any, Any, float]] = deque()

    def begins(self, stage: str, number: int | None = None) -> bool:
        """Begin a forward of the model, or of a layer that is run by itself; return True if it is observed.

        Args:
            stage: the stage of the forward.
            number: number of the forward since the last reset, where processes share it. It decides together
                with the plan, which then stays until the next call of :meth:`follow`.
        """
        now = self._now()
        self._collect()
        if self._last is not None:
            before, at = self._last
            before.earn(now - at)
        account = self._stages[stage]
        self._last = account, now
        account.is_following = account.is_following or number is not None
        return account.decide(number)

    def rows_per_feature(self, stage: str) -> float | None:
        """The number of rows to draw for each feature; None: all."""
        rows = self._stages[stage].plan.rows_per_feature
        return None if rows >= _ALL_ROWS_PER_FEATURE else rows

    def follow(self, stage: str, plan: Plan) -> None:
        """Follow a plan until the next call, instead of making another plan at the end of each block.

        Processes that share layers must observe the same forwards: where they synchronise, one process sends
        its :meth:`propose` to all.
        """
        account = self._stages[stage]
        account.plan, account.is_following = plan, True

    def propose(self, stage: str) -> Plan:
        """A plan from this process' own times, for forwards counted from the last reset."""
        return self._stages[stage].propose()

    def spent(self, stage: str) -> Spent:
        """The time taken since the last reset."""
        self._collect()
        account = self._stages[stage]
        share = account.cost / account.time if account.time > 0 else 0.0
        return Spent(share, *account.counts())

    def reset(self, stage: str) -> None:
        """Count a stage from the beginning; the averages of its times stay."""
        self._stages[stage].restart()
        self._last = None

    def passes(self, stage: str) -> None:
        """Record that a layer ran and was not observed; the call of its hook, about 1 µs, is not counted."""
        self._stages[stage].has_run = True

    @contextlib.contextmanager
    def measuring(
        self, stage: str, output: Any, around: contextlib.AbstractContextManager[Any] = _NOTHING
    ) -> Iterator[None]:
        """Count the time spent inside and in ``around``, on the host and on the accelerator of an output."""
        account = self._stages[stage]
        events = _events(output)
        if events is not None:
            events[0].record()
        start = self._now()
        try:
            with around:
                yield
        finally:
            seconds = self._now() - start
            account.pay(seconds)
            if events is not None:
                events[1].record()
                self._pending.append((account, *events, seconds))

    def _collect(self) -> None:
        """Count the accelerator's time beyond the host's, as far as it can be read without waiting."""
        while self._pending and self._pending[0][2].query():
            account, first, second, paid = self._pending.popleft()
            account.pay(max(first.elapsed_time(second) / 1000 - paid, 0.0))

    def __getstate__(self) -> dict[str, Any]:
        return {"share": self.share, "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["share"], state["_seed"])  # type: ignore[misc]  # a copy measures for itself


class _Account:
    """The time that one stage has earned and spent, in seconds, and its plan.

    Attributes:
        plan: the current plan.
        is_following: True if processes share forwards, so that only :meth:`Budget.follow` sets the plan.
        number: number of forwards so far, including those before a restart.
        credit: time that was earned and not spent.
        time, cost: time of the training and of the probe since the last restart.
        forwards, observed: number of forwards and of observed ones since the last restart.
        has_run: True if a hook was called in the current forward.
    """

    def __init__(self, share: float, seed: object) -> None:
        self._share = share
        self._seed = seed
        self.plan = Plan()
        self.is_following = False
        self.number = 0
        self.credit = 0.0
        self._mean_time = 0.0  # from one forward to the next
        self._times = 0  # number of forwards in that mean
        self._price: float | None = None  # seconds for an observed forward
        self._observed_ever = 0
        self.restart()

    def restart(self) -> None:
        self.has_run = self._is_observing = False
        self._paid = 0.0  # since the forward began
        self.time = self.cost = 0.0
        self.forwards = self.observed = 0
        if not self.is_following:  # to observe epochs that are shorter than a block, too
            self.plan = self._next_plan()

    def counts(self) -> tuple[int, int]:
        """The number of forwards and of observed ones, including the current forward."""
        return self.forwards + self.has_run, self.observed + (self.has_run and self._is_observing)

    def earn(self, seconds: float) -> None:
        """End the last forward, which began so many seconds ago."""
        has_run, self.has_run = self.has_run, False
        own, self._paid = self._paid, 0.0
        if not has_run:  # the probe was paused
            return
        seconds = max(seconds - own, 0.0)  # without the probe
        if self._times >= _FIRST_BLOCK:
            seconds = min(seconds, _LONGEST_STEP * self._mean_time)
        self._times = min(self._times + 1, _REMEMBERED)
        self._mean_time += (seconds - self._mean_time) / self._times
        self.time += seconds
        # By the mean, not by these seconds: credit must not be largest after the longest pause.
        self.credit += self._earned() - own
        self.number += 1
        self.forwards += 1
        if self._is_observing:
            self._learn(own)
        if self.number >= self.plan.start + self.plan.every and not self.is_following:
            self.plan = self._next_plan()

    def pay(self, seconds: float) -> None:
        self.has_run = True
        self._paid += seconds
        self.cost += seconds

    def decide(self, number: int | None = None) -> bool:
        """True if the forward that begins is observed; None takes its number from the account."""
        self._is_observing = self.plan.observes(self.number if number is None else number, self._seed)
        return self._is_observing

    def propose(self) -> Plan:
        return self._next_plan()._replace(start=0)

    def _earned(self) -> float:
        """The seconds that each forward earns."""
        return _USED * self._share * self._mean_time

    def _learn(self, paid: float) -> None:
        """Update the price by the price of an observed forward."""
        self._is_observing = False
        self.observed += 1
        self._observed_ever += 1
        if self._observed_ever == 2:  # the first one also makes the sums and costs more
            self._price = paid
        elif self._price is not None:
            self._price += 0.3 * (paid - self._price)

    def _next_plan(self) -> Plan:
        """The next plan, from averages and the number of forwards alone."""
        rows, earned = self.plan.rows_per_feature, self._earned()
        if not self._observed_ever:
            return Plan(self.number, rows_per_feature=rows)
        price = self._price or 0.0
        self.credit = min(self.credit, max(2 * price, 16 * earned))
        # Overspending and underspending are evened out slowly: otherwise long and short blocks would alternate
        # in a fixed rhythm.
        spendable = earned + self.credit / _EVENED_OUT
        longest = max(self.number, 2 * _SELDOM)  # a plan must not reach further than the forwards so far
        if spendable <= earned / 8 or price > longest * spendable:
            return Plan(self.number, min(longest, _EVENED_OUT), False, self._rows(rows, math.inf, price))
        length = price / spendable
        return Plan(self.number, max(math.ceil(length), 1), True, self._rows(rows, length, price))

    @staticmethod
    def _rows(rows: float, length: float, price: float) -> float:
        if length < _OFTEN and price:
            return min(rows * 1.25, _ALL_ROWS_PER_FEATURE)
        return max(rows * 0.8, _LEAST_ROWS_PER_FEATURE) if length > _SELDOM else rows


def _events(output: Any) -> tuple[Any, Any] | None:
    """Two timing events of an output's accelerator; None on the CPU, and on devices without events."""
    values = output if isinstance(output, torch.Tensor) else first_tensor(output)
    if not isinstance(values, torch.Tensor) or values.device.type == "cpu":
        return None
    try:
        kind = torch.get_device_module(values.device).Event
        return kind(enable_timing=True), kind(enable_timing=True)
    except (AttributeError, TypeError, RuntimeError):
        return None
