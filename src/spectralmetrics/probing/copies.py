"""Copies and pickles of a probed module, which have no hook of the probe's."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, TypeAlias

from torch import nn

from spectralmetrics.torch_private import HOOK_NOTES, HOOKS

Handles: TypeAlias = list[tuple[weakref.ref[nn.Module], Any]]
"""Of hooks, with the module that each is on."""


class OwnHook:
    """Marks hooks that stay with the module they were made for."""

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # the first thing that TorchScript asks a hook
            raise AttributeError(
                "torch.jit.script cannot compile a model with the hooks of a LayerProbe or LayerSimilarity:"
                " call its remove(), script the model, and probe the model that is not scripted"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _Way:
    """A way of copying a module, which ``copy`` or ``pickle`` asks the object itself for before its class.

    That is the only place where an entry of ``_forward_hooks`` can be kept out of a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module


class _Reduction(_Way):
    """The module's own ``__reduce_ex__``, without our hooks."""

    def __call__(self, protocol: Any) -> Any:
        module = self.module
        reduced = type(module).__reduce_ex__(module, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, arguments, *others = reduced
        # A graph module hands its attributes over as an argument, others as the state.
        arguments = tuple(_without_own(each, module) for each in arguments)
        return (function, arguments, *(_without_own(each, module) for each in others))


class _DeepCopy(_Way):
    """The module's own ``__deepcopy__``, without our hooks; for classes that copy themselves."""

    def __call__(self, memo: Any) -> Any:
        module: Any = self.module
        twin = type(module).__deepcopy__(module, memo)
        if isinstance(twin, nn.Module) and twin is not module:
            kept = _without_own(vars(twin), module)
            vars(twin).clear()
            vars(twin).update(kept)
        return twin


_WAYS: dict[str, type[_Way]] = {"__reduce_ex__": _Reduction, "__deepcopy__": _DeepCopy}


def leave_out_of_copies(module: nn.Module) -> None:
    """Have copies of a module come without our hooks."""
    for name, way in _WAYS.items():
        if hasattr(type(module), name):
            vars(module).setdefault(name, way(module))


def leave_as_it_was(module: nn.Module) -> None:
    """Undo :func:`leave_out_of_copies`, once the last of our hooks is gone."""
    if not _own_hooks(module):
        for name in _WAYS:
            if isinstance(vars(module).get(name), _Way):
                del vars(module)[name]


def take_off(handles: Handles) -> None:
    """Remove hooks, and leave nothing of ours on their modules."""
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
    """The attributes of a module, or of a copy of it, without what is ours; anything else as it is."""
    if not isinstance(attributes, dict) or HOOKS[0] not in attributes:
        return attributes
    own = _own_hooks(module)
    kept = {name: value for name, value in attributes.items() if not isinstance(value, _Way)}
    for name in (*HOOKS, *HOOK_NOTES):
        if own & set(kept.get(name, ())):
            kept[name] = OrderedDict((n, value) for n, value in kept[name].items() if n not in own)
    return kept
