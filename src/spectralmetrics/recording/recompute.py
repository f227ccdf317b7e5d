"""Statistics of a recorded run at other settings, without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import EigenspaceEmbeddingMetric, SpectralMetric
from spectralmetrics.metrics import statistics as all_statistics
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.record import COLUMNS, Settings, describe, tidy_rows
from spectralmetrics.recording.writers.arrays import SavedLayer, read_layers, saved_epochs

Statistics = Iterable[str | SpectralMetric] | Mapping[str, SpectralMetric]


def recompute(
    directory: str | Path,
    threshold: float | Sequence[float] | None = None,
    statistics: str | SpectralMetric | Statistics | None = None,
    *,
    progress: Callable[[Path], None] = lambda path: None,
) -> list[dict[str, Any]]:
    """Rebuild statistics from the arrays of a run (writer ``"arrays"``), also such as were not recorded.

    Args:
        directory: of the run.
        threshold: of the statistics that have one, in (0, 1]; None: as recorded, or 0.99. Of several
            thresholds, each has its rows under ``"saturation@0.95"`` and the like.
        statistics: short names (:func:`spectralmetrics.statistics` lists them) or names that were recorded;
            metrics, for settings of their own; or a dict of metrics by name. None: the numbers recorded. A
            name that was recorded has its recorded settings.
        progress: called with each array file before it is read.

    Returns:
        Rows with the columns of ``records.csv``: epoch, stage, layer, statistic, value, in its order, means
        over the layers included. Values of a statistic that is no number are numpy arrays.

    Raises:
        FileNotFoundError: if the run holds no arrays.
        ValueError: for an unknown statistic or a threshold outside (0, 1]; for an embedding of which no sample
            was kept.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = tempfile.mkdtemp()
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["arrays"]) as recorder:
    ...     _ = model(torch.eye(4))
    ...     _ = recorder.record()
    >>> [(row["statistic"], row["layer"]) for row in recompute(directory, 0.5, ["intrinsic_dimension"])]
    [('intrinsic_dimension', '0'), ('intrinsic_dimension', 'mean')]
    """
    directory = Path(directory)
    files = saved_epochs(directory)
    if not files:
        raise FileNotFoundError(f"expected a run recorded with the writer 'arrays', got {directory}")
    several = isinstance(threshold, Sequence)
    thresholds: list[float | None] = list(threshold) if isinstance(threshold, Sequence) else [threshold]
    for each in thresholds:
        if each is not None:
            check_threshold(each)
    metrics = _with_thresholds(
        _metrics(statistics, read_manifest(directory).statistics), thresholds if thresholds else [None], several
    )
    rows: list[dict[str, Any]] = []
    for epoch, path in files.items():
        progress(path)
        values: dict[tuple[str, str, str], Tensor] = {}
        arrays: list[dict[str, Any]] = []
        for layer in read_layers(path):
            spectra: dict[bool, Spectrum] = {}
            # Eigenvectors first: they come with the eigenvalues that the others read.
            for name in sorted(metrics, key=lambda each: not metrics[each].needs_eigenvectors):
                center = metrics[name].center
                spectrum = spectra.setdefault(center, layer.spectrum(center))
                values[name, layer.stage, layer.layer] = _value(metrics[name], spectrum, layer)
            for name in metrics:
                key = (name, layer.stage, layer.layer)
                values[key] = value = values.pop(key)  # in the order of the metrics
                if value.ndim:
                    cells = (epoch, layer.stage, layer.layer, name, value.numpy())
                    arrays.append(dict(zip(COLUMNS, cells, strict=True)))
        rows += [row._asdict() for row in tidy_rows(epoch, values)]
        rows += arrays if statistics is not None else []
    return rows


def _value(metric: SpectralMetric, spectrum: Spectrum, layer: SavedLayer) -> Tensor:
    if isinstance(metric, EigenspaceEmbeddingMetric):
        if layer.sample is None:
            raise ValueError(f"expected a sample of layer {layer.layer!r} for an embedding; none was recorded")
        metric.sample_keys, metric.sample_rows = layer.sample
    return torch.as_tensor(metric.statistic(spectrum))


def _metrics(
    chosen: str | SpectralMetric | Statistics | None, recorded: Mapping[str, Settings]
) -> dict[str, SpectralMetric]:
    if isinstance(chosen, Mapping):
        return dict(chosen)
    if chosen is None:
        metrics = {name: _rebuild(name, recorded) for name in recorded if "metric" in recorded[name]}
        if not metrics:
            raise ValueError("expected the names of statistics: the run has recorded none of this package's")
        return {name: each for name, each in metrics.items() if not isinstance(each, EigenspaceEmbeddingMetric)}
    found = {}
    for each in [chosen] if isinstance(chosen, (str, SpectralMetric)) else chosen:
        if isinstance(each, SpectralMetric):
            found[each.short_name] = each
        else:
            found[each] = _rebuild(each, recorded)
    return found


def _rebuild(name: str, recorded: Mapping[str, Settings]) -> SpectralMetric:
    settings = {**recorded.get(name, {"metric": name})}
    kinds = all_statistics()
    short_name = settings.pop("metric", None)
    if short_name not in kinds:
        detail = f" (recorded as {short_name!r}, which is not imported)" if name in recorded else ""
        raise ValueError(
            f"expected statistics among {sorted(set(kinds) | set(recorded))}, got {name!r}{detail}"
        )
    return kinds[short_name](**settings)


def _with_thresholds(
    metrics: dict[str, SpectralMetric], thresholds: Sequence[float | None], several: bool
) -> dict[str, SpectralMetric]:
    found: dict[str, SpectralMetric] = {}
    for name, metric in metrics.items():
        settings = describe(metric)
        if "threshold" not in settings or thresholds == [None]:
            found[name] = metric
            continue
        del settings["metric"], settings["threshold"]
        for threshold in thresholds:
            own = f"{name}@{threshold:g}" if several else name
            found[own] = type(metric)(threshold=threshold, **settings)
    return found
