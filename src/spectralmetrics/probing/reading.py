"""The values of all layers in one stage, and what has to be said of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.functional.together import NO_GROUP, Progress, Wanted, decompose_together
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.probing.collections import Counted, LayerMetrics, count_together
from spectralmetrics.sums import SpectralSum
from spectralmetrics.torch_private import ignores_hooks, missing_for_compiled

_OF_LEFT_OUT = "observations with NaN or infinite values were left out in {}: {}"
HOST = torch.device("cpu")
"""Where values go: whoever looks at them would otherwise wait for the device, one by one."""


def read_stage(
    places: Sequence[LayerMetrics],
    names: Collection[str],
    read: Callable[[Any], Any],
    applies: Callable[[Any], bool],
    progress: Progress | None = None,
    group: Any = NO_GROUP,
) -> dict[str, Any] | None:
    """What is read of the named metrics, by ``"{metric}/{stage}/{layer}"``; None if no layer has seen anything.

    Args:
        places: the layers of one stage in forward order, their states merged.
        names: of the metrics, in the order of the values.
        read: of a metric.
        applies: whether it can be read of a metric of this layer; where not, nothing is said.
        progress: told how much is done, and of how much.
        group: of processes that have the same states and share the work; NO_GROUP for a process of its own.

    Raises:
        RuntimeError: if observations were not finite and a metric has ``nan_strategy="error"``.
    """
    stage = places[0].stage
    counted = count_together(places)
    seen = [place for place in places if place.has_seen(counted)]
    left_out = _left_out(places, counted)
    tell = _Steps(progress, len(seen))
    decompose_together(_wanted(seen, names, applies, counted), tell.decomposed, group)
    values: dict[str, Any] = {}
    failed, few = [], []
    unlabelled: dict[str, list[str]] = {}
    missed: dict[str, int | None] = {}
    clipped: dict[str, None] = {}
    for place in seen:
        found: dict[str, Any] = {}
        for name, metric in place.readable().items():
            if name not in names or not applies(metric):
                continue
            if _has_no_labels(place, name, metric, counted):
                if place.is_sketched:
                    failed.append(f"{name!r} of {place.layer!r} (not read from sketches)")
                else:
                    unlabelled.setdefault(name, []).append(place.layer)
                continue
            try:
                if isinstance(metric, SpectralMetric):
                    metric.check_range(bool(counted[id(place.leader_of[name])].in_range))
                value = found[name] = read(metric)
                if isinstance(metric, SpectralMetric) and isinstance(value, Tensor) and metric.misses(value):
                    missed[place.layer] = metric.sketch_size
                if isinstance(metric, SpectralMetric) and isinstance(value, Tensor) and metric.is_clipped(HOST):
                    clipped.setdefault(place.layer)
            except Exception as error:
                # One value less: a user's statistic on a width it was not made for, say.
                failed.append(f"{name!r} of {place.layer!r} ({type(error).__name__}: {error})")
        values.update({f"{name}/{stage}/{place.layer}": found[name] for name in names if name in found})
        if count := place.too_few(counted):
            few.append(f"{place.layer!r} ({count})")
        tell.read()
    if left_out:
        _warn(_OF_LEFT_OUT.format(stage, ", ".join(left_out)))
    if failed:
        _warn(f"values that could not be computed in {stage} are left out: {', '.join(failed)}")
    for name, layers in unlabelled.items():
        which = "any layer" if len(layers) == len(seen) else ", ".join(map(repr, layers))
        _warn(
            f"{name!r} in {stage} is left out, since no labels came for {which}: run the model inside"
            " `with probe.labels(y):`"
        )
    if missed:
        sizes = ", ".join(sorted({str(size) for size in missed.values()}))
        named = ", ".join(map(repr, missed))
        _warn(
            f"in {stage} a sketch of {sizes} columns does not hold the share of the variance of {named}, and"
            " the value is NaN: intervals() has lower bounds, and a larger sketch_size the value"
        )
    if clipped:
        named = ", ".join(map(repr, clipped))
        _warn(
            f"in {stage} so few observations give values beyond what is possible of {named}; the limit is"
            " returned, and intervals() says how sure it is"
        )
    if few:
        _warn(
            f"in {stage} there are fewer observations than twice the dimension found, which is too small then:"
            f" {', '.join(few)}; observe more, or ask for intervals with folds=8"
        )
    if seen and len(seen) < len(places):
        unseen = ", ".join(repr(place.layer) for place in places if place not in seen)
        _warn(f"layers that saw nothing in {stage} are left out: {unseen}")
    return values if seen else None


def read_covariances(
    places: Sequence[LayerMetrics], *, unbiased: bool, center: bool
) -> dict[str, Tensor] | None:
    """Layer -> covariance, of those that have one; None if no layer has seen anything.

    Args:
        places: the layers of one stage in forward order, their states merged.
        unbiased: divide by n - 1.
        center: False leaves the mean in.

    A layer that has none, or is refused one by ``nan_strategy="error"``, is named in a warning.
    """
    counted = count_together(places)
    seen = [place for place in places if place.has_seen(counted)]
    found: dict[str, Tensor] = {}
    left_out, failed = [], []
    for place in places:
        try:
            left_out += _left_out([place], counted)
        except RuntimeError as error:
            failed.append(f"{place.layer!r} ({error})")
            continue
        if place not in seen:
            continue
        spectral = next((each for each in place.sums() if isinstance(each, SpectralSum)), None)
        if spectral is None:
            overflowed = any(not counted[id(leader)].in_range for leader in place.spectral_leaders)
            failed.append(f"{place.layer!r} ({'its sums overflowed' if overflowed else 'no metric keeps it'})")
            continue
        count = spectral.num_observations.to(torch.float64)
        try:
            found[place.layer] = spectral.covariance(center=center) * (count / (count - 1) if unbiased else 1)
        except Exception as error:
            failed.append(f"{place.layer!r} ({error})")
    stage = places[0].stage
    if left_out:
        _warn(_OF_LEFT_OUT.format(stage, ", ".join(left_out)), stacklevel=4)
    if failed:
        _warn(f"covariances that are not there in {stage} are left out: {', '.join(failed)}", stacklevel=4)
    return found if seen or failed else None


def _wanted(
    places: Sequence[LayerMetrics], names: Collection[str], applies: Callable[[Any], bool], counted: Counted
) -> list[Wanted]:
    return [
        each
        for place in places
        for name, metric in place.readable().items()
        if name in names and isinstance(metric, SpectralMetric) and applies(metric)
        if counted[id(place.leader_of[name])].in_range and not _has_no_labels(place, name, metric, counted)
        for each in metric.wanted(HOST)
    ]


def _has_no_labels(place: LayerMetrics, name: str, metric: Metric, counted: Counted) -> bool:
    needs_labels = isinstance(metric, SpectralMetric) and metric.needs_labels
    return needs_labels and not counted[id(place.leader_of[name])].observations


class _Steps:
    """Tells of decompositions first, and then of layers that are read."""

    def __init__(self, progress: Progress | None, layers: int) -> None:
        self._progress = progress
        self._layers = layers
        self._before = 0
        self._read = 0

    def decomposed(self, done: int, total: int) -> None:
        self._before = total
        if self._progress is not None:
            self._progress(done, total + self._layers)

    def read(self) -> None:
        self._read += 1
        if self._progress is not None:
            self._progress(self._before + self._read, self._before + self._layers)


def warn_of_nothing(
    stages: Iterable[str],
    places: Iterable[LayerMetrics],
    is_off: bool,
    budget: float | None,
    *,
    stacklevel: int = 5,
) -> None:
    """Say that nothing at all was observed, and why, where it can be told.

    Args:
        stages: that were asked for.
        places: all layers in all stages.
        is_off: whether the probe is paused or removed.
        budget: of the probe.
        stacklevel: see ``warnings.warn``.
    """
    places = list(places)
    asked = [place for place in places if place.stage in set(stages)]
    where = " or ".join(stages)
    if any(place.forwards for place in asked):
        reason = "the layers ran, but put out no observations"
        given_up = {place.given_up for place in asked if place.given_up}
        if given_up:
            reason += f" ({next(iter(given_up))})"
        elif all(place.needs_labels for place in asked):
            reason = "the layers ran, but no labels came that fit: run the model inside `with probe.labels(y):`"
        elif budget is not None:
            reason = f"the layers ran, but the budget of {100 * budget:.4g} % has paid for no forward yet"
    elif any(place.transformed for place in asked):
        reason = "the model ran inside transforms of torch.func, which are not observed"
    elif any(place.forwards for place in places):
        other = next(place.stage for place in places if place.forwards)
        reason = f"the layers ran in {other} only; the stage is the layer's own `training` flag"
    elif is_off:
        reason = "the probe is paused or removed"
    elif ignores_hooks():
        reason = (
            "torch._dynamo.config.skip_nnmodule_hook_guards has been set to True, so that a compiled model"
            " ignores hooks: set it to False and call torch.compiler.reset()"
        )
    elif missing := missing_for_compiled():
        reason = f"compiled models cannot be observed with torch {torch.__version__}, which has no {missing}"
    else:
        reason = (
            "no probed layer has run since the probe was made or reset; a model that is exported or"
            " scripted does not call hooks"
        )
    _warn(f"nothing was observed in {where}: {reason}", stacklevel)


def _left_out(places: Collection[LayerMetrics], counted: Counted) -> list[str]:
    """How many observations were not finite, by layer, where a metric wants that to be said."""
    found = []
    for place in places:
        dropped = counted[id(place.spectral_leaders[0])].left_out if place.spectral_leaders else 0
        strategies = {m.nan_strategy for m in place.members if isinstance(m, SpectralMetric)}
        if dropped and "error" in strategies:
            raise RuntimeError(
                f"{dropped} observations of layer {place.layer!r} in {place.stage} hold NaN or infinite values;"
                " nan_strategy='warn' leaves them out"
            )
        if dropped and "warn" in strategies:
            found.append(f"{dropped} of {place.layer!r}")
    return found


def _warn(message: str, stacklevel: int = 5) -> None:
    warnings.warn(message, UserWarning, stacklevel=stacklevel)
