"""How much of a training's time a probe may take, and what it then observes."""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from spectralmetrics.probing.observations import first_tensor

# What is measured from inside misses what the work does to caches: seen from outside, trainings took up to 1.7
# times as long beyond their own time as the probe had counted. So much of the budget is used.
_USED = 0.5
# Observed forwards should not be fewer than one in so many, as long as rows can be left out instead.
_SELDOM, _OFTEN = 1 / 8, 1 / 2
_LEAST_ROWS_PER_FEATURE, _ALL_ROWS_PER_FEATURE = 0.5, 2.0**20
# A pause between two forwards, such as an evaluation elsewhere, is no time to be spent.
_LONGEST_STEP = 4.0  # of the typical one


class Spent(NamedTuple):
    """What a probe with a budget has taken in one stage since the last reset.

    Attributes:
        share: of the time between forwards, the probe's own time left out.
        forwards: of the model.
        observed: of these.
    """

    share: float
    forwards: int
    observed: int


class Budget:
    """Decides which forwards are observed, and how many rows of each, by the time that observing takes.

    Each forward earns a share of the time since the one before. One is observed as soon as what has been earned
    pays for it, give or take a random half, so that no beat of the training is met. Where that is seldom, fewer
    rows are drawn; where it is often, more.

    Args:
        share: of the time, such as 0.03.
        seed: of the random halves.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self._seed = seed
        self._stages = {"train": _Account(share, seed), "eval": _Account(share, seed + 1)}
        self._last: tuple[_Account, float] | None = None
        self._pending: deque[tuple[_Account, Any, Any, float]] = deque()

    def begins(self, stage: str) -> bool:
        """A forward of the model begins, or of a layer that is run by itself; return whether to observe it."""
        now = time.perf_counter()
        self._collect()
        if self._last is not None:
            before, at = self._last
            before.earn(now - at)
        account = self._stages[stage]
        self._last = account, now
        return account.decide()

    def rows_per_feature(self, stage: str) -> float | None:
        """How many rows to draw for each feature; None: all."""
        found = self._stages[stage].rows_per_feature
        return None if found >= _ALL_ROWS_PER_FEATURE else found

    def spent(self, stage: str) -> Spent:
        """What has been taken so far."""
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
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            account.pay(seconds)
            if events is not None:
                events[1].record()
                self._pending.append((account, *events, seconds))

    def _collect(self) -> None:
        """Count the accelerator's time beyond the host's, as far as it is known without waiting."""
        while self._pending and self._pending[0][2].query():
            account, first, second, paid = self._pending.popleft()
            account.pay(max(first.elapsed_time(second) / 1000 - paid, 0.0))

    def __getstate__(self) -> dict[str, Any]:
        return {"share": self.share, "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["share"], state["_seed"])  # type: ignore[misc]  # a copy measures for itself


class _Account:
    """What one stage has earned and spent, in seconds."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._random = random.Random(seed)
        self.credit = 0.0
        self.rows_per_feature = 1.0
        self._typical = 0.0  # time from one forward to the next
        self._price: float | None = None  # of an observed forward
        self._luck = 1.0
        self._observed_ever = 0
        self._often = 0.0  # share of forwards that are observed, lately
        self._is_observing = False
        self._paid = 0.0  # since the forward began
        self.is_met = False  # by a hook of the forward
        self.restart()

    def restart(self) -> None:
        self.is_met = self._is_observing = False
        self._paid = 0.0
        self.time = self.cost = 0.0
        self.forwards = self.observed = 0

    def seen(self) -> tuple[int, int]:
        """How many forwards there were, and how many of them were observed, the last one included."""
        return self.forwards + self.is_met, self.observed + (self.is_met and self._is_observing)

    def earn(self, seconds: float) -> None:
        """So much time has passed since the last forward, which has ended."""
        self._settle()
        was_met, self.is_met = self.is_met, False
        own, self._paid = self._paid, 0.0
        if not was_met:  # the probe was paused
            return
        self.forwards += 1
        seconds = max(seconds - own, 0.0)  # without the probe
        if self._typical:
            seconds = min(seconds, _LONGEST_STEP * self._typical)
            self._typical += 0.1 * (seconds - self._typical)
        else:
            self._typical = seconds
        self.time += seconds
        most = max(2 * (self._price or 0.0), 16 * self._typical * self._share)
        self.credit = min(self.credit + _USED * self._share * seconds, most)

    def pay(self, seconds: float) -> None:
        self.is_met = True
        self._paid += seconds
        self.cost += seconds
        self.credit -= seconds

    def decide(self) -> bool:
        """Whether to observe the forward that begins."""
        can_pay = self._typical > 0 if self._price is None else self.credit >= self._luck * self._price
        self._is_observing = can_pay and self.credit >= 0
        return self._is_observing

    def _settle(self) -> None:
        """Learn from the forward that has ended."""
        was_observed = self._is_observing and self.is_met
        self._often += 0.05 * (was_observed - self._often)
        if not was_observed:
            return
        self._is_observing = False
        self._luck = self._random.uniform(0.5, 1.5)
        if self._observed_ever == 1:  # the first one also makes the sums, and tells nothing of the next
            self._price = self._paid
        elif self._price is not None:
            self._price += 0.3 * (self._paid - self._price)
        self._observed_ever += 1
        self.observed += 1
        if self._often > _OFTEN:
            self.rows_per_feature = min(self.rows_per_feature * 1.25, _ALL_ROWS_PER_FEATURE)
        elif self._often < _SELDOM:
            self.rows_per_feature = max(self.rows_per_feature * 0.8, _LEAST_ROWS_PER_FEATURE)


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
