"""The form of outputs whose rows are taken unchanged, kept so that the next such output takes few steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralmetrics.probing.rules import Batch
from spectralmetrics.sums import Observations


class Plain(NamedTuple):
    """The form of an output that was taken as it is, without a change of its layout or its values.

    Attributes:
        shape: the shape of the output.
        dtype: the dtype of the output.
        dim: dimension of its features.
        width: number of its features.
        limit: largest number of observations to draw; None for all.
    """

    shape: torch.Size
    dtype: torch.dtype
    dim: int
    width: int
    limit: int | None

    @classmethod
    def of(cls, output: Any, batch: Batch, observations: Observations, limit: int | None) -> Plain | None:
        """The form of an output; None if it was not taken as it is, or its layout was guessed."""
        if type(output) is not Tensor or output.is_nested or batch.guessed_dim is not None:
            return None
        is_as_it_was = batch.values.shape == output.shape and batch.order == tuple(range(output.ndim))
        if not is_as_it_was or observations.values is not batch.values or observations.valid is not None:
            return None
        return cls(output.shape, output.dtype, observations.feature_dim, observations.num_features, limit)

    def is_like(self, output: Tensor) -> bool:
        """True if an output, of no subclass, would be taken in the same way."""
        return (
            not output.is_nested
            and output.layout == torch.strided
            and output.dtype == self.dtype
            and output.shape == self.shape
        )
