"""Findings about a run at every position of the slider, in the words of a summary."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from spectralmetrics.findings import (
    SHORTEST_TAIL,
    Finding,
    LayerNumbers,
    in_tail,
    in_words,
    of_layer,
    read_numbers,
    true_ceiling,
)
from spectralmetrics.functional.tail import tail_start
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.report.spectra import Bounds
from spectralmetrics.recording.writers.arrays import SavedLayer

Array: TypeAlias = npt.NDArray[Any]

DEFAULT_THRESHOLD = 0.99
UNKNOWN_NUMBER = sys.maxsize
"""Stands for a number of observations that was not recorded, so that the page does not call it small."""


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
        numbers = read_numbers(
            layer.layer, layer.spectrum(), facts.ceiling, DEFAULT_THRESHOLD, facts.of_gradients
        )
        values, others = (np.where(each >= 0, each, np.nan) for each in (bounds.values, bounds.others))
        one = np.where(np.isnan(values), others, values)  # a sketch may give no value
        ends = np.fmin(one, others), np.maximum(one, others)
        return cls(where, numbers, values / numbers.width, np.stack([values, *ends]))

    @classmethod
    def of_values(
        cls,
        layer: str,
        share: float,
        dimension: float,
        spread: float,
        facts: LayerFacts,
        where: tuple[Any, ...],
    ) -> Known:
        """The numbers of a layer without arrays; its width is the dimension over the share."""
        is_known = share > 0 and not math.isnan(dimension)
        width = round(dimension / share) if is_known else 0
        ceiling = width if facts.ceiling is None else min(facts.ceiling, width)
        numbers = LayerNumbers(layer, width, ceiling, UNKNOWN_NUMBER, 0, has_interval=not math.isnan(spread))
        numbers = numbers._replace(of_gradients=facts.of_gradients)
        value = dimension if is_known else math.nan
        dimensions = np.array([[value], [value], [value + np.nan_to_num(spread)]])
        return cls(where, numbers, np.array([share if 0 <= share <= 1 else math.nan]), dimensions)

    def at(self, index: int) -> LayerNumbers:
        """The numbers at a threshold."""
        value, low, high = map(float, self.dimensions[:, index])
        return self.numbers._replace(dimension=(value, low, high))


class Words:
    """Findings at each stage, layer, threshold and epoch.

    Args:
        empty: an array with these axes that is ``MISSING`` everywhere.
    """

    def __init__(self, empty: Array) -> None:
        self._texts: dict[str, int] = {}
        self._problems: list[str] = []  # the part of each text that is a problem
        self._stands_out = empty
        self._in_tail, self._ceilings = empty.copy(), empty.copy()

    def add(self, layers: Sequence[Known], at: Any = slice(None)) -> None:
        """Add the layers of one stage and record, in forward order.

        Args:
            layers: the layers to add.
            at: index of the thresholds at which they hold.
        """
        if not layers:
            return
        shares = np.stack([each.shares for each in layers])
        is_known = ~np.isnan(shares).any(0)
        if any(each.numbers.of_gradients for each in layers):
            is_known[:] = False  # gradients have no tail
        first_of_tail = tail_start(np.nan_to_num(shares), shortest=SHORTEST_TAIL)
        numbers = [each.numbers for each in layers]
        for place, each in enumerate(layers):
            is_in_tail = is_known & (first_of_tail <= place) & (place < len(layers) - 1)
            indices: dict[tuple[Any, ...], int] = {}
            texts, ceilings = [], []
            for index in range(each.dimensions.shape[1]):
                here = each.at(index)
                key = (*np.nan_to_num(here.dimension, nan=-1), bool(is_in_tail[index]))
                if key not in indices:
                    tail = [in_tail("", here.layer, each.shares[index])] if is_in_tail[index] else []
                    indices[key] = self._place(here, numbers[:place], numbers[-1], tail)
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

    def _place(
        self,
        layer: LayerNumbers,
        before: Sequence[LayerNumbers],
        last: LayerNumbers,
        tail: Sequence[Finding],
    ) -> int:
        """The index of the text of a layer's findings."""
        own = of_layer("", layer, before, last) if layer.width else ()
        reasons = ", ".join(layer.few_because())
        findings = [
            each._replace(message=f"{each.message}: {reasons}") if each.kind == "few_observations" else each
            for each in (*own, *tail)
        ]
        text = "; ".join(in_words(findings))
        if text not in self._texts:
            self._texts[text] = len(self._texts)
            problems = in_words(each for each in findings if each.severity == "problem")
            self._problems.append("; ".join(problems))
        return self._texts[text]
