"""Forwards that run again in backward, as of a checkpoint, and what was decided when they ran first."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Recomputed:
    """Decisions of forwards that run without gradients inside a ``torch.autograd.Function``.

    Such as a reentrant checkpoint, or a reversible network: its backward runs them again, with gradients, and
    these belong to the forward. Which function runs, only frames tell.
    """

    def __init__(self) -> None:
        self._recorded: weakref.WeakKeyDictionary[Any, dict[str, deque[Any]]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # what runs here does not run anywhere else

    def record(self, layer: str, awaited: Any) -> None:
        """Note what was decided, for all functions whose forward this thread runs."""
        for context, is_backward in _running():
            if not is_backward:
                self._recorded.setdefault(context, {}).setdefault(layer, deque()).append(awaited)

    def recorded(self, layer: str, default: Any) -> Any:
        """The notes of the innermost function whose backward runs, in the order of the layer's calls."""
        for context, is_backward in _running():
            calls = self._recorded.get(context, {}).get(layer) if is_backward else None
            if calls:
                calls.rotate(-1)  # the graph may be kept for another backward
                return calls[-1]
        return default


def _running() -> Iterator[tuple[Any, bool]]:
    """The contexts of the autograd functions that this thread runs, the innermost first; whether backward."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[:1] == ("ctx",) and code.co_name in ("forward", "backward"):
            context = frame.f_locals.get("ctx")
            if isinstance(context, torch.autograd.function.FunctionCtx):
                yield context, code.co_name == "backward"
        frame = frame.f_back  # type: ignore[assignment]
