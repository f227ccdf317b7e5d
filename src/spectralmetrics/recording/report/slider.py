"""A layer at each position of a page's slider: dimensions, findings in words, and points of its spectrum."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectralmetrics.findings import (
    SHORTEST_TAIL,
    Finding,
    LayerNumbers,
    are_new,
    in_tail,
    in_words,
    of_layer,
    read_numbers,
    true_ceiling,
)
from spectralmetrics.functional.dimension import Rule, check_rule
from spectralmetrics.functional.sketched import intrinsic_dimension
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.tail import tail_start
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.record import Row
from spectralmetrics.recording.writers.arrays import SavedLayer

Array: TypeAlias = npt.NDArray[Any]
Family: TypeAlias = tuple[Rule, bool]
"""Rule and center: the settings besides the threshold on which a dimension depends."""

DEFAULT_THRESHOLD = 0.99
MISSING = -1
"""The number in an array of integers where nothing was recorded."""
UNKNOWN = -2
"""The number in an array of integers where the recorded sums give no value yet."""
UNKNOWN_NUMBER = sys.maxsize
"""Stands for a number of observations that was not recorded, so that the page does not call it small."""
STEPS_PER_DECADE = 4096
"""Resolution of the points of a spectrum: each is within 0.03 % of its eigenvalue."""
ZERO = 2**20
"""The point that stands for an eigenvalue of zero."""
NARROW = 512
"""Below this width one thread decomposes a covariance as fast as several."""


def slider(recorded: list[float]) -> list[float]:
    """The thresholds that a page offers: hundredths from 0.5, thousandths from 0.97, 1, and recorded ones.

    >>> positions = slider([0.985, 0.9999])
    >>> positions[:3], positions[-3:]
    ([0.5, 0.51, 0.52], [0.999, 0.9999, 1.0])
    """
    hundredths = [number / 100 for number in range(50, 97)]
    thousandths = [number / 1000 for number in range(970, 1001)]
    return sorted({*hundredths, *thousandths, *recorded})


def dimensions(eigenvalues: Tensor, thresholds: Array, rule: Rule = "explained") -> npt.NDArray[np.int64]:
    """The intrinsic dimension at many thresholds.

    Equal to :func:`spectralmetrics.functional.intrinsic_dimension` at each threshold, but found by bisection,
    since the cumulative sums rise.

    >>> dimensions(torch.tensor([4.0, 3.0, 2.0, 1.0]), np.array([0.4, 0.41, 0.85]))
    array([1, 2, 3])
    """
    check_rule(rule)
    values = eigenvalues.to(torch.float64).clamp(min=0)
    cumulative = values.cumsum(-1)
    total = cumulative[-1]
    if not total > 0:
        return np.zeros(len(thresholds), dtype=np.int64)
    shares = torch.from_numpy(thresholds)
    if rule == "delve":
        return torch.searchsorted(cumulative / values.sum(-1, keepdim=True), shares).numpy()
    limits = (shares - len(values) * torch.finfo(torch.float64).eps) * total
    return (torch.searchsorted(cumulative, limits) + 1).numpy()


class Bounds(NamedTuple):
    """Dimensions at T positions of the slider: ``MISSING`` where a sketch gives no value.

    Beside them the other ends of their intervals: ``MISSING`` without one, ``UNKNOWN`` while a fold is empty.
    """

    values: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]


def bounds(spectrum: Spectrum, thresholds: Array, rule: Rule) -> Bounds:
    """The dimensions of a spectrum that is kept as a covariance, as folds, or as a sketch."""
    if spectrum.sketch is not None:
        leading, total, width = spectrum.eigenvalues, spectrum.total_variance, spectrum.num_features
        estimates = [intrinsic_dimension(leading, total, width, each, rule) for each in thresholds.tolist()]
        known = [MISSING if each.value.isnan() else int(each.value) for each in estimates]
        return Bounds(np.array(known), np.array([int(each.low) for each in estimates]))
    values = dimensions(spectrum.eigenvalues, thresholds, rule)
    if spectrum.num_folds < 2:
        return Bounds(values, np.full_like(values, MISSING))
    held_out = spectrum.held_out()
    if held_out is None:
        return Bounds(values, np.full_like(values, UNKNOWN))
    return Bounds(values, dimensions(held_out.eigenvalues, thresholds, rule))


def measured(layer: SavedLayer, families: Sequence[Family], thresholds: Array) -> list[Bounds]:
    """The dimensions of a layer in each family."""
    with _threads(1 if layer.spectral.num_features < NARROW else torch.get_num_threads()):
        return [bounds(layer.spectrum(center), thresholds, rule) for rule, center in families]


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Inside the block, torch uses this number of threads.

    Where other programs keep the cores busy, threads that share a small matrix wait for each other hundreds of
    times: the 420 spectra of the demo have taken 45 s on two threads, and 0.8 s on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def positions(width: int, most: int) -> npt.NDArray[np.int64]:
    """The numbers, from 1, of the eigenvalues to draw of ``width``: all, or ``most``, evenly on a log axis.

    >>> positions(5, 10), positions(1000, 7)
    (array([1, 2, 3, 4, 5]), array([   1,    3,   10,   32,  100,  316, 1000]))
    """
    if width <= most:
        return np.arange(1, width + 1)
    return np.unique(np.geomspace(1, width, most).round().astype(np.int64))


def points(eigenvalues: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Chosen eigenvalues, numbered from 1, as steps of 1/4096 of a decade below the largest; ``ZERO`` for zero.

    >>> points(np.array([2.0, 0.2, 0.0]), np.array([1, 2, 3]))
    array([      0,    4096, 1048576])
    """
    picked = eigenvalues[chosen - 1]
    steps = np.full(len(picked), ZERO)
    positive = picked > 0
    steps[positive] = np.rint(-np.log10(picked[positive] / eigenvalues[0]) * STEPS_PER_DECADE)
    capped: npt.NDArray[np.int64] = np.minimum(steps, ZERO)
    return capped


class Known(NamedTuple):
    """The numbers of a layer in one record.

    Attributes:
        where: index into the arrays of the page.
        numbers: the numbers for findings, with the dimension at some threshold.
        shares: saturations at the thresholds, NaN if unknown, shape (T,), or (1,) for all thresholds.
        dimensions: likewise, with the ends of their intervals, shape (3, T) or (3, 1).
    """

    where: tuple[Any, ...]
    numbers: LayerNumbers
    shares: Array
    dimensions: Array

    @classmethod
    def of_layer(cls, layer: SavedLayer, facts: LayerFacts, where: tuple[Any, ...], bounds: Bounds) -> Known:
        """The numbers of a layer with arrays."""
        spectrum = layer.spectrum()
        numbers = read_numbers(layer.layer, spectrum, facts.ceiling, DEFAULT_THRESHOLD, facts.of_gradients)
        values, others = (np.where(each >= 0, each, np.nan) for each in (bounds.values, bounds.others))
        one = np.where(np.isnan(values), others, values)  # a sketch may give no value
        ends = np.fmin(one, others), np.maximum(one, others)
        return cls(where, numbers, values / numbers.width, np.stack([values, *ends]))

    @classmethod
    def of_rows(
        cls, saturation: Row, dimension: Row | None, facts: LayerFacts, where: tuple[Any, ...]
    ) -> Known:
        """The numbers of a layer without arrays; its width is the dimension over the saturation."""
        share, value, spread = saturation.value, math.nan, 0.0
        if dimension is not None and share > 0:
            value = dimension.value
            if dimension.low is not None and dimension.high is not None:
                spread = float(np.nan_to_num(dimension.high - dimension.low))
        width = 0 if math.isnan(value) else round(value / share)
        ceiling = width if facts.ceiling is None else min(facts.ceiling, width)
        numbers = LayerNumbers(
            saturation.layer, width, ceiling, UNKNOWN_NUMBER, 0, of_gradients=facts.of_gradients
        )
        dimensions = np.array([[value], [value], [value + spread]])
        return cls(where, numbers, np.array([share if 0 <= share <= 1 else math.nan]), dimensions)

    def at(self, index: int) -> LayerNumbers:
        """The numbers at a threshold."""
        value, low, high = map(float, self.dimensions[:, index])
        return self.numbers._replace(dimension=(value, low, high))


class Words:
    """Findings at each stage, layer, threshold and epoch: the axes of an array that is ``MISSING`` at first."""

    def __init__(self, empty: Array) -> None:
        self._texts: dict[str, int] = {}
        self._problems: list[str] = []  # the part of each text that is a problem
        self._stands_out = empty
        self._in_tail, self._ceilings = empty.copy(), empty.copy()

    def add(
        self, layers: Sequence[Known], at: Any = slice(None), *, untrained: Mapping[str, bool] | None = None
    ) -> None:
        """Add the layers of one stage and record, in forward order.

        Args:
            layers: the layers.
            at: the indices of their thresholds.
            untrained: layer -> True if its weights are as initialised.
        """
        if not layers:
            return
        shares = np.stack([each.shares for each in layers])
        is_known = ~np.isnan(shares).any(0)
        if any(each.numbers.of_gradients for each in layers):
            is_known[:] = False  # gradients have no tail
        first_of_tail = tail_start(np.nan_to_num(shares), shortest=SHORTEST_TAIL)
        numbers = [each.numbers for each in layers]
        new = are_new([each.layer for each in numbers], untrained or {})
        for place, (each, is_new) in enumerate(zip(layers, new, strict=True)):
            is_in_tail = is_known & (first_of_tail <= place) & (place < len(layers) - 1)
            indices: dict[tuple[Any, ...], int] = {}
            texts, ceilings = [], []
            for index in range(each.dimensions.shape[1]):
                here = each.at(index)
                key = (*np.nan_to_num(here.dimension, nan=-1), bool(is_in_tail[index]))
                if key not in indices:
                    tail = [in_tail("", here.layer, each.shares[index])] if is_in_tail[index] else []
                    own = of_layer("", here, numbers[:place], numbers[-1], is_new) if here.width else ()
                    indices[key] = self._place(here, [*own, *tail])
                texts.append(indices[key])
                ceilings.append(true_ceiling(here))
            self._stands_out[each.where][at] = texts
            if here.width:
                self._ceilings[each.where][at] = ceilings
            if not np.isnan(shares).any():
                self._in_tail[each.where][at] = is_in_tail

    def content(self) -> dict[str, Any]:
        """The texts and arrays for the page."""
        return {
            "words": list(self._texts),
            "problems": self._problems,
            "stands_out": self._stands_out,
            "in_tail": self._in_tail,
            "ceilings": self._ceilings,
        }

    def _place(self, layer: LayerNumbers, found: Sequence[Finding]) -> int:
        """The index of the text of a layer's findings."""
        reasons = ", ".join(layer.few_because())
        findings = [
            each._replace(message=f"{each.message}: {reasons}") if each.kind == "few_observations" else each
            for each in found
        ]
        text = "; ".join(in_words(findings))
        if text not in self._texts:
            self._texts[text] = len(self._texts)
            problems = in_words(each for each in findings if each.severity == "problem")
            self._problems.append("; ".join(problems))
        return self._texts[text]
