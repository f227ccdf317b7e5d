"""The keys of a probe's values: tuples inside, text for users; and a whole reading by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import Interval

Key: TypeAlias = tuple[str, str, str]
"""Statistic, stage, layer; see :func:`as_text`."""


class ProbeReading(NamedTuple):
    """What a probe has seen, read once.

    Attributes:
        values: as :meth:`.LayerProbe.compute` returns them.
        intervals: of those values that have one.
        spectra: (stage, layer) -> what is kept of the layer, with the eigenvalues that were read.
    """

    values: dict[Key, Any]
    intervals: dict[Key, Interval]
    spectra: dict[tuple[str, str], Spectrum]


def as_text(values: Mapping[Key, Any]) -> dict[str, Any]:
    """Values by ``"{statistic}/{stage}/{layer}"``, as users read them.

    >>> as_text({("saturation", "eval", "conv1"): 0.5})
    {'saturation/eval/conv1': 0.5}
    """
    return {"/".join(key): value for key, value in values.items()}


def from_text(key: str) -> Key:
    """The key of a value that :func:`as_text` gave a name; a scalar without stage or layer has ``""`` there."""
    statistic, stage, layer = (*key.split("/", 2), "", "")[:3]
    return statistic, stage, layer
