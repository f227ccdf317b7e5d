"""The rules alone, on made-up numbers."""

import json
import math
import random

import pytest

from spectralmetrics import DEFAULT_ALARMS
from spectralmetrics.findings import LayerNumbers
from spectralmetrics.monitoring.alarms import judge


def reading(layer="a", *, rank=12.0, width=64, observations=1000, **numbers):
    ends = rank if isinstance(rank, tuple) else (rank, rank)
    found = {"spread": 0.5, "dead": 0, **numbers}
    return LayerNumbers(layer, width, width, observations, found.pop("left_out", 0), rank=ends, **found)


def alarms_of(readings, every=100, rules=DEFAULT_ALARMS, scales=None):
    """(step, kind) of the alarms of one layer over consecutive readings; the memory is saved in between."""
    past, found = {}, []
    for number, one in enumerate(readings):
        layers = one if isinstance(one, list) else [one]
        for each in layers:
            past.setdefault(each.layer, {})
        step = every * (number + 1)
        pairs = [(each, [] if scales is None else scales(each.layer, number)) for each in layers]
        found += judge(rules, "train", step, pairs, past)
        past = json.loads(json.dumps(past))
    return found


def kinds(found):
    return [(alarm.step, alarm.finding.kind) for alarm in found]


FINE = [reading()] * 8


@pytest.mark.parametrize(
    ("bad", "kind", "after"),
    [
        ({"spread": 1e-5}, "collapsed", 2),
        ({"dead": 60}, "dead", 2),
        ({"rank": 1.5}, "collapsed", 3),
        ({"left_out": 3}, "non_finite", 1),
    ],
)
def test_one_alarm_when_it_has_been_so_for_long_enough(bad, kind, after):
    found = alarms_of([*FINE, *[reading(**bad)] * 8])
    assert kinds(found) == [(800 + 100 * after, kind)]
    assert found[0].finding.severity == "problem"
    assert not alarms_of([*FINE, *[reading(**bad)] * (after - 1), *FINE])
    # It ended, and comes again.
    again = alarms_of([*FINE, *[reading(**bad)] * 4, *FINE, *[reading(**bad)] * 4])
    assert kinds(again) == [(800 + 100 * after, kind), (2000 + 100 * after, kind)]


@pytest.mark.parametrize("bad", [{"spread": 1e-5}, {"dead": 60}, {"rank": 1.5}])
def test_readings_of_few_steps_must_show_it_for_12_steps(bad):
    assert not alarms_of([*FINE * 30, *[reading(**bad)] * 11, *FINE], every=1)
    assert len(alarms_of([*FINE * 30, *[reading(**bad)] * 12, *FINE], every=1)) == 1


@pytest.mark.parametrize("bad", [{"spread": 1e-5}, {"dead": 60}, {"rank": 1.5}])
def test_what_was_there_from_the_beginning_is_no_alarm(bad):
    assert not alarms_of([reading(**bad)] * 12)


@pytest.mark.parametrize("bad", [{"spread": 1e-5}, {"dead": 60}, {"rank": 1.5}])
def test_few_rows_raise_nothing(bad):
    assert not alarms_of([*FINE, *[reading(observations=100, **bad)] * 8])


def test_a_spread_that_was_hardly_larger_has_not_fallen():
    assert not alarms_of([*[reading(spread=2e-3)] * 8, *[reading(spread=9e-4)] * 8])


def test_a_rank_must_leave_the_range_of_its_own_past():
    assert not alarms_of([*[reading(rank=3.3)] * 8, *[reading(rank=2.3)] * 8])
    assert alarms_of([*[reading(rank=3.8)] * 8, *[reading(rank=2.3)] * 8])
    noisy = [reading(rank=each) for each in (4, 12, 7, 25, 4.2, 15, 9)]
    assert not alarms_of([*noisy, *[reading(rank=2.4)] * 8])
    assert alarms_of([*noisy, *[reading(rank=1.02)] * 8]) == []  # nor below three of its standard deviations


def test_the_upper_end_of_the_interval_counts():
    assert not alarms_of([*FINE, *[reading(rank=(1.5, 3.0))] * 8])
    (alarm,) = alarms_of([*FINE, *[reading(rank=(1.5, 2.0), has_interval=True)] * 8])
    assert (alarm.finding.low, alarm.finding.high, alarm.before) == (1.5, 2.0, 12.0)


def test_few_directions_are_no_alarm_where_the_task_has_no_more():
    last = reading("head", width=2, rank=1.8)
    assert not alarms_of([[reading(), last]] * 8 + [[reading(rank=1.2), last]] * 8)
    assert not alarms_of([reading(width=3, rank=2.9)] * 8 + [reading(width=3, rank=1.0)] * 8)
    assert not alarms_of([reading(rank=20)] * 1 + [reading(rank=1.2)] * 2, every=50)  # the first plateau


def test_a_slow_fall_is_seen_and_a_long_plateau_at_the_beginning_is_not_one():
    falling = [reading(rank=each) for each in (8.3, 6.3, 3.8, 2.8, 2.4, 2.2, 2.0, 2.0, 2.0)]
    assert kinds(alarms_of([*FINE, *falling])) == [(1500, "collapsed")]
    plateau = [reading(rank=each) for each in (30, *[1.1] * 20, *[7] * 10)]
    assert not alarms_of(plateau)


def noise(seed, count=400, size=0.02):
    generator = random.Random(seed)
    return [generator.gauss(0, size) for _ in range(count)]


def series(values, every=100, told=True, pause=0):
    """History at each reading: the last 256 forwards, some of them repeated from the reading before.

    A layer does not run for ``pause`` steps before its 150th forward.
    """

    def scales(layer, number):
        end = every * (number + 1)
        steps = [k + pause * (k >= 150) for k in range(end)]
        rows = [(k, steps[k] if told else None, value) for k, value in enumerate(values[layer][:end])]
        return rows[-256:]

    return scales


def jumps(values, **how):
    layers = [reading(layer) for layer in values]
    count = len(next(iter(values.values()))) // 100
    return alarms_of([layers] * count, scales=series(values, **how))


@pytest.mark.parametrize("at", [120, 199, 200, 299])
def test_a_jump_is_told_once_with_its_step_and_its_layer(at):
    first = [each + math.log(30) * (k >= at) for k, each in enumerate(noise(0))]
    second = [each + math.log(20) * (k >= at) for k, each in enumerate(noise(1))]
    (alarm,) = jumps({"before": noise(2), "a": first, "b": second})
    assert (alarm.step, alarm.finding.layer, alarm.finding.kind) == (at + 1, "a", "scale")
    assert alarm.finding.value / alarm.before == pytest.approx(30, rel=0.2)
    assert "in one step, then the scale of 1 other layer" in alarm.finding.message


def test_a_jump_whose_step_nobody_told_has_that_of_the_reading():
    (alarm,) = jumps({"a": [each + 3.4 * (k >= 120) for k, each in enumerate(noise(0))]}, told=False)
    assert alarm.step == 200


@pytest.mark.parametrize(
    "values",
    [
        [each + 3.0 * (k == 150) for k, each in enumerate(noise(0))],  # one unusual batch
        [each + 1.0 * (k >= 150) for k, each in enumerate(noise(0))],  # less than a factor of three
        [each + 3.0 * (k >= 5) for k, each in enumerate(noise(0))],  # before a level is established
        [3.0 * (k % 2) + each for k, each in enumerate(noise(0))],  # two kinds of batches alternate
        [each + 2.5 * (k % 20 in (5, 6)) for k, each in enumerate(noise(0))],  # rarer batches of another kind
        [each - 2.5 * (k % 20 in (5, 6)) for k, each in enumerate(noise(0))],
        [0.01 * k + each for k, each in enumerate(noise(0))],  # growth
        noise(0, size=0.5),
        [each if k < 5 else -math.inf for k, each in enumerate(noise(0))],
        [-math.inf if k % 7 == 6 else each for k, each in enumerate(noise(0))],  # dropped now and then
        [-math.inf if 150 <= k < 161 else each for k, each in enumerate(noise(0))],
        [-math.inf if k == 140 or k >= 150 else each for k, each in enumerate(noise(0))],  # not the first zero
        [each if k >= 150 else -math.inf for k, each in enumerate(noise(0))],  # begins at zero
        [math.nan if k % 3 else each for k, each in enumerate(noise(0))],
    ],
)
def test_what_is_no_jump(values):
    assert not jumps({"a": values})


@pytest.mark.parametrize(("pause", "found"), [(10, 1), (13, 0), (500, 0)])
def test_a_change_over_steps_in_which_a_layer_did_not_run_is_no_jump(pause, found):
    values = [each + 2.0 * (k >= 150) for k, each in enumerate(noise(0))]
    assert len(jumps({"a": values}, pause=pause)) == found


def test_a_jump_to_where_one_odd_batch_was_is_told():
    (alarm,) = jumps({"a": [each + 3.4 * (k == 140 or k >= 150) for k, each in enumerate(noise(0))]})
    assert alarm.step == 151


@pytest.mark.parametrize(("at", "told"), [(120, 200), (188, 200), (189, 300), (199, 300), (200, 300)])
def test_a_fall_to_zero_is_told_once_when_it_has_lasted_for_12_forwards(at, told):
    first = [each if k < at else -math.inf for k, each in enumerate(noise(0))]
    second = [each if k < at + 1 else -math.inf for k, each in enumerate(noise(1))]
    past = {"a": {}, "b": {}}
    layers, scales = [reading("b"), reading("a")], series({"a": first, "b": second})
    found = []
    for number in range(4):
        pairs = [(each, scales(each.layer, number)) for each in layers]
        step = 100 * (number + 1)
        found += [(step, alarm) for alarm in judge(DEFAULT_ALARMS, "train", step, pairs, past)]
        past = json.loads(json.dumps(past))
    # Where the 12 forwards of the other layer end in the next reading, it is told then.
    when, alarm = found[0]
    assert (when, alarm.step, alarm.finding.layer, alarm.finding.kind) == (told, at + 1, "a", "scale")
    assert alarm.finding.message.startswith("the scale fell from ")
    assert (alarm.finding.value, alarm.before) == (0.0, pytest.approx(1, rel=0.1))
    assert len(found) == 1 + (at == 188)


BOTH = [reading("a"), reading("b")]


def fading(to, start=250, end=650):
    """Scales that fall evenly to a share and stay there."""
    return [
        each + math.log(to) * min(max((k - start) / (end - start), 0), 1)
        for k, each in enumerate(noise(0, 1200))
    ]


def test_a_slow_fall_of_the_scale_is_told_once_with_its_largest_level():
    (alarm,) = jumps({"a": fading(to=1e-4), "last": noise(2, 1200)})
    # Less than a thousandth from step 550 on: at the readings at 600 and 700.
    assert (alarm.step, alarm.finding.layer, alarm.finding.kind) == (700, "a", "scale")
    assert alarm.before == pytest.approx(1, rel=0.1)
    assert alarm.finding.value == pytest.approx(1e-4, rel=0.1)
    assert alarm.finding.message == "faded: the scale is 0.0001 of what it was, since step 600"


def test_a_fall_from_the_first_step_on_is_told_by_rare_readings_too():
    values = [each - 0.008 * min(k, 950) for k, each in enumerate(noise(0, 5000))]
    found = [
        kinds(alarms_of([BOTH] * (5000 // every), every, scales=series({"a": values, "b": values}, every)))
        for every in (100, 250)
    ]
    assert found == [[(1000, "scale")], [(1250, "scale")]]


@pytest.mark.parametrize(
    ("order", "to", "kind"),
    [("ab", 2e-3, {}), ("ba", 1e-4, {}), ("ab", 1e-4, {"width": 3}), ("ab", 1e-4, {"of_gradients": True})],
)
def test_a_slow_fall_is_told_of_hidden_outputs_of_four_features_and_below_a_thousandth(order, to, kind):
    layers = [reading(layer, **kind) for layer in order]
    assert not alarms_of([layers] * 12, scales=series({"a": fading(to), "b": noise(1, 1200)}))


@pytest.mark.parametrize("every", [1, 10, 100])
def test_a_fall_in_one_step_is_a_jump_alone_and_the_level_begins_anew(every):
    def alarms(values):
        count = len(values) // every
        return kinds(alarms_of([BOTH] * count, every, scales=series({"a": values, "b": noise(1, 1200)}, every)))

    values = [each - 9 * (k >= 250) for k, each in enumerate(noise(0, 1200))]
    assert alarms(values) == [(251, "scale")]
    for_a_while = [each + 9 * (230 <= k < 270) for k, each in enumerate(noise(0, 1200))]
    assert alarms(for_a_while) == [(231, "scale")]
    (_, _), (step, _) = alarms([each - 0.02 * max(k - 600, 0) for k, each in enumerate(values)])
    assert 600 + 345 < step <= 600 + 345 + 20 + 2 * every


@pytest.mark.parametrize("odd", [9, math.inf, math.nan])
def test_odd_batches_are_no_level(odd):
    values = [odd if k in (50, 51) else each for k, each in enumerate(noise(0))]
    rules = [rule for rule in DEFAULT_ALARMS if rule.statistic == "level"]
    assert not alarms_of([BOTH] * 100, every=1, rules=rules, scales=series({"a": values, "b": values}, every=1))


def test_a_layer_in_which_nothing_varies_needs_no_second_reading():
    dead = reading(dead=64, spread=0.0)
    (alarm,) = alarms_of([*FINE, *[dead] * 4])
    assert (alarm.step, alarm.finding.message) == (900, "dead: 64 of 64 features")
    # With readings so frequent, it may be one batch in which a layer was dropped.
    assert not alarms_of([*FINE, *[dead] * 11, *FINE], every=1)
    assert kinds(alarms_of([*FINE, *[dead] * 14], every=1)) == [(20, "dead")]


@pytest.mark.parametrize(
    ("change", "width", "found"),
    [(1.2, 4, 1), (-1.2, 4, 1), (1.2, 3, 0), (-2.0, 1, 0), (2.4, 3, 1), (-2.4, 1, 1)],
)
def test_a_jump_is_a_factor_of_three_and_of_nine_in_a_narrow_layer(change, width, found):
    values = [each + change * (k >= 150) for k, each in enumerate(noise(0))]
    readings = [[reading("a", width=width)]] * 4
    assert len(alarms_of(readings, scales=series({"a": values}))) == found


def test_rules_of_one_s_own():
    rules = [rule._replace(threshold=0.5) for rule in DEFAULT_ALARMS if rule.kind == "dead"]
    assert kinds(alarms_of([*FINE, *[reading(dead=40, spread=1e-7)] * 3], rules=rules)) == [(1000, "dead")]
