"""Levels, jumps and falls to zero in the scales of successive steps. Scales are logarithms."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from spectralmetrics.probing.movers import Scales

_FEWEST_CHANGES, MOST_CHANGES = 12, 64
"""The number of earlier changes of the scale that a jump is compared with."""
LASTING = 12
"""The number of steps for which a layer must be zero or constant, and of which a level is the median: a layer
that is dropped at random in some batches runs again sooner. A change over so many times as many steps as usual
is no jump."""
_KNOWN = 2
"""The number of earlier scales near a new one, or beyond it, that make it one of several kinds of batches."""


def level(scales: Scales, jumped: int) -> float:
    """The median of 12 scales; NaN if there are fewer since a forward, or if it is 0."""
    logarithms = [scale for forward, _, scale in scales if forward >= jumped and scale < math.inf]  # nor NaN
    return math.exp(statistics.median(logarithms)) or math.nan if len(logarithms) == LASTING else math.nan


def has_jumped(scales: Scales, factor: float, deviations: float) -> bool:
    """True if the change to the last scale but one is a jump, and the last scale has not come back.

    Args:
        scales: the scales; the jump is compared with all but the last two.
        factor: the least factor of a jump.
        deviations: the least size of a jump in medians of the changes before.
    """
    *earlier, before, now, after = _logarithms(scales)
    changes = [abs(b - a) for a, b in itertools.pairwise([*earlier, before])]
    changes = [each for each in changes if math.isfinite(each)]
    if len(changes) < _FEWEST_CHANGES or _took_many(scales[:-1]):
        return False
    limit = max(deviations * statistics.median(changes), math.log(factor))
    # Also compared with the median of three: a single odd batch is no jump, nor is the way back from it.
    usual = _usual(scales)
    moves = [now - before, now - usual, after - before, after - usual]
    if not all(map(math.isfinite, moves)) or not (min(moves) > 0 or max(moves) < 0):
        return False
    return min(map(abs, moves)) > limit


def was_there(scales: Scales) -> bool:
    """True if the layer was as far as its last two scales before, or nearer to them than to its usual scale."""
    *earlier, now, after = _logarithms(scales)
    usual = _usual(scales)
    side = math.copysign(1, now - usual)
    new = min(side * now, side * after)
    return sum(side * each > (side * usual + new) / 2 for each in earlier if math.isfinite(each)) >= _KNOWN


def has_fallen_to_zero(scales: Scales) -> bool:
    """True if the last 12 scales are of zeros, and no scale before was."""
    logarithms = _logarithms(scales)
    before, now = logarithms[:-LASTING], logarithms[-LASTING:]
    return (
        len(before) > _FEWEST_CHANGES
        and all(map(math.isfinite, before))
        and all(each == -math.inf for each in now)
    )


def _logarithms(scales: Scales) -> Sequence[float]:
    return [scale for _, _, scale in scales]


def _usual(scales: Scales) -> float:
    """The scale before the last two: the median of three."""
    return statistics.median(_logarithms(scales[-5:-2]))


def _took_many(scales: Scales) -> bool:
    """True if the last change took far more steps than usual: the layer may have grown a step at a time."""
    steps = [step for _, step, _ in scales if step is not None]
    if len(steps) < len(scales):
        return False
    *usual, last = [b - a for a, b in itertools.pairwise(steps)]
    return last > LASTING * statistics.median(usual)
