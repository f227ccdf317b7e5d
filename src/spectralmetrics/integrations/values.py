"""A probe's values in the form that loggers of other libraries take."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectralmetrics.functional.tail import MEAN_LAYER, mean_over_layers, recorded_name


def with_means(values: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """(metric, layer) -> number, of values of one stage, and after them each metric's mean over the layers.

    The mean is over the layers for which the metric is defined. A layer that is itself called ``"mean"`` is
    ``"mean (layer)"``.

    >>> import torch
    >>> values = {"saturation/eval/a": torch.tensor(0.5), "saturation/eval/b": torch.tensor(1.0)}
    >>> with_means(values | {"spectrum/eval/a": torch.ones(2), "spectrum/eval/b": torch.ones(1)})
    {('saturation', 'a'): 0.5, ('saturation', 'b'): 1.0, ('saturation', 'mean'): 0.75}
    """
    numbers: dict[tuple[str, str], float] = {}
    for key, value in values.items():
        if value.ndim == 0:  # a logger has no place for spectra and matrices, also of one feature
            metric, _, layer = key.split("/", 2)
            numbers[metric, recorded_name(layer)] = float(value)
    for metric in dict.fromkeys(metric for metric, _ in numbers):
        of_metric = [number for (own, _), number in numbers.items() if own == metric]
        numbers[metric, MEAN_LAYER] = mean_over_layers(of_metric)
    return numbers


_LONGEST = 250  # MLflow takes no longer name


def loggable(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite scalars among values, as floats under names that experiment loggers accept.

    For W&B, MLflow, Comet, Neptune and others: spectra, matrices, NaN and infinite values are left out. Names
    have the form ``"{metric}/{stage}/{layer}"``. A character that MLflow refuses becomes an underscore, and a
    name longer than 250 characters is cut; names stay apart from one another.

    Args:
        values: the dict from :meth:`LayerProbe.compute` or :meth:`Recorder.record`.

    Raises:
        TypeError: for anything but a dict with names as keys.

    >>> import math, torch
    >>> loggable({"saturation/eval/fc": torch.tensor(0.5), "spectrum/eval/fc": torch.ones(3),
    ...           "saturation/eval/a:b": torch.tensor(1.0), "saturation/eval/dead": torch.tensor(math.nan)})
    {'saturation/eval/fc': 0.5, 'saturation/eval/a_b': 1.0}
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"expected the dict that compute() or record() returns, got {values!r}")
    found: dict[str, float] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"expected names as keys, got {key!r}")
        # Metrics of other libraries may return several numbers by name.
        for part, number in (value if isinstance(value, Mapping) else {"": value}).items():
            if (scalar := _finite(number)) is not None:
                found[_accepted(key, str(part), found)] = scalar
    return found


def _finite(value: Any) -> float | None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _accepted(key: str, part: str, taken: Mapping[str, float]) -> str:
    """A name for a value that is not yet taken."""
    statistic, *others = key.split("/", 2)
    parts = (
        re.sub(r"[^\w.\- ]", "_", each) for each in (f"{statistic}_{part}" if part else statistic, *others)
    )
    name = "/".join(f"_{each}" if each.strip(".") == "" else each for each in parts)
    if len(name) > _LONGEST or name in taken:
        mark = f"_{zlib.crc32(f'{key} {part}'.encode()):08x}"
        name = name[: _LONGEST - len(mark)] + mark
    return name
