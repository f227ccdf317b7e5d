"""Statistics of a recorded run at other settings, without the model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import Interval, MarginalMetric, SpectralMetric
from spectralmetrics.metrics import statistics as all_statistics
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.record import UNKNOWN, Row, Settings, tidy_rows
from spectralmetrics.recording.writers.arrays import read_layers, saved_epochs
from spectralmetrics.sums import Marginals
from spectralmetrics.sums.checks import check_type

Statistics = Iterable[str | SpectralMetric] | Mapping[str, SpectralMetric]


def recompute(
    directory: str | Path,
    threshold: float | Iterable[float] | None = None,
    statistics: str | SpectralMetric | Statistics | None = None,
    *,
    progress: Callable[[Path], None] = lambda path: None,
) -> list[dict[str, Any]]:
    """Rebuild statistics from the arrays of a run (writer ``"arrays"``), including ones not recorded.

    Args:
        directory: of the run.
        threshold: of the statistics that have one, in (0, 1]; None: as recorded, or 0.99. Of several
            thresholds, each has its rows under ``"saturation@0.95"`` and the like.
        statistics: short names (:func:`spectralmetrics.statistics` lists them) or names that were recorded;
            metrics, for settings of their own; or a dict of metrics by name. None: the numbers recorded. A
            name that was recorded has its recorded settings.
        progress: called with each array file before it is read.

    Returns:
        Rows with the columns of ``records.csv``, in its order, means over the layers included. With folds, low
        and high are the ends of the values' intervals. Values of a statistic that is no number are arrays.

    Raises:
        FileNotFoundError: if the run holds no arrays.
        TypeError: for statistics of another kind.
        ValueError: for an unknown statistic or a threshold outside (0, 1]; for an embedding of which no sample
            was kept.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = tempfile.mkdtemp()
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["arrays"]) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     _ = recorder.record()
    >>> [(row["statistic"], row["layer"]) for row in recompute(directory, 0.5, ["intrinsic_dimension"])]
    [('intrinsic_dimension', '0'), ('intrinsic_dimension', 'mean')]
    """
    directory = Path(directory)
    files = saved_epochs(directory)
    if not files:
        raise FileNotFoundError(f"expected a run recorded with the writer 'arrays', got {directory}")
    recorded = read_manifest(directory).statistics
    metrics = _metrics(statistics, recorded)
    if isinstance(threshold, Iterable) and not isinstance(threshold, str):
        metrics = {own: each for one in threshold for own, each in _at(metrics, one, True).items()}
    elif threshold is not None:
        metrics = _at(metrics, threshold, False)
    # As in the recording, where an embedding's eigenvectors bring the eigenvalues that all read.
    vectors = any(kind.needs_eigenvectors for kind in _kinds(recorded))
    rows: list[dict[str, Any]] = []
    for epoch, path in files.items():
        progress(path)
        values, intervals = rebuild_layers(path, metrics, vectors)
        rows += [row._asdict() for row in tidy_rows(epoch, values, intervals)]
        if statistics is not None:
            for (name, stage, layer), value in values.items():
                if value.ndim:
                    rows.append(Row(epoch, stage, layer, name, value.numpy())._asdict())  # type: ignore[arg-type]
    return rows


def rebuild_layers(
    path: Path, metrics: Mapping[str, SpectralMetric], vectors: bool = False
) -> tuple[dict[tuple[str, str, str], Tensor], dict[tuple[str, str, str], Interval]]:
    """(statistic, stage, layer) -> value, and to interval where there is one; in the order of the metrics.

    Args:
        path: of an array file.
        metrics: by the names of their statistics.
        vectors: whether eigenvalues are to come with eigenvectors, as they did in the recording.
    """
    values: dict[tuple[str, str, str], Tensor] = {}
    intervals: dict[tuple[str, str, str], Interval] = {}
    for layer in read_layers(path):
        spectra: dict[bool, Spectrum] = {}
        # Eigenvectors first: they come with the eigenvalues that the others read.
        for name in sorted(metrics, key=lambda each: not metrics[each].needs_eigenvectors):
            center = metrics[name].center
            if center not in spectra:
                spectra[center] = layer.spectrum(center)
                if vectors:
                    spectra[center].eigenvectors  # noqa: B018
            values[name, layer.stage, layer.layer] = _value(metrics[name], spectra[center], layer.layer)
        for name, metric in metrics.items():
            key = (name, layer.stage, layer.layer)
            values[key] = values.pop(key)
            kept = spectra[metric.center]
            if metric.has_interval and (kept.num_folds > 1 or kept.sketch is not None):
                intervals[key] = metric.interval_of(spectra[metric.center])
    return values, intervals


def rebuild_metrics(recorded: Mapping[str, Settings]) -> dict[str, SpectralMetric]:
    """The metrics of a run, by name, as far as they can be made from their settings."""
    metrics = {}
    for name in recorded:
        with contextlib.suppress(ValueError):
            metrics[name] = rebuild_statistic(name, recorded)
    return metrics


def _value(metric: SpectralMetric, spectrum: Spectrum, layer: str) -> Tensor:
    wanted = [*metric.other_sums()]
    if isinstance(metric, MarginalMetric):
        wanted += [] if metric.can_read_matrix else [metric.spectral_sum()]
    elif isinstance(spectrum.sums, Marginals):
        raise ValueError(
            f"expected a covariance of layer {layer!r} for {metric.short_name!r}; only marginals were recorded"
        )
    for each in wanted:
        if not spectrum.has(type(each)):
            raise ValueError(
                f"expected {each.described} of layer {layer!r} for {metric.short_name!r}; none was recorded"
            )
    return metric.value_of(spectrum)


def _metrics(
    chosen: str | SpectralMetric | Statistics | None, recorded: Mapping[str, Settings]
) -> dict[str, SpectralMetric]:
    if isinstance(chosen, Mapping):
        for name, each in chosen.items():
            check_type(f"metric {name!r}", each, SpectralMetric)
        return dict(chosen)
    if isinstance(chosen, type) or not isinstance(chosen, (str, SpectralMetric, Iterable, type(None))):
        kind = f"the class {chosen.__name__}; call it" if isinstance(chosen, type) else repr(chosen)
        raise TypeError(f"expected names of statistics or metrics, got {kind}")
    if chosen is None:
        metrics = {}
        for name, settings in recorded.items():
            try:
                metrics[name] = rebuild_statistic(name, recorded)
            except ValueError as error:
                if "metric" in settings:  # not one of another library, of which there is no hope
                    warnings.warn(f"left out {name!r}: {error}", UserWarning, stacklevel=3)
        found = {name: each for name, each in metrics.items() if not each.other_sums()}
        if not found:
            raise ValueError("expected the names of statistics: of those recorded, none can be recomputed")
        return found
    found = {}
    for each in [chosen] if isinstance(chosen, (str, SpectralMetric)) else chosen:
        if isinstance(each, SpectralMetric):
            found[each.short_name] = each
        else:
            found[each] = rebuild_statistic(each, recorded)
    return found


def rebuild_statistic(name: str, recorded: Mapping[str, Settings]) -> SpectralMetric:
    """A metric by the name that it was recorded under, with its settings, or by a short name.

    Raises:
        ValueError: if there is none, or its settings could not be recorded.
    """
    settings = {**recorded.get(name, {"metric": name})}
    kinds = all_statistics()
    short_name = settings.pop("metric", None)
    if name in recorded and short_name not in kinds:
        raise ValueError(f"{name!r} was recorded by a class that is not imported: import it, or pass a metric")
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


def _kinds(recorded: Mapping[str, Settings]) -> list[type[SpectralMetric]]:
    kinds = all_statistics()
    return [kinds[each["metric"]] for each in recorded.values() if each.get("metric") in kinds]


def _at(metrics: dict[str, SpectralMetric], threshold: float, named: bool) -> dict[str, SpectralMetric]:
    """The metrics at a threshold, and those that have none."""
    threshold = check_threshold(threshold)
    found: dict[str, SpectralMetric] = {}
    for name, metric in metrics.items():
        if hasattr(metric, "threshold"):
            metric = copy.deepcopy(metric)
            metric.threshold = threshold
            name = f"{name}@{threshold}" if named else name
        found[name] = metric
    return found
