"""The summary of a recorded run, without the model."""

from __future__ import annotations

from pathlib import Path

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.probing.summary import Summary, summarise, threshold_of
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.recompute import rebuild_metrics, rebuild_statistic
from spectralmetrics.recording.writers.arrays import read_layers, saved_epochs


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
        directory: of the run.
        epoch: the last that was recorded if None.
        stage: ``"train"`` or ``"eval"``.
        statistic: a name that was recorded or a short name, of a statistic that is one number.
        threshold: share of the variance, in (0, 1]; as recorded if None, or else 0.99.

    Raises:
        FileNotFoundError: if the run holds no arrays.
        ValueError: for an epoch or stage that was not recorded, or an unknown statistic or threshold.

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
    directory = Path(directory)
    files = saved_epochs(directory)
    if not files:
        raise FileNotFoundError(f"expected a run recorded with the writer 'arrays', got {directory}")
    chosen = max(files) if epoch is None else epoch
    if chosen not in files:
        raise ValueError(f"expected an epoch among {sorted(files)}, got {epoch!r}")
    manifest = read_manifest(directory)
    metric = rebuild_statistic(statistic, manifest.statistics)
    if threshold is None:
        threshold = threshold_of(rebuild_metrics(manifest.statistics).values())
    check_threshold(threshold)
    if hasattr(metric, "threshold"):
        metric.threshold = threshold
    layers = {each.layer: each.sums for each in read_layers(files[chosen]) if each.stage == stage}
    if not layers:
        raise ValueError(f"expected a stage that was recorded in epoch {chosen}, got {stage!r}")
    return summarise(layers, manifest.facts, metric, threshold=threshold, where=f"epoch {chosen}, {stage}")
