"""The labels of what a model is run on, for as long as they are laid beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from spectralmetrics.probing.hooks import tell
from spectralmetrics.probing.observations import Batch, ObservationRule
from spectralmetrics.sums import Observations

_MEANS = ObservationRule(feature_maps="mean", sequences="mean")


class Labels:
    """The labels that are valid now, and which outputs they did not fit."""

    def __init__(self) -> None:
        self.labels: Tensor | None = None
        self._fits = False
        self._misses: dict[str, tuple[int, ...]] = {}  # layer -> shape of an output they do not fit
        self._has_warned = False

    @contextlib.contextmanager
    def within(self, labels: Tensor) -> Iterator[None]:
        """Have labels be valid inside; warn once if they fitted nothing that was observed."""
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(
                f"expected labels as an integer tensor, the class of each sample or step, got {kind}"
            )
        if labels.ndim not in (1, 2):
            raise ValueError(f"expected labels of shape (N,) or (N, T), got {tuple(labels.shape)}")
        before, self.labels = self.labels, labels.to(torch.int64)
        self._fits, self._misses = False, {}
        try:
            yield
        finally:
            self.labels = before
        if self._misses and not self._fits and not self._has_warned:
            self._has_warned = True
            name, shape = next(iter(self._misses.items()))
            tell(
                f"labels of shape {tuple(labels.shape)} fit no output that was observed: not that of"
                f" {', '.join(map(repr, self._misses))}; the output of {name!r} has the shape {shape}"
            )

    def observe(self, layer: str, batch: Batch) -> Observations | None:
        """The labelled observations of an output; None without labels that fit it.

        With a label for each sample, maps and sequences are pooled to their means; with one for each step,
        steps are the observations.
        """
        labels = self.labels
        if labels is None:
            return None
        # A layer whose observation ends with a number of samples has seen the first ones.
        fitting = labels[: batch.num_samples]
        per_step = labels.ndim == 2
        expected = tuple(batch.values.shape[:2]) if per_step else (batch.num_samples,)
        if tuple(fitting.shape) != expected or (per_step and batch.kind != "sequence"):
            self._misses[layer] = tuple(batch.values.shape)
            return None
        self._fits = True
        seen = batch.observations(ObservationRule() if per_step else _MEANS)
        chosen = fitting.reshape(-1).to(seen.values.device)
        return Observations(seen.values, seen.feature_dim, seen.valid, labels=chosen)
