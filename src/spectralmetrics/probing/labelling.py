"""The labels of what a model is run on, for as long as they are laid beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.probing.beside import Beside
from spectralmetrics.probing.observations import Batch, ObservationRule
from spectralmetrics.sums import Observations

_MEANS = ObservationRule(feature_maps="mean", sequences="mean")


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

    def complaint(self, value: Tensor, layers: str, layer: str, shape: tuple[int, ...]) -> str:
        """See :class:`.Beside`."""
        return (
            f"labels of shape {tuple(value.shape)} fit no output that was observed: not that of"
            f" {layers}; the output of {layer!r} has the shape {shape}"
        )

    def observe(self, layer: str, batch: Batch) -> Observations | None:
        """The labelled observations of an output; None without labels that fit it.

        With a label for each sample, maps and sequences are pooled to their means; with one for each step,
        steps are the observations.
        """
        labels = self.value
        if labels is None:
            return None
        # A layer whose observation ends with a number of samples has seen the first ones.
        fitting = labels[: batch.num_samples]
        per_step = labels.ndim == 2
        expected = tuple(batch.values.shape[:2]) if per_step else (batch.num_samples,)
        fits = tuple(fitting.shape) == expected and (batch.kind == "sequence" or not per_step)
        self.note(layer, tuple(batch.values.shape), fits=fits)
        if not fits:
            return None
        seen = batch.observations(ObservationRule() if per_step else _MEANS)
        chosen = fitting.reshape(-1).to(seen.values.device)
        return Observations(seen.values, seen.feature_dim, seen.valid, labels=chosen)
