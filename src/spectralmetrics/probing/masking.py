"""Which steps of sequences are valid, for as long as a mask is laid over the model."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.probing.beside import Beside
from spectralmetrics.probing.observations import Batch


class Masks(Beside):
    """The mask that is valid now, and what sequences it did not fit."""

    def check(self, value: Tensor) -> Tensor:
        """See :class:`.Beside`."""
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"expected a boolean mask, True for valid tokens, got {kind}")
        if value.ndim != 2:
            raise ValueError(f"expected a mask of shape (N, T), got {tuple(value.shape)}")
        return value

    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """See :class:`.Beside`."""
        which = "that some layers have put out" if fits_others else "that was observed"
        return (
            f"the mask of shape {tuple(value.shape)} fits no sequence {which}: all steps, padding too, were"
            f" counted of {misses}; exclude them, or have `select` return (N, T, D)"
        )

    def met(self, layer: str, batch: Batch) -> None:
        """Note whether the mask fitted what a layer has put out."""
        if self.value is None or batch.is_feature_map:
            return
        # Rows, one for each sample, have no padding.
        if batch.kind != "rows" or batch.num_samples not in (1, len(self.value)):
            self.note(layer, tuple(batch.values.shape), fits=batch.valid is not None)
