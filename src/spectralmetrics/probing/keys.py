"""The keys of a probe's values: tuples inside, text for users; and a whole reading by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from spectralmetrics.metrics import Interval
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.sums import Sum

Key: TypeAlias = tuple[str, str, str]
"""Statistic, stage, layer; see :func:`as_text`."""


class ProbeReading(NamedTuple):
    """The values of a probe, read once.

    Attributes:
        values: as :meth:`.LayerProbe.compute` returns them.
        intervals: the intervals of the values that have one.
        sums: (stage, layer) -> sums of the layer. On several processes the first one may read them, one layer
            at a time, while all others are in :attr:`serve`.
        known: (stage, layer) -> eigenvalues that were read, see :meth:`.Spectrum.known`.
        facts: layer -> its facts, known without its data.
        serve: see :func:`~.processes.on_first_process`; None if this process has all sums.
    """

    values: dict[Key, Any]
    intervals: dict[Key, Interval]
    sums: Mapping[tuple[str, str], Sequence[Sum]]
    known: Mapping[tuple[str, str], Mapping[tuple[str, bool], Any]]
    facts: Mapping[str, LayerFacts]
    serve: Callable[[], None] | None = None


def as_text(values: Mapping[Key, Any]) -> dict[str, Any]:
    """Values by ``"{statistic}/{stage}/{layer}"``, as users read them.

    >>> as_text({("saturation", "eval", "conv1"): 0.5})
    {'saturation/eval/conv1': 0.5}
    """
    return {"/".join(key): value for key, value in values.items()}


def from_text(key: str) -> Key:
    """The key for a name made by :func:`as_text`; ``""`` for the stage or layer that a scalar does not have."""
    statistic, stage, layer = (*key.split("/", 2), "", "")[:3]
    return statistic, stage, layer


def module_key(stage: str, name: str) -> str:
    """A key for ``nn.ModuleDict``, which takes neither dots nor the names of its own methods."""
    name = name.replace("%", "%25").replace("/", "%2F")
    return f"{stage}/{name.replace('.', '/')}"
