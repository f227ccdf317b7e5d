"""What is known at the end of an epoch, as a writer gets it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.metrics import Interval, SpectralMetric
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.sums import Moments, Reservoir, SpectralSum, Sum
from spectralmetrics.tail import MEAN_LAYER

Settings: TypeAlias = dict[str, Any]
"""Of a metric, as JSON holds them; see :func:`describe`."""


class Row(NamedTuple):
    """One number of a run; the columns of ``records.csv``.

    Attributes:
        epoch: of the record.
        stage: ``"train"``, ``"eval"``, or what :meth:`Recorder.add_scalar` was given.
        layer: its qualified name, or ``"mean"`` for the mean over all layers of that stage.
        statistic: the name of the metric or scalar.
        value: dimensions are int, all else is float.
        low: the lower end of its interval, see :meth:`.SpectralMetric.interval`; None without folds.
        high: the upper end of its interval; None without folds.
    """

    epoch: int
    stage: str
    layer: str
    statistic: str
    value: float
    low: float | None = None
    high: float | None = None


COLUMNS = Row._fields


@dataclass(frozen=True)
class Record:
    """One epoch of a run.

    Attributes:
        epoch: its number.
        values: ``"{statistic}/{stage}/{layer}"`` -> value of any shape, in forward order, as
            :meth:`LayerProbe.compute` returns them, means over layers and added scalars included.
        rows: those of the values that are numbers.
        sums: (stage, layer) -> sums over the observations of all processes, the spectral one first. They are
            the state itself, which goes on changing: read what you need before ``write`` returns.
        statistics: name -> settings, see :func:`describe`.
        layers: name -> what is known of the layer besides its data.
    """

    epoch: int
    values: Mapping[str, Tensor]
    rows: Sequence[Row]
    sums: Mapping[tuple[str, str], Sequence[Sum]] = field(default_factory=dict)
    statistics: Mapping[str, Settings] = field(default_factory=dict)
    layers: Mapping[str, LayerFacts] = field(default_factory=dict)

    @property
    def moments(self) -> dict[tuple[str, str], Moments]:
        """(stage, layer) -> moments, all folds together."""
        totals = {
            place: each.total
            for place, sums in self.sums.items()
            for each in sums
            if isinstance(each, SpectralSum) and each.describes_layer
        }
        return {place: total for place, total in totals.items() if isinstance(total, Moments)}

    @property
    def samples(self) -> dict[tuple[str, str], Reservoir]:
        """(stage, layer) -> sample of observations, where an ``EigenspaceEmbeddingMetric`` keeps one."""
        return {
            place: each for place, sums in self.sums.items() for each in sums if isinstance(each, Reservoir)
        }


UNKNOWN = "settings not recorded"
"""Under which :func:`describe` names settings that JSON cannot hold."""


def tidy_rows(
    epoch: int,
    values: Mapping[tuple[str, str, str], Tensor],
    intervals: Mapping[tuple[str, str, str], Interval] | None = None,
) -> list[Row]:
    """The numbers among values, as rows, and after each stage the means over its layers.

    Args:
        epoch: of the record.
        values: (statistic, stage, layer) -> value, stage by stage and in forward order. What is no single
            number is left out.
        intervals: of some of them, by the same keys.

    >>> import torch
    >>> values = {("saturation", "eval", layer): torch.tensor(0.5 * k) for k, layer in enumerate("ab", 1)}
    >>> [(row.layer, row.value) for row in tidy_rows(0, values)]
    [('a', 0.5), ('b', 1.0), ('mean', 0.75)]
    """
    rows: list[Row] = []
    for stage in dict.fromkeys(stage for _, stage, _ in values):
        of_stage: dict[str, list[float]] = {}
        for (statistic, its_stage, layer), value in values.items():
            if its_stage == stage and value.ndim == 0 and not value.is_complex():
                number = int(value) if value.dtype == torch.bool else value.item()
                ends = (intervals or {}).get((statistic, stage, layer), ())
                rows.append(Row(epoch, stage, layer, statistic, number, *(end.item() for end in ends)))
                of_stage.setdefault(statistic, []).append(number)
        for statistic, numbers in of_stage.items():
            rows.append(Row(epoch, stage, MEAN_LAYER, statistic, sum(numbers) / len(numbers)))
    return rows


def describe(metric: Metric) -> Settings:
    """The statistic and the settings of a metric, as JSON can hold them; what ``recompute`` rebuilds it from.

    >>> from spectralmetrics import SaturationMetric
    >>> describe(SaturationMetric(threshold=0.9))["threshold"]
    0.9
    """
    if not isinstance(metric, SpectralMetric) or not (metric.takes_observations and metric.is_statistic):
        return {"class": type(metric).__name__}
    settings: Settings = {"metric": metric.short_name, "center": metric.center}
    for name, parameter in inspect.signature(type(metric)).parameters.items():
        value = getattr(metric, name, parameter.default)
        if name in ("num_features", "gram_dtype", "nan_strategy", "folds") or value is parameter.empty:
            continue  # a width of no consequence, and what changes how data is taken but not what it says
        if isinstance(value, (list, tuple)):
            value = list(value)
        try:
            settings[name] = json.loads(json.dumps(value))
        except TypeError:
            settings.setdefault(UNKNOWN, []).append(name)
    return settings
