"""A record of a run, as writers get it: its key, values, rows and sums, and the names of layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.tail import MEAN_LAYER, mean_over_layers, recorded_name
from spectralmetrics.metrics import Interval
from spectralmetrics.metrics.sharing import spectrum_of
from spectralmetrics.probing.facts import Key, LayerFacts
from spectralmetrics.sums import Moments, Reservoir, SpectralSum, Sum

Settings: TypeAlias = dict[str, Any]
"""The settings of a metric, as JSON holds them; see :func:`~spectralmetrics.recording.manifest.describe`."""


class RecordKey(NamedTuple):
    """The identity of a record.

    Attributes:
        epoch: the epoch that has ended, or the current epoch at a step.
        step: number of optimiser steps so far, for a record within an epoch; None at the end of the epoch.
    """

    epoch: int
    step: int | None = None

    @property
    def order(self) -> tuple[int, float]:
        """The sort key of records: steps come before the end of their epoch.

        >>> RecordKey(1, 700).order < RecordKey(1).order < RecordKey(2, 800).order
        True
        """
        return self.epoch, math.inf if self.step is None else self.step

    @property
    def ended_epoch(self) -> int | None:
        """The last epoch that has ended; None in the first one."""
        ended = self.epoch if self.step is None else self.epoch - 1
        return None if ended < 0 else ended

    def __str__(self) -> str:
        return f"epoch {self.epoch}" if self.step is None else f"epoch {self.epoch}, step {self.step}"


class Row(NamedTuple):
    """One number of a run; the columns of ``records.csv``.

    Attributes:
        epoch: the epoch of the record.
        stage: ``"train"``, ``"eval"``, or the stage given to :meth:`Recorder.add_scalar`.
        layer: qualified name of the layer, or ``"mean"`` for the mean over all layers of the stage.
        statistic: the name of the metric or scalar.
        value: the number; int for dimensions, otherwise float.
        low: the lower end of its interval, see :meth:`.SpectralMetric.interval`; None without folds.
        high: the upper end of its interval; None without folds.
        step: the step of a record within an epoch; None at the end of the epoch.
    """

    epoch: int
    stage: str
    layer: str
    statistic: str
    value: float
    low: float | None = None
    high: float | None = None
    step: int | None = None

    @property
    def key(self) -> RecordKey:
        """The key of its record."""
        return RecordKey(self.epoch, self.step)

    @property
    def is_of_layer(self) -> bool:
        """True for the number of one layer; False for means over layers and for scalars."""
        return self.layer not in ("", MEAN_LAYER)


@dataclass(frozen=True)
class Record:
    """One record of a run: the end of an epoch, or a step within one.

    Attributes:
        epoch: number of the epoch.
        values: ``"{statistic}/{stage}/{layer}"`` -> value of any shape, in forward order, as
            :meth:`LayerProbe.compute` returns them, means over layers and added scalars included.
        rows: the values that are numbers.
        sums: (stage, layer) -> sums over the observations of all processes, the spectral one first. They are
            the state itself, which changes later: read what you need before ``write`` returns. A layer whose
            observations were all left out for NaN or infinities has sums of no observations. On several
            processes, reading them fetches them from the others; keep the sums of one layer at a time.
        statistics: name -> settings of the metric, as JSON holds them.
        layers: name -> facts of the layer, known without its data.
        step: number of optimiser steps; None at the end of an epoch.
        known: (stage, layer) -> the eigenvalues that the values were read from; see :meth:`spectrum`.
        untrained: name of a layer -> True if its weights are still random, as initialised, False if they are
            trained. Only layers whose findings may depend on it are in it.
    """

    epoch: int
    values: Mapping[str, Tensor]
    rows: Sequence[Row]
    sums: Mapping[tuple[str, str], Sequence[Sum]] = field(default_factory=dict)
    statistics: Mapping[str, Settings] = field(default_factory=dict)
    layers: Mapping[str, LayerFacts] = field(default_factory=dict)
    step: int | None = None
    known: Mapping[tuple[str, str], Mapping[tuple[str, bool], Any]] = field(default_factory=dict)
    untrained: Mapping[str, bool] = field(default_factory=dict)

    @property
    def key(self) -> RecordKey:
        """The key of the record."""
        return RecordKey(self.epoch, self.step)

    def spectrum(self, stage: str, layer: str) -> Spectrum | None:
        """The spectrum of a layer about its mean, on the CPU.

        None if no covariance or sketch is kept, or if all observations were left out for NaN or infinities.
        """
        spectrum = spectrum_of(self.sums[stage, layer])
        if spectrum is None or not int(spectrum.num_observations):
            return None
        spectrum.learn_known(self.known.get((stage, layer), {}))
        return spectrum

    @property
    def moments(self) -> dict[tuple[str, str], Moments]:
        """(stage, layer) -> moments, all folds together; holds the moments of all layers in memory at once."""
        totals = {
            place: each.total
            for place, sums in self.sums.items()
            for each in sums
            if isinstance(each, SpectralSum) and each.describes_layer and int(each.num_observations)
        }
        return {place: total for place, total in totals.items() if isinstance(total, Moments)}

    @property
    def samples(self) -> dict[tuple[str, str], Reservoir]:
        """(stage, layer) -> sample of observations, if an ``EigenspaceEmbeddingMetric`` keeps one."""
        return {
            place: each for place, sums in self.sums.items() for each in sums if isinstance(each, Reservoir)
        }


class RecordedSums(Mapping[tuple[str, str], Sequence[Sum]]):
    """Sums of layers by the layers' recorded names; each reading may fetch them."""

    def __init__(self, sums: Mapping[tuple[str, str], Sequence[Sum]]) -> None:
        self._sums = sums
        self._places = {(stage, recorded_name(layer)): (stage, layer) for stage, layer in sums}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._places)

    def __contains__(self, place: object) -> bool:
        return place in self._places

    def __getitem__(self, place: tuple[str, str]) -> Sequence[Sum]:
        return self._sums[self._places[place]]


def recorded_threshold(statistics: Mapping[str, Settings]) -> float:
    """The first threshold among the settings of statistics, or 0.99."""
    return next((float(each["threshold"]) for each in statistics.values() if "threshold" in each), 0.99)


def check_recordable(what: str, name: str) -> None:
    r"""Raise a ValueError for a name that the files of a run cannot hold.

    >>> check_recordable("layer", "a\0b")
    Traceback (most recent call last):
    ValueError: expected a layer's name without null characters and lone surrogates, got 'a\x00b'; rename it
    """
    if "\0" in name or any("\ud800" <= each <= "\udfff" for each in name):
        raise ValueError(
            f"expected a {what}'s name without null characters and lone surrogates, got {name!r}; rename it"
        )


def tidy_rows(
    key: RecordKey, values: Mapping[Key, Tensor], intervals: Mapping[Key, Interval] | None = None
) -> list[Row]:
    """The numbers among values, as rows, and after each stage the means over its layers.

    Args:
        key: the key of the record.
        values: (statistic, stage, layer) -> value, stage by stage and in forward order. Values that are no
            single numbers are left out.
        intervals: the intervals of some of the values, by the same keys.

    >>> import torch
    >>> values = {("saturation", "eval", layer): torch.tensor(0.5 * k) for k, layer in enumerate("ab", 1)}
    >>> [(row.layer, row.value) for row in tidy_rows(RecordKey(0), values)]
    [('a', 0.5), ('b', 1.0), ('mean', 0.75)]
    """
    rows: list[Row] = []
    for stage in dict.fromkeys(stage for _, stage, _ in values):
        of_stage: dict[str, dict[str, float]] = {}
        for (statistic, value_stage, layer), value in values.items():
            if value_stage == stage and value.ndim == 0 and not value.is_complex():
                number = int(value) if value.dtype == torch.bool else value.item()
                ends = (intervals or {}).get((statistic, stage, layer), ())
                low, high = (end.item() for end in ends) if ends else (None, None)
                rows.append(Row(key.epoch, stage, layer, statistic, number, low, high, key.step))
                of_stage.setdefault(statistic, {})[layer] = number
        for statistic, numbers in of_stage.items():
            mean = mean_over_layers(numbers.values())
            rows.append(Row(key.epoch, stage, MEAN_LAYER, statistic, mean, step=key.step))
    return rows


def undefined_layers(rows: Iterable[Row]) -> dict[str, dict[str, list[str]]]:
    """Statistic -> stage -> layers that the mean leaves out, if it is defined for other layers of the stage."""
    missing: dict[str, dict[str, list[str]]] = {}
    rows = list(rows)
    defined = {(row.key, row.statistic, row.stage) for row in rows if row.layer and not math.isnan(row.value)}
    for row in rows:
        if row.is_of_layer and math.isnan(row.value) and (row.key, row.statistic, row.stage) in defined:
            layers = missing.setdefault(row.statistic, {}).setdefault(row.stage, [])
            layers += [] if row.layer in layers else [row.layer]
    return missing


def warn_of_undefined(rows: Sequence[Row], known: Container[str] = ()) -> None:
    """Warn once for each statistic whose means leave out layers.

    Args:
        rows: the rows of one record or several.
        known: statistics without a warning, such as statistics with an earlier warning.
    """
    records: dict[RecordKey, list[Row]] = {}
    for row in rows:
        records.setdefault(row.key, []).append(row)
    worst: dict[str, dict[str, tuple[list[str], int]]] = {}  # from the record that leaves out most layers
    for of_record in records.values():
        for statistic, stages in undefined_layers(of_record).items():
            for stage, layers in stages.items():
                own = [row for row in of_record if (row.statistic, row.stage) == (statistic, stage)]
                by_stage = worst.setdefault(statistic, {})
                if len(layers) > len(by_stage.get(stage, ([], 0))[0]):
                    by_stage[stage] = layers, len({row.layer for row in own if row.is_of_layer})
    for statistic, named in worst.items():
        if statistic in known:
            continue
        words = [
            f"over {number - len(layers)} of {number} layers in {stage}, without {', '.join(map(repr, layers))}"
            for stage, (layers, number) in named.items()
        ]
        warnings.warn(
            f"the mean of {statistic!r} is {' and '.join(words)}, where it is undefined (NaN)",
            UserWarning,
            stacklevel=3,
        )
