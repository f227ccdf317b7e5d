"""Passes a compiled layer's output to its observer: plain tensors go through one opaque operation.

Dynamo puts the operation into the user's graph. The probe adds no guard but its presence: the number of the
observer is a tensor, an input of the graph like a weight.
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

# The operation is declared to change this tensor, so that compilers never drop, repeat or reorder it.
TICKET = torch.zeros((), dtype=torch.int64, device="cpu").add_(0)


_ROUTED = "routed "  # prefix of the kind of a mixture's arguments


class SeesCompiled(Protocol):
    """The protocol of observers that the operation calls."""

    def see_compiled(self, parts: list[Tensor], kind: str) -> None:
        """Take the result of :func:`take_apart`."""


_OBSERVERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(observer: object) -> Tensor:
    """A new number, by which the operation finds an observer as long as it exists."""
    number = next(_NUMBERS)
    _OBSERVERS[number] = observer
    # A Python number would be a constant of the graph, and each layer would need a graph of its own.
    with without_modes(), torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def observer_of(number: Tensor) -> Any:
    """The observer with that number; None if it is gone."""
    return _OBSERVERS.get(int(number))


class Unobservable:
    """Stands for an output that the operation cannot take.

    Args:
        why: reason why it cannot be observed.
    """

    def __init__(self, why: str) -> None:
        self.why = why


def take_apart(output: Any) -> tuple[list[Tensor], str]:
    """Plain tensors and a kind, from which :func:`put_together` makes an output again; traced by Dynamo."""
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
    """Undo :func:`take_apart`."""
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


# The compiler should keep the layouts that it would choose without us, and leave the operation out of captured
# CUDA graphs.
TAGS = tuple(
    getattr(torch.Tag, name) for name in ("flexible_layout", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


@untraced
def _see(parts: list[Tensor], ticket: Tensor, number: Tensor, kind: str) -> None:
    observer: SeesCompiled | None = observer_of(number)
    if observer is not None:
        observer.see_compiled(parts, kind)


def _see_nothing(parts: list[Tensor], ticket: Tensor, number: Tensor, kind: str) -> None:
    """Stands in for the operation while a graph is made."""


def _see_no_batch(info: Any, in_dims: Any, *arguments: Any) -> tuple[None, None]:
    return None, None  # under vmap a value stands for others and is no observation


# `torch.library.custom_op` would add Python wrappers for autograd, versions and aliases, which take 9 times as
# long as the call. They are not needed: nothing has a gradient, nothing is changed and nothing is returned.
_LIBRARY = torch.library.Library("spectralmetrics", "FRAGMENT")
_NAME = "see"
while hasattr(torch.ops.spectralmetrics, _NAME):  # a notebook that reloads the package has two copies
    _NAME += "_"
_LIBRARY.define(f"{_NAME}(Tensor[] parts, Tensor(a!) ticket, Tensor number, str kind) -> ()", tags=TAGS)
_LIBRARY.impl(_NAME, _see, "CompositeExplicitAutograd")
torch.library.register_fake(f"spectralmetrics::{_NAME}", _see_nothing, lib=_LIBRARY)
torch.library.register_vmap(f"spectralmetrics::{_NAME}", _see_no_batch, lib=_LIBRARY)

see: Callable[[list[Tensor], Tensor, Tensor, str], None] = getattr(torch.ops.spectralmetrics, _NAME).default
"""Passes the result of :func:`take_apart` to an observer; compilers do not trace into it."""
