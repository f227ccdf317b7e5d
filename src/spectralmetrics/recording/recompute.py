"""Statistics of a recorded run at other settings, and its summary, without the model."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spectralmetrics.findings import find
from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.probing.summary import Summary, summary_of, summary_rows, threshold_of
from spectralmetrics.recording.manifest import rebuild_metrics, rebuild_statistic
from spectralmetrics.recording.record import Row, Settings, tidy_rows, warn_of_undefined
from spectralmetrics.recording.saved import Failures, SavedRun
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
        directory: the directory of the run.
        threshold: threshold of the statistics that have one, in (0, 1]; None: as recorded, or 0.99. With
            several thresholds, each has its rows under ``"saturation@0.95"`` and the like.
        statistics: short names (:func:`spectralmetrics.statistics` lists them) or names that were recorded;
            metrics, for settings of their own; or a dict of metrics by name. None: the numbers recorded. A
            name that was recorded has its recorded settings.
        progress: called with each array file before it is read.

    Returns:
        Rows with the columns of ``records.csv``, in its order, means over the layers included. With folds, low
        and high are the ends of the values' intervals. Values of a statistic that is not a number are arrays.
        One warning names what is left out: statistics that cannot be read from the sketch of a layer, and
        damaged layers.

    Raises:
        FileNotFoundError: if the run holds no arrays.
        TypeError: for statistics of another kind.
        ValueError: for an unknown statistic or a threshold outside (0, 1]; for an embedding without a saved
            sample.

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
    run = SavedRun(directory)
    run.check(arrays=True)
    metrics = _metrics(statistics, run.statistics)
    if isinstance(threshold, Iterable) and not isinstance(threshold, str):
        metrics = {own: each for one in threshold for own, each in _at(metrics, one, True).items()}
    elif threshold is not None:
        metrics = _at(metrics, threshold, False)
    rows: list[Row] = []
    failures = Failures()
    for key, path in run.arrays.items():
        progress(path)
        values, intervals = run.rebuilt(key, metrics, failures)
        rows += tidy_rows(key, values, intervals)
        if statistics is not None:
            for (name, stage, layer), value in values.items():
                if value.ndim:
                    rows.append(Row(key.epoch, stage, layer, name, value.numpy(), step=key.step))  # type: ignore[arg-type]
    present = {row.statistic for row in rows}
    for name in metrics:
        if not present or (name not in present and statistics is not None):
            failures.check(repr(name))
    failures.warn()
    # Recorded statistics were warned of when they were recorded.
    warn_of_undefined([row for row in rows if isinstance(row.value, (int, float))], run.statistics)
    return [row._asdict() for row in rows]


def summarise_run(
    directory: str | Path,
    *,
    epoch: int | None = None,
    stage: str = "eval",
    statistic: str = "intrinsic_dimension",
    threshold: float | None = None,
) -> Summary:
    """The table of :meth:`.LayerProbe.summary`, from the arrays of a run (writer ``"arrays"``).

    Args:
        directory: the directory of the run.
        epoch: epoch whose last record with arrays is read; None: the last epoch.
        stage: ``"train"`` or ``"eval"``.
        statistic: a name that was recorded or a short name, of a statistic that is one number.
        threshold: share of the variance, in (0, 1]; as recorded if None, or else 0.99.

    Raises:
        FileNotFoundError: if the run holds no arrays.
        ValueError: for an epoch or stage that was not recorded, or an unknown statistic or threshold.

    Layers that are damaged are left out, with one warning that names them.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = tempfile.mkdtemp()
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["arrays"]) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     _ = recorder.record()
    >>> summarise_run(directory, stage="train").rows[0].width
    3
    """
    run = SavedRun(directory)
    run.check(arrays=True)
    key = run.last_of(epoch, arrays=True)
    metric = rebuild_statistic(statistic, run.statistics)
    if threshold is None:
        threshold = threshold_of(rebuild_metrics(run.statistics).values())
    check_threshold(threshold)
    if hasattr(metric, "threshold"):
        metric.threshold = threshold
    if stage not in (stages := sorted({each for each, _ in run.layers_in(key)})):
        raise ValueError(f"expected a stage of {key} among {stages}, got {stage!r}")
    spectra: dict[str, Spectrum] = {}
    failures = Failures()
    for layer in run.layers(key, stage):
        with failures.of(key, layer, "all"):
            layer.spectrum(metric.center)  # reads the saved eigenvalues, which the next spectrum shares
            spectra[layer.layer] = layer.spectrum()
    if not spectra:
        failures.check("all")
    failures.warn()
    rows = summary_rows(spectra, run.facts, metric, threshold=threshold)
    findings = find("", [numbers for _, numbers in rows], functools.partial(run.untrained, key))
    return summary_of(rows, findings, metric, threshold=threshold, where=f"{key}, {stage}")


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
                if "metric" in settings:  # metrics of other libraries can never be rebuilt
                    warnings.warn(f"left out {name!r}: {error}", UserWarning, stacklevel=3)
        usable = {name: each for name, each in metrics.items() if not each.other_sums()}
        if not usable:
            raise ValueError("expected the names of statistics: no recorded statistic can be recomputed")
        return usable
    by_name = {}
    for each in [chosen] if isinstance(chosen, (str, SpectralMetric)) else chosen:
        if isinstance(each, SpectralMetric):
            by_name[each.short_name] = each
        else:
            by_name[each] = rebuild_statistic(each, recorded)
    return by_name


def _at(metrics: dict[str, SpectralMetric], threshold: float, named: bool) -> dict[str, SpectralMetric]:
    """The metrics, with this threshold if they have one."""
    threshold = check_threshold(threshold)
    moved: dict[str, SpectralMetric] = {}
    for name, metric in metrics.items():
        if hasattr(metric, "threshold"):
            metric = copy.deepcopy(metric)
            metric.threshold = threshold
            name = f"{name}@{threshold}" if named else name
        moved[name] = metric
    return moved
