"""Limits of rows and features, and random draws of observations and steps."""

from __future__ import annotations

import functools
import hashlib
import math
import numbers
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.parts import LeftOut
from spectralmetrics.sums import Observations, compiled, has_float64
from spectralmetrics.sums.checks import check_positive_integer, check_seed
from spectralmetrics.sums.observations import plain_observations

_GENERATORS = threading.local()
_MOST_BYTES = 2**18  # up to this size, one thread copies faster than several

Allowed: TypeAlias = Callable[[str, float | None], float | None]
"""Stage and rows wanted for each feature, None for all -> rows that a budget allows."""


@dataclass
class Limits:
    """Limits of how much of a layer's output is observed; see :class:`~spectralmetrics.LayerProbe`."""

    max_samples: int | None = None
    rows_per_feature: float | None = None
    max_features: int = 8192
    sketch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integer("max_features", self.max_features)
        check_positive_integer("sketch_size", self.sketch_size, or_none=True)
        check_positive_integer("max_samples", self.max_samples, or_none=True)
        check_seed(self.seed)
        rows = self.rows_per_feature
        if rows is not None and not (isinstance(rows, numbers.Real) and 0 < rows < math.inf):
            raise ValueError(f"expected rows_per_feature to be a positive number or None, got {rows!r}")

    def room(self, of_layer: LayerMetrics) -> int | None:
        """The number of samples that a layer can still take; None: any number."""
        return None if self.max_samples is None else max(self.max_samples - of_layer.samples, 0)

    def keeps_nothing(self, of_layer: LayerMetrics) -> bool:
        """True if the sums of a layer get no further rows."""
        return bool(of_layer.given_up or of_layer.too_wide or self.room(of_layer) == 0)

    def check_width(self, of_layer: LayerMetrics, width: int) -> None:
        """Keep a sketch for a layer too wide for a covariance, or leave out one whose width has changed."""
        for leader in of_layer.spectral_leaders[:1]:
            if leader.num_features not in (None, width):
                raise LeftOut(
                    f"expected rows with {leader.num_features} features, got {width}: outputs of several widths"
                    " have no common spectrum; give each use of the layer a module of its own"
                )
        if width <= self.max_features or not of_layer.keeps_matrices or of_layer.is_sketched:
            return
        if self.sketch_size is None:
            of_layer.too_wide = True
            raise LeftOut(
                f"{width} features exceed max_features={self.max_features}; their covariance would take"
                f" {8 * width**2 / 2**30:.1f} GiB, a sketch (sketch_size=512)"
                f" {8 * width * 512 / 2**30:.2g} GiB"
            )
        of_layer.sketch(self.sketch_size)

    def draws(
        self, of_layer: LayerMetrics, width: int, most: int | None, forward: int, allowed: Allowed
    ) -> tuple[int | None, int]:
        """The number of observations of a forward to draw and the seed of the draws.

        At most ``most`` are drawn. None, here and there, stands for all.
        """
        rows_per_feature = allowed(of_layer.stage, self.rows_per_feature)
        if rows_per_feature is None and most is None:
            return None, 0
        size = sys.maxsize if most is None else most
        if rows_per_feature is not None:
            size = min(sample_size(rows_per_feature, width), size)
        where = f"{self.seed} {of_layer.stage} {of_layer.layer} {of_layer.epoch} {forward}"
        return size, zlib.crc32(where.encode())


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
