"""Masks and labels: tensors given beside a model while it runs on the batch that they describe."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.rules import Batch
from spectralmetrics.sums.checks import dtype_or_type
from spectralmetrics.torch_private import Version


@dataclass(eq=False)
class _Given:
    """A tensor for the outputs of one thread, and the outputs that it did not fit.

    Attributes:
        value: the tensor.
        fits: True once it has fitted an output.
        misses: layer -> shape of an output that it did not fit.
    """

    value: Tensor
    fits: bool = False
    misses: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _copy: tuple[Tensor, Version] | None = None

    def copied(self) -> Tensor:
        """A copy of the tensor as it is now; the same copy until the tensor is changed in place."""
        if self.value.is_inference():  # cannot be changed while gradients are computed
            return self.value
        if self._copy is None or self._copy[1].has_changed():
            self._copy = self.value.clone(), Version(self.value)
        return self._copy[0]


class _Thread(threading.local):
    """The tensor that was given last in each thread."""

    given: _Given | None = None


class Beside(ABC):
    """A tensor given beside the model, such as a mask, and the outputs that it did not fit.

    Each thread that runs the model uses the tensor given in that thread. A thread without one, such as a thread
    of ``nn.DataParallel``, uses the tensor given last in any thread.

    Args:
        copies: True if a forward needs its tensor later, when the user may have changed it in place.
    """

    def __init__(self, *, copies: bool = False) -> None:
        self.given: list[_Given] = []  # in all threads
        self._copies = copies
        self._thread = _Thread()
        self._named: set[str] = set()  # layers that a warning has named

    @property
    def value(self) -> Tensor | None:
        """The tensor for this thread; None outside of :meth:`within`."""
        given = self._current()
        if given is None:
            return None
        return given.copied() if self._copies else given.value

    @abstractmethod
    def check(self, value: Tensor) -> Tensor:
        """The tensor in the form that is used; raises a TypeError or ValueError if it has none."""

    @abstractmethod
    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """The warning about a tensor that fitted no output of these layers."""

    @contextlib.contextmanager
    def within(self, value: Tensor) -> Iterator[None]:
        """Use a tensor inside; warn at the end about layers that it did not fit, once about each layer."""
        given, before = _Given(self.check(value)), self._thread.given
        self._thread.given = given
        self.given.append(given)
        try:
            yield
        finally:
            self._thread.given = before
            self.given.remove(given)
        new = {layer: shape for layer, shape in given.misses.items() if layer not in self._named}
        if new:
            self._named.update(new)
            misses = ", ".join(f"{layer!r} {shape}" for layer, shape in new.items())
            warn_user(self.complaint(value, misses, fits_others=given.fits))

    def note(self, layer: str, shape: tuple[int, ...], *, fits: bool) -> None:
        """Record if the tensor fitted a layer's output."""
        given = self._current()
        if given is None:
            return
        if fits:
            given.fits = True
        else:
            given.misses.setdefault(layer, shape)

    def _current(self) -> _Given | None:
        if not self.given:
            return None
        own = self._thread.given
        # None if that other thread has just ended.
        return own if own is not None else next(reversed(self.given), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # no model runs beside a copy


class Masks(Beside):
    """The mask in use, and the sequences that it did not fit."""

    def check(self, value: Tensor) -> Tensor:
        """See :class:`.Beside`."""
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            how = "; mask.bool() makes one of ones and zeros" if isinstance(value, Tensor) else ""
            raise TypeError(f"expected a boolean mask, True for valid tokens, got {dtype_or_type(value)}{how}")
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

    def note_fit(self, layer: str, batch: Batch) -> None:
        """Record if the mask fitted a layer's output."""
        if self.value is None or batch.is_feature_map:
            return
        # One row for each sample: there is no padding.
        if batch.kind != "rows" or batch.num_samples not in (1, len(self.value)):
            self.note(layer, tuple(batch.values.shape), fits=batch.valid is not None)


class Labels(Beside):
    """The labels in use, and the outputs that they did not fit."""

    def check(self, value: Tensor) -> Tensor:
        """See :class:`.Beside`."""
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            raise TypeError(
                "expected labels as an integer tensor, the class of each sample or step, got"
                f" {dtype_or_type(value)}"
            )
        if value.ndim not in (1, 2):
            raise ValueError(f"expected labels of shape (N,) or (N, T), got {tuple(value.shape)}")
        return value.to(torch.int64)

    def complaint(self, value: Tensor, misses: str, *, fits_others: bool) -> str:
        """See :class:`.Beside`."""
        which = "of some layers" if fits_others else "that was observed"
        return (
            f"labels of shape {tuple(value.shape)} fit no output {which}: {misses}; metrics that need labels"
            " leave these out"
        )

    def join(self, layer: str, batch: Batch, labels: Tensor, time_first: bool = False) -> Batch:
        """A whole output with the labels of its samples or steps; without labels if they do not fit.

        Labels fit only an output with as many samples: it is not known which part of the batch a chunk, or the
        input of an expert, is.

        Args:
            layer: the name of the layer.
            batch: its whole output.
            labels: the labels that were given for the forward.
            time_first: True if flattened tokens are (T·N, D).
        """
        is_current = labels is self.value
        shape: tuple[int, ...] = tuple(batch.values.shape[: labels.ndim])
        if labels.ndim == 2 and batch.kind == "sequence" and shape == labels.mT.shape:
            labels = labels if shape == labels.shape else labels.mT
        elif labels.ndim == 2 and batch.kind == "rows" and len(batch.values) == labels.numel():
            labels = (labels.mT if time_first else labels).reshape(-1)
        elif shape != labels.shape or (labels.ndim == 2 and batch.kind != "sequence"):
            if is_current:
                self.note(layer, tuple(batch.values.shape), fits=False)
            return batch
        if is_current:
            self.note(layer, tuple(batch.values.shape), fits=True)
        return replace(batch, labels=labels)
