"""What stands out of a layer, in words: by itself, and beside the other layers of its network."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.table import plural
from spectralmetrics.tail import tail_start

Array: TypeAlias = npt.NDArray[Any]

UNKNOWN_LAYER = LayerFacts("", None)
"""A layer of which nothing is known besides its data."""
IN_TAIL = "in the tail"
_ENOUGH = 10  # observations per direction found (and at all), below which a value is not to be trusted
_WIDE = 0.1  # share of the width, beyond which an interval says little
_AT_CEILING = 0.95  # share of the ceiling from which on a layer uses all that its weights allow
_COLLAPSED = 0.25  # share of the largest saturation below which an output layer has lost its directions


class Word(NamedTuple):
    """What stands out of a layer.

    Attributes:
        text: in a few words.
        why: the rule behind it; empty where the text says it all.
    """

    text: str
    why: str = ""


def words_of_network(shares: Array, ceilings: Array) -> list[list[tuple[str, Array]]]:
    """What stands out of a layer beside the others of its network.

    Args:
        shares: saturations, layer by layer in forward order, shape (L, ...); NaN where one is unknown.
        ceilings: of the saturations, of the same shape.

    Returns:
        For each layer, words and where they hold, of shape (...).

    >>> shares = np.array([0.5, 0.7, 0.1, 0.04])
    >>> [[word for word, holds in each if holds] for each in words_of_network(shares, np.ones(4))]
    [[], [], ['in the tail'], ['collapsed']]
    """
    if not len(shares):
        return []
    is_known = ~np.isnan(shares).any(0)
    filled = np.nan_to_num(shares)
    first = tail_start(filled)
    found = [
        [(IN_TAIL, is_known & (first <= index) & (index < len(shares) - 1))] for index in range(len(shares))
    ]
    # The output layer belongs to no tail, since the task sets its width: it has to be far below all others.
    largest = filled[:-1].max(0, initial=0.0)
    last = filled[-1] / ceilings[-1]
    found[-1] = [("collapsed", is_known & (filled[-1] > 0) & (last < _COLLAPSED * largest))]
    return found


def true_ceiling(facts: LayerFacts, width: int, dimension: float) -> int:
    """The most directions that a layer's weights allow; its width where that is unknown or refuted.

    A dimension above the ceiling refutes it: weights that changed meanwhile, or a forward of the layer's own.

    >>> true_ceiling(LayerFacts("Conv2d", 64), 128, 60), true_ceiling(LayerFacts("Conv2d", 64), 128, 70)
    (64, 128)
    """
    ceiling = width if facts.ceiling is None else min(facts.ceiling, width)
    return width if dimension > ceiling else ceiling


def words_of_layer(
    dimension: int,
    spread: float,
    *,
    width: int,
    ceiling: int,
    observations: int | None = None,
    dead: int = 0,
    left_out: int = 0,
    is_sketched: bool = False,
    is_known: bool = True,
) -> list[Word]:
    """What stands out of a layer by itself.

    Args:
        dimension: the intrinsic dimension; a lower bound if it is not known.
        spread: width of its interval; NaN without one.
        width: the number of features D.
        ceiling: see :func:`true_ceiling`.
        observations: their number n; None if it was not recorded.
        dead: number of features that do not vary.
        left_out: number of observations left out for NaN or infinities.
        is_sketched: whether a sketch stands for the covariance.
        is_known: whether the dimension is.

    >>> [word.text for word in words_of_layer(12, 20, width=64, ceiling=64, observations=100, dead=1)]
    ['few observations', '1 dead feature']
    """
    words = []
    if not is_known:
        words.append(Word(f"more than {dimension - 1} directions: larger sketch"))
    elif is_sketched:
        words.append(Word("sketched"))
    why = []
    if observations is not None and observations < _ENOUGH * max(dimension, 1):
        why.append(f"below {_ENOUGH} times the dimension")
    if spread > _WIDE * width and not is_sketched:
        why.append("the interval is wider than a tenth of the width")
    if why:
        words.append(Word("few observations", ", ".join(why)))
    if dimension and dimension >= _AT_CEILING * ceiling:
        words.append(Word("at its ceiling"))
    if dead:
        words.append(Word(plural(dead, "dead feature")))
    if left_out:
        words.append(Word(f"{plural(left_out, 'row')} with NaN or infinities left out"))
    return words


def dead_features(spectrum: Spectrum) -> int:
    """The number of features that do not vary; 0 of a single observation, of which all are equal."""
    return int((spectrum.variances == 0).sum()) if int(spectrum.num_observations) > 1 else 0
