"""A tensor that is laid beside a model for as long as it runs on what the tensor describes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from spectralmetrics.probing.hooks import tell


class Beside(ABC):
    """What is valid now, and which outputs it did not fit.

    Attributes:
        value: the tensor; None outside of :meth:`within`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._fits = False
        self._misses: dict[str, tuple[int, ...]] = {}  # layer -> shape of an output that it does not fit
        self._named: set[str] = set()  # layers of which that has been said

    @abstractmethod
    def check(self, value: Tensor) -> Tensor:
        """The tensor as it is used; a TypeError or ValueError if it cannot be."""

    @abstractmethod
    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """What to say of a tensor that did not fit what these layers have put out, but maybe that of others."""

    @contextlib.contextmanager
    def within(self, value: Tensor) -> Iterator[None]:
        """Have a tensor be valid inside; warn at the end of layers that it did not fit, once of each."""
        before, self.value = self.value, self.check(value)
        fitted_before, missed_before = self._fits, self._misses
        self._fits, self._misses = False, {}
        try:
            yield
        finally:
            self.value = before
            fits, missed = self._fits, self._misses
            self._fits, self._misses = fitted_before, missed_before
        new = {layer: shape for layer, shape in missed.items() if layer not in self._named}
        if new:
            self._named.update(new)
            misses = ", ".join(f"{layer!r} {shape}" for layer, shape in new.items())
            tell(self.complaint(value, misses, fits_others=fits))

    def note(self, layer: str, shape: tuple[int, ...], *, fits: bool) -> None:
        """Note whether the tensor fitted what a layer has put out."""
        if fits:
            self._fits = True
        else:
            self._misses.setdefault(layer, shape)
