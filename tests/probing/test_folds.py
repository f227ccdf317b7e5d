"""A probe with folds: the same values, and intervals for all layers."""

import copy

import pytest
import torch
from torch import nn

import spectralmetrics as sm
from tests.metrics.properties import assert_same
from tests.metrics.test_folds import REFUSING, LargestShareMetric
from tests.metrics.test_properties import BUILT_IN
from tests.probing.models import MODELS

METRICS = [new() for name, new in BUILT_IN.items() if name != "embedding"]


def observed(kind, metrics, batches=10, **options):
    make, data = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    probe = sm.LayerProbe(model, metrics, **options)
    with torch.no_grad():
        for step in range(batches):
            model.train(step % 3 != 0)
            model(data())
    probe.remove()
    return probe


def small(folds=4, batches=9, metrics=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    probe = sm.LayerProbe(model, metrics or sm.SaturationMetric(), folds=folds, **options)
    for size in range(batches):
        model(torch.randn(10 + size, 4))
    return model, probe


@pytest.mark.parametrize("kind", MODELS)
def test_folds_equal_no_folds(kind):
    folded, plain = (observed(kind, METRICS, folds=folds) for folds in (4, None))
    found, expected = folded.compute(), plain.compute()
    assert list(found) == list(expected)
    for key, value in found.items():
        # A determinant of few observations is zero up to round-off, and so are the last eigenvalues.
        if not any(name in key for name in ("determinant", "power_law")):
            assert_same(value, expected[key], 1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_intervals_of_all_layers(kind):
    probe = observed(kind, [*METRICS, LargestShareMetric()], batches=30, folds=3)
    values, intervals = probe.compute(), probe.intervals()
    without = {*REFUSING, *(metric.short_name for metric in METRICS if isinstance(metric, sm.MarginalMetric))}
    assert list(intervals) == [key for key in values if key.split("/")[0] not in without]
    for key, (low, high) in intervals.items():
        statistic, stage, layer = key.split("/")
        its = probe[stage, layer][statistic].interval()
        tolerance = 1e-4 if "determinant" in key else 1e-9
        assert_same(low, its.low, tolerance)
        assert_same(high, its.high, tolerance)
        assert (low <= high).all()
        slack = tolerance * values[key].abs().double()
        assert (low <= values[key] + slack).all()
        assert (values[key] - slack <= high).all()
    assert list(probe.intervals("eval")) == [key for key in intervals if "/eval/" in key]


def test_a_batch_is_one_forward():
    _, probe = small(folds=4, batches=9)
    sizes = [10 + k for k in range(9)]
    for layer in probe.layers:
        metric = probe["train", layer]["saturation"]
        metric.flush()
        assert metric.fold_count.tolist() == [sum(sizes[turn::4]) for turn in range(4)]


def test_each_stage_deals_its_own_batches():
    model, probe = small(folds=2, batches=0)
    for _ in range(4):
        model.train()
        model(torch.randn(10, 4))
        model.eval()
        model(torch.randn(10, 4))
    for stage in ("train", "eval"):
        assert probe[stage, "0"]["saturation"].fold_count.tolist() == [20, 20]


def test_folds_of_the_metrics_are_left_where_the_probe_asks_for_none():
    metrics = {"two": sm.SaturationMetric(folds=2), "one": sm.SaturationMetric()}
    _, probe = small(folds=None, metrics=metrics)
    assert set(probe.intervals()) == {"two/train/0", "two/train/2"}
    assert probe["train", "0"]["two"].folds == 2
    assert metrics["two"].folds == 2
    _, probe = small(folds=8, metrics=metrics)
    assert set(probe.intervals()) == {f"{name}/train/{layer}" for name in metrics for layer in "02"}
    assert metrics["one"].folds == 1  # the user's own metrics are unchanged


def test_without_folds_the_error_says_how_to_get_intervals():
    _, probe = small(folds=None)
    with pytest.raises(RuntimeError, match="in one fold; make it with folds=8"):
        probe.intervals()


@pytest.mark.parametrize("folds", [0, -2, 1.5, "8"])
def test_folds_that_are_no_number(folds):
    with pytest.raises(ValueError, match=f"folds to be a positive integer, got {folds!r}"):
        small(folds=folds)


def test_fewer_batches_than_folds_leave_one_end_unknown():
    _, probe = small(folds=8, batches=3)
    values = probe.compute()
    for key, (low, high) in probe.intervals().items():
        assert low == values[key]
        assert high.isnan()


def test_the_state_is_that_many_times_as_large():
    sizes = {}
    for folds in (1, 4):
        _, probe = small(folds=folds)
        metric = probe["train", "0"]["saturation"]
        sizes[folds] = sum(
            metric.metric_state[name].nbytes for name in metric.metric_state if name != "configuration"
        )
    assert sizes[4] == 4 * sizes[1]


def test_an_interrupted_epoch_goes_on_in_turn():
    model, probe = small(folds=4, batches=3)
    probe.persistent(True)
    saved = copy.deepcopy(probe.state_dict())
    other_model, other = small(folds=4, batches=0)
    other_model.load_state_dict(model.state_dict())
    other.persistent(True)
    other.load_state_dict(saved)
    more = [torch.randn(6, 4) for _ in range(3)]
    for batch in more:
        model(batch)
        other_model(batch)
    for (key, its), mine in zip(probe.intervals().items(), other.intervals().values(), strict=True):
        assert key.startswith("saturation/train/")
        assert torch.equal(its.low, mine.low)
        assert torch.equal(its.high, mine.high)
    counts = [each["train", "0"]["saturation"].fold_count.tolist() for each in (probe, other)]
    assert counts[0] == counts[1] == [10 + 6, 11 + 6, 12, 6]


def test_a_reset_forgets_the_intervals():
    model, probe = small()
    probe.reset()
    for _ in range(8):
        model(torch.randn(30, 4))
    first = probe.intervals()
    probe.reset()
    for _ in range(8):
        model(100 * torch.randn(30, 4))
    assert probe.intervals().keys() == first.keys()
    assert probe["train", "0"]["saturation"].count == 240


def fold_counts(probe, layer="0"):
    metric = probe["train", layer]["saturation"]
    metric.flush()
    return metric.fold_count.tolist()


@pytest.mark.parametrize("every", [2, 3, 4])
def test_folds_are_equal_whichever_forwards_are_observed(every):
    for seed in range(40):
        model = nn.Sequential(nn.Linear(4, 3))
        probe = sm.LayerProbe(model, sm.SaturationMetric(), folds=8, every_n_steps=every, seed=seed)
        for _ in range(9 * every):
            model(torch.randn(10, 4))
        assert fold_counts(probe) == [20] + 7 * [10]


def test_a_layer_that_runs_in_every_fourth_forward_fills_all_folds():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.seldom = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, number):
            x = self.often(x)
            return self.seldom(self.seldom(x)) if number % 4 == 3 else x

    model = Alternating()
    probe = sm.LayerProbe(model, sm.SaturationMetric(), folds=8)
    for number in range(64):
        model(torch.randn(5, 4), number)
    assert fold_counts(probe, "often") == 8 * [40]
    assert fold_counts(probe, "seldom") == 8 * [20]  # two groups of two calls each


def test_calls_inside_and_outside_of_forwards_are_dealt_in_one_turn():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    probe = sm.LayerProbe(model, sm.SaturationMetric(), folds=4)
    for _ in range(4):
        model(torch.randn(5, 4))
        model[0](torch.randn(5, 4))
    assert fold_counts(probe) == 4 * [10]
    assert fold_counts(probe, "1") == 4 * [5]


def test_forwards_with_labels_are_dealt_by_themselves():
    model = nn.Sequential(nn.Linear(4, 3))
    probe = sm.LayerProbe(model, [sm.SaturationMetric(), sm.LinearProbeMetric(2)], folds=4)
    for number in range(16):
        rows = torch.randn(6, 4)
        if number % 4 == 1:
            with probe.labels(torch.arange(6) % 2):
                model(rows)
        else:
            model(rows)
    assert fold_counts(probe) == 4 * [24]
    assert probe["train", "0"]["linear_probe"].sums[0].counts.tolist() == 4 * [6]


def test_the_turn_goes_on_where_it_was_saved():
    def new():
        model = nn.Sequential(nn.Linear(4, 4))
        probe = sm.LayerProbe(model, sm.SaturationMetric(), folds=8, every_n_steps=3)
        probe.persistent()
        return model, probe

    model, probe = new()
    for _ in range(3 * 5):
        model(torch.randn(5, 4))
    state = copy.deepcopy(probe.state_dict())
    model, probe = new()
    probe.load_state_dict(state)
    for _ in range(3 * 3):
        model(torch.randn(5, 4))
    assert fold_counts(probe) == 8 * [5]
    # A state as saved by 0.2.0, without the number of dealt groups.
    older = {key: value for key, value in state.items() if not key.endswith("deals")}
    model, probe = new()
    probe.load_state_dict(older)
    for _ in range(3 * 3):
        model(torch.randn(5, 4))
    assert fold_counts(probe) == 8 * [5]
