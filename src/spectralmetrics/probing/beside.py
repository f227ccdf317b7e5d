"""A tensor that is laid beside a model for as long as it runs on what the tensor describes."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spectralmetrics.probing.hooks import tell


@dataclass(eq=False)
class _Laid:
    """A tensor that is valid in the thread that laid it, and which outputs it did not fit.

    Attributes:
        value: the tensor.
        fits: whether it fitted any output.
        misses: layer -> shape of an output that it did not fit.
    """

    value: Tensor
    fits: bool = False
    misses: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Thread(threading.local):
    """What each thread has laid last."""

    laid: _Laid | None = None


class Beside(ABC):
    """What is valid now, and which outputs it did not fit.

    Threads that run the model side by side have each what they laid themselves. One that laid nothing, such as
    those of ``nn.DataParallel``, has what another one laid last.
    """

    def __init__(self) -> None:
        self._all: list[_Laid] = []  # of all threads
        self._thread = _Thread()
        self._named: set[str] = set()  # layers of which it has been said that something did not fit

    @property
    def value(self) -> Tensor | None:
        """The tensor that is valid in this thread; None outside of :meth:`within`."""
        laid = self._laid()
        return None if laid is None else laid.value

    @abstractmethod
    def check(self, value: Tensor) -> Tensor:
        """The tensor as it is used; a TypeError or ValueError if it cannot be."""

    @abstractmethod
    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """What to say of a tensor that did not fit what these layers have put out, but maybe that of others."""

    @contextlib.contextmanager
    def within(self, value: Tensor) -> Iterator[None]:
        """Have a tensor be valid inside; warn at the end of layers that it did not fit, once of each."""
        laid, before = _Laid(self.check(value)), self._thread.laid
        self._thread.laid = laid
        self._all.append(laid)
        try:
            yield
        finally:
            self._thread.laid = before
            self._all.remove(laid)
        new = {layer: shape for layer, shape in laid.misses.items() if layer not in self._named}
        if new:
            self._named.update(new)
            misses = ", ".join(f"{layer!r} {shape}" for layer, shape in new.items())
            tell(self.complaint(value, misses, fits_others=laid.fits))

    def note(self, layer: str, shape: tuple[int, ...], *, fits: bool) -> None:
        """Note whether the tensor fitted what a layer has put out."""
        laid = self._laid()
        if laid is None:
            return
        if fits:
            laid.fits = True
        else:
            laid.misses.setdefault(layer, shape)

    def _laid(self) -> _Laid | None:
        if not self._all:
            return None
        own = self._thread.laid
        return own if own is not None else next(reversed(self._all), None)  # which may be gone by now

    def __getstate__(self) -> dict[str, Any]:
        return {"_named": self._named}  # beside a copy nothing runs

    def __setstate__(self, state: dict[str, Any]) -> None:
        Beside.__init__(self)
        self.__dict__.update(state)
