"""Finds the layers whose forwards processes share: by weights, outputs and one checksum."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.layers import kind_of
from spectralmetrics.probing.alike import Alike, Selecting
from spectralmetrics.probing.layout import FeatureDim, dim_of, widths_around
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import (
    Cut,
    LeftOut,
    Part,
    Split,
    dtensors_of,
    is_dtensor,
    part_of,
    weights_of,
)
from spectralmetrics.probing.processes import is_one_of_several
from spectralmetrics.probing.rendezvous import Gathered, Rendezvous, are_alike, fingerprint, weights_checksum
from spectralmetrics.torch_private import dims_of_fsdp, spec_of_part

_UNKNOWN = -1

_Placement = Literal["own", "replicated"]


class Spread(NamedTuple):
    """The placement of a module's single experts.

    Attributes:
        splits: the splits of each expert's output.
        travels: the processes among which experts are sharded, so that tokens travel; None if none are.
    """

    splits: tuple[Split, ...]
    travels: Split | None


class Meshes:
    """The placement of a model's layers over processes, as far as it is known.

    Args:
        model: the model that the layers are part of; not kept alive.
        layers: names of the layers.
        selected: layers with a user's function, which returns a part of the output, or a DTensor.
        of_inputs: True for the inputs of layers, in place of their outputs.
        alike: the settings that must be equal on the processes of a layer; an attribute, too.

    Attributes:
        selecting: the results of the user's functions.
        active: True if some layer shares its forwards, so that each process takes part in every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        selected: Collection[str],
        of_inputs: bool,
        alike: Alike,
    ) -> None:
        self.active = False
        self.alike = alike
        self.selecting = Selecting(selected, alike)
        self._model = weakref.ref(model)
        self._selected = selected
        self._of_inputs = of_inputs
        self._groups: tuple[Any, ...] = ()  # of tensor parallelism
        self._for_plain: tuple[Any, ...] = ()  # groups along which plain outputs are placed
        self._sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules with weights that are sharded
        # (layer, number of its call in a forward) -> the placement of its plain outputs, or their whole width.
        self._placements: dict[tuple[str, int], _Placement | int] = {}
        self._rendezvous = Rendezvous(layers)
        self._exchanges: Counter[tuple[str, int]] = Counter()
        self._last: Cut | None = None  # form of the last layer's output, if it is divided
        self._experts: weakref.WeakKeyDictionary[nn.Module, Spread] = weakref.WeakKeyDictionary()
        self._has_searched = False

    def search(self, module: nn.Module | None = None) -> None:
        """Search for tensor-parallel weights: once in the model, and in a module that runs and so is whole."""
        if self._has_searched and (self._groups or module is None or not dtensors_of(module)):
            return
        if not is_one_of_several():
            return
        self._has_searched = True
        self.active = self.active or bool(self._selected)
        model = self._model()
        if model is None or not may_share_layers():
            return
        groups: dict[str, Any] = {}
        for each, parameter, dims in _placed(model, module):
            mesh = parameter.device_mesh
            of_mesh = [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]
            groups.update({group.group_name: group for group in of_mesh})
            if any(mesh.size(dim) > 1 and type(parameter.placements[dim]).__name__ == "Shard" for dim in dims):
                self._sharded.add(each)
        self._groups = tuple(groups.values())
        self._for_plain = _smallest(self._groups)
        self.active = self.active or bool(groups)

    def agree(self, name: str) -> None:
        """Compare the settings of processes in the first forward of a layer, which all of them observe."""
        if self._groups:
            self.alike.check(self._groups)
        elif name in self._selected and is_one_of_several():  # its processes are not known yet
            self.selecting.send_settings(name)

    def shares(self) -> bool:
        """True if some layer shares its forwards, as far as can be known before it runs."""
        if not self._has_searched:
            self.search()
        return self.active

    def concerns(self, output: Any) -> bool:
        """True if a process that observes nothing must still take part in a layer's forward."""
        if not self._has_searched and is_one_of_several():
            self.search()
        return self.active or (type(output) is not Tensor and (isinstance(output, Part) or is_dtensor(output)))

    def part_of(
        self, name: str, module: nn.Module, output: Any, dims: FeatureDim | None, call: int = 0
    ) -> Part | None:
        """This process' part of a layer's output; None if all of it is its own, a LeftOut if that is unknown.

        ``dims`` finds its features, and there were ``call`` earlier calls of the layer in this forward.
        """
        part = None
        try:
            part = self._part_of(name, module, output, dims, call)
        finally:
            self._last = None if part is None or name in self._selected else Cut.of(part)
        return part

    def _part_of(
        self, name: str, module: nn.Module, output: Any, dims: FeatureDim | None, call: int
    ) -> Part | None:
        values = output if isinstance(output, Part) else first_tensor(output)
        if isinstance(values, Part) or is_dtensor(values):
            part = values if isinstance(values, Part) else part_of(values)
            if not part.splits:
                return None
            self.active = True
            self.alike.check([split.group for split in part.splits])
            if name in self._selected:
                self.selecting.check_form(name, part)
            return part
        if not self._for_plain or name in self._selected or not isinstance(values, Tensor) or values.ndim < 1:
            return None
        self.alike.check(self._groups)
        dim = (dims or dim_of(module, of_inputs=self._of_inputs)).find(values).dim
        placement = self._placements.get((name, call))
        if placement is None:
            placement = self._find_out(name, module, values, dim, call)
        if placement == "own":
            return None
        shape = list(values.shape)
        if placement == "replicated":
            splits = [Split.along(group) for group in self._for_plain]
        else:
            assert isinstance(placement, int)
            (group,) = self._for_plain
            splits = [Split.along(group, dim)]
            shape[dim] = placement
        return Part(values, tuple(shape), tuple(torch.empty(shape, device="meta").stride()), tuple(splits))

    def spread_of_experts(self, module: nn.Module, states: Tensor) -> Spread:
        """The placement of single experts' outputs, by their weights and, once, by a checksum of the tokens."""
        self.search(module)
        spread = self._experts.get(module)
        if spread is not None:
            return spread
        if not self._groups:
            return Spread((), None)
        self.alike.check(self._groups)
        sharded: dict[str, set[int]] = {}
        for each, parameter, dims in () if (model := self._model()) is None else _placed(model, module):
            for dim in dims if each is module and parameter.ndim > 1 else ():
                placed_in = getattr(parameter.placements[dim], "dim", None)
                if placed_in is not None:
                    sharded.setdefault(parameter.device_mesh.get_group(dim).group_name, set()).add(placed_in)
        splits, travels, is_certain = [], None, True
        for group in self._groups:
            alike, nonzero = are_alike(states, group)
            is_certain = is_certain and (nonzero or not alike)
            dims_of = sharded.get(group.group_name, set())
            if not alike and (dims_of - {0} or (dims_of and travels is not None)):
                raise LeftOut(
                    f"its weights are sharded in dimensions {sorted(dims_of)} among processes that have other"
                    " tokens"
                )
            split = Split.along(group)
            if not alike:
                travels = split if dims_of else travels
            elif not dims_of:
                splits.append(split)
            elif 0 not in dims_of:
                splits.append(split if self._of_inputs else split._replace(op="sum"))
        if travels is not None and any(split.op for split in splits):
            raise LeftOut("its weights are cut and sharded among processes that have other tokens, both")
        spread = Spread(tuple(splits), travels)
        if is_certain:
            self._experts[module] = spread
        return spread

    def _find_out(self, name: str, module: nn.Module, values: Tensor, dim: int, call: int) -> _Placement | int:
        """Find the placement of a plain output, once, by numbers that the processes of each group exchange."""
        width, place = values.shape[dim], (name, call)
        kind, _ = kind_of(module)
        features = None if kind is None else kind.features_of(module, of_inputs=self._of_inputs)
        if (
            features is not None
            and width < features
            and module in self._sharded
            and self._fits(features, width)
        ):
            self._placements[place] = features
            return features
        whole = self._of_different(name, features, values.shape, dim)
        numbers = [*fingerprint(values), weights_checksum(module), whole]
        self._exchanges[place] += 1
        topic = f"{name}/{call}/{self._exchanges[place]}"
        gathered = [self._rendezvous.gather(topic, numbers, _ranks_in(group)) for group in self._for_plain]
        if not all(each.is_all for each in gathered):
            return self._of_some(place, gathered, is_whole=features == width)
        every = [numbers for each in gathered for numbers in each.by_rank.values()]
        if all(each[:2] == numbers[:2] for each in every):
            if any(each[2] for each in every):  # zeros show nothing: exchanged again at the next forward
                self._placements[place] = "replicated"
            return "replicated"
        if any(each[4] != whole for each in every) or (
            features is not None and any(each[3] != numbers[3] for each in every)
        ):
            whole = _UNKNOWN
        if whole == _UNKNOWN:
            raise LeftOut(
                f"its outputs of shape {tuple(values.shape)} differ between the processes of tensor"
                " parallelism, and it is unknown whether features or samples are divided: give the probe"
                f" select={{{name!r}: lambda out: DTensor.from_local(out, mesh, [Shard(-1)])}}"
            )
        self._placements[place] = whole or "own"
        return whole or "own"

    def _of_some(self, place: tuple[str, int], gathered: Sequence[Gathered], *, is_whole: bool) -> _Placement:
        """The placement if some processes have not run a layer for long: each process that runs it is alone.

        A later process with the same output has a replica, which has been counted.
        """
        for each in gathered:
            *earlier, (_, numbers) = each.up_to(dist.get_rank())
            for rank, earlier_numbers in earlier:
                if earlier_numbers[:2] == numbers[:2] and numbers[2]:
                    raise LeftOut(f"process {rank} had the same output long before this one, which counts once")
        if not is_whole:
            raise LeftOut(
                "other processes of tensor parallelism have not run it for seconds, and it is unknown whether"
                " its features are divided"
            )
        self._placements[place] = "own"
        return "own"

    def _of_different(self, name: str, features: int | None, shape: Sequence[int], dim: int) -> int:
        """The whole width if outputs differ since features are divided; 0 if each output is a process' own."""
        width, last = shape[dim], self._last
        if features is not None:
            return 0 if features == width else _UNKNOWN
        if last is not None and last[:2] == (tuple(shape), dim % len(shape)) and self._fits(last.whole, width):
            return last.whole  # as an activation behind a column-parallel layer
        model = self._model()
        for group in [] if model is None else widths_around(model, name):
            if wholes := {whole for whole in group if whole == width or self._fits(whole, width)}:
                whole = wholes.pop() if len(wholes) == 1 else _UNKNOWN
                return 0 if whole == width else whole
        return _UNKNOWN

    def _fits(self, whole: int, width: int) -> bool:
        """True if this process' shard of a number of features has this width."""
        if len(self._for_plain) != 1:
            return False
        span = Part(torch.empty(0), (whole,), (1,), (Split.along(self._for_plain[0], 0),)).spans(0)
        return span.stop - span.start == width < whole

    def __getstate__(self) -> dict[str, Any]:
        return {"alike": self.alike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # No model runs with a copy.
        self.__init__(nn.Module(), (), (), False, state["alike"])  # type: ignore[misc]
        self._has_searched = True


def may_share_layers() -> bool:
    """True if processes may share layers, since there are several and PyTorch's DTensors have been imported."""
    return is_one_of_several() and "torch.distributed.tensor" in sys.modules


def _ranks_in(group: Any) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))


def _smallest(groups: Sequence[Any]) -> tuple[Any, ...]:
    """The groups that contain no smaller one, each once: experts may be spread over several meshes."""
    by_ranks = {frozenset(_ranks_in(group)): group for group in reversed(groups)}
    return tuple(
        group for ranks, group in reversed(by_ranks.items()) if not any(other < ranks for other in by_ranks)
    )


def _placed(model: nn.Module, running: nn.Module | None) -> Iterator[tuple[nn.Module, Any, range]]:
    """Modules, DTensors or specs of their weights, and the dimensions of the mesh without FSDP2's.

    FSDP2 puts its own dimensions first: one, or two if it also replicates. A module that runs is whole, as is
    everything that FSDP2 gathers with it.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    # A unit inside another comes later and replaces it.
    unit = {id(each): outer for outer in model.modules() if isinstance(outer, fsdp) for each in outer.modules()}
    for module in model.modules():
        for weight in weights_of(module):
            tensor: Any = weight if is_dtensor(weight) else spec_of_part(weight)
            if tensor is not None:
                number = tensor.device_mesh.ndim
                of_fsdp = 0
                if id(module) in unit and unit[id(module)] is not unit.get(id(running)):
                    of_fsdp = dims_of_fsdp(unit[id(module)])
                yield module, tensor, range(of_fsdp, number)


class Alone:
    """Stands for :class:`Meshes` where no other process shares a forward."""

    active = False

    def concerns(self, output: Any) -> bool:
        """See :class:`Meshes`."""
        return False
