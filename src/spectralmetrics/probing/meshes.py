"""Finds the layers whose forwards processes share: by weights, outputs and one checksum."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.layers import kind_of
from spectralmetrics.probing.alike import Alike
from spectralmetrics.probing.checksums import are_alike, checksum, checksum_of_weights, extremes
from spectralmetrics.probing.hooks import Hooks, Observe, Select
from spectralmetrics.probing.identity import is_one_of_several
from spectralmetrics.probing.layout import FeatureDim, dim_of, widths_around
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import LeftOut, Part, Split, is_dtensor, part_of, split_of
from spectralmetrics.probing.selecting import Selecting

_UNKNOWN = -1

_How = Literal["own", "replicated"]


class Spread(NamedTuple):
    """The placement of a module's single experts.

    Attributes:
        splits: the splits of what each puts out.
        travels: the processes among which experts are sharded, and tokens travel to them; None if none do.
    """

    splits: tuple[Split, ...]
    travels: Split | None


class Meshes:
    """The placement of a model's layers over processes, as far as it is known.

    Args:
        model: the model that the layers are part of; not kept alive.
        selected: layers of which a function of the user's returns a part, or a DTensor.
        of_inputs: True for the inputs of layers, in place of their outputs.
        alike: the settings that the processes of a layer must have in common.

    Attributes:
        alike: likewise.
        selecting: what functions of the user's have returned.
        active: whether some layer shares its forwards, so that each process takes part in every forward.
    """

    def __init__(self, model: nn.Module, selected: Collection[str], of_inputs: bool, alike: Alike) -> None:
        self.active = False
        self.alike = alike
        self.selecting = Selecting(selected, alike)
        self._model = weakref.ref(model)
        self._selected = selected
        self._of_inputs = of_inputs
        self._groups: tuple[Any, ...] = ()  # of tensor parallelism
        self._sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules with weights that are sharded
        self._known: dict[
            str, _How | int
        ] = {}  # layer -> how its plain outputs are placed, or their whole width
        self._experts: weakref.WeakKeyDictionary[nn.Module, Spread] = weakref.WeakKeyDictionary()
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
            self.selecting.tell_settings(name)

    def shares(self) -> bool:
        """True if some layer shares its forwards, as far as can be known before it runs."""
        if not self._has_looked:
            self.look()
        return self.active

    def concerns(self, output: Any) -> bool:
        """True if a process that observes nothing has to take part in the forward of a layer all the same."""
        if not self._has_looked and is_one_of_several():
            self.look()
        return self.active or (type(output) is not Tensor and (isinstance(output, Part) or is_dtensor(output)))

    def part_of(self, name: str, module: nn.Module, output: Any, dims: FeatureDim | None) -> Part | None:
        """This process' part of a layer's output; None if all of it is its own.

        Args:
            name: the name of the layer.
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
                self.selecting.check_form(name, part)
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

    def spread_of_experts(self, module: nn.Module, states: Tensor) -> Spread:
        """The placement of single experts' outputs, by their weights and, once, by a checksum of the tokens.

        Args:
            module: the module of all experts.
            states: the tokens that it gets.

        Raises:
            LeftOut: where weights are cut and tokens differ.
        """
        self.look(module)
        known = self._experts.get(module)
        if known is not None:
            return known
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
            split = Split(group, dist.get_rank(group), dist.get_world_size(group))
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

    def _find_out(self, name: str, module: nn.Module, values: Tensor, dim: int) -> _How | int:
        """Finds out how a plain output is placed; one or two collectives, once."""
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
        numbers = [checksum(values), hash(tuple(values.shape)) % 2**40, checksum_of_weights(module)]
        nonzero = int(bool((values != 0).any()))
        alike = [extremes([*numbers, nonzero], group) for group in self._groups]
        if all(high[:2] == low[:2] for high, low in alike):
            if any(high[3] for high, _ in alike):  # all zeros tell nothing: asked again at the next forward
                self._known[name] = "replicated"
            return "replicated"
        whole = self._of_different(name, features, width, all(high[2] == low[2] for high, low in alike))
        for group in self._groups:
            high, low = extremes([whole], group)
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
        """True if a width is that of this process' shard of so many features."""
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
        self.selecting = Selecting((), self.alike)
        self.active, self._has_looked, self._groups, self._selected = False, True, (), ()
        self._known, self._sharded, self._of_inputs = {}, weakref.WeakSet(), False
        self._experts = weakref.WeakKeyDictionary()
        self._model = lambda: None  # type: ignore[assignment]


class Alone:
    """Stands for :class:`Meshes` where no other process shares a forward."""

    active = False

    def concerns(self, output: Any) -> bool:
        """See :class:`Meshes`."""
        return False


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


def has_dtensors(module: nn.Module) -> bool:
    """True if a layer has a parameter that is a DTensor."""
    return bool(_dtensors(module))


def watch_outputs(hooks: Hooks, module: nn.Module, observe: Observe) -> None:
    """Have it shown what a layer puts out, before this becomes plain where the layer's weights are DTensors."""
    if has_dtensors(module):
        either = FirstOrLast(observe)
        hooks.behind(module, either.first, prepend=True)
        hooks.behind(module, either.last)
    else:
        hooks.behind(module, observe)


def _dtensors(module: nn.Module) -> list[Any]:
    return [
        each
        for each in module.parameters(recurse=False)
        if type(each) is not nn.Parameter or is_dtensor(each.data)
    ]


def _placed(model: nn.Module, running: nn.Module | None) -> Iterator[tuple[nn.Module, Any, range]]:
    """Modules, DTensors among their parameters, and the dimensions of the mesh that are not those of FSDP2.

    FSDP2 puts its own before those that were there: one, or two where it also replicates. A module that runs is
    whole, with all that FSDP2 brings together with it.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    # What is nested more deeply comes later.
    unit = {id(each): outer for outer in model.modules() if isinstance(outer, fsdp) for each in outer.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if is_dtensor(parameter):
                tensor: Any = parameter
                number = tensor.device_mesh.ndim
                own = 0
                if id(module) in unit and unit[id(module)] is not unit.get(id(running)):
                    own = 2 if number > 1 and tensor.placements[0].is_replicate() else 1
                yield module, tensor, range(own, number)
