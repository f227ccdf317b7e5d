"""Deals batches to folds, and pairs the folds of two metrics that are merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.metrics.following import FollowingMetric
from spectralmetrics.sums import Observations, first_fold
from spectralmetrics.sums.repeats import Repeats


class DealingMetric(FollowingMetric):
    """A metric that deals groups of batches to folds in turn."""

    folds: int = 1
    """The number of folds; groups of batches are dealt to them in turn."""
    replica: tuple[int, int] | None = None
    """The number of this process among the processes that observe different data, and the number of these.

    None: the rank in the process group and its size. Give one number to processes that share their forwards,
    as under tensor parallelism.
    """

    _dealt = 0  # groups dealt so far, never reset
    _first_fold: int | None = None
    _has_own_groups = False  # True if the user gave `Observations.group`
    _rearranges = False
    _repeats: Repeats | None = None

    def deal(self) -> int:
        """The number of the next group of batches; its fold is this number modulo g."""
        if self._first_fold is None:
            self._first_fold = first_fold(self.folds, *(self.replica or self._rank()))
        self._dealt += 1
        return self._first_fold + self._dealt - 1

    def grouped(self, observations: Observations) -> Observations:
        """The user's observations with the number of their group; their inputs are noted."""
        self._has_own_groups = self._has_own_groups or observations.group is not None
        if self.folds == 1 or not observations.values.numel():
            return observations
        group = self.deal() if observations.group is None else observations.group
        if observations.feature_dim % observations.values.ndim:  # samples come first
            self.note(observations.values, group)
        return replace(observations, group=group)

    def note(self, inputs: Tensor, group: int) -> None:
        """Remember the inputs of a group, shape (N, ...); see :meth:`repeats`."""
        self._repeats = self._repeats or Repeats(self.folds)
        self._repeats.add(inputs, group % self.folds)

    def repeats(self) -> bool:
        """True if the same inputs have come in several folds, as far as this process has seen."""
        return self._repeats is not None and self._repeats.found()

    def reset(self) -> None:
        """Forget all observations."""
        super().reset()
        self._repeats = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The value of one batch, which is added; see ``torchmetrics.Metric``."""
        before = self._repeats
        with self.changed_by_user():
            value = super().forward(*args, **kwargs)  # this resets in between
        if before is not None and before is not self._repeats:
            if self._repeats is not None:
                before.merge(self._repeats)
            self._repeats = before
        return value

    def _rank(self) -> tuple[int, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        rank = dist.get_rank(self.process_group)
        return (0, 1) if rank < 0 else (rank, dist.get_world_size(self.process_group))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the observations of another metric of this class, or of its state as a dict.

        Its folds are paired with the folds of this metric so that all are filled as equally as possible, unless
        the user gave ``Observations.group``.
        """
        with self.changed_by_user():
            self.merge_for_all(incoming_state)

    def merge_for_all(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Like :meth:`merge_state`; metrics that follow this one read the merged sums in any case."""
        has_groups = getattr(incoming_state, "_has_own_groups", False)
        self._rearranges = not (self._has_own_groups or has_groups)
        self._has_own_groups = self._has_own_groups or has_groups
        try:
            super().merge_state(incoming_state)
        finally:
            self._rearranges = False
        theirs: Repeats | None = getattr(incoming_state, "_repeats", None)
        if theirs is not None:
            self._repeats = self._repeats or Repeats(self.folds)
            self._repeats.merge(theirs)
