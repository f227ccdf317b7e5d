"""Files of a run that no writer keeps: ``recording.json``, with metrics made from it, and ``alarms.csv``."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchmetrics import Metric

from spectralmetrics.findings import Finding
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics import statistics as all_statistics
from spectralmetrics.monitoring import Alarm
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.files import blank_missing, csv_text, read_table, replace_file, sweep
from spectralmetrics.recording.record import RecordKey, Settings

FILE_NAME = "recording.json"
ALARMS = "alarms.csv"
ALARM_COLUMNS = ("step", *Finding._fields, "before")
_FORMAT = 1
_KINDS: dict[str, tuple[type, ...]] = {"metric": (str,), "center": (bool,), "threshold": (float, int)}
MODULE = "module"
"""The key of the module of a statistic from another package, see :func:`describe`."""
UNKNOWN = "settings not recorded"
"""The key of the names of settings that JSON cannot hold, see :func:`describe`."""
# These decide how data is accumulated, not which value is read. A probe itself sketches wide layers.
_OF_ACCUMULATION = ("num_features", "gram_dtype", "nan_strategy", "folds", "sketch_size")


@dataclass
class Manifest:
    """The state of a run.

    Attributes:
        writers: name -> the last record before that writer joined; None if it joined at the beginning. Records
            up to that one are whole without this writer's part.
        statistics: name -> settings of the metric, see :func:`describe`.
        layers: name -> facts about the layer besides its data: ``kind``, ``ceiling``, and
            ``of_gradients`` if gradients were observed.
        last: the last whole record, for runs whose writers keep no records.
        trained: name of a layer whose weights were tested -> the first record at which they were trained; None
            if they have been random, as initialised, at all records so far.
    """

    writers: dict[str, RecordKey | None] = field(default_factory=dict)
    statistics: dict[str, Settings] = field(default_factory=dict)
    last: RecordKey | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: dict[str, RecordKey | None] = field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a run; an empty one if it has none.

    Raises:
        ValueError: if there is one that cannot be read, or of a later release.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return Manifest()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version > _FORMAT:
            raise ValueError(f"format {version} is of a later release")
        content["last"] = content.pop("last_epoch", None)
        manifest = Manifest(**content)
        _check(manifest)
        manifest.writers = {name: _key(name, each) for name, each in manifest.writers.items()}
        manifest.trained = {name: _key(name, each) for name, each in manifest.trained.items()}
        manifest.last = _key("last_epoch", manifest.last)
        return manifest
    except KeyError as error:
        raise ValueError(f"expected {path} to be a recorder's: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected {path} to be a recorder's: {error}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest of a run."""
    content = {
        "format": _FORMAT,
        "writers": {name: _plain(key) for name, key in manifest.writers.items()},
        "statistics": manifest.statistics,
        "last_epoch": _plain(manifest.last),
        "layers": manifest.layers,
    }
    if manifest.trained:  # others can be read by earlier releases
        content["trained"] = {name: _plain(key) for name, key in manifest.trained.items()}
    replace_file(directory / FILE_NAME, json.dumps(content, indent=1).encode())


def _plain(key: RecordKey | None) -> int | list[int] | None:
    """The end of an epoch as its number, as earlier releases wrote it; a step as epoch and step."""
    return None if key is None else key.epoch if key.step is None else [key.epoch, key.step]


def _key(name: str, content: Any) -> RecordKey | None:
    if content is None or type(content) is int:
        return None if content is None else RecordKey(content)
    if isinstance(content, list) and len(content) == 2 and all(type(each) is int for each in content):
        return RecordKey(*content)
    raise ValueError(f"expected an epoch, [epoch, step] or null as {name!r}, got {content!r}")


def _check(manifest: Manifest) -> None:
    """Raise a ValueError unless all parts have the types that their readers expect."""
    parts = (manifest.writers, manifest.statistics, manifest.layers, manifest.trained)
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("writers, statistics, layers and trained are no objects")
    for name, facts in manifest.layers.items():
        ceiling = facts.get("ceiling")
        if set(facts) - {"of_gradients"} != set(LayerFacts._fields) or not isinstance(facts["kind"], str):
            raise ValueError(f"expected kind and ceiling of the layer {name!r}, got {facts!r}")
        if ceiling is not None and type(ceiling) is not int:
            raise ValueError(f"expected an integer or null as the ceiling of {name!r}, got {ceiling!r}")
        if type(facts.get("of_gradients", False)) is not bool:
            raise ValueError(f"expected true or false as of_gradients of {name!r}, got {facts!r}")
    for name, settings in manifest.statistics.items():
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object as the settings of {name!r}, got {settings!r}")
        for key, kinds in _KINDS.items():
            if type(settings.get(key, kinds[0]())) not in kinds:
                kind = " or ".join(each.__name__ for each in kinds)
                raise ValueError(f"expected a {kind} as the {key} of {name!r}, got {settings[key]!r}")


# -- statistics as settings ------------------------------------------------------------------------------------


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


# -- alarms.csv ------------------------------------------------------------------------------------------------


def read_alarms(directory: Path) -> list[Alarm]:
    """The alarms of a run, in the order in which they were raised; none without the file.

    Raises:
        ValueError: if it is not a table of alarms.
    """
    return read_table(directory / ALARMS, "an alarm", _alarm, ALARM_COLUMNS)


def write_alarms(directory: Path, alarms: Iterable[Alarm]) -> None:
    """Replace the alarms of a run by these alarms; an error leaves the earlier ones."""
    sweep(directory, ALARMS)
    lines = [blank_missing((alarm.step, *alarm.finding, alarm.before)) for alarm in alarms]
    if lines:
        replace_file(directory / ALARMS, csv_text([ALARM_COLUMNS, *lines]))
    else:
        (directory / ALARMS).unlink(missing_ok=True)


def _alarm(cells: list[str]) -> Alarm:
    step, stage, layer, kind, severity, message, *values = cells
    value, low, high, before = (float(each) if each else math.nan for each in values)
    if severity not in ("problem", "note"):
        raise ValueError
    return Alarm(int(step), Finding(stage, layer, kind, severity, message, value, low, high), before)  # type: ignore[arg-type]
