"""The arguments of a module of experts: tokens, and the experts that each goes to."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Routed(NamedTuple):
    """The arguments of a module of experts.

    Attributes:
        states: (T, D), the tokens.
        experts: (T, k), the experts of each token.
        cast: name of the dtype that autocast computes in; empty without it.
    """

    states: Tensor
    experts: Tensor
    cast: str


class Choose:
    """Selects tokens and their experts from the arguments of a module's forward; traced by Dynamo."""

    def __init__(self, module: nn.Module) -> None:
        self._names = arguments_of(module)[:2]
        accelerator = torch.accelerator.current_accelerator()
        devices = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
        # Read here, since Dynamo of torch 2.8 cannot trace this call.
        self._casting = tuple(each for each in devices if torch.amp.is_autocast_available(each))

    def __call__(self, arguments: Any) -> Routed:
        """The tokens and experts of a call."""
        args, kwargs = arguments
        states, index = (
            args[place] if place < len(args) else kwargs[name] for place, name in enumerate(self._names)
        )
        device = states.device.type
        is_cast = device in self._casting and torch.is_autocast_enabled(device)
        return Routed(
            states, index, str(torch.get_autocast_dtype(device)).removeprefix("torch.") if is_cast else ""
        )


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, as its type defines them."""
    try:
        return tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):  # not written in Python
        return ()
