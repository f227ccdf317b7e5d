"""DTensors as weights and outputs: the layers that have them, their processes, and hooks that see them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.probing.hooks import Hooks, Observe, Select
from spectralmetrics.probing.identity import is_one_of_several
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import Part, is_dtensor
from spectralmetrics.torch_private import dims_of_fsdp, spec_of_part


class FirstOrLast:
    """Passes on a layer's output as its first hook gets it if this is a DTensor, or else as its last hook does.

    Hooks after the first may replace a DTensor by this process' part of it. A plain output is passed on as the
    layer's caller gets it: hooks may have cast it.

    Args:
        observe: called with the output that is passed on.
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


def may_share_layers() -> bool:
    """True if processes may share layers, since there are several and PyTorch's DTensors have been imported."""
    return is_one_of_several() and "torch.distributed.tensor" in sys.modules


def has_dtensors(module: nn.Module) -> bool:
    """True if a layer has a parameter that is a DTensor."""
    return bool(dtensors_of(module))


def watch_outputs(hooks: Hooks, module: nn.Module, observe: Observe) -> None:
    """Observe a layer's outputs; if its weights are DTensors, before other hooks make outputs plain."""
    if has_dtensors(module):
        either = FirstOrLast(observe)
        hooks.behind(module, either.first, prepend=True)
        hooks.behind(module, either.last)
    else:
        hooks.behind(module, observe)


def dtensors_of(module: nn.Module) -> list[Any]:
    """The weights of a layer that are DTensors, or may be, or are parts of them between forwards."""
    return [
        each
        for each in _weights_of(module)
        if type(each) is not nn.Parameter or is_dtensor(each.data) or spec_of_part(each) is not None
    ]


def _weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a layer, and DTensors in the place of parameters while it runs."""
    yield from module.parameters(recurse=False)
    yield from (each for each in vars(module).values() if isinstance(each, Tensor) and is_dtensor(each))


def smallest(groups: Sequence[Any]) -> tuple[Any, ...]:
    """The groups that contain no smaller one, each once: experts may be spread over several meshes."""
    by_ranks = {frozenset(ranks_in(group)): group for group in reversed(groups)}
    return tuple(
        group for ranks, group in reversed(by_ranks.items()) if not any(other < ranks for other in by_ranks)
    )


def ranks_in(group: Any) -> list[int]:
    """The processes of a group, in ascending order."""
    return sorted(dist.get_process_group_ranks(group))


def placed(model: nn.Module, running: nn.Module | None) -> Iterator[tuple[nn.Module, Any, range]]:
    """Modules, DTensors or specs of their weights, and the dimensions of the mesh without FSDP2's.

    FSDP2 puts its own dimensions first: one, or two if it also replicates. A module that runs is whole, as is
    everything that FSDP2 gathers with it.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    # A unit inside another comes later and replaces it.
    unit = {id(each): outer for outer in model.modules() if isinstance(outer, fsdp) for each in outer.modules()}
    for module in model.modules():
        for weight in _weights_of(module):
            tensor: Any = weight if is_dtensor(weight) else spec_of_part(weight)
            if tensor is not None:
                number = tensor.device_mesh.ndim
                of_fsdp = 0
                if id(module) in unit and unit[id(module)] is not unit.get(id(running)):
                    of_fsdp = dims_of_fsdp(unit[id(module)])
                yield module, tensor, range(of_fsdp, number)
