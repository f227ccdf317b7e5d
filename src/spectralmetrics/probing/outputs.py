"""Tensors in layers' outputs and in experts' arguments, and the operation that passes them on in compiled code.

Dynamo puts the operation, which is opaque, into the user's graph. The probe adds no guard but its presence: the
number of the observer is a tensor, an input of the graph like a weight.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from spectralmetrics.probing.parts import PLACED, part_from, take_dtensor_apart
from spectralmetrics.torch_private import is_known, jagged, jagged_dim, untraced, without_modes

# The operation is declared to change this tensor, so that compilers never drop, repeat or reorder it.
TICKET = torch.zeros((), dtype=torch.int64, device="cpu").add_(0)

_ROUTED = "routed "  # prefix of the kind of a mixture's arguments


def first_tensor(output: Any) -> Tensor | PackedSequence | None:
    """The first floating tensor in a nest of tuples, lists, mappings and dataclasses; None if there is none.

    >>> first_tensor({"ids": torch.zeros(2, dtype=torch.int64), "hidden": (torch.ones(3),)})
    tensor([1., 1., 1.])
    """
    return _first_tensor(output, ())


def not_floating(output: Any) -> str:
    """The error message for an output without a floating tensor.

    >>> not_floating(torch.zeros(2, dtype=torch.int64))
    'expected a floating tensor in the output, got a Tensor of torch.int64'
    """
    got = f"a Tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
    return f"expected a floating tensor in the output, got {got}"


def _first_tensor(output: Any, inside: tuple[Any, ...]) -> Tensor | PackedSequence | None:
    if output is None:  # Dynamo of torch 2.8 cannot read the class of None
        return None
    if isinstance(output, Tensor):
        # A method of an unknown subclass may break the graph that is traced.
        is_unknown = torch.compiler.is_compiling() and not is_known(output)
        return output if is_unknown or output.is_floating_point() else None
    if isinstance(output, PackedSequence):  # itself a tuple
        return output if output.data.is_floating_point() else None
    # Dynamo cannot compare tuples by identity, which would break the graph.
    if not torch.compiler.is_compiling() and any(output is outer for outer in inside):
        return None  # a nest that holds itself
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name, None) for field in dataclasses.fields(output))
    inside = (*inside, output)
    for part in parts:
        first = _first_tensor(part, inside)
        if first is not None:
            return first
    return None


def padded_nested(nested: Tensor) -> tuple[Tensor, Tensor, int]:
    """The samples of a nested tensor, padded with zeros; (N, T) flags, False for padding; the ragged dimension.

    Raises:
        ValueError: for samples without features, or of other sizes in more than one dimension.
    """
    parts = list(nested.unbind())
    shapes = [tuple(part.shape) for part in parts]
    if nested.layout == torch.jagged:
        ragged = jagged_dim(nested)
    else:
        differing = [dim for dim, sizes in enumerate(zip(*shapes, strict=True), 1) if len({*sizes}) > 1]
        if len(differing) > 1:
            raise ValueError(
                f"expected samples of a nested output to differ in one dimension, got shapes {shapes[:3]}"
            )
        ragged = differing[0] if differing else 1
    if nested.ndim < 3:
        raise ValueError(
            f"expected a nested output with features, (N, T*, D), got samples of shapes {shapes[:3]}"
        )
    padded = pad_sequence([part.movedim(ragged - 1, 0) for part in parts], batch_first=True)  # (N, T, …)
    lengths = torch.tensor([shape[ragged - 1] for shape in shapes], device="cpu")
    return padded.movedim(1, ragged), up_to(lengths, padded), ragged


def up_to(lengths: Tensor, padded: Tensor) -> Tensor:
    """(N, T) boolean, True for the first steps of each sequence."""
    steps = torch.arange(padded.shape[1], device=lengths.device)
    return (steps < lengths[:, None]).to(padded.device)


class Routed(NamedTuple):
    """The arguments of a module of experts.

    Attributes:
        states: (T, D), the tokens.
        experts: (T, k), the experts of each token.
        cast: name of the dtype that autocast computes in; empty without it.
    """

    states: Tensor
    experts: Tensor
    cast: str


class Choose:
    """Selects tokens and their experts from the arguments of a module's forward; traced by Dynamo."""

    def __init__(self, module: nn.Module) -> None:
        self._names = arguments_of(module)[:2]
        accelerator = torch.accelerator.current_accelerator()
        devices = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
        # Read here, since Dynamo of torch 2.8 cannot trace this call.
        self._casting = tuple(each for each in devices if torch.amp.is_autocast_available(each))

    def __call__(self, arguments: Any) -> Routed:
        """The tokens and experts of a call."""
        args, kwargs = arguments
        states, index = (
            args[place] if place < len(args) else kwargs[name] for place, name in enumerate(self._names)
        )
        device = states.device.type
        is_cast = device in self._casting and torch.is_autocast_enabled(device)
        return Routed(
            states, index, str(torch.get_autocast_dtype(device)).removeprefix("torch.") if is_cast else ""
        )


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, as its type defines them."""
    try:
        return tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):  # not written in Python
        return ()


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
    observer = observer_of(number)
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
