"""The weights that modules compute with: parameters, or tensors made of several parameters.

``torch.nn.utils`` makes weights in two ways: a parametrisation makes them at each reading, a hook, such as the
hook of pruning, before each forward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from spectralmetrics.torch_private import weight_of_hook

_LEAST_SIZE = 0.01
"""New weights below this size leave less than a hundredth of the inputs' scale: that is a problem by itself."""
_LARGE = 32
"""The least rows and columns of a matrix whose singular values tell whether it is random."""
_FLAT = 2.4
"""A kurtosis between those of uniform weights, 1.8, and of normal ones, 3."""
_ITERATIONS = 12
"""Number of products with a weight and its transpose, which find a singular value a tenth above all others."""
_FLUCTUATIONS = 4.0
"""Widths of the law of Tracy and Widom by which singular values of random matrices may exceed their edge."""


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


@torch.no_grad()
def is_untrained(module: nn.Module) -> bool | None:
    """True if the weights of a layer are still random, as they were initialised.

    The singular values of independent random numbers end at the edge of Marchenko and Pastur, √n + √m of their
    standard deviation, whatever their distribution. Training adds directions beyond it (arXiv 1810.01075).
    It takes tens of steps to show, and does not in matrices of a few rows or columns. Weights of PyTorch's own
    range show their first steps by leaving it.

    Returns:
        None if the layer has no matrix of weights of its own, is an embedding, which may hold positions, or is
        too narrow to tell.

    >>> is_untrained(nn.Linear(64, 32)), is_untrained(nn.ReLU())
    (True, None)
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    # Not the attribute: reading a parametrised weight may change the state of its parametrisation.
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.numel() == 0:  # lazy, or emptied
        return None
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.ndim < 2:  # sharded, packed
        return None
    matrix = weight.detach().flatten(1).to(torch.float32)
    deviation = float(matrix.square().mean().sqrt())
    if not deviation * math.sqrt(matrix.shape[1]) > _LEAST_SIZE:
        return False
    is_in_range = _is_in_range_of_torch(matrix, deviation, torch.finfo(weight.dtype).eps / 2)
    if is_in_range is not None:
        return is_in_range
    return _is_random(matrix / deviation) if min(matrix.shape) >= _LARGE else None


def _is_in_range_of_torch(matrix: Tensor, deviation: float, rounding: float) -> bool | None:
    """True if weights fill the range ±1/√(fan-in), from which PyTorch draws them uniformly.

    False if some have left that range, as in the first steps of training; None if they come from elsewhere.
    """
    bound = 1 / math.sqrt(matrix.shape[1])
    tolerance = 0.1 + 2 / math.sqrt(matrix.numel())  # few weights have another size by chance
    if abs(deviation / (bound / math.sqrt(3)) - 1) >= tolerance:
        return None
    if float(matrix.abs().max()) <= (1 + 1e-3 + rounding) * bound:
        return True
    return False if float((matrix / deviation).pow(4).mean()) < _FLAT else None


def _is_random(matrix: Tensor) -> bool:
    """True if no singular value of a matrix, of unit mean square, is beyond those of a random matrix."""
    n, m = matrix.shape
    direction = torch.randn(m, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    for _ in range(_ITERATIONS):
        direction = matrix.T @ (matrix @ (direction / direction.norm()))
    largest = float(direction.norm())  # the square of the largest singular value, or a little less
    edge = math.sqrt(n) + math.sqrt(m)
    width: float = edge * (1 / math.sqrt(n) + 1 / math.sqrt(m)) ** (1 / 3)
    return largest < edge**2 + _FLUCTUATIONS * width
