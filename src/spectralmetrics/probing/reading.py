"""The values of all layers in one stage, and the warnings about them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.findings import needs_weights
from spectralmetrics.functional.together import Progress, Wanted, decompose_together
from spectralmetrics.metrics import Interval, SpectralMetric
from spectralmetrics.probing.collections import Counted, LayerMetrics, count_together
from spectralmetrics.probing.facts import Key
from spectralmetrics.probing.hooks import HOOKS_IGNORED, level_of_user
from spectralmetrics.probing.rules import Observes
from spectralmetrics.sums import SpectralSum
from spectralmetrics.torch_private import ignores_hooks

_OF_LEFT_OUT = "observations with NaN or infinite values were left out in {}: {}"
HOST = torch.device("cpu")
"""The device of values: reading them from an accelerator would wait for it, value by value."""


@dataclass
class Reading:
    """The values of one layer in one stage, and the warnings about it; sent between processes.

    Attributes:
        seen: True if the layer has data.
        values: metric -> its value.
        failed: descriptions of values that could not be read.
        unlabelled: metrics that got no labels.
        missed: columns of a sketch that was too small; None if it was not.
        is_clipped: True if a limit of the possible values replaces a value.
        few: number of observations, if they are too few; otherwise 0.
        has_intervals: True if a metric that was read has an interval.
        left_out: number of observations that were not finite, if a warning is wanted; otherwise 0.
        refused: number of observations that were not finite, if they are an error; otherwise 0.
        intervals: metric -> interval of its value, for a record.
        known: eigenvalues that were read, see :meth:`.Spectrum.known`, for a record; None without a spectrum.
        needs_weights: True if findings depend on the layer's weights, see :func:`.needs_weights`, for a record.
    """

    seen: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    missed: int | None = None
    is_clipped: bool = False
    few: int = 0
    has_intervals: bool = False
    left_out: int = 0
    refused: int = 0
    intervals: dict[str, Interval] = field(default_factory=dict)
    known: dict[tuple[str, bool], Any] | None = None
    needs_weights: bool = False


@dataclass(frozen=True)
class Question:
    """A reading to take of layers' metrics.

    Attributes:
        names: the names of the metrics.
        read: function that reads a metric.
        applies: True for a metric that ``read`` can read; others are skipped without a warning.
        for_record: True to read intervals, too, and to send the eigenvalues that were read to all processes.
    """

    names: Collection[str]
    read: Callable[[Any], Any]
    applies: Callable[[Any], bool]
    for_record: bool = False

    def of(self, place: LayerMetrics) -> dict[str, Metric]:
        """The metrics of a layer that are read."""
        named = place.readable().items()
        return {name: metric for name, metric in named if name in self.names and self.applies(metric)}


def read_layers(
    question: Question, places: Sequence[LayerMetrics], progress: Progress | None
) -> dict[tuple[str, str], Reading]:
    """Read the metrics of this package and the reasons for warnings, by stage and layer.

    Args:
        question: the reading to take.
        places: layers whose states are merged.
        progress: called with the number of finished steps and their total.
    """
    counted = count_together(places)
    readings = {(place.stage, place.layer): _left_out(place, counted) for place in places}
    seen = [place for place in places if place.has_seen(counted)]
    before = 0

    def decomposed(done: int, total: int) -> None:
        nonlocal before
        before = total
        if progress is not None:
            progress(done, total + len(seen))

    if not any(reading.refused for reading in readings.values()):
        decompose_together(_wanted(seen, question, counted), decomposed)
    for number, place in enumerate(seen, 1):
        reading = readings[place.stage, place.layer]
        reading.seen = True
        if reading.refused:
            continue
        for name, metric in question.of(place).items():
            if not isinstance(metric, SpectralMetric):
                continue
            if _saw_nothing(place, name, counted):
                if not metric.needs_labels:  # such as a metric that was not in a loaded state
                    reading.failed.append(f"{name!r} of {place.layer!r} (it saw nothing)")
                elif place.is_sketched:
                    reading.failed.append(f"{name!r} of {place.layer!r} (not read from sketches)")
                else:
                    reading.unlabelled.append(name)
                continue
            reading.has_intervals = reading.has_intervals or metric.keeps_interval
            try:
                metric.check_range(bool(counted[id(place.leader_of[name])].in_range))
                value = reading.values[name] = question.read(metric)
                if isinstance(value, Tensor) and metric.misses(value):
                    reading.missed = metric.sketch_size
                if isinstance(value, Tensor) and metric.is_clipped(HOST):
                    reading.is_clipped = True
                if question.for_record and metric.keeps_interval:
                    with contextlib.suppress(Exception):  # the value is there without an interval
                        reading.intervals[name] = metric.read_interval(HOST)
            except Exception as error:
                # Only this value is missing: a user's statistic may not allow this width, for example.
                reading.failed.append(f"{name!r} of {place.layer!r} ({type(error).__name__}: {error})")
        reading.few = place.too_few(counted)
        if question.for_record and (spectrum := place.spectrum()) is not None:
            reading.known = spectrum.known()
            reading.needs_weights = needs_weights(spectrum)
        if progress is not None:
            progress(before + number, before + len(seen))
    for place in places if question.for_record else ():
        if not readings[place.stage, place.layer].seen and place.recorded_sums():
            readings[place.stage, place.layer].known = {}  # all was left out, which the record must tell
    return readings


def read_others(place: LayerMetrics, question: Question, reading: Reading) -> None:
    """Read metrics of other libraries. They merge themselves, so that all processes read in one order."""
    for name, metric in question.of(place).items():
        if not isinstance(metric, SpectralMetric):
            try:
                with warnings.catch_warnings():
                    # Maybe only other processes have updated it; an error here would make them wait.
                    warnings.filterwarnings("ignore", message=".*was called before.*update")
                    reading.values[name] = question.read(metric)
            except Exception as error:
                reading.failed.append(f"{name!r} of {place.layer!r} ({type(error).__name__}: {error})")


def report_readings(
    stage: str, readings: Mapping[str, Reading], names: Collection[str], warned: set[str]
) -> dict[Key, Any] | None:
    """The values of one stage, with warnings about them; None if no layer has data.

    Args:
        stage: the stage of the readings.
        readings: layer -> its reading, in the order of the values.
        names: the names of the metrics, in the order of the values.
        warned: stages and layers without observations that have been named; each of these is named once.

    Raises:
        RuntimeError: if observations were not finite and a metric has ``nan_strategy="error"``.
    """
    for layer, reading in readings.items():
        if reading.refused:
            raise RuntimeError(_refusal(layer, stage, reading.refused))
    seen = {layer: reading for layer, reading in readings.items() if reading.seen}
    if left_out := [f"{each.left_out} of {layer!r}" for layer, each in readings.items() if each.left_out]:
        _warn(_OF_LEFT_OUT.format(stage, ", ".join(left_out)))
    if failed := [words for reading in seen.values() for words in reading.failed]:
        _warn(f"values that could not be computed in {stage} are left out: {', '.join(failed)}")
    for name in names:
        if layers := [layer for layer, reading in seen.items() if name in reading.unlabelled]:
            which = "any layer" if len(layers) == len(seen) else ", ".join(map(repr, layers))
            _warn(
                f"{name!r} in {stage} is left out, since no labels came for {which}: run the model inside"
                " `with probe.labels(y):`"
            )
    if missed := {layer: reading.missed for layer, reading in seen.items() if reading.missed is not None}:
        sizes = ", ".join(sorted({str(size) for size in missed.values()}))
        named = ", ".join(map(repr, missed))
        _warn(
            f"in {stage} a sketch of {sizes} columns does not hold the share of the variance of {named}, and"
            " the value is NaN: intervals() has lower bounds, and a larger sketch_size the value"
        )
    if clipped := [repr(layer) for layer, reading in seen.items() if reading.is_clipped]:
        _warn(
            f"in {stage} so few observations give values beyond what is possible of {', '.join(clipped)}; the"
            " limit is returned, and intervals() says how sure it is"
        )
    if few := [f"{layer!r} ({reading.few})" for layer, reading in seen.items() if reading.few]:
        how_sure = any(reading.has_intervals for reading in seen.values() if reading.few)
        _warn(
            f"in {stage} there are fewer observations than twice the dimension found, which is probably too"
            f" small: {', '.join(few)}; observe more, or"
            f" {'see intervals()' if how_sure else 'ask for intervals with folds=8'}"
        )
    if seen and len(seen) < len(readings):
        unseen = ", ".join(repr(layer) for layer in readings if layer not in seen)
        if f"{stage}: {unseen}" not in warned:
            warned.add(f"{stage}: {unseen}")
            _warn(
                f"layers that saw nothing in {stage} are left out: {unseen}. They did not run, an earlier"
                " warning says why they are not observed, or the model uses their weights without calling them"
            )
    values = {
        (name, stage, layer): reading.values[name]
        for layer, reading in seen.items()
        for name in names
        if name in reading.values
    }
    return values if seen else None


@dataclass
class Covariance:
    """The covariance of one layer in one stage, or the reason why there is none.

    Attributes:
        seen: True if the layer has data.
        value: shape (D, D), float64; None if there is none.
        failed: the reason why there is none.
        left_out: number of observations that were not finite, if a warning is wanted; otherwise 0.
    """

    seen: bool = False
    value: Tensor | None = None
    failed: str = ""
    left_out: int = 0


def read_covariance(place: LayerMetrics, *, unbiased: bool, center: bool) -> Covariance:
    """The covariance of a layer whose states are merged.

    Args:
        place: the layer.
        unbiased: True divides by n - 1.
        center: False does not subtract the mean.
    """
    counted = count_together([place])
    reading = _left_out(place, counted)
    result = Covariance(place.has_seen(counted), left_out=reading.left_out)
    if reading.refused:
        result.failed = _refusal(place.layer, place.stage, reading.refused)
    elif result.seen:
        spectral = next((each for each in place.sums() if isinstance(each, SpectralSum)), None)
        if spectral is None:
            overflowed = any(not counted[id(leader)].in_range for leader in place.spectral_leaders)
            result.failed = "its sums overflowed" if overflowed else "no metric keeps it"
            return result
        count = spectral.num_observations.to(torch.float64)
        try:
            result.value = spectral.covariance(center=center) * (count / (count - 1) if unbiased else 1)
        except Exception as error:
            result.failed = str(error)
    return result


def report_covariances(stage: str, read: Mapping[str, Covariance]) -> dict[str, Tensor] | None:
    """Layer -> covariance, for layers that have one; None if no layer has data.

    Warnings name the layers without a covariance, also those with an error by ``nan_strategy="error"``.
    """
    if left_out := [f"{each.left_out} of {layer!r}" for layer, each in read.items() if each.left_out]:
        _warn(_OF_LEFT_OUT.format(stage, ", ".join(left_out)))
    if failed := [f"{layer!r} ({each.failed})" for layer, each in read.items() if each.failed]:
        _warn(f"covariances that are not there in {stage} are left out: {', '.join(failed)}")
    covariances = {layer: each.value for layer, each in read.items() if each.value is not None}
    return covariances if failed or any(each.seen for each in read.values()) else None


def _refusal(layer: str, stage: str, number: int) -> str:
    return (
        f"{number} observations of layer {layer!r} in {stage} hold NaN or infinite values;"
        " nan_strategy='warn' leaves them out"
    )


def _wanted(places: Sequence[LayerMetrics], question: Question, counted: Counted) -> list[Wanted]:
    return [
        each
        for place in places
        for name, metric in question.of(place).items()
        if isinstance(metric, SpectralMetric)
        if counted[id(place.leader_of[name])].in_range and not _saw_nothing(place, name, counted)
        for each in metric.wanted(HOST)
    ]


def _saw_nothing(place: LayerMetrics, name: str, counted: Counted) -> bool:
    """True if a metric of this package has no observations, such as without labels; others may have some."""
    return not counted[id(place.leader_of[name])].observations


def nothing_observed(
    stages: Iterable[str], places: Iterable[LayerMetrics], is_off: bool, budget: float | None, observe: Observes
) -> str:
    """A message that nothing was observed, with the reason.

    Args:
        stages: the stages that were to be read.
        places: all layers in all stages.
        is_off: True if the probe is paused or removed.
        budget: the budget of the probe.
        observe: the probe's argument ``observe``.
    """
    places = list(places)
    of_stages = [place for place in places if place.stage in set(stages)]
    where = " or ".join(stages)
    if any(place.forwards for place in of_stages):
        reason = "the layers ran, but put out no observations"
        given_up = {place.given_up for place in of_stages if place.given_up}
        if given_up:
            reason += f" ({next(iter(given_up))})"
        elif all(place.needs_labels for place in of_stages):
            reason = "the layers ran, but no labels came that fit: run the model inside `with probe.labels(y):`"
        elif budget is not None:
            reason = f"the layers ran, but the budget of {100 * budget:.4g} % has paid for no forward yet"
        elif observe == "gradients":
            reason = "the layers ran, but no gradient arrived: there was no backward, or the layers are frozen"
    elif any(place.transformed for place in of_stages):
        reason = "the model ran inside transforms of torch.func, which are not observed"
    elif any(place.forwards for place in places):
        other = next(place.stage for place in places if place.forwards)
        reason = f"the layers ran in {other} only; the stage is the layer's own `training` flag"
    elif is_off:
        reason = "no probed layer has run since the probe was made or reset, and it is paused or removed now"
    elif ignores_hooks():
        reason = HOOKS_IGNORED
    else:
        reason = (
            "no probed layer has run since the probe was made or reset; a model that is exported or"
            " scripted does not call hooks"
        )
    return f"nothing was observed in {where}: {reason}"


def _left_out(place: LayerMetrics, counted: Counted) -> Reading:
    """A reading with the number of observations left out, as an error or a warning by ``nan_strategy``."""
    dropped = max((counted[id(leader)].left_out for leader in place.spectral_leaders), default=0)
    metrics = place.templates.metrics.values()
    strategies = {metric.nan_strategy for metric in metrics if isinstance(metric, SpectralMetric)}
    if "error" in strategies:
        return Reading(refused=dropped)
    return Reading(left_out=dropped if "warn" in strategies else 0)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=level_of_user())
