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
        self._has_warned = False

    @abstractmethod
    def check(self, value: Tensor) -> Tensor:
        """The tensor as it is used; a TypeError or ValueError if it cannot be."""

    @abstractmethod
    def complaint(self, value: Tensor, layers: str, layer: str, shape: tuple[int, ...]) -> str:
        """What to say of a tensor that fitted nothing: not these layers, the first of which had this shape."""

    @contextlib.contextmanager
    def within(self, value: Tensor) -> Iterator[None]:
        """Have a tensor be valid inside; warn once if outputs came and it fitted none of them."""
        before, self.value = self.value, self.check(value)
        self._fits, self._misses = False, {}
        try:
            yield
        finally:
            self.value = before
        if self._misses and not self._fits and not self._has_warned:
            self._has_warned = True
            tell(self.complaint(value, ", ".join(map(repr, self._misses)), *next(iter(self._misses.items()))))

    def note(self, layer: str, shape: tuple[int, ...], *, fits: bool) -> None:
        """Note whether the tensor fitted what a layer has put out."""
        if fits:
            self._fits = True
        else:
            self._misses[layer] = shape
