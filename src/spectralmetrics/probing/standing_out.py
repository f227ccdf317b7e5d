"""What stands out of a layer, in the words of its findings, at whatever threshold."""

from __future__ import annotations

from collections.abc import Iterable

from spectralmetrics.findings import Finding, LayerNumbers, order_of
from spectralmetrics.probing.facts import LayerFacts

UNKNOWN_LAYER = LayerFacts("", None)
"""A layer of which nothing is known besides its data."""


def true_ceiling(numbers: LayerNumbers) -> int:
    """The most directions that a layer's weights allow; its width where that is unknown or refuted.

    A dimension above the ceiling refutes it: weights that changed meanwhile, or a forward of the layer's own.

    >>> numbers = LayerNumbers("conv", 128, 64, 1000, 0, dimension=(70.0, 70.0, 70.0))
    >>> true_ceiling(numbers), true_ceiling(numbers._replace(dimension=(60.0, 60.0, 60.0)))
    (128, 64)
    """
    return numbers.width if numbers.found > numbers.ceiling else numbers.ceiling


def in_words(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The messages of a layer's findings, problems first."""
    return tuple(each.message for each in sorted(findings, key=order_of))
