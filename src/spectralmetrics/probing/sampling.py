"""Random draws: of observations from an output, and of the steps to observe."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.sums import Observations, compiled, has_float64
from spectralmetrics.sums.observations import plain_observations

_GENERATORS = threading.local()
_MOST_BYTES = 2**18  # up to this size, one thread copies faster than several


def draw(observations: Observations, number: int, seed: int) -> Observations:
    """Draw at most ``number`` observations, each with the same probability; global random state stays as it is.

    All observations lie on a ring that is cut at a random place into ``number`` arcs, whose lengths differ by
    at most one, and one is drawn from each arc: none is drawn twice, all have the same chance, and neighbouring
    positions of a map, which are similar, are seldom drawn together.

    >>> draw(Observations(torch.arange(10.0)[:, None]), 5, seed=0).num_observations
    5
    """
    total = observations.num_observations
    if total <= number:
        return observations
    values = observations.values
    turn = zlib.crc32(seed.to_bytes(8, "big", signed=True)) % total  # of the ring
    if values.is_cpu and compiled.is_there():
        # The same numbers as below in fewer calls; for a small layer, calls take most of the time.
        is_small = values.nbytes * number <= total * _MOST_BYTES
        if is_small and _are_rows(observations) and compiled.is_in_memory(values):
            rows = values if values.ndim == 2 else values.view(total, -1)
            return plain_observations(compiled.draw_rows(rows, number, seed, turn))
        return observations.take(compiled.draw_places(total, number, seed, turn))
    device = values.device
    dtype = torch.float64 if has_float64(device) else torch.float32
    chances = torch.rand(number, generator=_generator(device, seed), device=device, dtype=dtype)
    if device.type == "cpu":
        bounds, sizes = _host_arcs(total, number)
        places = (chances.numpy() * sizes).astype(np.int64)
        places += bounds
        places += turn
        places %= total
        return observations.take(torch.from_numpy(places))
    starts, lengths = _arcs(total, number, device)
    index = chances.mul_(lengths).to(torch.int64).add_(starts)
    index.add_(turn).remainder_(total)  # in place: each operation launches a kernel on an accelerator
    return observations.take(index)


def _are_rows(observations: Observations) -> bool:
    """True if these are contiguous rows without labels or other entries for each row."""
    values = observations.values
    return (
        observations.valid is None
        and observations.group is None
        and observations.labels is None
        and observations.forward is None
        and observations.step is None
        and (observations.feature_dim == -1 or observations.feature_dim == values.ndim - 1)
        and values.is_contiguous()
    )


def sample_size(rows_per_feature: float, num_features: int) -> int:
    """⌈r·D⌉, the largest number of observations drawn from one output.

    >>> sample_size(0.5, 3)
    2
    """
    return math.ceil(rows_per_feature * num_features)


def is_observed(index: int, every: int, seed: object) -> bool:
    """True if a step is observed: the first step, then one drawn from each ``every`` steps.

    With a fixed distance, a training with several forwards a step might always show the same one of them.

    Args:
        index: the index of the step.
        every: length of a block of steps; 1 observes all steps.
        seed: seed of the random draws.

    >>> [index for index in range(12) if is_observed(index, 3, "seed")]
    [0, 4, 6, 11]
    """
    if every == 1:
        return True
    block, place = divmod(index, every)
    return place == (zlib.crc32(f"{seed} {block}".encode()) % every if block else 0)


def draw_place(number: int, seed: object) -> int:
    """A number from 0 to ``number - 1``, each with the same chance.

    >>> [draw_place(4, block) for block in range(6)]
    [1, 2, 0, 1, 2, 0]
    """
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % number


@functools.lru_cache(maxsize=512)
def _arcs(total: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The starts and the lengths of the arcs."""
    with torch.inference_mode(False):
        bounds = torch.arange(number + 1, device=device, dtype=torch.int64) * total // number
        dtype = torch.float64 if has_float64(device) else torch.float32
        return bounds[:-1], bounds.diff().to(dtype)


@functools.lru_cache(maxsize=512)
def _host_arcs(total: int, number: int) -> tuple[Any, Any]:
    """As :func:`_arcs`, for numpy."""
    starts, lengths = _arcs(total, number, torch.device("cpu"))
    return starts.numpy(), lengths.numpy()


def _generator(device: torch.device, seed: int) -> torch.Generator:
    """The generator of this thread; making a new one would cost more."""
    name = str(device)
    generator: torch.Generator | None = getattr(_GENERATORS, name, None)
    if generator is None:
        generator = torch.Generator(device)
        setattr(_GENERATORS, name, generator)
    return generator.manual_seed(seed)
