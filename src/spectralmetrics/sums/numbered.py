"""A sample of rows, chosen by the numbers of the rows alone, so that samples of two sources correspond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.sums.arithmetic import flags_of_counted
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.reservoir import Reservoir, empty_reservoir, offer
from spectralmetrics.sums.sum import Intake

_AT_A_TIME = 4096


@dataclass(frozen=True)
class Numbered(Reservoir):
    """At most m rows of observations with a ``start``; observations without one are skipped.

    The key of a row is a hash of its number. So two sources with equally many rows keep rows of the same
    numbers, whatever the rows hold and in whatever order they came.

    >>> sums = empty_numbered(4, 1)
    >>> rows = torch.arange(100.0)[:, None]
    >>> for start in (50, 0):
    ...     sums.intake(None).add(sums, Observations(rows[start : start + 50], start=start), 0)
    >>> sums.rows.flatten()
    tensor([53., 33., 94.,  2.], dtype=torch.float64)
    """

    states: ClassVar[dict[str, str]] = {"rows": "numbered_rows", "keys": "numbered_keys"}
    described: ClassVar[str] = "a sample of numbered rows"
    arrays: ClassVar[tuple[str, ...]] = ("numbered_rows", "numbered_keys")
    counts_batches: ClassVar[bool] = False

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Numbered:
        """See :class:`.Sum`."""
        return empty_numbered(self.capacity, num_features, device)

    def intake(self, gram_dtype: torch.dtype | None) -> Intake:
        """See :class:`.Sum`."""
        return NumberedIntake()

    def paired_with(self, other: Numbered) -> tuple[Tensor, Tensor]:
        """The rows whose numbers both samples have, (k, D) of this sample and (k, D') of the other."""
        common = self.keys[torch.isin(self.keys, other.keys) & self.keys.isfinite()]
        mine, theirs = (torch.searchsorted(each.keys, common) for each in (self, other))
        return self.rows[mine], other.rows[theirs]


class NumberedIntake(Intake):
    """Offers every numbered batch to the sample."""

    def add(self, sums: Numbered, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        if observations.start is None:
            return
        count = observations.num_observations
        for at in range(0, count, _AT_A_TIME):
            keys = _hashed(observations.start + at, min(_AT_A_TIME, count - at))
            near = (keys < sums.keys[-1].cpu()).nonzero()[:, 0]  # few, once the sample is full
            chosen = observations.take((near + at).to(observations.values.device))
            rows = chosen.values.detach().to(torch.float64)
            eligible = flags_of_counted(rows, chosen.valid)
            offer(sums, rows, torch.where(eligible, keys[near].to(rows.device), torch.inf))


def empty_numbered(capacity: int, num_features: int, device: torch.device | str | None = None) -> Numbered:
    """A sample of ``capacity`` empty slots; without slots while the width is unknown (0).

    >>> empty_numbered(4, 2).keys
    tensor([inf, inf, inf, inf], dtype=torch.float64)
    """
    return Numbered(**vars(empty_reservoir(capacity, num_features, device)))


def _hashed(start: int, count: int) -> Tensor:
    """Hash consecutive integers to uniform numbers in [0, 1), shape (N,), float64: splitmix64."""
    mixed = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)
