"""A uniform sample of a stream that merges exactly: keep the rows with the smallest random keys.

Each row draws a key from the uniform distribution; the sample of size m is the rows with the m smallest keys.
The sample of a union is the m smallest of both samples, in whatever order they are merged, and no step reads
from the device.

>>> import torch
>>> sample = empty_reservoir(2, 1)
>>> rows = torch.arange(5.0)[:, None]
>>> offer(sample, rows, torch.tensor([0.9, 0.1, 0.8, 0.2, torch.inf]))
>>> kept_rows(sample).flatten()
tensor([1., 3.], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.sums.arithmetic import flags_of_counted
from spectralmetrics.sums.merging import ForReader, agree
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import Exchange, Intake, Sum, zeros


@dataclass(frozen=True)
class Reservoir(Sum):
    """A sample of at most m rows; the intake updates the tensors in place.

    Attributes:
        keys: shape (m,), float64, ascending; infinite for empty slots.
        rows: shape (m, D), float64.
        capacity: the largest number of rows m.
        seed: the seed of the random keys.
    """

    states: ClassVar[dict[str, str]] = {"rows": "sample_rows", "keys": "sample_keys"}
    described: ClassVar[str] = "a sample"
    arrays: ClassVar[tuple[str, ...]] = ("sample", "sample_keys")
    counts_batches: ClassVar[bool] = True

    keys: Tensor
    rows: Tensor
    capacity: int
    seed: int = 0

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.rows.shape[1]

    def settings(self) -> tuple[object, ...]:
        """See :class:`.Sum`."""
        return (f"max_samples={self.capacity}", f"seed={self.seed}")

    def empty(self, num_features: int, device: torch.device | str | None = None) -> Reservoir:
        """See :class:`.Sum`."""
        return empty_reservoir(self.capacity, num_features, device, seed=self.seed)

    def intake(self, gram_dtype: torch.dtype | None) -> Intake:
        """See :class:`.Sum`."""
        return SampleIntake()

    def merged(self, other: Reservoir) -> Reservoir:
        """See :class:`.Sum`."""
        if other.num_features == 0:
            return self
        if other.keys.numel() != self.capacity:
            raise ValueError(
                f"expected an incoming sample of max_samples={self.capacity}, got {other.keys.numel()}"
            )
        home = self.rows.device
        mine = self if self.num_features else self.empty(other.num_features, home)
        twin = mine.map(torch.clone)
        offer(twin, other.rows.to(home), other.keys.to(home))
        return twin

    def exchange(self, known: Reservoir | None, rank: int, world_size: int) -> Exchange:
        """See :class:`.Sum`.

        Processes first share the keys of all samples; then each row that is kept travels once, from the one
        process that has it.
        """
        own = self.keys if self.num_features else torch.full((self.capacity,), torch.inf)
        width, keys = yield from agree(self.num_features, known is not None, rank, world_size, own)
        if not width:
            return known if width is None else None
        smallest = torch.topk(keys.flatten(), self.capacity, largest=False, sorted=True)
        owner, slot = smallest.indices // self.capacity, smallest.indices % self.capacity
        rows = torch.zeros(self.capacity, width, dtype=torch.float64, device=self.rows.device)
        if self.num_features:
            mine = (owner == rank).to(rows.device)
            rows[mine] = self.rows[slot.to(rows.device)[mine]]
        rows = yield rows.as_subclass(ForReader)
        return None if rows is None else replace(self, keys=smallest.values.to(rows.device), rows=rows)

    def num_exchanged(self, num_features: int, world_size: int) -> int:
        """See :class:`.Sum`: the keys of all processes, and the rows."""
        return self.capacity * (world_size + num_features)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`.Sum`."""
        yield from zip(self.arrays, (self.rows, self.keys), strict=True)

    @classmethod
    def restored(cls, read: Callable[[str], Tensor]) -> Reservoir:
        """See :class:`.Sum`."""
        rows, keys = (read(name) for name in cls.arrays)
        return cls(keys, rows, keys.numel())


class SampleIntake(Intake):
    """Offers every batch to the sample, with keys from a generator of its own."""

    def add(self, sums: Reservoir, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        matrix = observations.rows().detach()
        if matrix.dtype != torch.float64:
            matrix = matrix.to(torch.float32)
        device = matrix.device
        # A fresh generator for each batch, so that copies and pickles of the metric draw the same keys.
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        entropy = np.random.SeedSequence([sums.seed, rank, batch]).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(entropy[0]) >> 1)
        keys = torch.rand(matrix.shape[0], generator=generator, device=device, dtype=torch.float64)
        keys = torch.where(flags_of_counted(matrix, observations.valid), keys, torch.inf)
        # Only the smallest new keys can enter, so only their rows are read.
        smallest = torch.topk(keys, min(len(keys), sums.capacity), largest=False)
        offer(sums, matrix.index_select(0, smallest.indices), smallest.values)


def empty_reservoir(
    capacity: int, num_features: int, device: torch.device | str | None = None, *, seed: int = 0
) -> Reservoir:
    """A reservoir of ``capacity`` empty slots; without slots while the width is unknown (0).

    >>> empty_reservoir(4, 2).keys
    tensor([inf, inf, inf, inf], dtype=torch.float64)
    """
    slots = capacity if num_features else 0
    sample = Reservoir(**zeros(device, keys=(slots,), rows=(slots, num_features)), capacity=capacity, seed=seed)
    sample.keys.fill_(torch.inf)
    return sample


def offer(reservoir: Reservoir, rows: Tensor, keys: Tensor) -> None:
    """Offer rows with these keys to the reservoir, in place.

    Args:
        reservoir: the reservoir of capacity m.
        rows: shape (N, D), floating.
        keys: shape (N,); an infinite key never enters.

    >>> sample = empty_reservoir(1, 1)
    >>> offer(sample, torch.tensor([[3.0], [4.0]]), torch.tensor([0.5, 0.25]))
    >>> sample.rows
    tensor([[4.]], dtype=torch.float64)
    """
    with torch.inference_mode(False), torch.no_grad():
        all_keys = torch.cat([reservoir.keys, keys.to(torch.float64)])
        all_rows = torch.cat([reservoir.rows, rows.to(torch.float64)])
        smallest = torch.topk(all_keys, reservoir.keys.shape[0], largest=False, sorted=True)
        reservoir.keys.copy_(smallest.values)
        reservoir.rows.copy_(all_rows.index_select(0, smallest.indices))


def kept_rows(reservoir: Reservoir) -> Tensor:
    """The rows in occupied slots, shape (k, D), k at most m; reads k from the device.

    >>> kept_rows(empty_reservoir(4, 2)).shape
    torch.Size([0, 2])
    """
    return reservoir.rows[reservoir.keys.isfinite()]
