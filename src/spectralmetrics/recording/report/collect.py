"""The content of a page about recorded runs, as dicts, lists and arrays; ``page/data.js`` reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from spectralmetrics.functional.dimension import Rule
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.probing.facts import UNKNOWN_LAYER
from spectralmetrics.recording.record import RecordKey, Settings
from spectralmetrics.recording.report.encode import MISSING
from spectralmetrics.recording.report.spectra import Bounds, Thresholds, bounds, points, positions, slider
from spectralmetrics.recording.report.timeline import QUANTITIES, of_history
from spectralmetrics.recording.report.words import Known, Words
from spectralmetrics.recording.saved import Failures, SavedRun
from spectralmetrics.recording.writers.arrays import SavedLayer
from spectralmetrics.table import shorten_names

Progress: TypeAlias = Callable[[str, int], None]
Content: TypeAlias = dict[str, Any]
Array: TypeAlias = npt.NDArray[Any]
Family: TypeAlias = tuple[Rule, bool]
"""Rule and center: the settings besides the threshold on which a dimension depends."""

DEFAULT_THRESHOLD = 0.99
DEFAULT_FAMILY: Family = ("explained", True)
"""The family of summaries, and of statistics that were not recorded."""
KINDS = {"saturation": "share", "intrinsic_dimension": "dimension"}
"""The statistics that the slider moves: a dimension, or one divided by the width."""
NARROW = 512
"""Below this width one thread decomposes a covariance as fast as several."""
SHORT = 22
"""The most characters of a layer's name on an axis without room for whole names."""
MOST_POINTS = 1_280_000
"""The most points of all spectra together, so that a page of 200 layers and 100 epochs stays below 10 MB."""


def collect(runs: Mapping[str, SavedRun], progress: Progress) -> Content:
    """The content of a page.

    Arrays have the axes (stage, layer, epoch), or (stage, layer, threshold or point, epoch), in the order of
    the page's and the run's lists. Where nothing was recorded, they hold ``MISSING``, or ``"is_recorded"`` 0.
    ``"held_out"`` has the dimensions of held-out data, ``MISSING`` without folds and ``UNKNOWN`` while a fold
    is empty; with the dimension they are the ends of its interval. ``"stands_out"`` has indices into the list
    ``"words"``, ``"in_tail"`` 0 or 1. If no run recorded the end of an epoch, epochs are steps.

    Args:
        runs: the runs by their names.
        progress: called before each layer with its name and the number of all layers.

    Raises:
        ValueError: if a file cannot be read.
    """
    recorded = [
        float(each["threshold"]) for run in runs.values() for each in run.statistics.values() if _moves(each)
    ]
    thresholds = slider(recorded)
    by_step = not any(run.has_epochs for run in runs.values())
    where = {name: run.where for name, run in runs.items()}
    stages = _in_order(dict.fromkeys(stage for stage, _ in keys) for keys in where.values())
    layers = _in_order(
        [layer for one, layer in keys if one == stage] for keys in where.values() for stage in stages
    )
    total = sum(len(run.layers_in(key)) for run in runs.values() for key in run.places(by_step))
    most = min(max(MOST_POINTS // max(total, 1), 16), 128)
    has_arrays = any(run.arrays for run in runs.values())
    contents = []
    chosen = []
    failures = Failures()
    for name, run in runs.items():
        axes = _Axes(stages, layers, run.places(by_step))
        families = list(dict.fromkeys([*_families(run), DEFAULT_FAMILY]))
        content = _from_records(run, axes, families)
        chosen += [*content.pop("recorded"), *content["statistics"]]
        words = Words(axes.new(MISSING, len(thresholds)))
        arrays = {}
        if run.arrays:
            parts = (np.array(thresholds), most, failures, words)

            def advance(part: str, name: str = name) -> None:
                progress(f"{name}, {part}", total)

            arrays = _from_arrays(run, axes, families, *parts, advance)
        else:
            _words_of_values(run, axes, content["statistics"], words, None if not has_arrays else thresholds)
        facts = [run.facts.get(layer, UNKNOWN_LAYER)._asdict() for layer in layers]
        contents.append(
            {
                "name": name,
                "epochs": list(axes.epochs),
                "facts": facts,
                "alarms": list(map(str, run.alarms)),
                "history": {stage: of_history(rows, layers) for stage, rows in run.history.items()},
                "arrays": arrays,
                **content,
                **words.content(),
            }
        )
    failures.warn(stacklevel=3)
    shares = [
        name
        for name in chosen
        if any(run["statistics"].get(name, {}).get("kind") == "share" for run in contents)
    ]
    own = [name for run in contents for name, entry in run["statistics"].items() if "values" in entry]
    return {
        "unit": "step" if by_step else "epoch",
        "thresholds": thresholds,
        "threshold": thresholds.index(recorded[0] if recorded else DEFAULT_THRESHOLD),
        # A statistic that was recorded, saturation before others.
        "statistic": next((name for name in [*shares, *chosen] if name in own), next(iter(chosen), None)),
        "quantities": QUANTITIES,
        "stages": stages,
        "layers": layers,
        "short_layers": list(shorten_names(layers, SHORT).values()),
        "runs": contents,
    }


class _Axes:
    """The axes of a run's arrays."""

    def __init__(self, stages: Sequence[str], layers: Sequence[str], places: Mapping[RecordKey, int]) -> None:
        self._stages = {stage: index for index, stage in enumerate(stages)}
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self.epochs = list(places.values())
        self.records = {key: index for index, key in enumerate(places)}

    def new(self, fill: float, *between: int) -> Array:
        shape = (len(self._stages), len(self._layers), *between, len(self.epochs))
        return np.full(shape, fill, dtype=type(fill))

    def line(self, fill: float) -> Array:
        return np.full(len(self.epochs), fill, dtype=type(fill))

    def of(self, stage: str, layer: str, key: RecordKey) -> tuple[Any, ...]:
        return (self._stages[stage], self._layers[layer], ..., self.records[key])


def _moves(settings: Settings) -> bool:
    return settings.get("metric") in KINDS and "threshold" in settings


def _families(run: SavedRun) -> list[Family]:
    return [_family(each) for each in run.statistics.values() if _moves(each)]


def _family(settings: Settings) -> Family:
    return settings.get("rule", "explained"), settings.get("center", True)


def _from_records(run: SavedRun, axes: _Axes, families: list[Family]) -> Content:
    """The numbers of ``records.csv``, and the ``"kind"`` of the statistics that the slider moves."""
    statistics: dict[str, Content] = {}
    scalars: dict[tuple[str, str], Content] = {}
    for row in run.rows:
        if row.key not in axes.records:
            continue
        if not row.layer:
            key, epoch = (row.statistic, row.stage), axes.records[row.key]
            if key not in scalars:
                empty = {"values": axes.line(np.nan), "is_recorded": axes.line(0)}
                scalars[key] = {"name": row.statistic, "stage": row.stage, **empty}
            scalars[key]["values"][epoch] = row.value
            scalars[key]["is_recorded"][epoch] = 1
        elif row.is_of_layer:
            if row.statistic not in statistics:
                statistics[row.statistic] = {"values": axes.new(np.nan), "is_recorded": axes.new(0)}
            where = axes.of(row.stage, row.layer, row.key)
            statistics[row.statistic]["values"][where] = row.value
            statistics[row.statistic]["is_recorded"][where] = 1
            for end, value in (("low", row.low), ("high", row.high)):
                if value is not None:
                    ends = statistics[row.statistic].setdefault(end, axes.new(np.nan))
                    ends[where] = value
    recorded = list(statistics)
    # With arrays every run has these two.
    names = list(dict.fromkeys([*statistics, *(KINDS if run.arrays else ())]))
    for name in names:
        # As recompute does for a name that was not recorded.
        settings = run.statistics.get(name, {"metric": name})
        kind = KINDS.get(str(settings.get("metric")))
        entry = statistics.setdefault(name, {})
        entry["kind"] = kind
        if kind is not None:
            entry["threshold"] = settings.get("threshold", DEFAULT_THRESHOLD)
            entry["family"] = families.index(_family(settings))
        elif run.arrays and "threshold" in settings:
            entry["fixed"] = float(settings["threshold"])
    return {
        "statistics": {name: statistics[name] for name in names},
        "scalars": list(scalars.values()),
        "recorded": recorded,
    }


def _from_arrays(
    run: SavedRun,
    axes: _Axes,
    families: list[Family],
    thresholds: Thresholds,
    most: int,
    failures: Failures,
    words: Words,
    progress: Callable[[str], None],
) -> Content:
    """Dimensions at all thresholds, points of the spectra, and counts of the observations."""
    arrays = {name: axes.new(MISSING) for name in ("width", "observations", "non_finite", "dead")}
    arrays["largest"] = axes.new(np.nan)
    arrays["points"] = axes.new(MISSING, most)
    tables = [axes.new(MISSING, len(thresholds)) for _ in families]
    held_out = [axes.new(MISSING, len(thresholds)) for _ in families]
    chosen: dict[int, Array] = {}
    for key in (key for key in axes.records if key in run.arrays):
        of_stage: dict[str, list[Known]] = {}
        for layer in run.layers(key):
            progress(f"{key}: {layer.layer} in {layer.stage}")
            where = axes.of(layer.stage, layer.layer, key)
            with failures.of(key, layer, "the spectrum"):
                width = len(layer.mean)
                arrays["width"][where] = width
                arrays["observations"][where] = layer.count
                arrays["non_finite"][where] = layer.non_finite
                measured = _measured(layer, families, thresholds)
                for table, other, each in zip(tables, held_out, measured, strict=True):
                    table[where], other[where] = each
                facts = run.facts.get(layer.layer, UNKNOWN_LAYER)
                known = Known.of_layer(layer, facts, where, measured[families.index(DEFAULT_FAMILY)])
                of_stage.setdefault(layer.stage, []).append(known)
                arrays["dead"][where] = known.numbers.dead
                spectrum = layer.spectrum(families[0][1])
                if spectrum.sketch is not None:
                    raise ValueError(
                        "a sketch of its covariance was kept, and the page draws no spectrum of it"
                    )
                drawn = spectrum.eigenvalues.numpy()
                if width not in chosen:
                    chosen[width] = positions(width, most)
                arrays["largest"][where] = drawn[0]
                arrays["points"][where][: len(chosen[width])] = points(drawn, chosen[width])
        for layers in of_stage.values():
            words.add(layers)
    return {
        **arrays,
        "dimensions": tables,
        # Most runs have no folds; their pages carry no empty tables.
        **({"held_out": held_out} if any((table != MISSING).any() for table in held_out) else {}),
        "positions": {width: list(map(int, each)) for width, each in chosen.items()},
    }


def _measured(layer: SavedLayer, families: Sequence[Family], thresholds: Thresholds) -> list[Bounds]:
    spectra: dict[bool, Spectrum] = {}
    with _threads(1 if len(layer.mean) < NARROW else torch.get_num_threads()):
        for center in dict.fromkeys(center for _, center in families):
            spectra[center] = layer.spectrum(center)
        return [bounds(spectra[center], thresholds, rule) for rule, center in families]


def _words_of_values(
    run: SavedRun,
    axes: _Axes,
    statistics: Mapping[str, Content],
    words: Words,
    thresholds: Sequence[float] | None,
) -> None:
    """Add the findings of a run of which only numbers were recorded.

    Args:
        run: a run without arrays.
        axes: the axes of its arrays.
        statistics: the statistics of the page.
        words: the words to add to.
        thresholds: the thresholds of the page; the words hold at the recorded one. None: they hold at all.
    """
    kinds = {entry["kind"]: (name, entry["threshold"]) for name, entry in statistics.items() if entry["kind"]}
    if "share" not in kinds:
        return
    threshold = kinds["share"][1]
    dimension, dimension_threshold = kinds.get("dimension", ("", None))
    at = slice(None) if thresholds is None else [thresholds.index(threshold)]
    numbers: dict[tuple[str, RecordKey], dict[str, dict[str, float]]] = {}
    for row in run.rows:
        if row.is_of_layer and row.key in axes.records:
            of_layer = numbers.setdefault((row.stage, row.key), {}).setdefault(row.layer, {})
            of_layer[row.statistic] = row.value
            if row.statistic == dimension and row.low is not None and row.high is not None:
                of_layer["spread"] = row.high - row.low
    for (stage, key), layers in numbers.items():
        known = []
        for layer, values in layers.items():
            if kinds["share"][0] in values:
                share = values[kinds["share"][0]]
                value = values.get(dimension, np.nan) if dimension_threshold == threshold else np.nan
                facts = run.facts.get(layer, UNKNOWN_LAYER)
                where = axes.of(stage, layer, key)
                known.append(Known.of_values(layer, share, value, values.get("spread", np.nan), facts, where))
        words.add(known, at)


def _in_order(sequences: Iterable[Iterable[str]]) -> list[str]:
    """All names of several sequences; a new name comes behind the name before it in its own sequence.

    >>> _in_order([["a", "c"], ["a", "b", "c", "d"]])
    ['a', 'b', 'c', 'd']
    """
    merged: list[str] = []
    known: set[str] = set()
    for sequence in sequences:
        place = 0
        for name in sequence:
            if name in known:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                known.add(name)
                place += 1
    return merged


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Inside the block, torch uses this number of threads.

    Where other programs keep the cores busy, threads that share a small matrix wait for each other hundreds of
    times: the 420 spectra of the demo have taken 45 s on two threads, and 0.8 s on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
