"""Forward hooks that prepare the observation of gradients of outputs: eager, compiled, of DTensors."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from spectralmetrics.probing.copies import OwnHook
from spectralmetrics.probing.gradient_graph import Form, Through, gradient_token, holds, replaced, tensors_in
from spectralmetrics.probing.gradients import COMPUTED, UNKNOWN, Awaited, GradientRouter
from spectralmetrics.probing.hooks import Select
from spectralmetrics.probing.outputs import TICKET, Unobservable, first_tensor, number_of, see
from spectralmetrics.probing.parts import is_dtensor
from spectralmetrics.torch_private import base_of_view, is_exporting, is_known, skip_frames

_IS_INPUT = "a compiled layer that returns its input, or a view of it, has no gradient of its own to observe"
_NOT_REPLACED = "gradients of a compiled layer whose output is a {} are not observed"
_NO_GRADIENT = "no gradient"

_Held: TypeAlias = list[tuple[weakref.ref[Tensor], RemovableHandle]]


def _let_go(held: _Held) -> None:
    for _, handle in held:
        handle.remove()


class GradientHook(OwnHook):
    """A forward hook of one module for a :class:`GradientRouter`; it also gets arguments that go by name.

    Args:
        router: the router; not kept alive.
        layer: name of the module.
        module: the module that gets this hook.
        select: function of the output; None takes the first floating tensor.
        first: the first hook of the module, which watches outputs that are DTensors.
    """

    def __init__(
        self,
        router: GradientRouter,
        layer: str,
        module: nn.Module,
        select: Select | None = None,
        *,
        first: FirstGradientHook | None = None,
    ) -> None:
        self._first = first
        if first is not None:
            first.last = weakref.ref(self)
        self._router = weakref.ref(router)
        self._layer = layer
        self._module = weakref.ref(module)
        self._select = select
        self._number = number_of(self)
        self._pending: dict[int, Awaited | None] = {}  # token -> its compiled forward, while the graph exists
        self._latest: Awaited | None = None
        self._held: _Held = []
        weakref.finalize(self, _let_go, self._held).atexit = False

    @property
    def router(self) -> GradientRouter | None:
        """The router; None if it is gone."""
        return self._router()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """See ``torch.nn.Module.register_forward_hook``; eager outputs stay as they are."""
        if not torch.compiler.is_compiling():
            if self._first is None or not self._first.has_watched():
                self.watch(module, (args, kwargs), output)
        elif not is_exporting():
            return self._trace((args, kwargs), output)
        return None

    def hold(self, leaf: Tensor, handle: RemovableHandle) -> None:
        """Remove an earlier hook from an output that is a leaf and outlives its forwards, like a parameter."""
        before, self._held[:] = list(self._held), [(weakref.ref(leaf), handle)]
        for each, earlier in before:
            if each() is leaf:
                earlier.remove()
            elif each() is not None:
                self._held.append((each, earlier))

    def watch(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Prepare the observation of the gradients of an eager output."""
        router = self._router()
        if router is None:
            return
        awaited = router.expect(self._layer, module, output, module.training)
        if awaited is not None and awaited is not UNKNOWN and torch.is_grad_enabled():
            where = awaited.stage, awaited.layer, output, False
            router.guard(*where, router.attach, awaited, module, output, self._select, arguments, self)

    def _trace(self, arguments: Any, output: Any) -> Any:
        """The part that Dynamo traces; see :meth:`.Observer.__call__`."""
        values = first_tensor(output if self._select is None else self._select(output))
        why = ""
        if values is None or isinstance(values, PackedSequence):
            why = _NOT_REPLACED.format(type(output).__name__)
        elif not is_known(values) or values.is_nested:
            why = f"gradients of a compiled layer whose output is a {type(values).__name__} cannot be observed"
        elif not (torch.is_grad_enabled() and values.requires_grad):
            see([], TICKET, self._number, _NO_GRADIENT)
            return None
        else:
            base = base_of_view(values)
            for each in tensors_in(arguments):
                if values is each or (base is not None and (base is each or base is base_of_view(each))):
                    why = _IS_INPUT
            if not why and not holds(output, values):
                why = COMPUTED if self._select is not None else _NOT_REPLACED.format(type(output).__name__)
        if why or not isinstance(values, Tensor):
            see([], TICKET, self._number, why)
            return None
        token = gradient_token(torch.empty(0, device="cpu"))
        see([token], TICKET, self._number, "")
        # Dynamo warns about its own handling of autograd functions, which would end the forward where warnings
        # are errors. It evaluates this context while it traces; the graph does not contain it.
        with warnings.catch_warnings(action="ignore"):
            through: Tensor = Through.apply(values, token, self._number)  # type: ignore[no-untyped-call]
        return replaced(output, values, through)

    def see_compiled(self, parts: list[Tensor], kind: str) -> None:
        """Register a compiled forward; its gradient will arrive with the token in ``parts``."""
        router, module = self._router(), self._module()
        if router is None or module is None:
            return
        output = Unobservable(kind) if kind and kind != _NO_GRADIENT else None
        with torch.set_grad_enabled(kind != _NO_GRADIENT):
            awaited = router.expect(self._layer, module, output, module.training)
        if kind == _NO_GRADIENT or awaited is UNKNOWN:
            return
        self._latest = awaited
        for token in parts:
            number = int(token)
            self._pending[number] = awaited
            weakref.finalize(token, self._pending.pop, number, None).atexit = False

    def arrive_compiled(self, gradient: Tensor, token: Tensor) -> None:
        """Pass the gradient of a compiled forward to the router."""
        # A checkpoint that is compiled with the model makes another token in backward: the last forward counts.
        router, awaited = self._router(), self._pending.get(int(token), self._latest)
        if router is not None and awaited is not None:
            router.arrive(awaited, gradient, Form())


class FirstGradientHook(OwnHook):
    """The first forward hook of a module whose weights are DTensors; it sees outputs that are DTensors.

    Later hooks may replace such an output by this process' part.
    """

    def __init__(self) -> None:
        self._is_seen = False
        self.last: weakref.ref[GradientHook] | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """See ``torch.nn.Module.register_forward_hook``; while Dynamo traces, only the last hook works."""
        if torch.compiler.is_compiling():
            return
        last = None if self.last is None else self.last()
        self._is_seen = last is not None and is_dtensor(first_tensor(output))
        if last is not None and self._is_seen:
            last.watch(module, (args, kwargs), output)

    def has_watched(self) -> bool:
        """True if this hook has watched the output of the current forward; the call clears it."""
        is_seen, self._is_seen = self._is_seen, False
        return is_seen


skip_frames(GradientHook.__call__.__code__)
skip_frames(FirstGradientHook.__call__.__code__)
