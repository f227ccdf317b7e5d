"""The low-saturation tail of a network: the last layers, once they stop doing work."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MEAN_LAYER = "mean"
"""The layer name under which recorders and callbacks keep the mean of a statistic over all layers."""


def recorded_name(layer: str) -> str:
    """The name under which a layer's values are kept: its own, unless the mean over layers has this name.

    >>> recorded_name("encoder.0"), recorded_name("mean"), recorded_name("mean (layer)")
    ('encoder.0', 'mean (layer)', 'mean (layer) (layer)')
    """
    return f"{layer} (layer)" if re.fullmatch(rf"{MEAN_LAYER}( \(layer\))*", layer) else layer


def mean_over_layers(values: Iterable[float]) -> float:
    """The mean of the values that are defined; NaN if none is.

    A statistic may be undefined for some layers, such as the effective rank of a constant output.

    >>> mean_over_layers([1.0, float("nan"), 2.0])
    1.5
    """
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def layer_profile(values: Mapping[str, Tensor], metric: str, stage: str) -> dict[str, Tensor]:
    """One metric in one stage, layer by layer, from the result of :meth:`LayerProbe.compute`.

    Args:
        values: ``"{metric}/{stage}/{layer}"`` -> value.
        metric: such as ``"saturation"``.
        stage: ``"train"`` or ``"eval"``.

    Returns:
        Layer name -> value, in the order of ``values``, without the layer ``"mean"`` that a recorder adds;
        the input of :func:`low_saturation_tail` and :func:`~spectralmetrics.plotting.plot_profile`.

    Raises:
        ValueError: if there is no such value; the message lists the metrics and stages of ``values``.
        TypeError: for rows, as :func:`~spectralmetrics.recompute` returns them; the message says what to write.

    >>> import torch
    >>> layer_profile({"saturation/eval/conv1": torch.tensor(0.5), "spectrum/eval/conv1": torch.ones(3)},
    ...               "saturation", "eval")
    {'conv1': tensor(0.5000)}
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            "expected what a probe's compute() or a recorder's record() returned, got a"
            f" {type(values).__name__}. Of rows, as recompute() returns them, write {{row['layer']:"
            " row['value'] for row in rows if (row['epoch'], row['stage'], row['statistic']) =="
            f" (epoch, {stage!r}, {metric!r}) and row['layer'] != 'mean'}}"
        )
    prefix = f"{metric}/{stage}/"
    profile = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if not profile:
        present = sorted({key.rsplit("/", 1)[0] for key in values if "/" in key})
        raise ValueError(
            f"expected values of {prefix[:-1]!r}, got {', '.join(map(repr, present)) or 'no values'}"
        )
    mean = profile.pop(MEAN_LAYER, None)
    # A layer may be named "mean", too: then the value is not the mean of the others.
    if mean is not None and not _is_mean(mean, profile.values()):
        return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return profile


def _is_mean(value: Tensor, others: Iterable[Tensor]) -> bool:
    mean = mean_over_layers(float(each) for each in others if each.numel() == 1)
    return bool(torch.isclose(value.double(), torch.tensor(mean, dtype=torch.float64), equal_nan=True).all())


def low_saturation_tail(
    saturation: Mapping[str, float | Tensor], *, ratio: float = 0.5, output_layers: int = 1
) -> list[str]:
    """The layers that form a low-saturation tail, in forward order.

    The tail is the longest run of layers at the end of the network whose saturation lies below ``ratio`` times
    the largest saturation of any layer. The output layers, whose width is set by the task, belong neither to
    the run nor to the largest value. Networks whose receptive field outgrows their input end in such a tail
    (`arXiv:2006.08679 <https://arxiv.org/abs/2006.08679>`_).

    Use validation data: a profile over an epoch of training pools features of changing weights. And give each
    layer many more observations than features, or a lack of data looks like a lack of directions.

    Args:
        saturation: layer name -> saturation in [0, 1], in forward order.
        ratio: share of the largest saturation below which a layer counts as idle, in (0, 1).
        output_layers: number of layers at the end to leave out.

    Returns:
        The names of the layers in the tail; empty if the last layer before the output is not below the limit.

    Raises:
        TypeError: for anything but a dict.
        ValueError: if ``ratio`` or a saturation is out of range, or ``output_layers`` is negative.

    >>> low_saturation_tail({"conv1": 0.8, "conv2": 0.3, "conv3": 0.7, "conv4": 0.2, "conv5": 0.1, "head": 0.9})
    ['conv4', 'conv5']
    >>> low_saturation_tail({"conv1": 0.8, "conv2": 0.7, "head": 0.9})
    []
    """
    if not isinstance(saturation, Mapping):
        raise TypeError(f"expected a dict of layers and saturations, got {saturation!r}")
    if not isinstance(ratio, numbers.Real) or not 0 < ratio < 1:
        raise ValueError(f"expected a ratio in (0, 1), got {ratio!r}")
    if not isinstance(output_layers, numbers.Integral) or isinstance(output_layers, bool) or output_layers < 0:
        raise ValueError(f"expected output_layers as an integer that is not negative, got {output_layers!r}")
    for name, value in saturation.items():
        is_number = value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")
        if not is_number or not 0 <= float(value) <= 1:
            raise ValueError(f"expected saturations in [0, 1], got {value!r} for {name!r}")
    names = list(saturation)
    values = np.array([float(value) for value in saturation.values()])
    inner = max(len(names) - int(output_layers), 0)
    return names[int(tail_start(values, ratio, inner)) : inner]


def tail_start(
    saturations: npt.NDArray[Any], ratio: float = 0.5, inner: int | None = None, shortest: int = 1
) -> npt.NDArray[Any]:
    """The index of the first layer of the low-saturation tail; ``inner`` if there is none.

    Args:
        saturations: shape (L, ...), in forward order.
        ratio: see :func:`low_saturation_tail`.
        inner: number of layers before the output layers; all but one if None.
        shortest: number of layers below which a tail is none.

    >>> int(tail_start(np.array([0.8, 0.3, 0.7, 0.2, 0.1, 0.9])))
    3
    """
    layers = saturations[: max(len(saturations) - 1, 0) if inner is None else inner]
    is_low = layers < ratio * layers.max(0, initial=0.0)
    run = np.logical_and.accumulate(is_low[::-1], 0).sum(0)
    start: npt.NDArray[Any] = len(layers) - np.where(run < shortest, 0, run)
    return start
