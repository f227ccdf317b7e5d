"""Compares two epochs of a run, or two runs, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralmetrics.findings import has_eigenvalues
from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.relations import MINIMUM_SAMPLES, frechet_distance, linear_cka, subspace_overlap
from spectralmetrics.metrics import IntrinsicDimensionMetric
from spectralmetrics.recording.recompute import recompute
from spectralmetrics.recording.record import RecordKey, Row
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writers.arrays import SavedLayer
from spectralmetrics.sums import Numbered

SIDES = ("left", "right")
_RELATIONS = ("subspace_overlap", "overlap_by_chance", "frechet_distance", "linear_cka")


def compare(
    left: str | Path,
    right: str | Path | None = None,
    *,
    epochs: tuple[int, int] | None = None,
    stage: str = "eval",
    threshold: float = 0.99,
) -> list[dict[str, Any]]:
    """Compare two runs layer by layer, or two epochs of one run; they need arrays (writer ``"arrays"``).

    Args:
        left: directory of a run.
        right: another run; None compares two epochs of ``left``.
        epochs: epochs (left, right), whose last records with arrays are compared; default: each run's last.
        stage: the stage of the observations, ``"train"`` or ``"eval"``.
        threshold: the leading eigenspaces explain this share of the variance, in (0, 1].

    Returns:
        A dict for each layer, in forward order: first the left layers, then layers only on the right:

        - ``layer``;
        - ``{statistic}_left`` and ``{statistic}_right`` for each recorded statistic, as it was recorded;
        - ``subspace_overlap`` of the leading eigenspaces, in [0, 1]: see
          :func:`~spectralmetrics.functional.subspace_overlap`;
        - ``overlap_by_chance``: what random subspaces of these dimensions share on average, max(k, l) / D;
        - ``frechet_distance`` as a share of the total variance of both sides, tr Σ₁ + tr Σ₂: 0 for equal
          distributions, at most 1 where the means agree;
        - ``linear_cka`` of up to 1,024 rows with the same numbers, also where the widths differ, if both runs
          measured sources with equally many rows, see :func:`~spectralmetrics.measure`: rows with one number
          are taken for the same sample;
        - ``note``: the reason why a value is missing, or ``""``.

        Values that a side lacks, or that cannot be compared because the widths differ, are None.

    Raises:
        FileNotFoundError: if a run holds no arrays.
        ValueError: for an epoch or a stage that was not recorded, or a threshold outside (0, 1].

    Directions are compared unit by unit. Between two networks whose weights began differently, units do not
    correspond and the overlap is near chance; :class:`~spectralmetrics.LayerSimilarity` compares those.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
    >>> directory = tempfile.mkdtemp()
    >>> batch = torch.randn(32, 4)
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["csv", "arrays"]) as recorder:
    ...     for epoch in range(2):
    ...         _ = model(batch * (1 + epoch))
    ...         _ = recorder.record(epoch)
    >>> row = compare(directory, epochs=(0, 1))[0]
    >>> row["layer"], row["saturation_left"] == row["saturation_right"], round(row["subspace_overlap"], 6)
    ('0', True, 1.0)
    """
    return rows_of(open_sides(left, right, epochs, stage, threshold), threshold)


@dataclass(frozen=True)
class Side:
    """One record of a run, on the left or on the right."""

    name: str
    run: SavedRun
    key: RecordKey
    stage: str
    rows: list[Row]
    values: dict[str, dict[str, float]]  # layer -> statistic -> value

    def layers(self) -> Iterator[SavedLayer]:
        """The layers, one in memory at a time."""
        return self.run.layers(self.key, self.stage)


def open_sides(
    left: str | Path, right: str | Path | None, epochs: tuple[int, int] | None, stage: str, threshold: float
) -> list[Side]:
    """Both sides of a comparison; for the arguments see :func:`compare`."""
    check_threshold(threshold)
    if right is None and epochs is None:
        raise ValueError("expected a second run, or epochs=(first, second) of one run; got one run only")
    given = (None, None) if epochs is None else tuple(epochs) if isinstance(epochs, Iterable) else (epochs,)
    if len(given) != 2 or isinstance(epochs, str):
        raise ValueError(f"expected two epochs, for the left and for the right side, got {epochs!r}")
    sides = []
    for name, directory, epoch in zip(SIDES, (left, left if right is None else right), given, strict=True):
        run = SavedRun(directory)
        run.check(arrays=True)
        key = run.last_of(epoch, arrays=True)
        rows = run.rows if run.has_table else [Row(**row) for row in recompute(directory)]
        rows = [row for row in rows if row.key == key]
        values: dict[str, dict[str, float]] = {}
        for row in rows:
            if row.stage == stage and row.is_of_layer:
                values.setdefault(row.layer, {})[row.statistic] = row.value
        stages = sorted({row.stage for row in rows if row.layer} | {each for each, _ in run.layers_in(key)})
        if stage not in stages:
            raise ValueError(f"expected a stage of {key} of {directory} among {stages}, got {stage!r}")
        sides.append(Side(name, run, key, stage, rows, values))
    return sides


def rows_of(sides: Sequence[Side], threshold: float) -> list[dict[str, Any]]:
    """The rows of :func:`compare`."""
    relations = {}
    for first, second in _pairs(*(side.layers() for side in sides)):
        name = (first or second).layer  # type: ignore[union-attr]  # one of them is there
        relations[name] = _compare_layers(first, second, threshold)
    statistics = list(dict.fromkeys(s for side in sides for values in side.values.values() for s in values))
    rows = []
    for layer in dict.fromkeys([*sides[0].values, *relations, *sides[1].values]):
        row: dict[str, Any] = {"layer": layer}
        for statistic in statistics:
            for side in sides:
                row[f"{statistic}_{side.name}"] = side.values.get(layer, {}).get(statistic)
        row |= relations.get(layer) or _without("no covariance was kept")
        rows.append(row)
    return rows


def _pairs(
    left: Iterator[SavedLayer], right: Iterator[SavedLayer]
) -> Iterator[tuple[SavedLayer | None, SavedLayer | None]]:
    """Pairs of layers of one name; for two runs of one network, one pair is in memory at a time."""
    passed: dict[str, SavedLayer] = {}
    for first in left:
        while first.layer not in passed and (second := next(right, None)) is not None:
            passed[second.layer] = second
        yield first, passed.pop(first.layer, None)
    for second in [*passed.values(), *right]:
        yield None, second


def _compare_layers(first: SavedLayer | None, second: SavedLayer | None, threshold: float) -> dict[str, Any]:
    if first is None or second is None:
        return _without(f"only on the {'left' if second is None else 'right'}")
    layers = (first, second)
    for side, layer in zip(SIDES, layers, strict=True):
        try:
            _ = layer.sums
        except ValueError as error:  # it is damaged
            return _without(f"on the {side}: {error}")
    if empty := [side for side, layer in zip(SIDES, layers, strict=True) if layer.is_empty]:
        return _without(f"all rows with NaN or infinities on the {' and the '.join(empty)}")
    widths = [layer.spectral.num_features for layer in layers]
    if widths[0] != widths[1]:
        return _without(f"widths {widths[0]} and {widths[1]}") | _alignment(first, second)
    spectra = [layer.spectrum() for layer in layers]
    if not all(map(has_eigenvalues, spectra)):
        return _without("no covariance was kept") | _alignment(first, second)
    metric = IntrinsicDimensionMetric(threshold=threshold)
    sizes = [float(metric.value_of(spectrum)) for spectrum in spectra]
    if any(map(math.isnan, sizes)):
        return _without("a sketch does not hold the share")
    row = _without("") | _alignment(first, second)
    variance = float(spectra[0].total_variance + spectra[1].total_variance)
    if any(spectrum.sketch is not None for spectrum in spectra):
        row["note"] = "sketched: no Fréchet distance"
    elif variance > 0:
        left, right = spectra
        distance = frechet_distance(left.mean, left.covariance, right.mean, right.covariance)
        row["frechet_distance"] = float(distance) / variance
    bases = [s.eigenvectors[:, : int(size)] for s, size in zip(spectra, sizes, strict=True)]
    if constant := [side for side, basis in zip(SIDES, bases, strict=True) if basis.shape[1] == 0]:
        row["note"] = f"constant on the {' and the '.join(constant)}"
    else:
        row["subspace_overlap"] = float(subspace_overlap(*bases))
        row["overlap_by_chance"] = max(basis.shape[1] for basis in bases) / widths[0]
    return row


def _alignment(first: SavedLayer, second: SavedLayer) -> dict[str, float]:
    """Linear CKA of corresponding rows; empty if no rows are known to correspond."""
    samples = [each for layer in (first, second) for each in layer.sums if isinstance(each, Numbered)]
    offered = {int(each.spectral.num_observations + each.spectral.num_left_out) for each in (first, second)}
    if len(samples) < 2 or len(offered) > 1:
        return {}
    left, right = samples[0].paired_with(samples[1])
    return {"linear_cka": float(linear_cka(left, right))} if len(left) >= MINIMUM_SAMPLES else {}


def _without(note: str) -> dict[str, Any]:
    return {**dict.fromkeys(_RELATIONS), "note": note}
