"""Numbers about layers that processes compare: samples of weights, checksums, and numbers through their store.

In the store processes come in any order, and each wait has a limit. Collectives would pair numbers of
different layers, or wait for a process that never runs a layer.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.functional.together import read_together
from spectralmetrics.probing.parts import is_dtensor
from spectralmetrics.probing.processes import digest, extremes, is_one_of_several
from spectralmetrics.torch_private import default_store, spec_of_part

PATIENCE = 15.0  # seconds for which a process may be behind another in making its probe, or in running a layer
_LATER_PATIENCE = 1.0  # the same for a layer after one process has not come
_COMPARED = 2**20  # elements of a tensor that are compared
_SAMPLES = 16  # elements of a layer's weights
# Weights of different layers are unrelated; weights of replicas that drift apart stay similar for a while.
_DIFFERENT = 0.5

_ALL, _SOME = b"all", b"some"

_PROBES: Counter[tuple[str, ...]] = Counter()  # a subject and names of layers -> probes so far


def key_of_probe(subject: str, layers: Collection[str]) -> str:
    """A key in the store for a new probe of layers: the same on all processes, whatever else they probe."""
    _PROBES[kind := (subject, *sorted(layers))] += 1
    return f"spectralmetrics/{subject}/{zlib.crc32(repr(kind[1:]).encode())}/{_PROBES[kind]}"


class Gathered(NamedTuple):
    """The numbers of several processes.

    Attributes:
        by_rank: rank -> numbers, the earliest first.
        is_all: True if all processes sent theirs in time; the same on all of them.
    """

    by_rank: dict[int, list[int]]
    is_all: bool

    def up_to(self, rank: int) -> list[tuple[int, list[int]]]:
        """Ranks and numbers, up to and including a process."""
        ranks = list(self.by_rank)
        return [(each, self.by_rank[each]) for each in ranks[: ranks.index(rank) + 1]]


class Rendezvous:
    """Exchanges numbers about layers between processes.

    Args:
        layers: names of the layers, the same on all these processes.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self._patience = PATIENCE
        self._key = key_of_probe("numbers", layers)

    def gather(self, topic: str, numbers: Sequence[int], ranks: Sequence[int]) -> Gathered:
        """Send this process' numbers to some processes, this one included, and receive theirs.

        Each topic is used for one exchange only.

        Raises:
            RuntimeError, AttributeError: if there is no store.
        """
        store, key = default_store(), f"{self._key}/{topic}"
        keys = {rank: f"{key}/{rank}" for rank in ranks}
        decision = f"{key}/{','.join(map(str, ranks))}"
        turn = store.add(f"{key}/turn", 1)
        store.set(keys[dist.get_rank()], json.dumps([turn, *numbers]))
        if store.check([decision]) and store.get(decision) == _SOME:
            outcome = _SOME
        else:
            try:
                store.wait(list(keys.values()), timedelta(seconds=self._patience))
                outcome = _ALL
            except RuntimeError:  # such as a timeout
                outcome = _SOME
            # The first decision counts for all processes.
            outcome = store.compare_set(decision, "", outcome.decode())
        if outcome == _SOME:
            self._patience = _LATER_PATIENCE
        present = [rank for rank in ranks if outcome == _ALL or store.check([keys[rank]])]
        turns = sorted((*json.loads(store.get(keys[rank])), rank) for rank in present)
        return Gathered({rank: numbers for _, *numbers, rank in turns}, outcome == _ALL)


def checksum(values: Tensor) -> int:
    """A number that very likely differs if the compared elements differ in any bit."""
    flat = values.detach().reshape(-1)
    flat = flat[:: max(len(flat) // _COMPARED, 1)].contiguous()
    kinds: dict[int, torch.dtype] = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    whole = flat.view(kinds[flat.element_size()]).to(torch.int64)
    return int((whole * (torch.arange(len(whole), device=whole.device) % 8191 + 1)).sum()) % 2**62


def fingerprint(values: Tensor) -> list[int]:
    """The checksum of a tensor, a number for its shape, and 1 if it is not all zeros."""
    return [checksum(values), hash(tuple(values.shape)) % 2**40, int(bool((values != 0).any()))]


def are_alike(values: Tensor, group: Any) -> tuple[bool, bool]:
    """True if a tensor is the same on a group's processes, and True if it is not all zeros; one collective."""
    high, low = extremes(fingerprint(values), group)
    return high[:2] == low[:2], bool(high[2])


def weights_checksum(module: nn.Module) -> int:
    """The checksum of a module's own weights; without DTensors, which differ between processes anyway."""
    plain = [each for each in module.parameters(recurse=False) if not is_dtensor(each)]
    return sum(checksum(each) for each in plain) % 2**62


@dataclass
class _Probes:
    """The probes of this process in one default process group.

    Attributes:
        made: the number of probes made so far.
        read: ranks of processes that read probes together -> the number of probes that they have read.
    """

    made: int = 0
    read: Counter[tuple[int, ...]] = field(default_factory=Counter)


_MADE: weakref.WeakKeyDictionary[Any, _Probes] = weakref.WeakKeyDictionary()


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
                probes = _MADE.setdefault(dist.group.WORLD, _Probes())
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
        store, end = default_store(), time.monotonic() + PATIENCE
        ranks, probes = dist.get_process_group_ranks(group), _MADE[dist.group.WORLD]
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
        numbers = iter(read_together([samples for _, _, samples in weights.values()]))
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


def _key(rank: int, number: int) -> str:
    return f"spectralmetrics/probe/{rank}/{number}"
