"""What a logger of another library can take of a probe's values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectralmetrics.tail import MEAN_LAYER, mean_over_layers


def scalars(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of one element; loggers have no place for spectra and matrices.

    >>> import torch
    >>> scalars({"saturation/eval/fc": torch.tensor(0.5), "spectrum/eval/fc": torch.ones(3)})
    {'saturation/eval/fc': tensor(0.5000)}
    """
    return {key: value for key, value in values.items() if value.numel() == 1}


def with_means(values: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """(metric, layer) -> number, of values of one stage, and after them each metric's mean over the layers.

    The mean is over the layers for which the metric is defined.

    >>> import torch
    >>> with_means({"saturation/eval/a": torch.tensor(0.5), "saturation/eval/b": torch.tensor(1.0)})
    {('saturation', 'a'): 0.5, ('saturation', 'b'): 1.0, ('saturation', 'mean'): 0.75}
    """
    numbers: dict[tuple[str, str], float] = {}
    for key, value in scalars(values).items():
        metric, _, layer = key.split("/", 2)
        numbers[metric, layer] = float(value)
    for metric in dict.fromkeys(metric for metric, _ in numbers):
        of_metric = [number for (own, _), number in numbers.items() if own == metric]
        numbers[metric, MEAN_LAYER] = mean_over_layers(of_metric)
    return numbers
