"""What a layer's type and weights say of its outputs before any data comes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from spectralmetrics.probing.selection import conv1d

_KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *(getattr(nn, f"{name}{rank}d") for name in ("Conv", "ConvTranspose") for rank in (1, 2, 3)),
)


class LayerFacts(NamedTuple):
    """What is known of a layer without its data.

    Attributes:
        kind: name of its type.
        ceiling: the most directions that its weights allow its outputs; None if nothing is known of them.
    """

    kind: str
    ceiling: int | None


def facts_of(module: nn.Module, *, is_linear: bool = True) -> LayerFacts:
    """The facts of a layer.

    Args:
        module: the layer.
        is_linear: whether what is observed is a linear function of each output: not so where a function of the
            user's or a maximum stands between.

    >>> facts_of(nn.Conv2d(64, 128, 1))
    LayerFacts(kind='Conv2d', ceiling=64)
    """
    return LayerFacts(type(module).__name__, _ceiling(module) if is_linear else None)


def _ceiling(module: nn.Module) -> int | None:
    """The rank that the weights can have; a bias moves the mean and adds no direction."""
    if isinstance(module, conv1d()):  # its weight is (inputs, outputs)
        weight = module.weight
        return min(weight.shape) if isinstance(weight, torch.Tensor) else None
    if not any(type(module).forward is kind.forward for kind in _KNOWN if isinstance(module, kind)):
        return None  # a forward of its own may do more than its weights
    if isinstance(module, nn.Linear):
        return min(module.out_features, module.in_features) or None
    if isinstance(module, _ConvNd):
        # Each group of outputs is a linear function of its own inputs at the kernel's positions, or of some.
        inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
        taps = math.prod(module.kernel_size)
        return module.groups * min(outputs, inputs * taps) or None
    return None
