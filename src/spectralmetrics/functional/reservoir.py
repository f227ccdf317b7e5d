"""A uniform sample of a stream that merges exactly: keep the rows with the smallest random keys.

Each row draws a key from the uniform distribution; the sample of size m is the rows with the m smallest keys.
The sample of a union is the m smallest of both samples, in whatever order they are merged, and no step reads
from the device.

>>> import torch
>>> reservoir = empty_reservoir(2, 1)
>>> rows = torch.arange(5.0)[:, None]
>>> reservoir = offer(reservoir, rows, torch.tensor([0.9, 0.1, 0.8, 0.2, torch.inf]))
>>> kept_rows(reservoir).flatten()
tensor([1., 3.], dtype=torch.float64)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reservoir(NamedTuple):
    """A sample of at most m rows.

    Attributes:
        keys: shape (m,), float64, ascending; infinite where the place is empty.
        rows: shape (m, D), float64.
    """

    keys: Tensor
    rows: Tensor


def empty_reservoir(capacity: int, num_features: int, device: torch.device | str | None = None) -> Reservoir:
    """A reservoir of ``capacity`` empty places.

    >>> empty_reservoir(4, 2).keys
    tensor([inf, inf, inf, inf], dtype=torch.float64)
    """
    with torch.inference_mode(False):
        return Reservoir(
            keys=torch.full((capacity,), torch.inf, dtype=torch.float64, device=device or "cpu"),
            rows=torch.zeros(capacity, num_features, dtype=torch.float64, device=device or "cpu"),
        )


def offer(reservoir: Reservoir, rows: Tensor, keys: Tensor) -> Reservoir:
    """The reservoir after the rows with these keys were offered; the input is left as it was.

    Args:
        reservoir: of capacity m.
        rows: shape (N, D), floating.
        keys: shape (N,); an infinite key never enters.

    >>> offer(empty_reservoir(1, 1), torch.tensor([[3.0], [4.0]]), torch.tensor([0.5, 0.25])).rows
    tensor([[4.]], dtype=torch.float64)
    """
    with torch.inference_mode(False), torch.no_grad():
        all_keys = torch.cat([reservoir.keys, keys.to(torch.float64)])
        all_rows = torch.cat([reservoir.rows, rows.to(torch.float64)])
        smallest = torch.topk(all_keys, reservoir.keys.shape[0], largest=False, sorted=True)
        return Reservoir(smallest.values, all_rows.index_select(0, smallest.indices))


def kept_rows(reservoir: Reservoir) -> Tensor:
    """The rows in occupied places, shape (k, D), k at most m; reads k from the device.

    >>> kept_rows(empty_reservoir(4, 2)).shape
    torch.Size([0, 2])
    """
    return reservoir.rows[reservoir.keys.isfinite()]
