"""Observers of gradients in autograd's graph: hooks in eager code, operations in compiled code.

Eager code gets a hook on the output and one on the tensor of which it is a view: an operation that changes a
view in place gives the view another place in the graph, and hooks on the view are never called. Compiled code
gets a copy of the output, whose backward is one opaque operation; the compiler merges the copy into the next
operation.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.probing.outputs import TAGS, observer_of
from spectralmetrics.torch_private import Version, untraced, without_modes

_CHANGED_INPUT = "its output is a view of its input, and what comes behind the layer changes it in place"


class Form(NamedTuple):
    """The change of a gradient into the form of the output.

    Attributes:
        stride: the stride of the output, if its layout was guessed; None if the layout is known.
        packing: the fields of a packed sequence besides its data; None for anything else.
        region: the output's region in the tensor whose gradient arrives; None if this tensor is the output.
    """

    stride: tuple[int, ...] | None = None
    packing: tuple[Any, ...] | None = None
    region: Region | None = None

    def of(self, gradient: Tensor) -> Any:
        """The gradient in the form in which the layer returned its output."""
        values = gradient if self.region is None else self.region.of(gradient)
        if self.stride is not None:
            values = _with_stride(values, values.shape, self.stride)
        return values if self.packing is None else PackedSequence(values, *self.packing)


class Region(NamedTuple):
    """The part of a tensor that a view covers.

    Attributes:
        view: size, stride and offset of the view.
        base: size and stride of the tensor.
    """

    view: tuple[Any, Any, Any]
    base: tuple[Any, Any]

    @classmethod
    def of_view(cls, values: Tensor, base: Tensor) -> Region:
        """The region of a view in its base."""
        offset = values.storage_offset() - base.storage_offset()
        return cls((values.size(), values.stride(), offset), (base.size(), base.stride()))

    def of(self, gradient: Tensor) -> Tensor:
        """The part of the base's gradient, in any layout."""
        size, stride, offset = self.view
        gradient = _with_stride(gradient, *self.base)
        return gradient.as_strided(size, stride, gradient.storage_offset() + offset)


def _with_stride(values: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return values if values.stride() == stride else values.new_empty_strided(size, stride).copy_(values)


class Arrival:
    """A hook on the output of one forward; passes gradients to the router while the hook on the layer exists.

    Autograd's graph keeps it alive; it keeps neither the model nor the probe alive.
    """

    __torch_unserializable__ = True  # or PyTorch would warn where the output is saved

    def __init__(self, hook: weakref.ref[Any], awaited: Any, form: Form) -> None:
        self._hook = hook
        self._awaited = awaited
        self.form = form
        self.has_come = False

    @untraced  # compiled autograd would trace it
    def __call__(self, gradient: Tensor | None) -> None:
        """See ``torch.Tensor.register_hook``; None if the backward has no gradient for this tensor."""
        if gradient is None:
            return
        self.has_come = True
        self.show(gradient, self.form)

    def show(self, gradient: Tensor, form: Form, why: str = "") -> None:
        """Pass a gradient to the router, see :meth:`.GradientRouter.arrive`."""
        hook = self._hook()
        router = None if hook is None else hook.router
        if router is not None:
            router.arrive(self._awaited, gradient, form, why)


class BaseArrival:
    """A hook on the base of an output that is a view, for outputs that are changed in place behind the layer.

    No gradient arrives at such a view; the gradient of the unchanged output is part of the base's gradient.
    """

    __torch_unserializable__ = True

    def __init__(self, values: Tensor, base: Tensor, arrival: Arrival, *, is_input: bool) -> None:
        self._arrival = arrival
        self._form = arrival.form._replace(region=Region.of_view(values, base))
        self._version = Version(values)
        self._why = _CHANGED_INPUT if is_input else ""  # an input's gradient has other summands

    @untraced  # compiled autograd would trace it
    def __call__(self, gradient: Tensor | None) -> None:
        """See ``torch.Tensor.register_hook``."""
        # Autograd finishes a view before it comes to the base.
        if gradient is not None and not self._arrival.has_come and self._version.has_changed():
            self._arrival.show(gradient, self._form, self._why)


_TOKENS = itertools.count()


# Neither this operation nor the next changes the ticket that `see` changes: autograd would keep it for backward
# and refuse it once another forward has changed it. Compilers never merge two empty tensors, and so no two
# tokens; they do not remove a token, since it is used.
@torch.library.custom_op("spectralmetrics::gradient_token", mutates_args=(), tags=TAGS)
def gradient_token(empty: Tensor) -> Tensor:
    """A unique number for the gradient of one forward; opaque to compilers."""
    with without_modes(), torch.inference_mode(False):
        return torch.tensor(next(_TOKENS), device="cpu")


@gradient_token.register_fake
def _(empty: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@gradient_token.register_vmap
def _(info: Any, in_dims: Any, empty: Tensor) -> tuple[Tensor, None]:
    return torch.full((), -1, device="cpu"), None  # values under vmap are no observations


@torch.library.custom_op("spectralmetrics::see_gradient", mutates_args=(), tags=TAGS)
def see_gradient(gradient: Tensor, token: Tensor, number: Tensor) -> Tensor:
    """A copy of a gradient, which is passed to a hook; opaque to compilers."""
    hook = observer_of(number)
    if hook is not None:
        hook.arrive_compiled(gradient, token)
    return gradient.clone()


@see_gradient.register_fake
def _(gradient: Tensor, token: Tensor, number: Tensor) -> Tensor:
    return gradient.clone()


@see_gradient.register_vmap
def _(info: Any, in_dims: Any, gradient: Tensor, token: Tensor, number: Tensor) -> tuple[Tensor, Any]:
    return gradient.clone(), in_dims[0]


class Through(torch.autograd.Function):
    """A copy of an output, so that the output itself stays as it is if the copy is changed in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, token: Tensor, number: Tensor) -> Tensor:
        """See ``torch.autograd.Function``."""
        ctx.save_for_backward(token, number)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """See ``torch.autograd.Function``."""
        return see_gradient(gradient, *ctx.saved_tensors), None, None


def tensors_in(nest: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts; Dynamo traces this."""
    if isinstance(nest, Tensor):
        return [nest]
    parts: Any = ()
    if isinstance(nest, Mapping):
        parts = nest.values()
    elif isinstance(nest, (tuple, list)):
        parts = nest
    return [each for part in parts for each in tensors_in(part)]


def holds(nest: Any, values: Tensor) -> bool:
    """True if :func:`replaced` finds a tensor in a nest; Dynamo traces this."""
    if nest is values:
        return True
    if type(nest) in (tuple, list) or (isinstance(nest, tuple) and hasattr(nest, "_make")):
        return any(holds(part, values) for part in nest)
    return type(nest) is dict and any(holds(part, values) for part in nest.values())


def replaced(nest: Any, values: Tensor, other: Tensor) -> Any:
    """A nest in which another tensor replaces ``values``; Dynamo traces this."""
    if nest is values:
        return other
    if type(nest) is dict:
        return {key: replaced(part, values, other) for key, part in nest.items()}
    if isinstance(nest, (tuple, list)):
        parts = [replaced(part, values, other) for part in nest]
        if hasattr(nest, "_make"):
            return nest._make(parts)
        return tuple(parts) if isinstance(nest, tuple) else parts
    return nest
