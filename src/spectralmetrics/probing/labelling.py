"""The labels of what a model is run on, for as long as they are laid beside it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectralmetrics.probing.beside import Beside
from spectralmetrics.probing.observations import Batch


class Labels(Beside):
    """The labels that are valid now, and which outputs they did not fit."""

    def check(self, value: Tensor) -> Tensor:
        """See :class:`.Beside`."""
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"expected labels as an integer tensor, the class of each sample or step, got {kind}"
            )
        if value.ndim not in (1, 2):
            raise ValueError(f"expected labels of shape (N,) or (N, T), got {tuple(value.shape)}")
        return value.to(torch.int64)

    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """See :class:`.Beside`."""
        which = "of some layers" if fits_others else "that was observed"
        return (
            f"labels of shape {tuple(value.shape)} fit no output {which}: not that of {misses}; what needs"
            " labels leaves these out"
        )

    def join(self, layer: str, batch: Batch, labels: Tensor, time_first: bool = False) -> Batch:
        """A whole output with the labels of its samples, or of its steps; without any if they do not fit.

        Another number of samples than of labels fits none: a part of a batch, or what an expert of a mixture
        gets, may be any part.

        Args:
            layer: that put it out.
            batch: all of it.
            labels: that were valid in the forward.
            time_first: whether tokens that have been flattened are (T·N, D).
        """
        is_valid_now = labels is self.value
        shape: tuple[int, ...] = tuple(batch.values.shape[: labels.ndim])
        if labels.ndim == 2 and batch.kind == "sequence" and shape == labels.mT.shape:
            labels = labels if shape == labels.shape else labels.mT
        elif labels.ndim == 2 and batch.kind == "rows" and len(batch.values) == labels.numel():
            labels = (labels.mT if time_first else labels).reshape(-1)
        elif shape != labels.shape or (labels.ndim == 2 and batch.kind != "sequence"):
            if is_valid_now:
                self.note(layer, tuple(batch.values.shape), fits=False)
            return batch
        if is_valid_now:
            self.note(layer, tuple(batch.values.shape), fits=True)
        return replace(batch, labels=labels)
