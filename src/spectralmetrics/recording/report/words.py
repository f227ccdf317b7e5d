"""What stands out of the layers of a run at every position of the slider, in the words of a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.probing.standing_out import (
    Word,
    dead_features,
    true_ceiling,
    words_of_layer,
    words_of_network,
)
from spectralmetrics.recording.report.spectra import Bounds, Thresholds
from spectralmetrics.recording.writers.arrays import SavedLayer

Array: TypeAlias = npt.NDArray[Any]


class Known(NamedTuple):
    """What is known of a layer in one record.

    Attributes:
        where: in arrays of the page.
        width: the number of features; 0 if it is unknown.
        shares: saturations at the thresholds, NaN where one is unknown, shape (T,) or (1,) for all.
        dimensions: or lower bounds of them, of that shape; 0 where nothing is known.
        spreads: widths of their intervals, of that shape; NaN without one.
        facts: of the layer.
        counts: arguments of :func:`.words_of_layer`.
    """

    where: tuple[Any, ...]
    width: int
    shares: Array
    dimensions: Array
    spreads: Array
    facts: LayerFacts
    counts: dict[str, Any]

    @classmethod
    def of_layer(cls, layer: SavedLayer, facts: LayerFacts, where: tuple[Any, ...], found: Bounds) -> Known:
        """Of a layer with arrays."""
        spectrum = layer.spectrum()
        is_known = found.values >= 0
        others = found.others.astype(float)
        others[others < 0] = np.nan
        return cls(
            where,
            spectrum.num_features,
            np.where(is_known, found.values / spectrum.num_features, np.nan),
            np.where(is_known, found.values, np.nan_to_num(others)).astype(int),
            np.abs(found.values - others),
            facts,
            {
                "observations": layer.count,
                "dead": dead_features(spectrum),
                "left_out": layer.non_finite,
                "is_sketched": spectrum.sketch is not None,
            },
        )

    @classmethod
    def of_values(
        cls, share: float, dimension: float, spread: float, facts: LayerFacts, where: tuple[Any, ...]
    ) -> Known:
        """Of recorded numbers alone; the width is what they are a share of."""
        is_dimension = share > 0 and not math.isnan(dimension)
        return cls(
            where,
            round(dimension / share) if is_dimension else 0,
            np.array([share if 0 <= share <= 1 else np.nan]),
            np.array([int(dimension) if is_dimension else 0]),
            np.array([spread]),
            facts,
            {},
        )


class Words:
    """What stands out at each stage, layer, threshold and epoch.

    Args:
        empty: an array of these axes in which nothing is known.
        thresholds: of the slider.
    """

    def __init__(self, empty: Array, thresholds: Thresholds) -> None:
        self._texts: dict[str, int] = {}
        self._stands_out = empty
        self._in_tail, self._ceilings = empty.copy(), empty.copy()
        self._number = len(thresholds)

    def add(self, layers: Sequence[Known], at: Any = slice(None)) -> None:
        """Add the layers of one stage and record, in forward order.

        Args:
            layers: to add.
            at: the thresholds where they hold.
        """
        if not layers:
            return
        ceilings = [
            np.array([true_ceiling(each.facts, each.width, found) for found in each.dimensions])
            for each in layers
        ]
        shares = np.stack([each.shares for each in layers])
        of_width = [
            c / each.width if each.width else np.ones(len(c)) for c, each in zip(ceilings, layers, strict=True)
        ]
        beside = words_of_network(shares, np.stack(of_width))
        for each, ceiling, network in zip(layers, ceilings, beside, strict=True):
            known: dict[tuple[Any, ...], int] = {}
            places = []
            for index, (found, spread) in enumerate(zip(each.dimensions, each.spreads, strict=True)):
                first = [Word(text) for text, holds in network if holds[index]]
                is_known = not math.isnan(each.shares[index])
                key = (int(found), int(ceiling[index]), float(np.nan_to_num(spread)), is_known, *first)
                if key not in known:
                    known[key] = self._place(
                        [*first, *_own_words(each, int(found), spread, ceiling[index], is_known)]
                    )
                places.append(known[key])
            self._stands_out[each.where][at] = places
            if each.width:
                self._ceilings[each.where][at] = ceiling
            if not np.isnan(shares).any():
                self._in_tail[each.where][at] = next(
                    (holds for text, holds in network if text == "in the tail"), 0
                )

    def content(self) -> dict[str, Any]:
        """For the page."""
        return {
            "words": list(self._texts),
            "stands_out": self._stands_out,
            "in_tail": self._in_tail,
            "ceilings": self._ceilings,
        }

    def _place(self, words: Sequence[Word]) -> int:
        text = "; ".join(f"{word.text}: {word.why}" if word.why else word.text for word in words)
        return self._texts.setdefault(text, len(self._texts))


def _own_words(layer: Known, found: int, spread: float, ceiling: int, is_known: bool) -> list[Word]:
    if not layer.width:
        return []
    return words_of_layer(found, spread, width=layer.width, ceiling=ceiling, is_known=is_known, **layer.counts)
