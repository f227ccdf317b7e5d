"""Detect inputs that have come in several folds, which are not independent then.

A few values of each input are hashed to a sign and one of 256 slots, and each fold adds up the signs in each
slot (a count sketch: Charikar, Chen & Farach-Colton 2002). Two folds that share inputs have similar sums;
different inputs cancel. Memory is constant, and only :meth:`Repeats.found` reads from the device.
"""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

_SLOTS = 256
_HASHED_VALUES = 16  # of an input
_WAITING = 256  # inputs, so that an update is one copy
_FEWEST = 64  # inputs: fewer give no verdict
# A share of the inputs: half of the result if each input came twice, and six times the error by chance.
_SHARED = 0.25
# Batches of one have no pairs: inputs so many places apart are compared. Inputs that come again after some
# places are alike at few of these distances, inputs that are alike by nature at all.
_DISTANCES = range(1, 17)

REPEATED_INPUTS = (
    "the same inputs came in several folds, which then depend on each other: intervals are too narrow. Call"
    " reset() before each pass over the data, and show what belongs to one input in one batch"
)
"""The warning that folds share inputs."""


class Repeats:
    """Detects inputs that the folds of one metric share.

    Args:
        number: number of folds g.

    >>> repeats, inputs = Repeats(2), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> repeats.add(inputs[:32], 0)
    >>> repeats.add(inputs[32:], 1)
    >>> repeats.found()
    False
    >>> repeats.add(inputs, 1)
    >>> repeats.found()
    True
    """

    def __init__(self, number: int) -> None:
        self._sums: Tensor | None = None  # (g, _SLOTS), int64
        # Pairs of inputs that are alike by nature: of one batch, and at each distance.
        self._alike: Tensor | None = None  # (1 + distances,), int64
        self._pairs = [0.0] * (1 + len(_DISTANCES))  # of how many
        self._counts = [0] * number
        self._buffer: Tensor | None = None  # (_WAITING, up to _HASHED_VALUES), float32
        self._waiting: list[tuple[int, int]] = []  # fold and number of inputs of each batch

    def add(self, inputs: Tensor, fold: int) -> None:
        """Record the inputs of one batch, shape (N, ...)."""
        chosen = _chosen(inputs)
        self._counts[fold] += len(chosen)
        self._pairs[0] += len(chosen) * (len(chosen) - 1) / 2
        for part in chosen.split(_WAITING):
            buffer, start = self._buffer, sum(count for _, count in self._waiting)
            size = math.prod(part.shape[1:])
            fits = buffer is not None and buffer.device == part.device and buffer.shape[1] == size
            if not fits or start + len(part) > _WAITING:
                self._flush()
                start = 0
            if not fits:
                buffer = self._buffer = torch.empty((_WAITING, size), dtype=torch.float32, device=part.device)
            assert buffer is not None
            buffer[start : start + len(part)].view(part.shape).copy_(part)
            self._waiting.append((fold, len(part)))

    def found(self) -> bool:
        """True if folds share more inputs than chance, or inputs that are alike by nature, explain."""
        self._flush()
        total = sum(self._counts)
        if self._sums is None or self._alike is None or total < _FEWEST:
            return False
        sums = self._sums.cpu().to(torch.float64)  # not every device has float64
        shared = (sums.sum(0).square().sum() - sums.square().sum()) / 2
        apart = (total**2 - sum(count**2 for count in self._counts)) / 2
        shares: list[float] = [
            alike / max(pairs, 1.0) for alike, pairs in zip(self._alike.tolist(), self._pairs, strict=True)
        ]
        by_nature = max(shares[0], median(shares[1:])) * apart
        return bool(float(shared) - 2 * by_nature > _SHARED * total)

    def merge(self, other: Repeats) -> None:
        """Add the records of another, which must have as many folds."""
        self._flush()
        other._flush()
        if other._sums is not None and other._alike is not None:
            sums, alike = self._into(other._sums.device)
            sums += other._sums.to(sums.device)
            alike += other._alike.to(alike.device)
        self._pairs = [left + right for left, right in zip(self._pairs, other._pairs, strict=True)]
        self._counts = [left + right for left, right in zip(self._counts, other._counts, strict=True)]

    @torch.inference_mode(False)
    def _into(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sums, made on a device if there are none yet."""
        if self._sums is None or self._alike is None:
            self._sums = torch.zeros(len(self._counts), _SLOTS, dtype=torch.int64, device=device)
            self._alike = torch.zeros(len(self._pairs), dtype=torch.int64, device=device)
        return self._sums, self._alike

    @torch.inference_mode(False)
    @torch.no_grad()
    def _flush(self) -> None:
        if not self._waiting or self._buffer is None:
            return
        waiting, self._waiting = self._waiting, []
        device = self._buffer.device
        labels = [(fold, batch) for batch, (fold, count) in enumerate(waiting) for _ in range(count)]
        folds, batches = torch.tensor(labels, device="cpu").to(device, non_blocking=True).unbind(1)
        hashes = _hashes(self._buffer[: len(labels)])
        sums, alike = self._into(device)
        signs = (hashes >> 8 & 1) * 2 - 1
        index, home = folds * _SLOTS + (hashes & _SLOTS - 1), sums.device
        sums.view(-1).index_add_(0, index.to(home), signs.to(home))
        same = hashes[:, None] == hashes
        of_batches = ((same & (batches[:, None] == batches)).sum() - len(labels)) // 2
        alike[0] += of_batches.to(home)
        if len(waiting) == len(labels):
            apart = [same.diagonal(distance).sum() for distance in _DISTANCES]
            alike[1:] += torch.stack(apart).to(home)
            for place, distance in enumerate(_DISTANCES, 1):
                self._pairs[place] += max(len(labels) - distance, 0)


def _chosen(inputs: Tensor) -> Tensor:
    """A few values of each input, evenly apart in each dimension; a view."""
    dims = inputs.ndim - 1
    take = max(int(_HASHED_VALUES ** (1 / max(dims, 1)) + 1e-9), 1)
    for dim in range(1, inputs.ndim):
        number = 4 if dims == 3 and dim == 1 else take
        step = max(inputs.shape[dim] // number, 1)
        inputs = inputs.narrow(dim, 0, min(step * number, inputs.shape[dim]))
        inputs = inputs[(slice(None),) * dim + (slice(step // 2, None, step),)]
    return inputs


def _hashes(values: Tensor) -> Tensor:
    """A number for each row, the same for rows that agree in all but the last digits, shape (N,), int64."""
    # The other inputs of a batch change the last digits of values. With few values, all digits are needed.
    bits = values.view(torch.int32).to(torch.int64) >> (11 if values.shape[1] >= 4 else 0)
    factors = torch.arange(1, values.shape[1] + 1, device=values.device) * 0x9E3779B97F4A7C1 | 1
    hashes = (bits * factors).sum(1)
    for _ in range(2):
        hashes = (hashes ^ hashes >> 29) * 0xBF58476D1CE4E5B
    return hashes ^ hashes >> 32
