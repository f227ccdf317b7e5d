"""Which layers share their forwards with other processes: weights, outputs and one checksum tell."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import weakref
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.layers import kind_of
from spectralmetrics.probing.alike import Alike
from spectralmetrics.probing.hooks import Observe, Select
from spectralmetrics.probing.identity import is_one_of_several
from spectralmetrics.probing.layout import FeatureDim, Found, dim_of, widths_around
from spectralmetrics.probing.observations import first_tensor
from spectralmetrics.probing.parts import (
    LeftOut,
    Part,
    Split,
    is_dtensor,
    part_of,
    reason_of,
    split_of,
)
from spectralmetrics.sums.merging import communication_device
from spectralmetrics.torch_private import default_store

_SAMPLES = 2**20  # elements of an output that are compared

_UNKNOWN = -1

_PROBES: Counter[tuple[str, ...]] = Counter()  # layers with functions that select -> probes so far

_How = Literal["own", "replicated"]


class Meshes:
    """What is known of the processes that a model's layers are spread over.

    Args:
        model: that the layers are part of; not kept alive.
        selected: layers of which a function of the user's returns a part, or a DTensor.
        of_inputs: of what layers take, in place of what they put out.
        alike: the settings that the processes of a layer must have in common.

    Attributes:
        alike: likewise.
        active: whether some layer shares its forwards, so that each process takes part in every forward.
    """

    def __init__(self, model: nn.Module, selected: Collection[str], of_inputs: bool, alike: Alike) -> None:
        self.active = False
        self.alike = alike
        self._model = weakref.ref(model)
        self._selected = selected
        self._of_inputs = of_inputs
        self._groups: tuple[Any, ...] = ()  # of tensor parallelism
        self._sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules with weights that are sharded
        self._known: dict[
            str, _How | int
        ] = {}  # layer -> how its plain outputs are placed, or their whole width
        self._forms: dict[str, Part] = {}  # of what was selected, without its values
        self._heard: set[str] = set()  # layers of which all have told whether what selects failed
        self._failed: dict[str, str] = {}  # layer -> why what selects failed in its first forward, somewhere
        # The same on all processes, whatever other probes each of them has.
        _PROBES[names := tuple(sorted(selected))] += 1
        self._key = f"spectralmetrics/select/{zlib.crc32(repr(names).encode())}/{_PROBES[names]}"
        self._experts: weakref.WeakKeyDictionary[nn.Module, tuple[Split, ...]] = weakref.WeakKeyDictionary()
        self._has_looked = False

    def look(self, module: nn.Module | None = None) -> None:
        """Look for tensor-parallel weights: of the whole model once, and of a module that runs.

        Args:
            module: that runs, so that what FSDP2 had sharded of it is whole.
        """
        if self._has_looked and (self._groups or module is None or not _dtensors(module)):
            return
        if not is_one_of_several():
            return
        self._has_looked = True
        self.active = self.active or bool(self._selected)
        model = self._model()
        if model is None or "torch.distributed.tensor" not in sys.modules:
            return
        groups: dict[str, Any] = {}
        for each, parameter, dims in _placed(model, module):
            mesh = parameter.device_mesh
            found = [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]
            groups.update({group.group_name: group for group in found})
            if any(mesh.size(dim) > 1 and type(parameter.placements[dim]).__name__ == "Shard" for dim in dims):
                self._sharded.add(each)
        self._groups = tuple(groups.values())
        self.active = self.active or bool(groups)

    def agree(self, name: str) -> None:
        """Compare the settings of processes in the first forward of a layer, which all observe in any case.

        Raises:
            LeftOut: if they differ where layers are shared.
        """
        if self._groups:
            self.alike.check(self._groups)
        elif name in self._selected and is_one_of_several():  # with whom it is shared is not known yet
            self._tell_store(f"{name}/settings", pickle.dumps(self.alike.settings()))

    def shares(self) -> bool:
        """Whether some layer shares its forwards, as far as can be known before it runs."""
        if not self._has_looked:
            self.look()
        return self.active

    def concerns(self, output: Any) -> bool:
        """Whether a process that observes nothing has to take part in the forward of a layer all the same."""
        return self.shares() or isinstance(output, Part) or is_dtensor(output)

    def part_of(self, name: str, module: nn.Module, output: Any, dims: FeatureDim | None) -> Part | None:
        """What this process has of a layer's output; None if all of it is its own.

        Args:
            name: of the layer.
            module: the layer.
            output: its output, or a part of a compiled layer's.
            dims: finds its features.

        Raises:
            LeftOut: where nothing tells how it is placed.
        """
        values = output if isinstance(output, Part) else first_tensor(output)
        if isinstance(values, Part) or is_dtensor(values):
            part = values if isinstance(values, Part) else part_of(values)
            if not part.splits:
                return None
            self.active = True
            self.alike.check([split.group for split in part.splits])
            if name in self._selected:
                self._check_form(name, part)
            return part
        if not self._groups or name in self._selected or not isinstance(values, Tensor) or values.ndim < 1:
            return None
        self.alike.check(self._groups)
        dim = (dims or dim_of(module, of_inputs=self._of_inputs)).find(values).dim
        how = self._known.get(name)
        if how is None:
            how = self._find_out(name, module, values, dim)
        if how == "own":
            return None
        shape = list(values.shape)
        if how == "replicated":
            splits = [Split(group, dist.get_rank(group), dist.get_world_size(group)) for group in self._groups]
        else:
            assert isinstance(how, int)
            (group,) = self._groups
            splits = [Split(group, dist.get_rank(group), dist.get_world_size(group), dim)]
            shape[dim] = how
        return Part(values, tuple(shape), tuple(torch.empty(shape, device="meta").stride()), tuple(splits))

    def splits_of_experts(self, module: nn.Module, states: Tensor) -> tuple[Split, ...]:
        """How what single experts put out is spread, by their weights and, once, by a checksum of the tokens.

        Args:
            module: of all experts.
            states: the tokens that it gets.

        Raises:
            LeftOut: where the tokens of an expert are on other processes.
        """
        known = self._experts.get(module)
        if known is not None:
            return known
        if not self._groups:
            return ()
        self.alike.check(self._groups)
        sharded: dict[str, set[int]] = {}
        for each, parameter, dims in () if (model := self._model()) is None else _placed(model, module):
            for dim in dims if each is module and parameter.ndim > 1 else ():
                placed_in = getattr(parameter.placements[dim], "dim", None)
                if placed_in is not None:
                    sharded.setdefault(parameter.device_mesh.get_group(dim).group_name, set()).add(placed_in)
        splits, is_certain = [], True
        for group in self._groups:
            alike, nonzero = _alike(states, group)
            is_certain = is_certain and (nonzero or not alike)
            dims_of = sharded.get(group.group_name, set())
            if not alike and dims_of:
                raise LeftOut(
                    "its weights are sharded among processes that have other tokens, which travel inside the"
                    " layer: what experts of other processes put out is not seen"
                )
            split = Split(group, dist.get_rank(group), dist.get_world_size(group))
            if alike and not dims_of:
                splits.append(split)
            elif 0 not in dims_of and alike and not self._of_inputs:
                splits.append(split._replace(op="sum"))
            elif 0 not in dims_of and alike:
                splits.append(split)
        if is_certain:
            self._experts[module] = tuple(splits)
        return tuple(splits)

    def select(self, name: str, output: Any, function: Select) -> tuple[Any, Exception | None]:
        """What a function of the user's makes of an output.

        Whether it fails in its first forward is told to all processes through their store: nobody can know then
        which of them expect something of this one.

        Raises:
            LeftOut: where it has failed in the first forward on some process, for good.

        Returns:
            It and None. Where the function raises, what others expect of this process, the part of a DTensor as
            it was the last time, whose values are NaN, and the error.
        """
        if name in self._failed:
            raise LeftOut(self._failed[name])
        try:
            chosen = function(output)
        except Exception as error:
            before = self._forms.get(name)
            values = first_tensor(output)
            if before is None or not isinstance(values, Tensor):
                if name not in self._heard and is_one_of_several():
                    self._failed[name] = f"`select` failed in the first forward: {reason_of(error)}"
                    self._tell_store(name, self._failed[name].encode())
                raise
            sizes = zip(values.shape, before.shape, before.local.shape, strict=True)
            shape = tuple(size if whole == local else whole for size, whole, local in sizes)
            return replace(before, local=torch.full_like(values, math.nan), shape=shape), error
        if is_dtensor(chosen):
            part, values = part_of(chosen), first_tensor(output)
            if name not in self._heard:
                self._heard.add(name)
                self._tell_store(name, b"")
                self._hear_others(name, chosen.device_mesh.mesh.flatten().tolist())
            if isinstance(values, Tensor) and part.local.shape == values.shape:
                self._forms[name] = replace(part, local=part.local.new_empty(()).expand(part.local.shape))
        return chosen, None

    def _tell_store(self, name: str, told: bytes) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # a store that cannot, or none
            default_store().set(f"{self._key}/{name}/{dist.get_rank()}", b"." + told)

    def _hear(self, name: str, ranks: list[int]) -> dict[int, bytes]:
        try:
            store = default_store()
            return {rank: store.get(f"{self._key}/{name}/{rank}")[1:] for rank in ranks}
        except (RuntimeError, AttributeError):
            return {}

    def _hear_others(self, name: str, ranks: list[int]) -> None:
        """Raise an error if a function of the user's has failed on one of these, or settings differ."""
        try:
            if not self._groups:
                settings = self._hear(f"{name}/settings", ranks)
                self.alike.compare({rank: pickle.loads(each) for rank, each in settings.items()})
            told = self._hear(name, ranks)
            if failures := [f"{why.decode()} on process {rank}" for rank, why in told.items() if why]:
                raise LeftOut("; ".join(failures))
        except LeftOut as error:
            self._failed[name] = str(error)
            raise

    def _check_form(self, name: str, part: Part) -> None:
        """Have all processes agree, once, on the shape of what a function of the user's has returned."""
        if self._known.get(name) is not None:
            return
        self._known[name] = "own"
        for split in part.splits:
            spans = [part.spans(dim) for dim in range(part.local.ndim)]
            fits = tuple(part.local.shape) == tuple(span.stop - span.start for span in spans)
            high, low = _extremes([hash(part.shape) % 2**40, not fits], part.local, split.group)
            if high != low or high[1]:
                raise LeftOut(
                    f"`select` returned a DTensor of shape {part.shape} whose part on this process is"
                    f" {tuple(part.local.shape)}, which does not fit the other processes': give"
                    " DTensor.from_local the shape and stride of the whole where parts are uneven"
                )

    def _find_out(self, name: str, module: nn.Module, values: Tensor, dim: int) -> _How | int:
        """How a plain output is placed; one or two collectives, once."""
        width = values.shape[dim]
        kind, _ = kind_of(module)
        features = None if kind is None else kind.features_of(module, of_inputs=self._of_inputs)
        if (
            features is not None
            and width < features
            and module in self._sharded
            and self._fits(features, width)
        ):
            self._known[name] = features
            return features
        numbers = [_hash(values), hash(tuple(values.shape)) % 2**40, _hash_weights(module)]
        nonzero = int(bool((values != 0).any()))
        alike = [_extremes([*numbers, nonzero], values, group) for group in self._groups]
        if all(high[:2] == low[:2] for high, low in alike):
            if any(high[3] for high, _ in alike):  # all zeros tell nothing: asked again at the next forward
                self._known[name] = "replicated"
            return "replicated"
        whole = self._of_different(name, features, width, all(high[2] == low[2] for high, low in alike))
        for group in self._groups:
            high, low = _extremes([whole], values, group)
            if high != low:
                whole = _UNKNOWN
        if whole == _UNKNOWN:
            raise LeftOut(
                f"its outputs of shape {tuple(values.shape)} differ between the processes of tensor"
                " parallelism, and nothing tells whether features or samples are divided: give the probe"
                f" select={{{name!r}: lambda out: DTensor.from_local(out, mesh, [Shard(-1)])}}"
            )
        self._known[name] = whole or "own"
        return whole or "own"

    def _of_different(self, name: str, features: int | None, width: int, has_same_weights: bool) -> int:
        """The whole width where outputs differ because features are divided; 0 if each is a process' own."""
        if features is not None:
            return 0 if features == width and has_same_weights else _UNKNOWN
        model = self._model()
        for group in [] if model is None else widths_around(model, name):
            for whole in group:
                if whole == width or self._fits(whole, width):
                    return whole if whole != width else 0
        return _UNKNOWN

    def _fits(self, whole: int, width: int) -> bool:
        """Whether a width is that of this process' shard of so many features."""
        if len(self._groups) != 1:
            return False
        split = split_of(self._groups[0], torch.distributed.tensor.Shard(0), 1)
        span = Part(torch.empty(0), (whole,), (1,), (split,)).spans(0)
        return span.stop - span.start == width < whole

    def __getstate__(self) -> dict[str, Any]:
        return {"alike": self.alike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a copy nothing runs.
        self.alike = state["alike"]
        self.active, self._has_looked, self._groups, self._selected = False, True, (), ()
        self._known, self._forms, self._sharded, self._of_inputs = {}, {}, weakref.WeakSet(), False
        self._failed, self._heard, self._key = {}, set(), ""
        self._experts = weakref.WeakKeyDictionary()
        self._model = lambda: None  # type: ignore[assignment]


class FirstOrLast:
    """Passes on what the first hook of a layer sees if it is a DTensor, or else what the last sees.

    What is behind the first hook may hand out this process' part of the DTensor alone. Plain outputs are passed
    on as the layer's caller gets them: what is behind may have cast them.

    Args:
        observe: gets what is passed on.
    """

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._is_seen = False

    def first(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """See :data:`.Observe`."""
        self._is_seen = isinstance(output, Part) or is_dtensor(first_tensor(output))
        if self._is_seen:
            self._observe(module, output, training, select)

    def last(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """See :data:`.Observe`."""
        is_seen, self._is_seen = self._is_seen, False
        if not is_seen:
            self._observe(module, output, training, select)


class At(FeatureDim):
    """Features whose dimension has been found."""

    def __init__(self, found: Found, takes_sequences: bool) -> None:
        super().__init__(takes_sequences=takes_sequences)
        self._found = found

    def find(self, values: Tensor) -> Found:
        """See :class:`.FeatureDim`."""
        return self._found


def has_dtensors(module: nn.Module) -> bool:
    """Whether a layer has a parameter that is a DTensor."""
    return bool(_dtensors(module))


def _dtensors(module: nn.Module) -> list[Any]:
    return [
        each
        for each in module.parameters(recurse=False)
        if type(each) is not nn.Parameter or is_dtensor(each.data)
    ]


def _placed(model: nn.Module, running: nn.Module | None) -> Iterator[tuple[nn.Module, Any, range]]:
    """Modules, DTensors among their parameters, and the dimensions of the mesh that are not those of FSDP2.

    FSDP2 puts its own before those that were there: one, or two where it also replicates. A module that runs is
    whole.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    managed = {id(each) for outer in model.modules() if isinstance(outer, fsdp) for each in outer.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if is_dtensor(parameter):
                tensor: Any = parameter
                number = tensor.device_mesh.ndim
                own = 0
                if id(module) in managed and module is not running:
                    own = 2 if number > 1 and tensor.placements[0].is_replicate() else 1
                yield module, tensor, range(own, number)


def _hash(values: Tensor) -> int:
    flat = values.detach().reshape(-1)
    flat = flat[:: max(len(flat) // _SAMPLES, 1)].contiguous()
    kinds: dict[int, torch.dtype] = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    whole = flat.view(kinds[flat.element_size()]).to(torch.int64)
    return int((whole * (torch.arange(len(whole), device=whole.device) % 8191 + 1)).sum()) % 2**62


def _alike(values: Tensor, group: Any) -> tuple[bool, bool]:
    """Whether all processes of a group have the same, and whether that is more than zeros; one collective."""
    numbers = [_hash(values), hash(tuple(values.shape)) % 2**40, int(bool((values != 0).any()))]
    high, low = _extremes(numbers, values, group)
    return high[:2] == low[:2], bool(high[2])


def _hash_weights(module: nn.Module) -> int:
    plain = [each for each in module.parameters(recurse=False) if not is_dtensor(each)]
    return sum(_hash(each) for each in plain) % 2**62


def _extremes(numbers: list[int], values: Tensor, group: Any) -> tuple[list[int], list[int]]:
    """The largest of each number on the processes of a group, and the smallest."""
    both = torch.tensor([*numbers, *(-each for each in numbers)], device=communication_device(group))
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    told = both.tolist()
    return told[: len(numbers)], [-each for each in told[len(numbers) :]]
