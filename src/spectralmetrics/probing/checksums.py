"""Comparison of tensors between processes, by checksums and one collective."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.probing.parts import is_dtensor
from spectralmetrics.sums.merging import communication_device

_SAMPLES = 2**20  # elements of a tensor that are compared


def checksum(values: Tensor) -> int:
    """A number that very likely differs if the compared elements differ in any bit."""
    flat = values.detach().reshape(-1)
    flat = flat[:: max(len(flat) // _SAMPLES, 1)].contiguous()
    kinds: dict[int, torch.dtype] = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    whole = flat.view(kinds[flat.element_size()]).to(torch.int64)
    return int((whole * (torch.arange(len(whole), device=whole.device) % 8191 + 1)).sum()) % 2**62


def are_alike(values: Tensor, group: Any) -> tuple[bool, bool]:
    """True if a tensor is the same on a group's processes, and True if it is not all zeros; one collective."""
    numbers = [checksum(values), hash(tuple(values.shape)) % 2**40, int(bool((values != 0).any()))]
    high, low = extremes(numbers, group)
    return high[:2] == low[:2], bool(high[2])


def checksum_of_weights(module: nn.Module) -> int:
    """The checksum of a module's own weights; without DTensors, which differ between processes anyway."""
    plain = [each for each in module.parameters(recurse=False) if not is_dtensor(each)]
    return sum(checksum(each) for each in plain) % 2**62


def extremes(numbers: list[int], group: Any) -> tuple[list[int], list[int]]:
    """The largest and the smallest value of each number over the processes of a group."""
    both = torch.tensor([*numbers, *(-each for each in numbers)], device=communication_device(group))
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    largest = both.tolist()
    return largest[: len(numbers)], [-each for each in largest[len(numbers) :]]
