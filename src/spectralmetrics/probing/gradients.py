"""Gradients with respect to layers' outputs: observed as they arrive in backward, and passed on unchanged.

In a forward, a hook (:mod:`~spectralmetrics.probing.gradient_hooks`) calls :meth:`GradientRouter.expect`, and
puts an observer into autograd's graph if the gradients are to be observed
(:mod:`~spectralmetrics.probing.gradient_graph`).
"""

from __future__ import annotations

import math
import numbers
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.probing.beside import Labels, Masks
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.gradient_graph import Arrival, BaseArrival, Form, Region, tensors_in
from spectralmetrics.probing.hooks import Select, how_it_runs
from spectralmetrics.probing.outputs import first_tensor, not_floating
from spectralmetrics.probing.parts import LeftOut, is_dtensor
from spectralmetrics.probing.routing import Router
from spectralmetrics.probing.steps import Moment
from spectralmetrics.torch_private import base_of_view, in_backward, is_many_at_once, part_of_backward

COMPUTED = "`select` returns a tensor that is no part of the layer's output: no gradient arrives there"


@dataclass(eq=False)
class Awaited:
    """A forward of a layer whose gradients are observed when they arrive.

    Attributes:
        stage: the stage of the forward.
        layer: the name of the layer.
        moment: the moment of the forward.
        is_for_inputs: True if the gradient came in a backward for inputs, before the backward for weights.
    """

    stage: str
    layer: str
    moment: Moment
    is_for_inputs: bool = False


UNKNOWN = Awaited("", "", Moment(0, {}))


class GradientRouter(Router):
    """Turns gradients into observations, see :class:`.Router`.

    Attributes:
        scale: the factor of the loss; gradients are divided by it, and it is read whenever one arrives.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks, self.labels = Masks(copies=True), Labels(copies=True)  # backward comes later
        self.scale: Any = 1.0
        self._recomputed = _Recomputed()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scale": 1.0}

    def expect(self, name: str, module: nn.Module, output: Any, training: bool) -> Awaited | None:
        """Decide, in a forward, whether to observe its gradients; an error here must not end the forward.

        Returns the awaited forward, None if its gradients are not observed, and :data:`UNKNOWN` for the second
        run of an unknown forward, such as in a checkpoint whose gradients arrive in the graph of the first run.
        An output that exists only in a compiled graph is None.
        """
        if self.thread.here.is_observing:
            return None
        if in_backward():  # a checkpoint's recomputation, whose gradients belong to the first forward
            awaited: Awaited | None = self._recomputed.recorded(name, UNKNOWN)
            if awaited is UNKNOWN:
                return UNKNOWN
        else:
            awaited = self.observe(name, module, output, training, None)
        if not torch.is_grad_enabled():
            self._recomputed.record(name, awaited)
        return awaited

    def take(
        self,
        of_layer: LayerMetrics,
        is_idle: bool,
        module: nn.Module,
        output: Any,
        select: Select | None,
        has_grad: bool,
    ) -> Awaited | None:
        """Count a forward whose gradients arrive later; see :meth:`.Core.take`."""
        moment = self.enter(of_layer, is_idle, module, output, has_grad)
        return None if moment is None else Awaited(of_layer.stage, of_layer.layer, moment)

    def attach(
        self,
        of_layer: LayerMetrics,
        is_idle: bool,
        awaited: Awaited,
        module: nn.Module,
        output: Any,
        select: Select | None,
        arguments: Any,
        hook: Any,
    ) -> None:
        """Put hooks on an output in autograd's graph; called by :meth:`.Core.guard`.

        Gradients are observed as long as the ``GradientHook`` exists.
        """
        selected = first_tensor(output if select is None else select(output))
        if selected is None:
            raise LeftOut(not_floating(output))
        values = selected.data if isinstance(selected, PackedSequence) else selected
        packing = tuple(selected)[1:] if isinstance(selected, PackedSequence) else None
        base = base_of_view(values)
        whole = values if select is None else _holding(values, base, output)
        if not whole.requires_grad:
            return
        if is_dtensor(whole):
            whole.register_hook(Arrival(weakref.ref(hook), awaited, Form()))
            return
        stride = None
        if packing is None and not values.is_nested and values.ndim:
            # Warnings about layouts, masks and labels belong to the forward, as for any output.
            batch = self.batch_of(of_layer, module, values, awaited.moment)
            stride = None if batch.guessed_dim is None else values.stride()
        region = None if whole is values else Region.of_view(values, whole)
        arrival = Arrival(weakref.ref(hook), awaited, Form(stride, packing, region))
        if whole.is_leaf:
            hook.hold(whole, whole.register_hook(arrival))
            return
        whole.register_hook(arrival)
        if whole is values and base is not None and not base.is_leaf and base.requires_grad:
            is_input = any(base is each or base is base_of_view(each) for each in tensors_in(arguments))
            base.register_hook(BaseArrival(values, base, arrival, is_input=is_input))

    def arrive(self, awaited: Awaited, gradient: Tensor, form: Form, why: str = "") -> None:
        """Observe a gradient, or leave the layer out and say why; an error here does not end a backward."""
        part = part_of_backward()
        if part == "weights" and awaited.is_for_inputs:
            return  # the same gradient again, or a summand of it
        awaited.is_for_inputs = awaited.is_for_inputs or part == "inputs"
        is_idle = bool(self.paused) or awaited.moment.is_idle or self._is_closed(awaited.layer)
        if self.thread.here.is_observing or (is_idle and not self.meshes.concerns(gradient)):
            return
        where = awaited.stage, awaited.layer, gradient, is_idle
        self.guard(*where, self._arrive, awaited, gradient, form, why)

    def _arrive(
        self, of_layer: LayerMetrics, is_idle: bool, awaited: Awaited, gradient: Tensor, form: Form, why: str
    ) -> None:
        module = self.modules[awaited.layer]()
        if module is None or how_it_runs(gradient) != "run" or is_many_at_once(gradient):
            return
        if why:
            raise LeftOut(why)
        moment, name, meshes = awaited.moment, awaited.layer, self.meshes
        is_idle = is_idle or self.limits.keeps_nothing(of_layer)
        if is_idle and not meshes.concerns(gradient):
            return
        values = form.of(unscaled(gradient.detach(), self.scale))
        if meshes.active or is_dtensor(values):
            part = meshes.part_of(name, module, values, self.layout.dims.get(name), moment.call)
            if part is not None:
                self.take_part(of_layer, module, part, moment, is_idle)
                return
        if not is_idle:
            self.take_rows(of_layer, module, values, moment)


def _holding(values: Tensor, base: Tensor | None, output: Any) -> Tensor:
    """The tensor whose gradient contains the gradient of a selected part of an output."""
    tensors = tensors_in(output)
    if any(values is each for each in tensors):
        return values
    if base is not None and any(base is each or base is base_of_view(each) for each in tensors):
        return base
    raise LeftOut(COMPUTED)


def check_scale(scale: Any) -> None:
    """Raise an error for anything but a factor of a loss."""
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not 0 < float(scale) < math.inf:
            raise ValueError(f"expected gradient_scale to be a positive number, got {scale!r}")
    elif not callable(getattr(scale, "get_scale", None)):
        raise TypeError(f"expected gradient_scale to be a number or a GradScaler, got {type(scale).__name__}")


def unscaled(gradient: Tensor, scale: Any) -> Tensor:
    """A gradient without the factor of its loss. The factor is read now: a scaler changes it between steps.

    >>> unscaled(torch.tensor([6.0, 8.0]), 2.0)
    tensor([3., 4.])
    """
    if isinstance(scale, numbers.Real) and scale == 1:
        return gradient
    if isinstance(scale, numbers.Real):
        factor: Any = float(scale)
    elif isinstance(scale, torch.amp.GradScaler):  # its factor is on a device: do not wait for it
        factor = scale.scale(torch.ones((), device=gradient.device))
    else:
        factor = scale.get_scale()
    # A gradient that was scaled to fit into half precision may not fit unscaled.
    full = gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.to(torch.float32)
    return full.div(factor)


class _Recomputed:
    """Decisions of forwards that run without gradients inside a ``torch.autograd.Function``.

    Examples are a reentrant checkpoint and a reversible network. Their backward runs the forwards again, with
    gradients, which belong to the first run. Only stack frames show which function runs.
    """

    def __init__(self) -> None:
        self._recorded: weakref.WeakKeyDictionary[Any, dict[str, deque[Any]]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # the functions that run here do not run in another process

    def record(self, layer: str, awaited: Any) -> None:
        """Store a decision for all functions whose forward this thread runs."""
        for context, is_backward in _running():
            if not is_backward:
                self._recorded.setdefault(context, {}).setdefault(layer, deque()).append(awaited)

    def recorded(self, layer: str, default: Any) -> Any:
        """The innermost running backward's next decision for a layer, in the order of the layer's calls."""
        for context, is_backward in _running():
            calls = self._recorded.get(context, {}).get(layer) if is_backward else None
            if calls:
                calls.rotate(-1)  # the graph may be kept for another backward
                return calls[-1]
        return default


def _running() -> Iterator[tuple[Any, bool]]:
    """Contexts of the autograd functions that this thread runs, innermost first, with True for a backward."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[:1] == ("ctx",) and code.co_name in ("forward", "backward"):
            context = frame.f_locals.get("ctx")
            if isinstance(context, torch.autograd.function.FunctionCtx):
                yield context, code.co_name == "backward"
        frame = frame.f_back  # type: ignore[assignment]
