"""The factor by which a loss was multiplied, which is taken out of gradients."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def check_scale(scale: Any) -> None:
    """Raise an error for what is no factor of a loss."""
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not 0 < float(scale) < math.inf:
            raise ValueError(f"expected gradient_scale to be a positive number, got {scale!r}")
    elif not callable(getattr(scale, "get_scale", None)):
        raise TypeError(f"expected gradient_scale to be a number or a GradScaler, got {type(scale).__name__}")


def unscaled(gradient: Tensor, scale: Any) -> Tensor:
    """A gradient without the factor of its loss, which is read now: a scaler changes it between steps.

    >>> unscaled(torch.tensor([6.0, 8.0]), 2.0)
    tensor([3., 4.])
    """
    if isinstance(scale, numbers.Real) and scale == 1:
        return gradient
    if isinstance(scale, numbers.Real):
        factor: Any = float(scale)
    elif isinstance(scale, torch.amp.GradScaler):  # whose factor is on a device, and not waited for
        factor = scale.scale(torch.ones((), device=gradient.device))
    else:
        factor = scale.get_scale()
    # What was scaled to fit into half precision may not fit without.
    full = gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.to(torch.float32)
    return full.div(factor)
