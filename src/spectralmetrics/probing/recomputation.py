"""Decisions of forwards that run again in backward, such as those inside a checkpoint."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Recomputed:
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
