"""Hooks that see every output of a layer and change nothing: eager, compiled, copied, pickled or traced.

In a compiled model the hook is one opaque operation, which runs at every call and is never traced: the graph is
the user's own plus this operation.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.probing.copies import Handles, OwnHook, leave_out_of_copies, take_off
from spectralmetrics.probing.outputs import (
    TICKET,
    Unobservable,
    first_tensor,
    number_of,
    put_together,
    see,
    take_apart,
)
from spectralmetrics.probing.parts import Part, dtensors_of, is_dtensor
from spectralmetrics.sums import no_autocast
from spectralmetrics.torch_private import (
    heed_hooks,
    is_autocast_anywhere,
    is_exporting,
    is_fake,
    is_inferring_shapes,
    is_tracing,
    is_transformed,
    num_modes,
    renumber,
    set_grad_enabled,
    skip_frames,
    without_modes,
)

_logger = logging.getLogger("spectralmetrics")

# Packages whose frames lie between a warning and the user's line.
_BETWEEN = {
    "accelerate",
    "contextlib",
    "functools",
    "lightning",
    "pytorch_lightning",
    "spectralmetrics",
    "torch",
    "torchmetrics",
    "transformers",
}

Select = Callable[..., Any]
Observe = Callable[[nn.Module, Any, bool, Select | None], None]
"""Takes a module, its output, its training flag, and a function that is still to be applied to the output."""

HOOKS_IGNORED = (
    "torch._dynamo.config.skip_nnmodule_hook_guards has been set to True, so that a compiled model ignores"
    " hooks: set it to False and call torch.compiler.reset()"
)
"""The reason why no hook was called, where PyTorch is set so."""

_SELECTED = "selected "  # prefix of the kind of an output that a user's function has returned

_WITHOUT_GRADIENTS = "no grad "  # prefix of the kind where gradients are off


class Hooks:
    """The hooks of one owner on any number of modules; removed together, at the latest with the owner.

    Copies of a module do not have these hooks, and a copy of this object has no hooks.

    Args:
        owner: the object that uses the hooks; they do not keep it alive if they call :func:`weakly` only.
        model: the model whose layers they are on; not kept alive.
    """

    def __init__(self, owner: Any, model: nn.Module | None = None) -> None:
        self._handles: Handles = []
        self._model = None if model is None else weakref.ref(model)
        finalizer = weakref.finalize(owner, take_off, self._handles)
        finalizer.atexit = False  # at the end of the program there is nothing left to clean
        heed_hooks()

    def before(
        self, module: nn.Module, observe: Observe, select: Select | None = None, *, needs_values: bool = False
    ) -> None:
        """Call ``observe`` before each forward of a module; with the arguments if ``needs_values`` is True."""
        hook = Entering(module, Observer(module, observe, select, needs_values=needs_values))
        self._note(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def behind(
        self,
        module: nn.Module,
        observe: Observe,
        select: Select | None = None,
        *,
        needs_values: bool = True,
        always_call: bool = False,
        prepend: bool = False,
    ) -> None:
        """Call ``observe`` with each output of a module, see :class:`Observer`.

        For ``always_call`` and ``prepend`` see ``torch.nn.Module.register_forward_hook``.
        """
        hook = Observer(module, observe, select, needs_values=needs_values)
        self._note(module, module.register_forward_hook(hook, always_call=always_call, prepend=prepend))

    def put(self, module: nn.Module, hook: Any, *, prepend: bool = False) -> None:
        """Put an :class:`OwnHook` behind a module; it also gets the arguments that were passed by name."""
        self._note(module, module.register_forward_hook(hook, with_kwargs=True, prepend=prepend))

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are on; None if it is gone."""
        return None if self._model is None else self._model()

    def take_off(self) -> None:
        """Remove all hooks, and everything else of ours from the modules."""
        take_off(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": [], "_model": None}

    def _note(self, module: nn.Module, handle: Any) -> None:
        renumber(handle)
        self._handles.append((weakref.ref(module), handle))
        leave_out_of_copies(module)


class weakly:  # noqa: N801  # used like functools.partial
    """Calls a bound method, with ``where`` in front, as long as the method's object exists."""

    def __init__(self, method: Any, where: Any) -> None:
        self.owner_of, self.function, self.where = weakref.ref(method.__self__), method.__func__, where

    def __call__(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """See :data:`Observe`."""
        owner = self.owner_of()
        if owner is not None:
            self.function(owner, self.where, module, output, training, select)


class Observer(OwnHook):
    """A forward hook of one module.

    Args:
        module: the module that it will be put on.
        observe: see :data:`Observe`.
        select: function of the output; None takes the first floating tensor.
        needs_values: False for a hook that needs no output; compiled code then passes none.
    """

    def __init__(
        self, module: nn.Module, observe: Observe, select: Select | None = None, *, needs_values: bool = True
    ) -> None:
        self._module = weakref.ref(module)
        self._observe = observe
        self._owner_of, self._function, self._where = _parts_of(observe)
        self._select = select
        self._needs_values = needs_values
        self._number = number_of(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """See ``torch.nn.Module.register_forward_hook``."""
        if not torch.compiler.is_compiling():
            owner = self._owner_of()
            if owner is not None:
                self._function(owner, self._where, module, output, module.training, self._select)
        elif not is_exporting():
            # Nothing else of the module or of the hook is read here: each value would become a guard of the
            # graph. The gradient mode is a guard anyway. It must be read here: while the compiled graph runs,
            # the mode is another one.
            mode = "" if torch.is_grad_enabled() else _WITHOUT_GRADIENTS
            if not self._needs_values:
                see([], TICKET, self._number, mode + "nothing")
                return
            if self._select is None or isinstance(output, Tensor):
                parts, kind = take_apart(output)
            else:
                parts, kind = take_apart(self._select(output))
                kind = _SELECTED + kind
            see(parts, TICKET, self._number, mode + kind)

    def see_compiled(self, parts: list[Tensor], kind: str) -> None:
        """Pass on a compiled module's output, which :func:`take_apart` has taken apart."""
        module = self._module()
        has_gradients = not kind.startswith(_WITHOUT_GRADIENTS)
        kind = kind.removeprefix(_WITHOUT_GRADIENTS)
        if module is not None:
            select = None if kind.startswith(_SELECTED) else self._select
            try:
                output = put_together(parts, kind.removeprefix(_SELECTED))
            except Exception as error:  # no error here may end a forward
                output = Unobservable(f"{type(error).__name__}: {error}")
            with torch.set_grad_enabled(has_gradients):
                self._observe(module, output, module.training, select)


def _parts_of(observe: Observe) -> tuple[Callable[[], Any], Callable[..., Any], Any]:
    # A hook calls the function of `weakly` itself: one call less.
    if isinstance(observe, weakly):
        return observe.owner_of, observe.function, observe.where
    return lambda: observe, lambda owner, where, *arguments: observe(*arguments), None


class Entering(OwnHook):
    """A forward pre-hook of one module; passes an observer the arguments in the order of the signature."""

    def __init__(self, module: nn.Module, observer: Observer) -> None:
        self._observer = observer
        try:
            self._names = tuple(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # not written in Python
            self._names = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See ``torch.nn.Module.register_forward_pre_hook``."""
        if len(kwargs) > 1:  # in the order of the call
            kwargs = {**{name: kwargs[name] for name in self._names if name in kwargs}, **kwargs}
        self._observer(module, args, (args, kwargs))


# Where Dynamo does not trace the hooks, such as after a graph break, they run as in eager code.
skip_frames(Observer.__call__.__code__)
skip_frames(Entering.__call__.__code__)


class _FirstOrLast:
    """Passes on a layer's output as its first hook gets it if this is a DTensor, or else as its last hook does.

    Hooks after the first may replace a DTensor by this process' part of it. A plain output is passed on as the
    layer's caller gets it: hooks may have cast it.
    """

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._is_seen = False

    def first(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        self._is_seen = isinstance(output, Part) or is_dtensor(first_tensor(output))
        if self._is_seen:
            self._observe(module, output, training, select)

    def last(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        is_seen, self._is_seen = self._is_seen, False
        if not is_seen:
            self._observe(module, output, training, select)


def watch_outputs(hooks: Hooks, module: nn.Module, observe: Observe) -> None:
    """Observe a layer's outputs; if its weights are DTensors, before other hooks make outputs plain."""
    if dtensors_of(module):
        either = _FirstOrLast(observe)
        hooks.behind(module, either.first, prepend=True)
        hooks.behind(module, either.last)
    else:
        hooks.behind(module, observe)


def warn_user(message: str) -> None:
    """Warn, or log where warnings are errors: a warning in a forward must not end it."""
    try:
        warnings.warn(message, UserWarning, stacklevel=level_of_user())
    except UserWarning:
        _logger.warning(message)


def level_of_user() -> int:
    """The ``stacklevel`` with which a warning of the calling function points at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    return level


def how_it_runs(output: Any) -> Literal["run", "transformed", "traced"]:
    """Distinguishes a model that runs from one that is transformed by ``torch.func``, traced or planned."""
    if isinstance(output, torch.fx.Proxy):
        return "traced"
    first = output if type(output) is Tensor else first_tensor(output)
    if is_tracing():
        return "traced"
    if first is None:
        return "run"
    values = first.data if isinstance(first, PackedSequence) else first
    if is_transformed(values):
        return "transformed"
    return "traced" if is_fake(values) or is_inferring_shapes() else "run"


def runs(output: Tensor) -> bool:
    """True if :func:`how_it_runs` is ``"run"``, in few steps, for an output of no subclass."""
    return not (is_tracing() or is_transformed(output) or output.is_meta or is_inferring_shapes())


class undisturbed:  # noqa: N801  # used like the contexts of contextlib, and a class because it is entered often
    """Switches off autograd, inference mode, autocast and all modes that record operations, for an output.

    >>> with torch.inference_mode(), undisturbed(torch.zeros(1)):
    ...     torch.zeros(1).is_inference()
    False
    """

    def __init__(self, output: Any) -> None:
        self._output = output
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self._had_grad = torch.is_grad_enabled()
        if num_modes() or is_autocast_anywhere() or torch.is_inference_mode_enabled():
            self._stack = contextlib.ExitStack()
            self._switch_off(self._stack)
        set_grad_enabled(False)

    def _switch_off(self, stack: contextlib.ExitStack) -> None:
        if num_modes():
            # Selective checkpointing records every operation of the forward, to replay it in backward.
            stack.enter_context(without_modes())
        stack.enter_context(torch.inference_mode(False))
        device = self._output.device.type if isinstance(self._output, Tensor) else "cpu"
        stack.enter_context(no_autocast(device if torch.amp.is_autocast_available(device) else "cpu"))

    def __exit__(self, *exception: object) -> None:
        set_grad_enabled(self._had_grad)
        if self._stack is not None:
            self._stack.close()
