"""The metrics for rows of some width: the user's metrics, or a default choice."""

from __future__ import annotations

from torchmetrics import Metric

from spectralmetrics.metrics import (
    CovarianceTraceMetric,
    EffectiveRankMetric,
    IntrinsicDimensionMetric,
    LinearProbeMetric,
    MarginalMetric,
    NeuralCollapseMetric,
    ParticipationRatioMetric,
    SaturationMetric,
    SpectralMetric,
    SpreadMetric,
    StableRankMetric,
)
from spectralmetrics.metrics.groups import Metrics, named_metrics
from spectralmetrics.sums import SpectralSum

WIDEST = 8192
"""The most features for which a covariance is kept."""
_SKETCH_SIZE = 512


def metrics_for(
    metrics: Metrics | None, width: int, classes: int, center: bool, folds: int
) -> dict[str, Metric]:
    """The metrics by name, or a choice for this width, with these folds if they can keep folds.

    Raises:
        ValueError: for a metric whose covariance would be too large.
    """
    named = named_metrics(_defaults(width, classes) if metrics is None else metrics)
    chosen: dict[str, Metric] = {}
    for name, metric in named.items():
        if isinstance(metric, SpectralMetric) and metric.takes_observations:
            metric = metric.with_folds(1 if metric.sketch_size is not None else folds)
            if not (center or metric.needs_labels or isinstance(metric, MarginalMetric)):
                metric.center = False
            kept = metric.prototypes[0]
            if width > WIDEST and isinstance(kept, SpectralSum) and kept.keeps_products:
                raise ValueError(
                    f"expected at most {WIDEST} features for {name!r}, whose covariance would take"
                    f" {8 * width**2 / 2**30:.1f} GiB, got {width}; give it sketch_size={_SKETCH_SIZE}"
                )
        chosen[name] = metric
    return chosen


def _defaults(width: int, classes: int) -> list[Metric]:
    first, then = (IntrinsicDimensionMetric, SaturationMetric), (ParticipationRatioMetric, StableRankMetric)
    if width > WIDEST:
        return [kind(sketch_size=_SKETCH_SIZE) for kind in (*first, *then)]
    kinds = (*first, EffectiveRankMetric, *then, CovarianceTraceMetric, SpreadMetric)
    # The findings say how many rows were left out.
    metrics: list[Metric] = [kind(nan_strategy="ignore") for kind in kinds]
    if classes > 1:
        metrics += [kind(classes, nan_strategy="ignore") for kind in (LinearProbeMetric, NeuralCollapseMetric)]
    return metrics
