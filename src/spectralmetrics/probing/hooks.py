"""Hooks that see every output of a layer and change nothing: eager, compiled, copied, pickled or traced.

In a compiled model the hook is one opaque operation, which the compiler calls at every run and looks into at
none: the graph is the user's own and this.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.probing.compilation import (
    TICKET,
    Unobservable,
    number_of,
    put_together,
    see,
    take_apart,
)
from spectralmetrics.probing.copies import Handles, OwnHook, leave_out_of_copies, take_off
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.sums import no_autocast
from spectralmetrics.torch_private import (
    heed_hooks,
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

Select = Callable[..., Any]
Observe = Callable[[nn.Module, Any, bool, Select | None], None]
"""Takes a module, its output, its training flag, and what the output has yet to go through."""

_SELECTED = "selected "  # begins the kind of an output of which a function of the user's has returned a part

_WITHOUT_GRADIENTS = "no grad "  # begins it where gradients are off


class Hooks:
    """The hooks of one owner on any number of modules; gone together, at the latest with the owner.

    No copy of a module has them, and a copy of these has none.

    Args:
        owner: what they are for; kept alive by none of them if what they call is :class:`Weakly`.
        model: the model whose layers they are on; not kept alive.
    """

    def __init__(self, owner: Any, model: nn.Module | None = None) -> None:
        self._handles: Handles = []
        self._model = None if model is None else weakref.ref(model)
        finalizer = weakref.finalize(owner, take_off, self._handles)
        finalizer.atexit = False  # at the end of the program there is nothing left to clean
        heed_hooks()

    def before(
        self, module: nn.Module, observe: Observe, select: Select | None = None, *, looks: bool = False
    ) -> None:
        """Have it told that a forward of a module begins, or, if it looks, be shown the arguments."""
        hook = Entering(module, Observer(module, observe, select, looks=looks))
        self._note(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def behind(
        self,
        module: nn.Module,
        observe: Observe,
        select: Select | None = None,
        *,
        looks: bool = True,
        always_call: bool = False,
        prepend: bool = False,
    ) -> None:
        """Have it shown what a module has put out, see :class:`Observer`.

        ``always_call`` and ``prepend`` are those of ``torch.nn.Module.register_forward_hook``.
        """
        hook = Observer(module, observe, select, looks=looks)
        self._note(module, module.register_forward_hook(hook, always_call=always_call, prepend=prepend))

    def put(self, module: nn.Module, hook: Any, *, prepend: bool = False) -> None:
        """Put a hook behind a module, an :class:`OwnHook` that is called with its arguments by name, too."""
        self._note(module, module.register_forward_hook(hook, with_kwargs=True, prepend=prepend))

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are on, if it is there."""
        return None if self._model is None else self._model()

    def take_off(self) -> None:
        """Remove them all, and leave nothing of ours on the modules."""
        take_off(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": [], "_model": None}

    def _note(self, module: nn.Module, handle: Any) -> None:
        renumber(handle)
        self._handles.append((weakref.ref(module), handle))
        leave_out_of_copies(module)


class Weakly:
    """Calls a bound method, with these arguments before its others, as long as its object is there."""

    def __init__(self, method: Any, *arguments: Any) -> None:
        self._owner = weakref.ref(method.__self__)
        self._function = method.__func__
        self._arguments = arguments

    def __call__(self, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """See :data:`Observe`."""
        owner = self._owner()
        if owner is None:
            return
        if len(self._arguments) == 1:  # without unpacking, which takes longer than all else here
            self._function(owner, self._arguments[0], module, output, training, select)
        else:
            self._function(owner, *self._arguments, module, output, training, select)


class Observer(OwnHook):
    """A forward hook of one module.

    Args:
        module: the module that it will be put on.
        observe: see :data:`Observe`.
        select: function of the output; None takes the first floating tensor.
        looks: False for a hook that is content to know that the module ran; a compiled one then gets no output.
    """

    def __init__(
        self, module: nn.Module, observe: Observe, select: Select | None = None, *, looks: bool = True
    ) -> None:
        self._module = weakref.ref(module)
        self._observe = observe
        self._select = select
        self._looks = looks
        self._number = number_of(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """See ``torch.nn.Module.register_forward_hook``."""
        if not torch.compiler.is_compiling():
            self._observe(module, output, module.training, self._select)
        elif not is_exporting():
            # Nothing else of the module or of us is looked at here: the graph would be guarded by it.
            # By the mode it is guarded in any case; while it runs, autograd works on what was traced, and the
            # mode does not tell any more.
            mode = "" if torch.is_grad_enabled() else _WITHOUT_GRADIENTS
            if not self._looks:
                see([], TICKET, self._number, mode + "nothing")
                return
            if self._select is None or isinstance(output, Tensor):
                parts, kind = take_apart(output)
            else:
                parts, kind = take_apart(self._select(output))
                kind = _SELECTED + kind
            see(parts, TICKET, self._number, mode + kind)

    def __reduce__(self) -> tuple[Any, ...]:
        # For the few classes that copy themselves, see `copies`: a function of the standard library that takes
        # any three arguments and does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")

    def see_compiled(self, parts: list[Tensor], kind: str) -> None:
        """Pass on what a compiled module has put out, as :func:`take_apart` has taken it apart."""
        module = self._module()
        has_gradients = not kind.startswith(_WITHOUT_GRADIENTS)
        kind = kind.removeprefix(_WITHOUT_GRADIENTS)
        if module is not None:
            select = None if kind.startswith(_SELECTED) else self._select
            try:
                output = put_together(parts, kind.removeprefix(_SELECTED))
            except Exception as error:  # nothing that happens here may end a forward
                output = Unobservable(f"{type(error).__name__}: {error}")
            with torch.set_grad_enabled(has_gradients):
                self._observe(module, output, module.training, select)


class Entering(OwnHook):
    """A forward pre-hook of one module, which shows an observer the arguments in the order of its signature.

    Args:
        module: the module that it will be put on.
        observer: one that has been put on the module's forward nowhere.
    """

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


# Where Dynamo does not look into the hooks, as behind its graph breaks, they run as in eager code.
skip_frames(Observer.__call__.__code__)
skip_frames(Entering.__call__.__code__)


def tell(message: str) -> None:
    """Warn, or log where warnings are errors: what is told from a forward must not end it."""
    try:
        warnings.warn(message, UserWarning, stacklevel=4)
    except UserWarning:
        _logger.warning(message)


def how_it_runs(output: Any) -> Literal["run", "transformed", "traced"]:
    """Tells a model that is run from one that is transformed by ``torch.func``, traced or planned."""
    if type(output) is Tensor:
        values = output
    else:
        if isinstance(output, torch.fx.Proxy):
            return "traced"
        found = first_tensor(output)
        if found is None:
            return "traced" if is_tracing() else "run"
        values = found.data if isinstance(found, PackedSequence) else found
    if is_tracing():
        return "traced"
    if is_transformed(values):
        return "transformed"
    return "traced" if is_fake(values) or is_inferring_shapes() else "run"


class undisturbed:  # noqa: N801  # used like the contexts of contextlib, and a class because it is entered often
    """No autograd, no inference mode, no autocast inside, and nobody listening to what is computed there.

    Args:
        output: the output of the layer that is observed.

    >>> with torch.inference_mode(), undisturbed(torch.zeros(1)):
    ...     torch.zeros(1).is_inference()
    False
    """

    def __init__(self, output: Any) -> None:
        device = output.device.type if isinstance(output, Tensor) and not output.is_cpu else "cpu"
        self._device = device if device == "cpu" or torch.amp.is_autocast_available(device) else "cpu"
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self._had_grad = torch.is_grad_enabled()
        modes = num_modes()
        is_cast = torch.is_autocast_enabled(self._device)
        if modes or is_cast or torch.is_inference_mode_enabled():
            self._stack = contextlib.ExitStack()
            if modes:
                # Selective checkpointing records every operation of the forward, to replay it in backward.
                self._stack.enter_context(without_modes())
            self._stack.enter_context(torch.inference_mode(False))
            self._stack.enter_context(no_autocast(self._device))
        set_grad_enabled(False)

    def __exit__(self, *exception: object) -> None:
        set_grad_enabled(self._had_grad)
        if self._stack is not None:
            self._stack.close()
