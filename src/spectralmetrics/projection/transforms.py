"""What a layer is really called with under ``torch.func``: the values behind the transforms' wrappers."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch import pyfunctorch

_functorch = torch._C._functorch


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Inside, PyTorch does not know of the transforms that are under way.

    A transform refuses to change a tensor that it was not given, such as a sum that goes on from forward to
    forward, and would wrap what is computed to be kept.
    """
    return pyfunctorch.temporarily_clear_interpreter_stack()


def untransformed(values: Tensor, dim: int) -> tuple[Tensor, int] | None:
    """The values of a tensor without its wrappers, and the place of one of its dimensions in them.

    Dimensions that ``vmap`` has hidden are in front, so that a forward of one sample at a time counts as many
    rows as one of all samples together.

    Args:
        values: as a module gets them.
        dim: not negative.

    Returns:
        None for a tensor without values, as while a graph is traced.

    >>> seen = []
    >>> def look(row):
    ...     values, dim = untransformed(row, 0)
    ...     seen.append((tuple(values.shape), dim))
    ...     return row
    >>> _ = torch.func.vmap(look)(torch.zeros(7, 3))
    >>> seen
    [((7, 3), 1)]
    """
    while _functorch.is_functorch_wrapped_tensor(values):
        if _functorch.is_functionaltensor(values):
            return None
        is_batched = _functorch.is_batchedtensor(values)
        hidden = _functorch.maybe_get_bdim(values) if is_batched else 0
        values = _functorch.get_unwrapped(values)
        if is_batched:
            values, dim = values.movedim(hidden, 0), dim + 1
    return values, dim
