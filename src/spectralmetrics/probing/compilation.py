"""The way of a compiled layer's output to its observer: plain tensors go through one opaque operation.

Dynamo puts the operation into the user's graph, and guards that graph by nothing of the probe's but its
presence: which observer is meant is a tensor, an input of the graph like a weight.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.probing.outputs import first_tensor, not_floating
from spectralmetrics.probing.parts import PLACED, part_from, take_dtensor_apart
from spectralmetrics.probing.routed import Routed
from spectralmetrics.torch_private import (
    is_known,
    jagged,
    jagged_dim,
    untraced,
    without_modes,
)

# The operation is said to change this one tensor, and so is never left out, done twice, or put before another.
TICKET = torch.zeros((), dtype=torch.int64, device="cpu").add_(0)


_ROUTED = "routed "  # begins the kind of what a module of experts is called with


class SeesCompiled(Protocol):
    """The protocol of observers that the operation calls."""

    def see_compiled(self, parts: list[Tensor], kind: str) -> None:
        """Take what :func:`take_apart` has returned."""


_OBSERVERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(observer: object) -> Tensor:
    """A number of its own, by which the operation finds an observer as long as it is there."""
    number = next(_NUMBERS)
    _OBSERVERS[number] = observer
    # A Python number would be a constant of the graph, and each layer would need a graph of its own.
    with without_modes(), torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def observer_of(number: Tensor) -> Any:
    """The observer with that number; None if it is gone."""
    return _OBSERVERS.get(int(number))


class Unobservable:
    """Stands for an output that no operation can be given.

    Args:
        why: it cannot be observed.
    """

    def __init__(self, why: str) -> None:
        self.why = why


def take_apart(output: Any) -> tuple[list[Tensor], str]:
    """Plain tensors that an output can be made from again, and how; traced by Dynamo."""
    if isinstance(output, Routed):
        if not is_known(output.states):
            kind = type(output.states).__name__
            return [], f"compiled experts whose tokens are a {kind} cannot be observed"
        return [output.states.detach(), output.experts.detach()], f"{_ROUTED}{output.cast}"
    values = first_tensor(output)
    if isinstance(values, PackedSequence):
        parts = [values.data.detach(), values.batch_sizes]
        if values.sorted_indices is not None and values.unsorted_indices is not None:
            parts += [values.sorted_indices, values.unsorted_indices]
        return parts, "packed"
    if values is None:
        return [], not_floating(output)
    if not is_known(values):
        if type(values).__name__ == "DTensor":
            return take_dtensor_apart(values)
        return [], f"a compiled layer whose output is a {type(values).__name__} cannot be observed"
    if values.is_nested and values.layout == torch.jagged:
        nested: Any = values
        lengths = nested.lengths()
        parts = [nested.values().detach(), nested.offsets()]
        return (parts if lengths is None else [*parts, lengths]), f"jagged {jagged_dim(values)}"
    if values.layout != torch.strided or values.is_nested:
        return [], f"a compiled layer whose output is {values.layout} cannot be observed"
    return [values.detach()], "tensor"


def put_together(parts: list[Tensor], kind: str) -> Any:
    """Undoes :func:`take_apart`."""
    if kind == "tensor":
        return parts[0]
    if kind == "packed":
        return PackedSequence(*parts)
    if kind == "nothing":
        return None
    if kind.startswith(_ROUTED):
        states, experts = parts
        return Routed(states, experts, kind.removeprefix(_ROUTED))
    if kind.startswith(PLACED):
        return part_from(parts, kind)
    if kind.startswith("jagged "):
        values, offsets, *lengths = parts
        dim = int(kind.removeprefix("jagged "))
        return jagged(values, offsets, lengths[0] if lengths else None, dim)
    return Unobservable(kind)


# The compiler is to leave outputs in the layout that it would choose without us, and out of captured CUDA
# graphs.
TAGS = tuple(
    getattr(torch.Tag, name) for name in ("flexible_layout", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


@untraced
def _see(parts: list[Tensor], ticket: Tensor, number: Tensor, kind: str) -> None:
    observer: SeesCompiled | None = observer_of(number)
    if observer is not None:
        observer.see_compiled(parts, kind)


def _see_nothing(parts: list[Tensor], ticket: Tensor, number: Tensor, kind: str) -> None:
    """Stands in for the operation where a graph is made."""


def _see_no_batch(info: Any, in_dims: Any, *arguments: Any) -> tuple[None, None]:
    return None, None  # values that stand for others are no observations


# `torch.library.custom_op` would wrap it in Python for autograd, versions and aliases, which takes 9 times as
# long as the call: here nothing has a gradient, nothing is changed and nothing comes back.
_LIBRARY = torch.library.Library("spectralmetrics", "FRAGMENT")
_NAME = "see"
while hasattr(torch.ops.spectralmetrics, _NAME):  # a notebook that has loaded the package anew has two copies
    _NAME += "_"
_LIBRARY.define(f"{_NAME}(Tensor[] parts, Tensor(a!) ticket, Tensor number, str kind) -> ()", tags=TAGS)
_LIBRARY.impl(_NAME, _see, "CompositeExplicitAutograd")
torch.library.register_fake(f"spectralmetrics::{_NAME}", _see_nothing, lib=_LIBRARY)
torch.library.register_vmap(f"spectralmetrics::{_NAME}", _see_no_batch, lib=_LIBRARY)

see: Callable[[list[Tensor], Tensor, Tensor, str], None] = getattr(torch.ops.spectralmetrics, _NAME).default
"""Shows an observer what :func:`take_apart` has returned; compilers do not look inside."""
