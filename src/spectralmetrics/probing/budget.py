"""Budgets: the share of a training's time that a probe may take, and the forwards it then observes.

Which forwards are observed does not depend on the time within a step of the training: one is drawn from each
block of forwards. How long the next block is, and how many rows are drawn from each layer, is decided where a
block ends, from averages over many forwards. Whatever waited for the moment at which enough time has passed
would always meet the forward after the longest pause, such as that of one of two networks.
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

from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.sampling import draw_place

# What is measured from inside misses what the work does to caches: seen from outside, trainings took up to 1.7
# times as long beyond their own time as the probe had counted. So much of the budget is used.
_USED = 0.5
# Observed forwards should not be fewer than one in so many, as long as rows can be left out instead.
_SELDOM, _OFTEN = 8, 2
_LEAST_ROWS_PER_FEATURE, _ALL_ROWS_PER_FEATURE = 0.5, 2.0**20
# A pause between two forwards, such as an evaluation elsewhere, is no time to be spent.
_LONGEST_STEP = 32  # times the mean one
_REMEMBERED = 256  # forwards over which times are averaged
_EVENED_OUT = 64  # forwards in which what was spent too much, or too little, is evened out
_FIRST_BLOCK = 4  # forwards, as long as no price is known


class Plan(NamedTuple):
    """All that decides which forwards of a stage are observed, and how much of each.

    Processes that follow the same plan observe the same forwards.

    Attributes:
        start: number of the forward with which the first block begins.
        every: number of forwards in a block.
        draws: whether one forward of each block is observed; if not, none is.
        rows_per_feature: number of rows to draw for each feature of a layer.
    """

    start: int = 0
    every: int = _FIRST_BLOCK
    draws: bool = True
    rows_per_feature: float = 1.0

    def observes(self, number: int, seed: object) -> bool:
        """Decides whether to observe a forward.

        Args:
            number: number of the forward in its stage, ``start`` or later.
            seed: seed of the draws.

        >>> [Plan(every=3).observes(number, seed=0) for number in range(6)]
        [False, True, False, False, True, False]
        """
        block, place = divmod(number - self.start, self.every)
        return self.draws and place == draw_place(self.every, (seed, self.start, block))


class Spent(NamedTuple):
    """The time that a probe with a budget has taken in one stage since the last reset.

    Attributes:
        share: the share of the time between forwards, the probe's own time left out.
        forwards: the number of forwards of the model.
        observed: the number of these that were observed.
    """

    share: float
    forwards: int
    observed: int


def _checked(share: Any) -> float:
    if not (isinstance(share, numbers.Real) and 0 < float(share) < 1):
        raise ValueError(f"expected budget to be a share of the time between 0 and 1, got {share!r}")
    return share  # type: ignore[return-value]  # a number of any kind


class Budget:
    """Decides which forwards are observed, and how many rows of each, by the time that observing takes.

    Each forward earns a share of the mean time from one to the next. From each block of forwards that earns
    what an observed one costs, one is drawn. Where blocks are long, fewer rows are drawn; where they are short,
    more.

    Args:
        share: share of the time, such as 0.03.
        seed: seed of the draws.
        clock: gives the time in seconds; ``time.perf_counter`` by default.
    """

    def __init__(self, share: float, seed: int, clock: Callable[[], float] | None = None) -> None:
        self.share = _checked(share)
        self._seed = seed
        self._clock = clock
        self._stages = {stage: _Account(share, (seed, stage)) for stage in ("train", "eval")}
        self._last: tuple[_Account, float] | None = None
        self._pending: deque[tuple[_Account, Any, Any, float]] = deque()

    def begins(self, stage: str, number: int | None = None) -> bool:
        """A forward of the model begins, or of a layer that is run by itself; return whether to observe it.

        Args:
            stage: the stage of the forward.
            number: number of the forward since the last reset, where processes share it. It decides together
                with the plan, which then stays until the next one is given, see :meth:`follow`.
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
        found = self._stages[stage].plan.rows_per_feature
        return None if found >= _ALL_ROWS_PER_FEATURE else found

    def plan(self, stage: str) -> Plan:
        """The plan by which forwards are observed now."""
        return self._stages[stage].plan

    def follow(self, stage: str, plan: Plan) -> None:
        """Keep to a plan until the next one is given, instead of making another at the end of each block.

        Processes that share layers must observe the same forwards: where they meet, one of them gives its
        :meth:`propose` to all.
        """
        account = self._stages[stage]
        account.plan, account.is_following = plan, True

    def propose(self, stage: str) -> Plan:
        """The plan that this process' own times make likely, for forwards counted from the last reset."""
        return self._stages[stage].propose()

    def spent(self, stage: str) -> Spent:
        """The time taken so far."""
        self._collect()
        account = self._stages[stage]
        share = account.cost / account.time if account.time > 0 else 0.0
        return Spent(share, *account.seen())

    def reset(self, stage: str) -> None:
        """Count a stage from the beginning; what has been learnt about its speed stays."""
        self._stages[stage].restart()
        self._last = None

    def passes(self, stage: str) -> None:
        """A layer is not observed in this forward; the call of a hook, about 1 µs, is not counted."""
        self._stages[stage].is_met = True

    @contextlib.contextmanager
    def measuring(self, stage: str, output: Any) -> Iterator[None]:
        """Count the time of what happens inside, on the host and on the accelerator of an output."""
        account = self._stages[stage]
        events = _events(output)
        if events is not None:
            events[0].record()
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            account.pay(seconds)
            if events is not None:
                events[1].record()
                self._pending.append((account, *events, seconds))

    def _collect(self) -> None:
        """Count the accelerator's time beyond the host's, as far as it is known without waiting."""
        while self._pending and self._pending[0][2].query():
            account, first, second, paid = self._pending.popleft()
            account.pay(max(first.elapsed_time(second) / 1000 - paid, 0.0))

    def _now(self) -> float:
        return time.perf_counter() if self._clock is None else self._clock()

    def __getstate__(self) -> dict[str, Any]:
        return {"share": self.share, "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["share"], state["_seed"])  # type: ignore[misc]  # a copy measures for itself


class _Account:
    """The time that one stage has earned and spent, in seconds, and its plan.

    Attributes:
        plan: what decides which forwards are observed.
        is_following: whether the plan is given by others.
        number: the number of forwards so far, whenever the account was restarted.
        credit: what has been earned and not spent.
        time, cost: since the last restart.
        forwards, observed: likewise.
        is_met: whether a hook was called in the forward that runs.
    """

    def __init__(self, share: float, seed: object) -> None:
        self._share = share
        self._seed = seed
        self.plan = Plan()
        self.is_following = False
        self.number = 0
        self.credit = 0.0
        self._mean_time = 0.0  # from one forward to the next
        self._times = 0  # in that mean
        self._price: float | None = None  # of an observed forward
        self._observed_ever = 0
        self.restart()

    def restart(self) -> None:
        self.is_met = self._is_observing = False
        self._paid = 0.0  # since the forward began
        self.time = self.cost = 0.0
        self.forwards = self.observed = 0
        if not self.is_following:  # an epoch shorter than a block is to be seen, too
            self.plan = self._next_plan()

    def seen(self) -> tuple[int, int]:
        """The numbers of forwards and of observed ones, the last one included."""
        return self.forwards + self.is_met, self.observed + (self.is_met and self._is_observing)

    def earn(self, seconds: float) -> None:
        """So much time has passed since the last forward, which has ended."""
        was_met, self.is_met = self.is_met, False
        own, self._paid = self._paid, 0.0
        if not was_met:  # the probe was paused
            return
        seconds = max(seconds - own, 0.0)  # without the probe
        if self._times >= _FIRST_BLOCK:
            seconds = min(seconds, _LONGEST_STEP * self._mean_time)
        self._times = min(self._times + 1, _REMEMBERED)
        self._mean_time += (seconds - self._mean_time) / self._times
        self.time += seconds
        # The mean, not what has just passed: credit must not be largest after the longest pause.
        self.credit += self._earned() - own
        self.number += 1
        self.forwards += 1
        if self._is_observing:
            self._learn(own)
        if self.number >= self.plan.start + self.plan.every and not self.is_following:
            self.plan = self._next_plan()

    def pay(self, seconds: float) -> None:
        self.is_met = True
        self._paid += seconds
        self.cost += seconds

    def decide(self, number: int | None = None) -> bool:
        """Decides whether to observe the forward that begins, of this number or the next one."""
        self._is_observing = self.plan.observes(self.number if number is None else number, self._seed)
        return self._is_observing

    def propose(self) -> Plan:
        return self._next_plan()._replace(start=0)

    def _earned(self) -> float:
        """By each forward."""
        return _USED * self._share * self._mean_time

    def _learn(self, paid: float) -> None:
        """Take the price of the forward that was observed."""
        self._is_observing = False
        self.observed += 1
        self._observed_ever += 1
        if self._observed_ever == 2:  # the first one also makes the sums, and tells nothing of the next
            self._price = paid
        elif self._price is not None:
            self._price += 0.3 * (paid - self._price)

    def _next_plan(self) -> Plan:
        """From averages and the number of forwards alone."""
        rows, earned = self.plan.rows_per_feature, self._earned()
        if not self._observed_ever:
            return Plan(self.number, rows_per_feature=rows)
        price = self._price or 0.0
        self.credit = min(self.credit, max(2 * price, 16 * earned))
        # What was spent too much, or too little, is evened out little by little: blocks of much different
        # lengths one after the other would have a beat.
        spendable = earned + self.credit / _EVENED_OUT
        known = max(self.number, 2 * _SELDOM)  # no plan for longer than has been seen
        if spendable <= earned / 8 or price > known * spendable:
            return Plan(self.number, min(known, _EVENED_OUT), False, self._rows(rows, math.inf, price))
        length = price / spendable
        return Plan(self.number, max(math.ceil(length), 1), True, self._rows(rows, length, price))

    @staticmethod
    def _rows(rows: float, length: float, price: float) -> float:
        if length < _OFTEN and price:
            return min(rows * 1.25, _ALL_ROWS_PER_FEATURE)
        return max(rows * 0.8, _LEAST_ROWS_PER_FEATURE) if length > _SELDOM else rows


def _events(output: Any) -> tuple[Any, Any] | None:
    """Two events of an accelerator that tell the time; None on the CPU, and where there are none."""
    values = output if isinstance(output, torch.Tensor) else first_tensor(output)
    if not isinstance(values, torch.Tensor) or values.device.type == "cpu":
        return None
    try:
        kind = torch.get_device_module(values.device).Event
        return kind(enable_timing=True), kind(enable_timing=True)
    except (AttributeError, TypeError, RuntimeError):
        return None
