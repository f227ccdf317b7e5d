"""The content of a page about recorded runs, as dicts, lists and arrays; ``page/data.js`` reads it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.probing.facts import UNKNOWN_LAYER
from spectralmetrics.probing.movers import HistoryRow
from spectralmetrics.recording.record import RecordKey, Row, Settings
from spectralmetrics.recording.report.slider import (
    DEFAULT_THRESHOLD,
    MISSING,
    Array,
    Bounds,
    Family,
    Known,
    Words,
    measured,
    points,
    positions,
    slider,
)
from spectralmetrics.recording.saved import Failures, SavedRun
from spectralmetrics.table import shorten_names

Progress: TypeAlias = Callable[[str, int], None]
Content: TypeAlias = dict[str, Any]

DEFAULT_FAMILY: Family = ("explained", True)
"""The family of summaries, and of statistics that were not recorded."""
KINDS = {"saturation": "share", "intrinsic_dimension": "dimension"}
"""The statistics that the slider moves: a dimension, or one divided by the width."""
SHORT = 22
"""The most characters of a layer's name on an axis without room for whole names."""
MOST_POINTS = 1_280_000
"""The most points of all spectra together, so that a page of 200 layers and 100 epochs stays below 10 MB."""
QUANTITIES = {"rms": "root mean square", "max_abs": "largest magnitude", "zero_share": "share of zeros"}
MOST_COLUMNS = 400
"""The most columns of the picture of forwards; with more forwards, several share a column."""


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
    moved = {name: [each for each in run.statistics.values() if _moves(each)] for name, run in runs.items()}
    recorded = [float(each["threshold"]) for own in moved.values() for each in own]
    thresholds = slider(recorded)
    by_step = not any(run.has_epochs for run in runs.values())
    where = [run.where for run in runs.values()]
    stages = _in_order(dict.fromkeys(stage for stage, _ in keys) for keys in where)
    layers = _in_order([layer for one, layer in keys if one == stage] for keys in where for stage in stages)
    total = sum(len(run.layers_in(key)) for run in runs.values() for key in run.places(by_step))
    most = min(max(MOST_POINTS // max(total, 1), 16), 128)
    has_arrays = any(run.arrays for run in runs.values())
    contents = []
    failures = Failures()
    for name, run in runs.items():
        axes = _Axes(stages, layers, run.places(by_step))
        families = list(dict.fromkeys([*map(_family, moved[name]), DEFAULT_FAMILY]))
        content = _from_records(run, axes, families)
        words = Words(axes.new(MISSING, len(thresholds)))
        arrays = {}
        if run.arrays:
            parts = (np.array(thresholds), most, failures, words)

            def advance(part: str, name: str = name) -> None:
                progress(f"{name}, {part}", total)

            arrays = _from_arrays(run, axes, families, *parts, advance)
        else:
            _words_of_values(run, axes, content["statistics"], words, thresholds if has_arrays else None)
        contents.append(
            {
                "name": name,
                "epochs": axes.epochs,
                "facts": [run.facts.get(layer, UNKNOWN_LAYER)._asdict() for layer in layers],
                "alarms": list(map(str, run.alarms)),
                "history": {stage: of_history(rows, layers) for stage, rows in run.history.items()},
                "arrays": arrays,
                **content,
                **words.content(),
            }
        )
    failures.warn(stacklevel=3)
    entries = [(name, entry) for run in contents for name, entry in run["statistics"].items()]
    chosen = [name for name, _ in entries]
    shares = [name for name in chosen if any(own == name and each["kind"] == "share" for own, each in entries)]
    own = {name for name, entry in entries if "values" in entry}
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


def _family(settings: Settings) -> Family:
    return settings.get("rule", "explained"), settings.get("center", True)


def _from_records(run: SavedRun, axes: _Axes, families: list[Family]) -> Content:
    """The numbers of ``records.csv``, and the ``"kind"`` of the statistics that the slider moves."""
    statistics: dict[str, Content] = defaultdict(
        lambda: {"values": axes.new(np.nan), "is_recorded": axes.new(0)}
    )
    scalars: dict[tuple[str, str], Content] = defaultdict(
        lambda: {"values": axes.line(np.nan), "is_recorded": axes.line(0)}
    )
    for row in run.rows:
        if row.key not in axes.records or row.layer == MEAN_LAYER:
            continue
        where: Any = axes.of(row.stage, row.layer, row.key) if row.layer else axes.records[row.key]
        entry = statistics[row.statistic] if row.layer else scalars[row.statistic, row.stage]
        entry["values"][where] = row.value
        entry["is_recorded"][where] = 1
        for end, value in (("low", row.low), ("high", row.high)):
            if value is not None:
                entry.setdefault(end, axes.new(np.nan))[where] = value
    # With arrays every run has these two.
    for name in dict.fromkeys([*statistics, *(KINDS if run.arrays else ())]):
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
        "statistics": dict(statistics),
        "scalars": [{"name": name, "stage": stage, **each} for (name, stage), each in scalars.items()],
    }


def _from_arrays(
    run: SavedRun,
    axes: _Axes,
    families: list[Family],
    thresholds: Array,
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
                width = layer.spectral.num_features
                arrays["width"][where] = width
                arrays["observations"][where] = int(layer.spectral.num_observations)
                arrays["non_finite"][where] = int(layer.spectral.num_left_out)
                unknown = np.full(len(thresholds), MISSING)
                found = [Bounds(unknown, unknown)] * len(families)
                if not layer.is_empty:
                    found = measured(layer, families, thresholds)
                for table, other, each in zip(tables, held_out, found, strict=True):
                    table[where], other[where] = each
                facts = run.facts.get(layer.layer, UNKNOWN_LAYER)
                known = Known.of_layer(layer, facts, where, found[families.index(DEFAULT_FAMILY)])
                of_stage.setdefault(layer.stage, []).append(known)
                if layer.is_empty:
                    continue
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
            words.add(layers, untrained=run.untrained(key, [each.numbers.layer for each in layers]))
    return {
        **arrays,
        "dimensions": tables,
        # Most runs have no folds; their pages carry no empty tables.
        **({"held_out": held_out} if any((table != MISSING).any() for table in held_out) else {}),
        "positions": {width: list(map(int, each)) for width, each in chosen.items()},
    }


def _words_of_values(
    run: SavedRun,
    axes: _Axes,
    statistics: Mapping[str, Content],
    words: Words,
    thresholds: Sequence[float] | None,
) -> None:
    """Add the findings of a run without arrays; they hold at the recorded threshold, or at all."""
    kinds = {entry["kind"]: (name, entry["threshold"]) for name, entry in statistics.items() if entry["kind"]}
    if "share" not in kinds:
        return
    saturation, threshold = kinds["share"]
    dimension, dimension_threshold = kinds.get("dimension", ("", None))
    at = slice(None) if thresholds is None else [thresholds.index(threshold)]
    rows: dict[tuple[str, RecordKey], dict[str, dict[str, Row]]] = {}
    for row in run.rows:
        if row.is_of_layer and row.key in axes.records:
            rows.setdefault((row.stage, row.key), {}).setdefault(row.layer, {})[row.statistic] = row
    for (stage, key), layers in rows.items():
        known = []
        for layer, own in layers.items():
            if saturation in own:
                other = own.get(dimension) if dimension_threshold == threshold else None
                facts, where = run.facts.get(layer, UNKNOWN_LAYER), axes.of(stage, layer, key)
                known.append(Known.of_rows(own[saturation], other, facts, where))
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


def of_history(rows: Sequence[HistoryRow], layers: Sequence[str]) -> dict[str, Any]:
    """Arrays of layers by forwards of a stage; a column of several forwards has their largest value.

    ``"layers"`` has indices into the page's list; ``"forwards"`` and ``"steps"`` the first and the last of each
    column, -1 for an unknown step; each of :data:`QUANTITIES` an array (layer, column), NaN where nothing was
    observed.
    """
    present = {row.layer for row in rows}
    shown = [place for place, layer in enumerate(layers) if layer in present]
    of_layer = {layers[place]: index for index, place in enumerate(shown)}
    steps = {row.forward: -1 if row.step is None else row.step for row in rows}
    forwards = sorted(steps)
    size = -(-len(forwards) // MOST_COLUMNS)
    place = {forward: index for index, forward in enumerate(forwards)}
    columns = -(-len(forwards) // size)
    ends = [(forwards[at * size], forwards[min((at + 1) * size, len(forwards)) - 1]) for at in range(columns)]
    content: dict[str, Any] = {
        "layers": shown,
        "forwards": [list(each) for each in ends],
        "steps": [[steps[first], steps[last]] for first, last in ends],
    }
    for name in QUANTITIES:
        values = np.full((len(shown), columns * size), np.nan)
        for row in rows:
            if row.layer in of_layer:
                values[of_layer[row.layer], place[row.forward]] = getattr(row, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # for columns without a value
            content[name] = np.nanmax(values.reshape(len(shown), columns, size), axis=2)
    return content
