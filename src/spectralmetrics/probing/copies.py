"""Copies and pickles of a probed module, which have no hook of the probe's."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, TypeAlias

from torch import nn

_ATTRIBUTE = "__reduce_ex__"
# Hooks by number, and what PyTorch notes of each by the same number.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOTES = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


Handles: TypeAlias = list[tuple[weakref.ref[nn.Module], Any]]
"""Of hooks, with the module that each is on."""


class OwnHook:
    """Marks hooks that stay with the module they were made for."""


class _Reduction:
    """How a probed module is copied and pickled: by what its class says of it, without our hooks.

    ``copy`` and ``pickle`` ask the object itself for ``__reduce_ex__`` before its class; that is the only place
    where an entry of ``_forward_hooks`` can be kept out of a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, protocol: Any) -> Any:
        module = self._module()
        assert module is not None
        reduced = type(module).__reduce_ex__(module, protocol)
        if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
            return (*reduced[:2], _without_own(reduced[2]), *reduced[3:])
        return reduced


def leave_out_of_copies(module: nn.Module) -> None:
    """Have copies of a module come without our hooks."""
    vars(module).setdefault(_ATTRIBUTE, _Reduction(module))


def leave_as_it_was(module: nn.Module) -> None:
    """Undo :func:`leave_out_of_copies`, once the last of our hooks is gone."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    if not any(isinstance(hook, OwnHook) for hook in hooks) and isinstance(
        vars(module).get(_ATTRIBUTE), _Reduction
    ):
        del vars(module)[_ATTRIBUTE]


def take_off(handles: Handles) -> None:
    """Remove hooks, and leave nothing of ours on their modules."""
    while handles:
        module, handle = handles.pop()
        handle.remove()
        hooked = module()
        if hooked is not None:
            leave_as_it_was(hooked)


def _without_own(state: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in state.items() if name != _ATTRIBUTE}
    own = {
        number for name in _HOOKS for number, hook in kept.get(name, {}).items() if isinstance(hook, OwnHook)
    }
    for name in (*_HOOKS, *_NOTES):
        if own & set(kept.get(name, ())):
            kept[name] = OrderedDict((n, value) for n, value in kept[name].items() if n not in own)
    return kept
