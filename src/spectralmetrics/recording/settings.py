"""Statistics as settings that JSON holds, and metrics made from them again."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

from torchmetrics import Metric

from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics import statistics as all_statistics

Settings: TypeAlias = dict[str, Any]
"""The settings of a metric, as JSON holds them; see :func:`describe`."""

MODULE = "module"
"""The key of the module of a statistic from another package, see :func:`describe`."""
# These decide how data is accumulated, not which value is read. A probe itself sketches wide layers.
_OF_ACCUMULATION = ("num_features", "gram_dtype", "nan_strategy", "folds", "sketch_size")
UNKNOWN = "settings not recorded"
"""The key of the names of settings that JSON cannot hold, see :func:`describe`."""


def describe(metric: Metric) -> Settings:
    """The statistic and the settings of a metric, as JSON can hold them; ``recompute`` rebuilds it from these.

    >>> from spectralmetrics import SaturationMetric
    >>> describe(SaturationMetric(threshold=0.9))["threshold"]
    0.9
    """
    if not isinstance(metric, SpectralMetric) or not (metric.takes_observations and metric.is_statistic):
        return {"class": type(metric).__name__}
    settings: Settings = {"metric": metric.short_name, "center": metric.center}
    if not type(metric).__module__.startswith("spectralmetrics."):
        settings[MODULE] = _module_of(type(metric))
    for name, parameter in inspect.signature(type(metric)).parameters.items():
        value = getattr(metric, name, parameter.default)
        if name in _OF_ACCUMULATION or value is parameter.empty:
            continue
        if isinstance(value, (list, tuple)):
            value = list(value)
        try:
            settings[name] = json.loads(json.dumps(value))
        except TypeError:
            settings.setdefault(UNKNOWN, []).append(name)
    return settings


def _module_of(kind: type) -> str:
    """The module to import for a class; empty for a class of a script, which cannot be imported by name."""
    if kind.__module__ != "__main__":
        return kind.__module__
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    return "" if spec is None else str(spec.name)


def rebuild_metrics(recorded: Mapping[str, Settings]) -> dict[str, SpectralMetric]:
    """The metrics of a run that can be made from their settings, by name."""
    metrics = {}
    for name in recorded:
        with contextlib.suppress(ValueError):
            metrics[name] = rebuild_statistic(name, recorded)
    return metrics


def _how_to_import(module: str | None) -> str:
    if module:
        return f"import {module} first (on the command line: --import {module}), or pass a metric"
    if module is None:  # up to 0.2.0 it was not recorded
        return "import its module first (on the command line: --import MODULE), or pass a metric"
    return (
        "it was defined in the script that recorded it; put it into a module and import that, or pass a metric"
    )


def rebuild_statistic(name: str, recorded: Mapping[str, Settings]) -> SpectralMetric:
    """A metric by the name that it was recorded under, with its settings, or by a short name.

    Raises:
        ValueError: if there is none, or its settings could not be recorded.
    """
    settings = {**recorded.get(name, {"metric": name})}
    kinds = all_statistics()
    short_name = settings.pop("metric", None)
    module = settings.pop(MODULE, None)
    if name in recorded and short_name not in kinds:
        raise ValueError(f"{name!r} was recorded by a class that is not imported: {_how_to_import(module)}")
    if short_name not in kinds:
        raise ValueError(f"expected statistics among {sorted(set(kinds) | set(recorded))}, got {name!r}")
    if unknown := settings.pop(UNKNOWN, None):
        raise ValueError(
            f"the settings {unknown} of {name!r} could not be recorded: pass a metric that has them"
        )
    try:
        return kinds[short_name](**settings)
    except TypeError as error:
        raise ValueError(f"the recorded settings of {name!r} are none of {short_name!r}: {error}") from error
