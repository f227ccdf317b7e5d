"""Checks that a probe and its layers are the same on all processes, where they are merged by name."""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.torch_private import default_store, spec_of_part

_SAMPLES = 16  # elements of a layer's weights
_PATIENCE = 15.0  # seconds for which a process may be behind another in making its probe
# Weights of different layers are unrelated; weights of replicas that drift apart stay similar for a while.
_DIFFERENT = 0.5


class _Probes:
    """The probes of this process in one default process group.

    Attributes:
        made: the number of probes made so far.
        read: ranks of processes that read probes together -> the number of probes that they have read.
    """

    def __init__(self) -> None:
        self.made = 0
        self.read: Counter[tuple[int, ...]] = Counter()


_PROBES: weakref.WeakKeyDictionary[Any, _Probes] = weakref.WeakKeyDictionary()


class Weights(NamedTuple):
    """A few numbers that distinguish the weights of a layer from another layer's.

    Attributes:
        kind: type of the layer.
        shape: the shape of the weight.
        samples: some of its elements.
    """

    kind: str
    shape: tuple[int, ...]
    samples: tuple[float, ...]

    def differ(self, other: Weights) -> bool:
        """True if these are weights of two layers."""
        if self.shape != other.shape:
            return True
        left, right = (torch.tensor(each.samples, dtype=torch.float64, device="cpu") for each in (self, other))
        return bool((left - right).norm() > _DIFFERENT * torch.maximum(left.norm(), right.norm()))


class Identity:
    """Checks that the other processes have a probe, too, with the same modules behind its names.

    Args:
        modules: the probed layers by name; not kept alive.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}
        self._is_compared = False
        self._announced: Any = None  # the process group in which this process has announced its probe
        if is_one_of_several():
            with contextlib.suppress(RuntimeError, AttributeError):  # no store, or one that cannot do this
                probes = _PROBES.setdefault(dist.group.WORLD, _Probes())
                default_store().set(_key(dist.get_rank(), probes.made + 1), "1")
                probes.made += 1
                self._announced = weakref.ref(dist.group.WORLD)

    def check_presence(self, group: Any) -> None:
        """Raise a RuntimeError if some process of a group has made fewer probes, instead of waiting for it.

        When processes first read their n-th probe, each must have made n probes or more; probes that are never
        read count, too.
        """
        announced, self._announced = self._announced, None
        if announced is None or announced() is not dist.group.WORLD:
            return  # made before the group was, as the other processes' probes may be
        store, end = default_store(), time.monotonic() + _PATIENCE
        ranks, probes = dist.get_process_group_ranks(group), _PROBES[dist.group.WORLD]
        missing, number = ranks, probes.read[tuple(ranks)] + 1
        while True:
            missing = [rank for rank in missing if not store.check([_key(rank, number)])]
            if not missing:
                probes.read[tuple(ranks)] = number
                return
            if time.monotonic() > end:
                raise RuntimeError(
                    "expected a probe on every process, whose values are merged, got none on process"
                    f" {', '.join(map(str, missing))}: make it on all of them, or of metrics with"
                    " sync_on_compute=False"
                )
            time.sleep(0.05)

    def weights(self) -> dict[str, Weights]:
        """The weights to compare, unless they have been compared; sharded ones are left out."""
        if self._is_compared:
            return {}
        weights: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        for name, reference in self._modules.items():
            module = reference()
            weight = None if module is None else _weight(module)
            if module is not None and weight is not None:
                flat = weight.detach().reshape(-1)
                step = max(len(flat) // _SAMPLES, 1)
                weights[name] = module, weight, flat[::step][:_SAMPLES].to(torch.float32)
        numbers = iter(_brought([samples for _, _, samples in weights.values()]))
        return {
            name: Weights(type(module).__name__, tuple(weight.shape), tuple(next(numbers)))
            for name, (module, weight, _) in weights.items()
        }

    def compare(self, of_processes: Mapping[int, Mapping[str, Weights]]) -> None:
        """Warn once if a name means different layers on different processes."""
        self._is_compared = True
        for name in dict.fromkeys(name for each in of_processes.values() for name in each):
            by_rank = [(rank, each[name]) for rank, each in of_processes.items() if name in each]
            (first, weights), *others = by_rank
            for rank, other in others:
                if weights.differ(other):
                    _warn(name, first, weights, rank, other)
                    return

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._modules, self._is_compared, self._announced = {}, True, None


def digest_of(weights: Mapping[str, Weights]) -> int:
    """A number that is equal for equal weights; 0 without weights."""
    return digest(repr(sorted(weights.items()))) if weights else 0


def digest(text: str) -> int:
    """A number that is equal for equal texts; with either sign it fits into a tensor of int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _warn(name: str, first: int, weights: Weights, rank: int, other: Weights) -> None:
    described = (
        f"{each.kind} with weights {' x '.join(map(str, each.shape))} on process {where}"
        for where, each in ((first, weights), (rank, other))
    )
    warnings.warn(
        f"the name {name!r} means different layers on different processes, and their observations are added up:"
        f" {', another '.join(described)}. If these are pipeline stages or experts that count from 0 on each"
        " process, give each its own name: LayerProbe(torch.nn.ModuleDict({'stage1': stage})) on process 1",
        UserWarning,
        stacklevel=6,
    )


def _weight(module: nn.Module) -> Tensor | None:
    """A weight that is alike on all processes that have the layer; None for shards and without weights."""
    for parameter in module.parameters():
        is_shard = hasattr(parameter, "placements") or hasattr(parameter, "ds_id")
        is_shard = is_shard or spec_of_part(parameter) is not None
        if isinstance(parameter, nn.parameter.UninitializedParameter) or is_shard or parameter.is_meta:
            return None
        if getattr(parameter, "tensor_model_parallel", False):  # Megatron's
            return None
        if parameter.ndim >= 2 and parameter.numel():  # a shard of the first FSDP is flat
            return parameter
    return None


def _brought(samples: Sequence[Tensor]) -> list[list[float]]:
    """The numbers in these tensors, with one transfer for each device."""
    by_place: dict[int, list[float]] = {}
    for device in {each.device for each in samples}:
        here = [place for place, each in enumerate(samples) if each.device == device]
        numbers = torch.cat([samples[place] for place in here]).tolist()
        for place in here:
            by_place[place] = [numbers.pop(0) for _ in range(len(samples[place]))]
    return [by_place[place] for place in range(len(samples))]


def is_one_of_several() -> bool:
    """True if there is a default process group with other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _key(rank: int, number: int) -> str:
    return f"spectralmetrics/probe/{rank}/{number}"
