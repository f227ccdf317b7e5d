"""What a page shows of recorded runs, as dicts, lists and arrays; ``page/data.js`` reads it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectralmetrics.functional.dimension import Rule
from spectralmetrics.metrics import statistics as all_statistics
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.record import Settings
from spectralmetrics.recording.report.encode import MISSING, UNKNOWN
from spectralmetrics.recording.report.runs import Run, in_order
from spectralmetrics.recording.report.spectra import Thresholds, dimensions, points, positions, slider
from spectralmetrics.recording.writers.arrays import SavedLayer, read_layers
from spectralmetrics.tail import MEAN_LAYER

Progress: TypeAlias = Callable[[str, int], None]
Content: TypeAlias = dict[str, Any]
Array: TypeAlias = npt.NDArray[Any]
Family: TypeAlias = tuple[Rule, bool]
"""The settings, rule and center, on which a dimension depends besides the threshold."""

DEFAULT_THRESHOLD = 0.99
KINDS = {"saturation": "share", "intrinsic_dimension": "dimension"}
"""The statistics that the slider moves: a dimension, or one divided by the width."""
NARROW = 512
"""Below this width one thread decomposes a covariance as fast as several."""
MOST_POINTS = 1_280_000
"""Of all spectra together, so that a page of 200 layers and 100 epochs stays below 10 MB."""


def collect(runs: Sequence[Run], progress: Progress) -> Content:
    """The content of a page.

    Arrays have the axes (stage, layer, epoch), or (stage, layer, threshold or point, epoch), in the order of
    the page's and the run's lists. Where nothing was recorded, they hold ``MISSING``, or ``"is_recorded"`` 0.
    ``"held_out"`` has the dimensions of what was held out, ``MISSING`` without folds and ``UNKNOWN`` while one
    of them is empty; with the dimension they are the ends of its interval.

    Args:
        runs: see :func:`~spectralmetrics.recording.report.runs.read_runs`.
        progress: called before each spectrum with what it is of, and the number of all spectra.

    Raises:
        ValueError: if an array file cannot be read.
    """
    recorded = [float(each["threshold"]) for run in runs for each in run.settings.values() if _moves(each)]
    thresholds = slider(recorded)
    where = [run.where for run in runs]
    stages = in_order(dict.fromkeys(stage for stage, _ in keys) for keys in where)
    layers = in_order([layer for one, layer in keys if one == stage] for keys in where for stage in stages)
    total = sum(len(keys) for run in runs for keys in run.saved.values())
    most = min(max(MOST_POINTS // max(total, 1), 16), 128)
    found = []
    for run in runs:
        place = _Place(stages, layers, run.epochs)
        families = _families(run)
        arrays = (
            _from_arrays(run, place, families, np.array(thresholds), most, lambda name: progress(name, total))
            if run.files
            else {}
        )
        records = _from_records(run, place, families)
        facts = [run.facts.get(layer, LayerFacts("", None))._asdict() for layer in layers]
        found.append({"name": run.name, "epochs": run.epochs, "facts": facts, "arrays": arrays, **records})
    return {
        "thresholds": thresholds,
        "threshold": thresholds.index(recorded[0] if recorded else DEFAULT_THRESHOLD),
        "stages": stages,
        "layers": layers,
        "runs": found,
    }


class _Place:
    """The axes of a run's arrays."""

    def __init__(self, stages: Sequence[str], layers: Sequence[str], epochs: Sequence[int]) -> None:
        self._stages = {stage: index for index, stage in enumerate(stages)}
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self.epochs = {epoch: index for index, epoch in enumerate(epochs)}

    def new(self, fill: float, *between: int) -> Array:
        shape = (len(self._stages), len(self._layers), *between, len(self.epochs))
        return np.full(shape, fill, dtype=type(fill))

    def line(self, fill: float) -> Array:
        return np.full(len(self.epochs), fill, dtype=type(fill))

    def of(self, stage: str, layer: str, epoch: int) -> tuple[Any, ...]:
        return (self._stages[stage], self._layers[layer], ..., self.epochs[epoch])


def _moves(settings: Settings) -> bool:
    return settings.get("metric") in KINDS and "threshold" in settings


def _families(run: Run) -> list[Family]:
    recorded: list[Family] = [_family(each) for each in run.settings.values() if _moves(each)]
    return list(dict.fromkeys(recorded)) or [_family({})]


def _family(settings: Settings) -> Family:
    return settings.get("rule", "explained"), settings.get("center", True)


def _from_records(run: Run, place: _Place, families: list[Family]) -> Content:
    """The numbers of ``records.csv``, and which of them the slider moves."""
    statistics: dict[str, Content] = {}
    scalars: dict[tuple[str, str], Content] = {}
    for row in run.rows:
        if not row.layer:
            key, epoch = (row.statistic, row.stage), place.epochs[row.epoch]
            if key not in scalars:
                empty = {"values": place.line(np.nan), "is_recorded": place.line(0)}
                scalars[key] = {"name": row.statistic, "stage": row.stage, **empty}
            scalars[key]["values"][epoch] = row.value
            scalars[key]["is_recorded"][epoch] = 1
        elif row.layer != MEAN_LAYER:
            if row.statistic not in statistics:
                statistics[row.statistic] = {"values": place.new(np.nan), "is_recorded": place.new(0)}
            where = place.of(row.stage, row.layer, row.epoch)
            statistics[row.statistic]["values"][where] = row.value
            statistics[row.statistic]["is_recorded"][where] = 1
            for end, value in (("low", row.low), ("high", row.high)):
                if value is not None:
                    ends = statistics[row.statistic].setdefault(end, place.new(np.nan))
                    ends[where] = value
    # With arrays these two can be had of every run.
    names = list(dict.fromkeys([*statistics, *(KINDS if run.files else ())]))
    for name in names:
        # As recompute does of a name that was not recorded.
        settings = run.settings.get(name, {"metric": name})
        kind = KINDS.get(str(settings.get("metric")))
        entry = statistics.setdefault(name, {})
        entry["kind"] = kind
        if kind is not None:
            entry["threshold"] = settings.get("threshold", DEFAULT_THRESHOLD)
            family = _family(settings)
            entry["family"] = families.index(family) if family in families else 0
    return {
        "statistics": {name: statistics[name] for name in names},
        "scalars": list(scalars.values()),
    }


def _from_arrays(
    run: Run,
    place: _Place,
    families: list[Family],
    thresholds: Thresholds,
    most: int,
    progress: Callable[[str], None],
) -> Content:
    """Dimensions at all thresholds, points of the spectra, and what the moments say of the observations."""
    found = {name: place.new(MISSING) for name in ("width", "observations", "non_finite", "dead")}
    found["largest"] = place.new(np.nan)
    found["points"] = place.new(MISSING, most)
    tables = [place.new(MISSING, len(thresholds)) for _ in families]
    held_out = [place.new(MISSING, len(thresholds)) for _ in families]
    chosen: dict[int, Array] = {}
    # As in the recording, where an embedding's eigenvectors bring the eigenvalues that all read.
    kinds = all_statistics()
    vectors = any(
        kinds[each["metric"]].needs_eigenvectors
        for each in run.settings.values()
        if each.get("metric") in kinds
    )
    for epoch, path in run.files.items():
        for layer in read_layers(path):
            progress(f"{run.name}, epoch {epoch}: {layer.layer} in {layer.stage}")
            where = place.of(layer.stage, layer.layer, epoch)
            width = len(layer.mean)
            found["width"][where] = width
            found["observations"][where] = layer.count
            found["non_finite"][where] = layer.non_finite
            found["dead"][where] = int((layer.spectral.variances() == 0).sum())
            try:
                spectra = {center: _decomposed(layer, center, vectors) for _, center in families}
            except ValueError as error:
                message = f"left out the spectrum of {layer.layer!r} in {layer.stage}, epoch {epoch}: {error}"
                warnings.warn(message, UserWarning, stacklevel=4)
                continue
            for table, other, (rule, center) in zip(tables, held_out, families, strict=True):
                plain, held = spectra[center]
                table[where] = dimensions(plain, thresholds, rule)
                if len(layer.spectral.folds) > 1:
                    other[where] = UNKNOWN if held is None else dimensions(held, thresholds, rule)
            drawn = spectra[families[0][1]][0].numpy()
            if width not in chosen:
                chosen[width] = positions(width, most)
            found["largest"][where] = drawn[0]
            found["points"][where][: len(chosen[width])] = points(drawn, chosen[width])
    return {
        **found,
        "dimensions": tables,
        # Most runs have no folds, and their pages are not to carry tables of nothing.
        **({"held_out": held_out} if any((table != MISSING).any() for table in held_out) else {}),
        "positions": {width: list(map(int, each)) for width, each in chosen.items()},
    }


def _decomposed(layer: SavedLayer, center: bool, vectors: bool) -> tuple[Tensor, Tensor | None]:
    """The eigenvalues of a spectrum, and those of what was held out where it can be known."""
    with _threads(1 if len(layer.mean) < NARROW else torch.get_num_threads()):
        spectrum = layer.spectrum(center)
        if spectrum.sketch is not None:
            raise ValueError("a sketch of its covariance was kept, of which the page shows the recorded values")
        if vectors:
            spectrum.eigenvectors  # noqa: B018
        held_out = spectrum.held_out() if spectrum.num_folds > 1 else None
        return spectrum.eigenvalues, None if held_out is None else held_out.eigenvalues


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch's threads inside the block.

    Where other programs keep the cores busy, threads that share a small matrix wait for each other hundreds of
    times: the 420 spectra of the demo have taken 45 s on two threads, and 0.8 s on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
