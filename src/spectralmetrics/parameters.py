"""The weights that modules compute with: parameters, or tensors made of several parameters.

``torch.nn.utils`` makes weights in two ways: a parametrisation makes them at each reading, a hook, such as the
hook of pruning, before each forward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from spectralmetrics.torch_private import weight_of_hook


def weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """The weights that a module computes with: name, a parameter behind it, and a function that returns it."""
    if is_parametrized(module):
        for own, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
            for parameter in itertools.islice(chain.parameters(), 1):
                yield own, parameter, functools.partial(_made, module, own, chain)
    buffers = dict(module.named_buffers(recurse=False))
    for name, parameter in module.named_parameters(recurse=False):
        own = name.rpartition("_")[0] if name.endswith(("_orig", "_g", "_v")) else name
        made = vars(module).get(own)  # hooks of `torch.nn.utils` set it before each forward
        if not isinstance(made, Tensor):
            yield name, parameter, functools.partial(_itself, parameter)
        elif (mask := buffers.get(f"{own}_mask")) is not None:  # pruned
            yield own, parameter, functools.partial(torch.mul, parameter, mask)
        elif not name.endswith("_g"):
            yield own, parameter, functools.partial(_of_hook, module, own)


@torch.no_grad()
def _made(module: nn.Module, name: str, chain: nn.Module) -> Tensor:
    """A parametrised weight, as in evaluation: reading it in training mode may change the parametrisation."""
    modes = [(each, each.training) for each in chain.modules()]
    chain.eval()
    try:
        weight: Tensor = getattr(module, name)
    finally:
        for each, mode in modes:
            each.training = mode
    return weight


@torch.no_grad()
def _of_hook(module: nn.Module, name: str) -> Tensor:
    """A weight that a hook makes, of the parameters as they are now, not as at the last forward."""
    made = weight_of_hook(module, name)
    weight: Tensor = vars(module)[name] if made is None else made
    return weight


def _itself(value: Tensor) -> Tensor:
    return value


def weight_in(stored: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A weight in a state dict, with its pruning mask; None if it is missing or there are only its parts.

    >>> weight_in({"0.weight_orig": torch.ones(2), "0.weight_mask": torch.eye(2)[0]}, "0.weight")
    tensor([1., 0.])
    """
    if name in stored:
        return stored[name]
    parts = f"{name}_orig", f"{name}_mask"
    return stored[parts[0]] * stored[parts[1]] if all(part in stored for part in parts) else None


def check_some_in(stored: Mapping[str, Tensor] | None, names: Sequence[str]) -> None:
    """Raise a ValueError if a state dict has tensors, and none of the weights of these names."""
    if stored and not any({name, f"{name}_orig"} & stored.keys() for name in names):
        raise ValueError(
            f"expected earlier weights of the same model in since, got none of {names[0]!r} and the others; its"
            f" first name is {next(iter(stored))!r}"
        )


def why_no_numbers(dtype: torch.dtype, shape: Sequence[int] = ()) -> str:
    """The reason why a tensor cannot be read as a weight; empty if it can.

    >>> why_no_numbers(torch.bfloat16), why_no_numbers(torch.uint8), why_no_numbers(torch.float32, (3, 0))
    ('', 'it holds uint8: packed or quantised weights', 'it is empty')
    """
    if 0 in shape:
        return "it is empty"
    if dtype.is_floating_point or dtype in (torch.qint8, torch.quint8, torch.qint32):
        return ""
    words = f"it holds {str(dtype).removeprefix('torch.')}"
    return words if dtype.is_complex else f"{words}: packed or quantised weights"
