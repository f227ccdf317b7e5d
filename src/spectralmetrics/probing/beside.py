"""Masks and labels: tensors that are laid beside a model for as long as it runs on what they describe."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.probing.hooks import tell
from spectralmetrics.probing.rules import Batch


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
    """The tensor that each thread has laid last."""

    laid: _Laid | None = None


class Beside(ABC):
    """A tensor laid beside the model, such as a mask, and the outputs that it did not fit.

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
        """The complaint about a tensor that fitted none of these layers' outputs."""

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
