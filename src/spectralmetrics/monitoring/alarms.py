"""Alarms: changes for the worse in a layer since earlier readings.

One public table, :data:`DEFAULT_ALARMS`, holds the rules. ``checks/alarms.py`` judges them, on networks, data
and seeds that they were not calibrated on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from spectralmetrics.findings import Finding, LayerNumbers, all_but
from spectralmetrics.monitoring import scales as of_scales
from spectralmetrics.monitoring.scales import LASTING, MOST_CHANGES
from spectralmetrics.probing.movers import Scales
from spectralmetrics.table import plural

AlarmStatistic: TypeAlias = Literal["non_finite", "spread", "dead_features", "effective_rank", "level", "rms"]

_NARROW = 4
"""In narrower layers and networks of fewer outputs, the task may need only few directions, and the scale of so
few features is hardly more than the scale of their means."""
_FALLEN = 4.0
"""A spread has fallen if it was once larger by this factor."""
_PAST, _LAG = 6, 3
"""A rank is compared with the last six readings and, for slow falls, with the six before the last three."""
_ROBUST = 1.4826
"""The standard deviation of a normal distribution over its median of absolute deviations."""


class Alarm(NamedTuple):
    """Something that went wrong in a layer.

    Attributes:
        step: the number of optimiser steps when the problem was found, or when the scale jumped.
        finding: the problem, with its layer, message and value.
        before: the earlier value of the same statistic; NaN if there is none.
    """

    step: int
    finding: Finding
    before: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.finding.layer!r} in {self.finding.stage}: {self.finding.message}"


class AlarmRule(NamedTuple):
    """A rule for alarms.

    Attributes:
        kind: the kind of the finding: ``"non_finite"``, ``"collapsed"``, ``"dead"`` or ``"scale"``.
        statistic: the value compared: ``"non_finite"``, ``"spread"``, ``"dead_features"``,
            ``"effective_rank"``, ``"level"`` (the median of the last 12 root mean squares) or ``"rms"``.
        threshold: the limit of the value; for ``"level"`` as a share of its largest, for ``"rms"`` the factor
            of a change.
        reads: number of readings in a row that must show it; if more than one, for 12 steps or more. One is
            enough if no feature varied for 12 steps.
        min_observations: if fewer rows came since the last reading, they are kept for the next one.
        first_step: the rule is silent before this step.
        factor: factor by which the value must be below its own past; NaN if the past does not count.
        deviations: the same margin in robust deviations of its own past; NaN if the past does not count.
        when: the rule in words.
    """

    kind: str
    statistic: AlarmStatistic
    threshold: float
    reads: int
    min_observations: int
    first_step: int
    factor: float
    deviations: float
    when: str


DEFAULT_ALARMS: tuple[AlarmRule, ...] = (
    AlarmRule("non_finite", "non_finite", 0, 1, 0, 0, math.nan, math.nan,
              "rows with NaN or infinities were left out"),
    AlarmRule("collapsed", "spread", 1e-3, 2, 256, 0, _FALLEN, math.nan,
              "the variance is less than this share of the mean square, and has fallen to less than a quarter"
              " of what it was, in a layer of 4 features or more"),
    AlarmRule("dead", "dead_features", 0.9, 2, 256, 0, math.nan, math.nan,
              "at least this share of the features does not vary, and did before; one reading is enough if no"
              " feature varied for 12 steps"),
    AlarmRule("collapsed", "effective_rank", 2.5, 3, 256, 175, 1.5, 3,
              "the effective rank is below this, and by the factor and the robust deviations below the least of"
              " its last six readings, or of the six before the last three, in a layer and a network of 4"
              " outputs or more"),
    AlarmRule("scale", "level", 1e-3, 2, 0, 0, math.nan, math.nan,
              "the median of the last 12 root mean squares is less than this share of the largest of earlier"
              " readings, or of those since a jump, in a layer of 4 features or more that is not the last;"
              " not for gradients"),
    AlarmRule("scale", "rms", 3, 1, 0, 0, math.nan, 12,
              "the root mean square changed by more than this factor, and by more than so many medians of its"
              " own last 64 changes, from one step to the next, did not come back in the step after, and was so"
              " far at most once in the last 64 steps; in a layer of less than 4 features by more than its"
              " square; or it fell to 0, where it was not before, for 12 steps"),
)  # fmt: skip
"""The default rules of a :class:`~spectralmetrics.Monitor`."""

STATISTICS: tuple[str, ...] = get_args(AlarmStatistic)

Past: TypeAlias = dict[str, Any]
"""The memory of one layer, in types that JSON has."""


def judge(
    rules: Sequence[AlarmRule],
    stage: str,
    step: int,
    layers: Sequence[tuple[LayerNumbers, Scales]],
    past: Mapping[str, Past],
) -> list[Alarm]:
    """The alarms of a reading, in forward order, as its layers are.

    Args:
        rules: the rules to apply.
        stage: the stage of the observations.
        step: number of optimiser steps so far.
        layers: the numbers and scales of layers.
        past: layer -> its memory, which is updated.
    """
    alarms: list[Alarm] = []
    series = {numbers.layer: _series(scales, past[numbers.layer]) for numbers, scales in layers}
    for numbers, _ in layers:
        own, last = past[numbers.layer], layers[-1][0]
        for rule in rules:
            if rule.statistic == "rms":
                continue
            if rule.statistic == "level":
                values = _levels(numbers, last, series[numbers.layer], own)
            else:
                values = [_value(rule.statistic, numbers, last)]
            alarms += _of_values(rule, stage, step, numbers, values, own)
    for rule in rules:
        if rule.statistic == "rms":
            alarms += _of_jumps(rule, stage, step, layers, series, past)
    for layer, each in series.items():
        past[layer]["scales"] = [list(one) for one in each[-MOST_CHANGES - 2 :]]
    order = [numbers.layer for numbers, _ in layers]
    return sorted(alarms, key=lambda alarm: order.index(alarm.finding.layer))


def enough(rules: Sequence[AlarmRule], numbers: LayerNumbers) -> bool:
    """True if a layer has the observations that the rules need."""
    return numbers.observations >= max((rule.min_observations for rule in rules), default=0)


# -- values that stay where they should not be -----------------------------------------------------------------


def _of_values(
    rule: AlarmRule, stage: str, step: int, numbers: LayerNumbers, values: Sequence[float], past: Past
) -> Iterator[Alarm]:
    """An alarm of the last value of a reading; the values before it only join the past."""
    *earlier, value = values
    if math.isnan(value) or (rule.statistic == "effective_rank" and not enough([rule], numbers)):
        return  # few rows span few directions
    new = {"seen": [], "reads": 0, "since": 0, "raised": False}
    own = past.setdefault(f"{rule.kind}/{rule.statistic}", new)
    for each in earlier:
        if not math.isnan(each):
            own["seen"] = _remembered(rule, own["seen"], each)
    if not _is_beyond(rule, value, own["seen"], step):
        own.update(reads=0, raised=False, seen=_remembered(rule, own["seen"], value), fine=step)
        return
    if numbers.observations < rule.min_observations or own["raised"]:
        return
    own["reads"] += 1
    if own["reads"] == 1:
        own["since"] = step
    is_constant = rule.statistic == "dead_features" and numbers.is_dead
    has_lasted = step - own.get("fine", own["since"]) >= LASTING
    if rule.reads == 1 or (has_lasted and (own["reads"] >= rule.reads or is_constant)):
        own["raised"] = True
        before = _before(rule, own["seen"])
        words = _words(rule.statistic, numbers, value, before)
        if own["since"] < step:
            words += f", since step {own['since']}"
        ends = numbers.rank if rule.statistic == "effective_rank" and numbers.has_interval else ()
        yield Alarm(step, Finding(stage, numbers.layer, rule.kind, "problem", words, value, *ends), before)


def _value(statistic: str, numbers: LayerNumbers, last: LayerNumbers) -> float:
    """The number that a rule compares; NaN where it says nothing of a layer."""
    if statistic == "non_finite":
        return numbers.left_out
    if statistic == "dead_features":
        return numbers.dead / numbers.width if numbers.observations > 1 else math.nan
    if statistic == "spread":
        counts = numbers.width >= _NARROW and numbers.observations > 1 and not numbers.is_dead
        return numbers.spread if counts else math.nan
    allows_more = min(numbers.width, numbers.ceiling, last.width) >= _NARROW
    return numbers.upper_rank if allows_more and not numbers.is_dead else math.nan


def _levels(numbers: LayerNumbers, last: LayerNumbers, series: Scales, past: Past) -> list[float]:
    """The medians of 12 steps each since the last reading; NaN where the rule says nothing."""
    # The outputs have the scale of the targets, and gradients fade as a network learns.
    if numbers.width < _NARROW or numbers.layer == last.layer or numbers.of_gradients:
        return [math.nan]
    ends = range(len(series), max(len(past.get("scales", ())), LASTING - 1), -LASTING)
    jumped = past.get("jumped", 0)
    return [of_scales.level(series[end - LASTING : end], jumped) for end in ends][::-1] or [math.nan]


def _words(statistic: str, numbers: LayerNumbers, value: float, before: float) -> str:
    if statistic == "non_finite":
        return f"{plural(numbers.left_out, 'row')} with NaN or infinities left out"
    if statistic == "level":
        return f"faded: the scale is {value / before:.2g} of what it was"
    if statistic == "spread":
        return f"collapsed: the mean holds {all_but(value)} %"
    if statistic == "dead_features":
        return f"dead: {numbers.dead} of {numbers.width} features"
    return f"collapsed: effective rank {value:.2g}, {before:.2g} before"


def _is_beyond(rule: AlarmRule, value: float, seen: Sequence[float], step: int) -> bool:
    """True if a value is beyond the limit and, for most rules, was not so in the past."""
    if step < rule.first_step:
        return False
    if rule.statistic == "non_finite":
        return value > rule.threshold
    if rule.statistic == "dead_features":
        return value >= rule.threshold and bool(seen)
    if rule.statistic == "level":
        return value < rule.threshold * max(seen, default=0)
    if value >= rule.threshold or not seen:
        return False
    if rule.statistic == "spread":
        return value < max(seen) / rule.factor
    # Fewer readings do not show the usual range: the training has just begun.
    return any(_has_left(rule, value, past) for past in (seen[-_PAST:], seen[:_PAST]) if len(seen) >= _PAST)


def _has_left(rule: AlarmRule, value: float, past: Sequence[float]) -> bool:
    """True if a rank is below the least of its own past by more than the factor and the robust deviations."""
    logarithms = [math.log(max(each, 1e-12)) for each in past]
    middle = statistics.median(logarithms)
    deviation = _ROBUST * statistics.median(abs(each - middle) for each in logarithms)
    margin = max(math.log(rule.factor), rule.deviations * deviation)
    return math.log(max(value, 1e-12)) < min(logarithms) - margin


def _remembered(rule: AlarmRule, seen: Sequence[float], value: float) -> list[float]:
    """The values to compare later values with."""
    if rule.statistic == "effective_rank":
        return [*seen, value][-_PAST - _LAG :]
    if rule.statistic == "spread":
        return [max([*seen, value]), value]
    if rule.statistic == "level":
        return [max([*seen, value])]
    return [value] if rule.statistic == "non_finite" or value < rule.threshold else list(seen)


def _before(rule: AlarmRule, seen: Sequence[float]) -> float:
    if not seen:
        return math.nan
    return statistics.median(seen) if rule.statistic == "effective_rank" else seen[-1]


# -- jumps of the scale ----------------------------------------------------------------------------------------


def _series(scales: Scales, past: Past) -> Scales:
    """The scales of earlier readings and those of this one."""
    earlier: Scales = [tuple(each) for each in past.get("scales", ())]
    return earlier + [each for each in scales if not earlier or each[0] > earlier[-1][0]]


def _of_jumps(
    rule: AlarmRule,
    stage: str,
    step: int,
    layers: Sequence[tuple[LayerNumbers, Scales]],
    all_series: Mapping[str, Scales],
    past: Mapping[str, Past],
) -> Iterator[Alarm]:
    """One alarm for all layers that jumped; it names the first one."""
    jumps: dict[str, tuple[int, int, str, int, int, float, float]] = {}
    for order, (numbers, _) in enumerate(layers):
        own, series = past[numbers.layer], all_series[numbers.layer]
        # The scale of one logit is the magnitude of its mean, which may pass zero.
        factor = rule.threshold**2 if numbers.width < _NARROW else rule.threshold
        for newest in range(max(len(own.get("scales", ())), 2), len(series)):
            some = series[max(newest - MOST_CHANGES - 2, 0) : newest + 1]
            is_new = True
            if of_scales.has_jumped(some, factor, rule.deviations):
                index, is_new = newest - 1, not of_scales.was_there(some)
            elif of_scales.has_fallen_to_zero(some):
                index = newest + 1 - LASTING
            else:
                continue
            (_, last, before), (forward, at, after) = series[index - 1 : index + 1]
            happened, span = (step, 1) if at is None else (at + 1, at - (at - 1 if last is None else last))
            jump = (forward, order, numbers.layer, happened, span, math.exp(before), math.exp(after))
            if is_new:
                jumps.setdefault(numbers.layer, jump)
            own.pop(f"{rule.kind}/level", None)  # which begins anew
            own["jumped"] = forward
    if jumps:
        _, _, layer, happened, span, before, after = min(jumps.values())
        change = f"changed by a factor of {after / before:.3g}" if after else f"fell from {before:.3g} to 0"
        # Forwards in between were not observed.
        words = f"the scale {change} in {plural(span, 'step') if span > 1 else 'one step'}"
        if len(jumps) > 1:
            words += f", then the scale of {plural(len(jumps) - 1, 'other layer')}"
        yield Alarm(happened, Finding(stage, layer, rule.kind, "problem", words, after), before)
