"""Hooks that see every output of a layer and change nothing: eager, compiled, copied, pickled or traced.

In a compiled model the hook is one opaque operation, which the compiler calls at every run and looks into at
none: the graph is the user's own and this.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from spectralmetrics.probing.compilation import heed_hooks
from spectralmetrics.probing.copies import Handles, OwnHook, leave_out_of_copies, take_off
from spectralmetrics.probing.observations import first_tensor
from spectralmetrics.sums import no_autocast

_logger = logging.getLogger("spectralmetrics")

Select = Callable[[Any], Any]
Observe = Callable[[nn.Module, Any, bool, Select | None], None]
"""Takes a module, its output, its training flag, and what the output has yet to go through."""

# By number, which is all that an operation can be given.
_OBSERVERS: weakref.WeakValueDictionary[int, Observer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7
# The operation is said to change this one tensor, and so is never left out, done twice, or put before another.
_TICKET = torch.zeros((), dtype=torch.int64, device="cpu").add_(0)
_NOTHING = torch.zeros((), device="cpu")


class Hooks:
    """The hooks of one owner on any number of modules; gone together, at the latest with the owner.

    No copy of a module has them, and a copy of these has none.

    Args:
        owner: what they are for; kept alive by none of them if what they call is :class:`Weakly`.
    """

    def __init__(self, owner: Any) -> None:
        self._handles: Handles = []
        finalizer = weakref.finalize(owner, take_off, self._handles)
        finalizer.atexit = False  # at the end of the program there is nothing left to clean
        heed_hooks()

    def before(self, module: nn.Module, observe: Observe, *, looks: bool = False) -> None:
        """Have it told that a forward of a module begins, or, if it looks, be shown the arguments."""
        hook = Entering(Observer(module, observe, looks=looks))
        self._note(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def behind(
        self,
        module: nn.Module,
        observe: Observe,
        select: Select | None = None,
        *,
        looks: bool = True,
        always_call: bool = False,
    ) -> None:
        """Have it shown what a module has put out, see :class:`Observer`.

        ``always_call`` is that of ``torch.nn.Module.register_forward_hook``.
        """
        hook = Observer(module, observe, select, looks=looks)
        self._note(module, module.register_forward_hook(hook, always_call=always_call))

    def take_off(self) -> None:
        """Remove them all, and leave nothing of ours on the modules."""
        take_off(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}

    def _note(self, module: nn.Module, handle: Any) -> None:
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
        if owner is not None:
            self._function(owner, *self._arguments, module, output, training, select)


class Observer(OwnHook):
    """A forward hook of one module.

    Args:
        module: that it will be put on.
        observe: see :data:`Observe`.
        select: of the output; None takes the first floating tensor.
        looks: False for a hook that is content to know that the module ran; a compiled one then gets no output.
    """

    def __init__(
        self, module: nn.Module, observe: Observe, select: Select | None = None, *, looks: bool = True
    ) -> None:
        self._module = weakref.ref(module)
        self._observe = observe
        self._select = select
        self._looks = looks
        self._number = next(_NUMBERS)
        _OBSERVERS[self._number] = self

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """See ``torch.nn.Module.register_forward_hook``."""
        if not torch.compiler.is_compiling():
            self._observe(module, output, module.training, self._select)
        elif not _is_exporting():
            values: Any = _NOTHING
            if self._looks:
                values = first_tensor(output if self._select is None else self._select(output))
            if isinstance(values, Tensor):
                _see_compiled(values.detach(), _TICKET, self._number, module.training)

    def __reduce__(self) -> tuple[Any, ...]:
        # For the few classes that copy themselves, see `copies`: a function of the standard library that takes
        # any three arguments and does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")

    def see_compiled(self, output: Tensor, training: bool) -> None:
        """Pass on what a compiled module has put out."""
        module = self._module()
        if module is not None:
            self._observe(module, output, training, None)


class Entering(OwnHook):
    """A forward pre-hook of one module, which shows an observer the arguments, positional ones first.

    Args:
        observer: one that has been put on the module's forward nowhere.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See ``torch.nn.Module.register_forward_pre_hook``."""
        self._observer(module, args, (args, kwargs))


# The compiler is to leave outputs in the layout that it would choose without us, and out of captured CUDA
# graphs.
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("flexible_layout", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


@torch.library.custom_op("spectralmetrics::see", mutates_args=("ticket",), tags=_TAGS)
def _see_compiled(output: Tensor, ticket: Tensor, number: int, training: bool) -> None:
    # Checkpoints save the ticket like any input, and check in backward that it has not been changed: nor has
    # it.
    torch._C._autograd._unsafe_set_version_counter((ticket,), (1,))
    observer = _OBSERVERS.get(number)
    if observer is not None:
        observer.see_compiled(output, training)


@_see_compiled.register_fake
def _(output: Tensor, ticket: Tensor, number: int, training: bool) -> None:
    return None


@_see_compiled.register_vmap
def _(
    info: Any, in_dims: Any, output: Tensor, ticket: Tensor, number: int, training: bool
) -> tuple[None, None]:
    return None, None  # values that stand for others are no observations


def tell(message: str) -> None:
    """Warn, or log where warnings are errors: what is told from a forward must not end it."""
    try:
        warnings.warn(message, UserWarning, stacklevel=4)
    except UserWarning:
        _logger.warning(message)


def how_it_runs(output: Any) -> Literal["run", "transformed", "traced"]:
    """Whether a model is run, is transformed by ``torch.func``, or is traced or planned."""
    if torch._C._is_tracing() or isinstance(output, torch.fx.Proxy):
        return "traced"
    values = output if type(output) is Tensor else first_tensor(output)
    if isinstance(values, PackedSequence):
        values = values.data
    if values is None:
        return "run"
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return "transformed"
    return "traced" if values.is_meta or isinstance(values, FakeTensor) else "run"


class undisturbed:  # noqa: N801  # used like the contexts of contextlib, and a class because it is entered often
    """No autograd, no inference mode, no autocast inside, and nobody listening to what is computed there.

    Args:
        output: of the layer that is observed.

    >>> with torch.inference_mode(), undisturbed(torch.zeros(1)):
    ...     torch.zeros(1).is_inference()
    False
    """

    def __init__(self, output: Any) -> None:
        self._device = output.device.type if isinstance(output, Tensor) else "cpu"
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self._had_grad = torch.is_grad_enabled()
        modes = torch._C._len_torch_dispatch_stack()
        is_cast = torch.is_autocast_enabled(self._device)
        if modes or is_cast or torch.is_inference_mode_enabled():
            self._stack = contextlib.ExitStack()
            if modes:
                # Selective checkpointing records every operation of the forward, to replay it in backward.
                self._stack.enter_context(_disable_current_modes())
            self._stack.enter_context(torch.inference_mode(False))
            self._stack.enter_context(no_autocast(self._device))
        torch._C._set_grad_enabled(False)

    def __exit__(self, *exception: object) -> None:
        torch._C._set_grad_enabled(self._had_grad)
        if self._stack is not None:
            self._stack.close()
