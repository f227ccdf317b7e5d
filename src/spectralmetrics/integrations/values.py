"""What a logger of another library can take of a probe's values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def scalars(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of one element; loggers have no place for spectra and matrices.

    >>> import torch
    >>> scalars({"saturation/eval/fc": torch.tensor(0.5), "spectrum/eval/fc": torch.ones(3)})
    {'saturation/eval/fc': tensor(0.5000)}
    """
    return {key: value for key, value in values.items() if value.numel() == 1}
