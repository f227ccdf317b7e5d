"""What has changed between two epochs of a run, or between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.relations import frechet_distance, subspace_overlap
from spectralmetrics.metrics import IntrinsicDimensionMetric
from spectralmetrics.recording.recompute import recompute
from spectralmetrics.recording.writers.arrays import SavedLayer, read_layers, saved_epochs
from spectralmetrics.recording.writers.csv import FILE_NAME, read_rows
from spectralmetrics.tail import MEAN_LAYER


def read_records(directory: str | Path) -> list[dict[str, Any]]:
    """The numbers of a run, as it recorded them with the writer ``"csv"``.

    Args:
        directory: of the run.

    Returns:
        One dict for each row of ``records.csv``, with its columns: epoch, stage, layer, statistic, value, … The
        layer ``"mean"`` is the mean over all layers; scalars that the task added have the layer ``""``.
        ``pandas.DataFrame(read_records(directory))`` makes a table of them.

    Raises:
        FileNotFoundError: if the directory has no ``records.csv``.
        ValueError: if that is no table of records.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = tempfile.mkdtemp()
    >>> with LayerProbe(model) as probe, Recorder(directory, probe) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     _ = recorder.record()
    >>> [(row["layer"], row["statistic"]) for row in read_records(directory)]
    [('0', 'saturation'), ('mean', 'saturation')]
    """
    path = Path(directory) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"expected a run with a {FILE_NAME}, got {directory}")
    return [row._asdict() for row in read_rows(path)]


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
        right: of another run; None compares two epochs of ``left``.
        epochs: the epoch of the left side and that of the right; of two runs their last ones if None.
        stage: whose observations, ``"train"`` or ``"eval"``.
        threshold: the leading eigenspaces explain this share of the variance, in (0, 1].

    Returns:
        A dict for each layer, in forward order, first of the left side and then what only the right one has:

        - ``layer``;
        - ``{statistic}_left`` and ``{statistic}_right`` for each recorded statistic, as it was recorded;
        - ``subspace_overlap`` of the leading eigenspaces, in [0, 1]: see
          :func:`~spectralmetrics.functional.subspace_overlap`;
        - ``overlap_by_chance``: what random subspaces of these dimensions share on average, max(k, l) / D;
        - ``frechet_distance`` as a share of the total variance of both sides, tr Σ₁ + tr Σ₂: 0 for equal
          distributions, at most 1 where the means agree;
        - ``note``: why a value is missing, or ``""``.

        What a side lacks, or what cannot be compared because the widths differ, is None.

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
    check_threshold(threshold)
    if right is None and epochs is None:
        raise ValueError("expected a second run, or epochs=(first, second) of one run; got one run only")
    given = (None, None) if epochs is None else tuple(epochs) if isinstance(epochs, Iterable) else (epochs,)
    if len(given) != 2 or isinstance(epochs, str):
        raise ValueError(f"expected two epochs, that of the left and that of the right side, got {epochs!r}")
    sides = [
        _open(Path(directory), epoch, stage)
        for directory, epoch in zip((left, left if right is None else right), given, strict=True)
    ]
    shapes = {}
    for first, second in _pairs(*(_layers_of(side.arrays, stage) for side in sides)):
        name = (first or second).layer  # type: ignore[union-attr]  # one of them is there
        shapes[name] = _compare_layers(first, second, threshold)
    statistics = list(dict.fromkeys(s for side in sides for values in side.values.values() for s in values))
    rows = []
    for layer in dict.fromkeys([*sides[0].values, *shapes, *sides[1].values]):
        row: dict[str, Any] = {"layer": layer}
        for statistic in statistics:
            for name, side in zip(("left", "right"), sides, strict=True):
                row[f"{statistic}_{name}"] = side.values.get(layer, {}).get(statistic)
        row |= shapes.get(layer) or _without("no covariance was kept")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Side:
    """One run at one epoch."""

    arrays: Path
    values: dict[str, dict[str, float]]  # layer -> statistic -> value


def last_epoch(directory: Path) -> int:
    """The last epoch of which a run has arrays.

    Raises:
        FileNotFoundError: if it has none.
    """
    return max(_saved(directory))


def _saved(directory: Path) -> dict[int, Path]:
    files = saved_epochs(directory)
    if not files:
        raise FileNotFoundError(f"expected a run recorded with the writer 'arrays', got {directory}")
    return files


def _open(directory: Path, epoch: int | None, stage: str) -> _Side:
    files = _saved(directory)
    epoch = max(files) if epoch is None else epoch
    if epoch not in files:
        known = ", ".join(map(str, files)) if len(files) <= 10 else f"{min(files)} to {max(files)}"
        raise ValueError(f"expected an epoch of {directory} that has arrays ({known}), got {epoch!r}")
    rows = read_records(directory) if (directory / FILE_NAME).exists() else recompute(directory)
    of_epoch = [row for row in rows if row["epoch"] == epoch]
    values: dict[str, dict[str, float]] = {}
    for row in of_epoch:
        if row["stage"] == stage and row["layer"] not in ("", MEAN_LAYER):
            values.setdefault(row["layer"], {})[row["statistic"]] = row["value"]
    if not values:
        stages = sorted({row["stage"] for row in of_epoch if row["layer"]})
        raise ValueError(f"expected a stage of epoch {epoch} of {directory} among {stages}, got {stage!r}")
    return _Side(files[epoch], values)


def _layers_of(path: Path, stage: str) -> Iterator[SavedLayer]:
    return (layer for layer in read_layers(path) if layer.stage == stage)


def _pairs(
    left: Iterator[SavedLayer], right: Iterator[SavedLayer]
) -> Iterator[tuple[SavedLayer | None, SavedLayer | None]]:
    """Layers of one name; of two runs of one network a single pair is in memory at a time."""
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
    widths = len(first.mean), len(second.mean)
    if widths[0] != widths[1]:
        return _without(f"widths {widths[0]} and {widths[1]}")
    spectra = [first.spectrum(), second.spectrum()]
    variance = float(spectra[0].total_variance + spectra[1].total_variance)
    metric = IntrinsicDimensionMetric(threshold=threshold)
    found = [float(metric.value_of(spectrum)) for spectrum in spectra]
    if any(map(math.isnan, found)):
        return _without("a sketch does not hold the share")
    bases = [s.eigenvectors[:, : int(size)] for s, size in zip(spectra, found, strict=True)]
    dimensions = [basis.shape[1] for basis in bases]
    row = _without("")
    if any(spectrum.sketch is not None for spectrum in spectra):
        row["note"] = "sketched: no Fréchet distance"
    elif variance > 0:
        distance = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
        row["frechet_distance"] = float(distance) / variance
    if 0 not in dimensions:
        row["subspace_overlap"] = float(subspace_overlap(*bases))
        row["overlap_by_chance"] = max(dimensions) / widths[0]
    else:
        where = [name for name, k in zip(("left", "right"), dimensions, strict=True) if k == 0]
        row["note"] = f"constant on the {' and the '.join(where)}"
    return row


def _without(note: str) -> dict[str, Any]:
    return {"subspace_overlap": None, "overlap_by_chance": None, "frechet_distance": None, "note": note}
