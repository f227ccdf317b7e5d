"""A history of the last forwards, a few numbers each: a ring of rows that is written without being read.

A row holds numbers that add up, so that the forwards of several processes, or of one step of the optimiser, can
be added: the number of observations, the sums of all values and of their squares, the number of values that are
not zero, and of observations left out; and the largest magnitude.

>>> import torch
>>> history = empty_history(2, 3)
>>> intake = history.intake(None)
>>> for forward in range(4):
...     intake.add(history, Observations(torch.full((5, 3), float(forward))), forward)
>>> history.forwards()[:, [FORWARD, COUNT, TOTAL, SQUARES, LARGEST]]
tensor([[  2.,   5.,  30.,  60.,   2.],
        [  3.,   5.,  45., 135.,   3.]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.sums import fused
from spectralmetrics.sums.measuring import Measured, measure, measured_last
from spectralmetrics.sums.merging import ForReader, agree
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import Exchange, Intake, Sum, zeros

COLUMNS = ("forward", "step", "largest", "count", "left_out", "total", "squares", "nonzero")
"""The columns of a row. The forward is -1 in an empty row, the step -1 where it is unknown."""
FORWARD, STEP, LARGEST, COUNT, LEFT_OUT, TOTAL, SQUARES, NONZERO = range(len(COLUMNS))
_ADDED = slice(COUNT, None)


@dataclass(frozen=True)
class ForwardHistory(Sum):
    """The last forwards of a layer; the intake updates the tensors in place.

    Attributes:
        ring: shape (steps, 8), float64; see :data:`COLUMNS`. The latest forward is at the end.
        width: an empty tensor whose shape (D, 0) gives the width, float64.
        steps: the number of forwards that the ring holds.
    """

    states: ClassVar[dict[str, str]] = {"ring": "history_ring", "width": "history_width"}
    described: ClassVar[str] = "a history"
    arrays: ClassVar[tuple[str, ...]] = ("history", "history_width")
    counts_batches: ClassVar[bool] = True
    takes_all_rows: ClassVar[bool] = True

    ring: Tensor
    width: Tensor
    steps: int

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.width.shape[0]

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return (f"steps={self.steps}",)

    def empty(self, num_features: int, device: torch.device | str | None = None) -> ForwardHistory:
        """See :class:`.Sum`."""
        return empty_history(self.steps, num_features, device)

    def intake(self, gram_dtype: torch.dtype | None) -> HistoryIntake:
        """See :class:`.Sum`."""
        return HistoryIntake()

    def forwards(self) -> Tensor:
        """The rows of the forwards, earliest first, shape (k, 8), float64; reads from the device."""
        rows = _together(self.ring, self.steps)  # a forward may go on after the next has begun
        rows = rows[rows[:, FORWARD] >= 0]
        # Sums about an origin have its round-off, which exceeds small outputs, and zeros, far from the origin.
        largest = rows[:, LARGEST]
        most = rows[:, NONZERO] * largest
        rows[:, TOTAL] = rows[:, TOTAL].clamp(-most, most)
        rows[:, SQUARES] = rows[:, SQUARES].clamp(largest.square(), most * largest)
        return rows

    def merged(self, other: ForwardHistory) -> ForwardHistory:
        """See :class:`.Sum`."""
        if other.settings() != self.settings():
            raise ValueError(f"expected a state of {self.settings()} to merge, got one of {other.settings()}")
        if other.num_features == 0:
            return self
        other = other.map(lambda tensor: tensor.to(self.ring.device))
        if self.num_features == 0:
            return other.map(torch.clone)
        return replace(self, ring=_together(torch.cat([self.ring, other.ring]), self.steps))

    def exchange(self, known: ForwardHistory | None, rank: int, world_size: int) -> Exchange:
        """See :class:`.Sum`."""
        width, _ = yield from agree(self.num_features, known is not None, rank, world_size)
        if not width:
            return known if width is None else None
        mine = self if self.num_features else self.empty(width, self.ring.device)
        # A process has no list of the other processes' forwards, so each sends all of its own.
        rings = torch.zeros(world_size, *mine.ring.shape, dtype=torch.float64, device=mine.ring.device)
        rings[rank] = mine.ring
        rings = yield rings.as_subclass(ForReader)
        if rings is None:
            return None
        return replace(mine, ring=_together(rings.flatten(0, 1), self.steps))

    def num_exchanged(self, num_features: int, world_size: int) -> int:
        """See :class:`.Sum`."""
        return world_size * self.steps * len(COLUMNS)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        yield "history", _together(self.ring, self.steps)
        yield "history_width", self.width

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> ForwardHistory:
        """See :class:`.Sum`."""
        rows = read("history")
        return cls(rows, read("history_width"), len(rows))


class HistoryIntake(Intake):
    """Writes each forward at the end and drops the earliest; adds up several batches of one forward."""

    reaches_other_devices = True

    def __init__(self) -> None:
        self._latest: int | None = None

    def add(self, sums: ForwardHistory, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        forward = batch if observations.forward is None else observations.forward
        if forward < 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            measured = measured_last(observations)
            if measured is None:
                origin = sums.ring.new_zeros(observations.num_features)
                measured = measure(observations, origin)
            step = -1 if observations.step is None else observations.step
            if observations.forward is not None and forward < (self._latest or 0):
                # Gradients of several forwards may arrive in another order: drop the earliest forward even so.
                row = torch.cat([sums.ring.new_tensor([forward, step]), _row(measured)])
                sums.ring.copy_(_together(torch.cat([sums.ring, row[None]]), sums.steps))
                return
            is_more, self._latest = forward == self._latest, forward
            if measured.totals.is_cpu:
                _write_in_memory(sums.ring, measured, None if is_more else (forward, step))
                return
            if not is_more:
                sums.ring[:-1] = sums.ring[1:].clone()
            end = sums.ring[-1]
            if fused.takes(end):
                fused.write_forward(*measured, end, None if is_more else (forward, step))
                return
            row = _row(measured)
            if is_more:
                end[_ADDED] += row[1:]
                end[LARGEST] = torch.maximum(end[LARGEST], row[0])
                return
            end[FORWARD] = forward
            end[STEP] = step
            end[LARGEST:] = row

    def meet(self, sums: ForwardHistory) -> None:
        """See :class:`.Intake`."""
        latest = int(sums.ring[-1, FORWARD])
        self._latest = latest if latest >= 0 else None


def empty_history(steps: int, num_features: int, device: torch.device | str | None = None) -> ForwardHistory:
    """A history without forwards.

    >>> empty_history(4, 2).ring.shape
    torch.Size([4, 8])
    """
    tensors = zeros(device, ring=(steps if num_features else 0, len(COLUMNS)), width=(num_features, 0))
    tensors["ring"][:, :LARGEST] = -1
    return ForwardHistory(**tensors, steps=steps)


def _row(measured: Measured) -> Tensor:
    """The columns of one batch from the largest magnitude on, about zero, shape (6,)."""
    count, left_out = measured.counts.to(torch.float64)
    first, squares, _, nonzero = measured.totals
    total, about_zero = _about_zero(first, squares, count, measured.origin)
    return torch.stack([measured.largest.amax(), count, left_out, total, about_zero, nonzero.sum()])


def _about_zero(first: Any, squares: Any, count: Any, origin: Any) -> tuple[Any, Any]:
    """The sums of all values and of their squares, from sums about an origin, as arrays or tensors."""
    moved = count * origin
    # Σ x² = Σ (x − o)² + 2 o Σ (x − o) + n o²
    return (first + moved).sum(), (squares + origin * (2 * first + moved)).sum()


def _write_in_memory(ring: Tensor, measured: Measured, started: tuple[int, int] | None) -> None:
    """Write a batch with numpy, which takes a third of the time for so few numbers.

    Args:
        ring: shape (steps, 8).
        measured: the measurement of the batch.
        started: numbers of the forward and the step that the batch begins; None adds to the last forward.
    """
    rows, origin = ring.numpy(), measured.origin.numpy()
    first, squares, _, nonzero = measured.totals.numpy()
    count, left_out = measured.counts.tolist()
    with np.errstate(all="ignore"):  # overflow gives infinities without a warning, as in PyTorch
        total, about_zero = _about_zero(first, squares, count, origin)
    added = (count, left_out, total, about_zero, nonzero.sum())
    largest, end = measured.largest.numpy().max(), rows[-1]
    if started is None:
        with np.errstate(all="ignore"):
            end[_ADDED] += added
        end[LARGEST] = max(end[LARGEST], largest)
    else:
        rows[:-1] = rows[1:]
        rows[-1] = (*started, largest, *added)


def _together(rows: Tensor, steps: int) -> Tensor:
    """Merge rows of several rings: add rows of one forward, and keep the last forwards, the latest at the end.

    Args:
        rows: shape (n, 8).
        steps: number of forwards to keep.
    """
    rows = rows[rows[:, FORWARD].argsort(descending=True, stable=True)]
    forwards = rows[:, FORWARD]
    is_next = torch.ones_like(forwards, dtype=torch.bool)
    is_next[1:] = forwards[1:] != forwards[:-1]
    target = is_next.cumsum(0) - 1  # the row of the result for each row's forward
    result = torch.zeros_like(rows)
    result.index_add_(0, target, torch.where((forwards >= 0)[:, None], rows, 0))
    others = rows[:, :COUNT]
    index = target[:, None].expand_as(others)
    result[:, :COUNT] = torch.full_like(others, -1).scatter_reduce(0, index, others, "amax")
    result[:, LARGEST].clamp_(min=0)
    return result[:steps].flip(0)
