"""Which steps of sequences are valid, for as long as a mask is laid over the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from spectralmetrics.probing.hooks import tell
from spectralmetrics.probing.observations import Batch


class Masks:
    """The mask that is valid now, and what sequences it did not fit."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._fits = False
        self._misses: dict[str, tuple[int, ...]] = {}  # layer -> shape of a sequence it does not fit
        self._has_warned = False

    @contextlib.contextmanager
    def within(self, mask: Tensor) -> Iterator[None]:
        """Have a mask be valid inside; warn once if sequences came and it fitted none of them."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"expected a boolean mask, True for valid tokens, got {kind}")
        if mask.ndim != 2:
            raise ValueError(f"expected a mask of shape (N, T), got {tuple(mask.shape)}")
        before, self.mask = self.mask, mask
        self._fits, self._misses = False, {}
        try:
            yield
        finally:
            self.mask = before
        if self._misses and not self._fits and not self._has_warned:
            self._has_warned = True
            name, shape = next(iter(self._misses.items()))
            tell(
                f"the mask of shape {tuple(mask.shape)} fits no sequence that was observed; all steps were"
                f" counted of {', '.join(map(repr, self._misses))}: (N, T, D) of {name!r} is {shape}"
            )

    def met(self, layer: str, batch: Batch) -> None:
        """Note whether the mask fitted what a layer has put out."""
        if self.mask is None or batch.kind != "sequence":
            return
        if batch.valid is None:
            self._misses[layer] = tuple(batch.values.shape)
        else:
            self._fits = True
