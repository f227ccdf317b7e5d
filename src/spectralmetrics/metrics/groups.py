"""Groups of metrics that share their sums: formed by their settings, not by the first data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torchmetrics import Metric, MetricCollection

from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.metrics.marginals import MarginalMetric
from spectralmetrics.metrics.overrides import copy_metric
from spectralmetrics.sums import Sum

Metrics: TypeAlias = Metric | Sequence[Metric] | Mapping[str, Metric] | MetricCollection
"""Metrics to read of each layer."""


class Templates(NamedTuple):
    """Metrics without observations, of which copies are made for each layer.

    Attributes:
        metrics: name -> metric.
        groups: names of metrics that share their sums; the first of each group keeps the sums.
    """

    metrics: Mapping[str, Metric]
    groups: list[list[str]]

    def leader(self, names: Sequence[str]) -> Any:
        """A metric that keeps the sums of a group."""
        leader = self.fresh(names[0])
        if isinstance(leader, SpectralMetric):
            have = {type(each) for each in leader.prototypes}
            wanted = {type(each): each for name in names for each in _others(self.metrics[name])}
            leader.accumulate_also([each for kind, each in wanted.items() if kind not in have])
        return leader

    def fresh(self, name: str) -> Any:
        """A copy of a metric."""
        with torch.inference_mode(False):  # states made inside could not be updated outside
            twin = copy_metric(self.metrics[name])
            twin.reset()
        return twin


def described(name: str, metric: Metric) -> tuple[object, ...]:
    """The settings of a metric that must be equal on all processes, so that it can be merged."""
    sums = metric.prototypes if isinstance(metric, SpectralMetric) else ()
    return (name, type(metric).__qualname__, *(setting for each in sums for setting in each.settings()))


def collect(metrics: Mapping[str, Metric]) -> Templates:
    """Group metrics by the sums that they can share."""
    metrics = _sharing_matrices(metrics)
    return Templates(metrics, _groups(metrics))


def _sharing_matrices(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Let metrics of single features read the covariance, if another metric keeps one."""
    owners = {
        (each.process_group, each.sync_on_compute): each
        for each in reversed(list(metrics.values()))  # the first one counts
        if isinstance(each, SpectralMetric) and not isinstance(each, MarginalMetric)
        if each.takes_observations and not each.needs_labels
    }
    found: dict[str, Metric] = {}
    for name, metric in metrics.items():
        owner = owners.get((metric.process_group, metric.sync_on_compute))
        if owner is not None and isinstance(metric, MarginalMetric) and metric.can_read_matrix:
            metric = metric.reading(owner)
        found[name] = metric
    return found


def _groups(metrics: Mapping[str, Metric]) -> list[list[str]]:
    groups: list[tuple[Any, dict[type[Sum], tuple[object, ...]], list[str]]] = []
    for name, metric in metrics.items():
        if not isinstance(metric, SpectralMetric) or not metric.takes_observations:
            groups.append((name, {}, [name]))
            continue
        spectral = metric.spectral_sum()
        kind = (type(spectral), spectral.settings())
        key = (metric.gram_dtype, kind, metric.process_group, metric.sync_on_compute)
        others = {type(each): each.settings() for each in _others(metric)}
        for group_key, kept, names in groups:
            # Two sums of one kind with different settings, such as samples with different seeds, stay apart.
            if group_key == key and all(kept.get(kind, own) == own for kind, own in others.items()):
                kept.update(others)
                names.append(name)
                break
        else:
            groups.append((key, others, [name]))
    # The metric that needs most leads: it accumulates all sums anyway, and saved states have its name.
    return [sorted(names, key=lambda name: -len(_others(metrics[name]))) for _, _, names in groups]


def _others(metric: Metric) -> Sequence[Sum]:
    return metric.other_sums() if isinstance(metric, SpectralMetric) else ()


def named_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by the names of their values.

    Raises:
        TypeError: for anything but metrics.
        ValueError: without a metric, and for a name that is invalid or comes twice.
    """
    if isinstance(metrics, Metric):
        metrics = [metrics]
    if isinstance(metrics, MetricCollection):
        named = [(str(key), metric) for key, metric in metrics.items(copy_state=False)]
    elif isinstance(metrics, Mapping):
        named = list(metrics.items())
    elif isinstance(metrics, Sequence) and not isinstance(metrics, str):
        named = [(getattr(metric, "short_name", type(metric).__name__), metric) for metric in metrics]
    else:
        hint = f"the class {metrics.__name__}; call it" if isinstance(metrics, type) else type(metrics).__name__
        raise TypeError(f"expected a metric, a sequence or dict of metrics, got {hint}")
    if not named:
        raise ValueError("expected at least one metric, got none")
    for name, metric in named:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"expected metric {name!r} to be a torchmetrics.Metric, got {type(metric).__name__}"
            )
        if not isinstance(name, str) or {".", "/"} & set(name) or not name or hasattr(MetricCollection, name):
            raise ValueError(
                f"expected a metric name without '.' and '/', no attribute of torch.nn.Module, got {name!r}"
            )
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected each metric name once, got {twice} more than once; name them with a dict")
    return dict(named)
