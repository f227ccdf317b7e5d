"""Keeps the probe's hooks out of copies and pickles of a probed module."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from typing import Any, TypeAlias

from torch import nn

from spectralmetrics.torch_private import HOOK_NOTES, HOOKS

Handles: TypeAlias = list[tuple[weakref.ref[nn.Module], Any]]
"""Handles of hooks, each with the module of its hook."""


class OwnHook:
    """Marks hooks that copies of their module do not get."""

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # the first attribute that TorchScript reads
            raise AttributeError(
                "torch.jit.script cannot compile a model with the hooks of a LayerProbe or LayerSimilarity:"
                " call its remove(), script the model, and probe the model that is not scripted"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        # For the few classes that copy themselves: a function of the standard library that takes any three
        # arguments and does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _CopyMethod:
    """A method for copying a module, which ``copy`` or ``pickle`` finds on the object before its class.

    Only such a method can keep an entry of ``_forward_hooks`` out of a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module


class _Reduction(_CopyMethod):
    """The module's own ``__reduce_ex__``, without our hooks."""

    def __call__(self, protocol: Any) -> Any:
        module = self.module
        reduced = type(module).__reduce_ex__(module, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, arguments, *others = reduced
        # A graph module passes its attributes as an argument, other modules as the state.
        arguments = tuple(_without_own(each, module) for each in arguments)
        return (function, arguments, *(_without_own(each, module) for each in others))


class _DeepCopy(_CopyMethod):
    """The module's own ``__deepcopy__``, without our hooks; for classes that copy themselves."""

    def __call__(self, memo: Any) -> Any:
        module: Any = self.module
        twin = type(module).__deepcopy__(module, memo)
        if isinstance(twin, nn.Module) and twin is not module:
            kept = _without_own(vars(twin), module)
            vars(twin).clear()
            vars(twin).update(kept)
        return twin


_COPY_METHODS: dict[str, type[_CopyMethod]] = {"__reduce_ex__": _Reduction, "__deepcopy__": _DeepCopy}


def leave_out_of_copies(module: nn.Module) -> None:
    """Keep our hooks out of copies of a module."""
    for name, method in _COPY_METHODS.items():
        if hasattr(type(module), name):
            vars(module).setdefault(name, method(module))


def leave_as_it_was(module: nn.Module) -> None:
    """Undo :func:`leave_out_of_copies`, once the last of our hooks is gone."""
    if not _own_hooks(module):
        for name in _COPY_METHODS:
            if isinstance(vars(module).get(name), _CopyMethod):
                del vars(module)[name]


def take_off(handles: Handles) -> None:
    """Remove hooks, and everything else of ours from their modules."""
    while handles:
        module, handle = handles.pop()
        handle.remove()
        hooked = module()
        if hooked is not None:
            leave_as_it_was(hooked)


def _own_hooks(module: nn.Module) -> set[int]:
    """Our hooks on a module, by number."""
    hooks = (item for name in HOOKS for item in vars(module).get(name, {}).items())
    return {number for number, hook in hooks if isinstance(hook, OwnHook)}


def _without_own(attributes: Any, module: nn.Module) -> Any:
    """The attributes of a module, or of its copy, without ours; any other object unchanged."""
    if not isinstance(attributes, dict) or HOOKS[0] not in attributes:
        return attributes
    own = _own_hooks(module)
    kept = {name: value for name, value in attributes.items() if not isinstance(value, _CopyMethod)}
    for name in (*HOOKS, *HOOK_NOTES):
        if own & set(kept.get(name, ())):
            kept[name] = OrderedDict((n, value) for n, value in kept[name].items() if n not in own)
    return kept
