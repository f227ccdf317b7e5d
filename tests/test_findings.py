"""Findings: networks in a known state, and expectations of a task."""

import math

import pytest
import torch
from torch import nn

from spectralmetrics import (
    FINDING_RULES,
    DormantFeaturesMetric,
    LayerProbe,
    Recorder,
    RootMeanSquareMetric,
    SaturationMetric,
    Spectrum,
    summarise_run,
)
from spectralmetrics.findings import LayerNumbers, find, read_numbers
from spectralmetrics.parameters import is_untrained
from spectralmetrics.recording import describe_comparison


class Gives(nn.Module):
    """Returns the same rows for any input."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return self.rows


def findings_of(*rows, **options):
    """Findings of layers with these rows as outputs, as (layer, kind, severity)."""
    model = nn.Sequential(*map(Gives, rows)).eval()
    with LayerProbe(model, layers=Gives, **options) as probe:
        model(torch.zeros(1))
    return [(each.layer, each.kind, each.severity) for each in probe.findings("eval")]


def gaussian(n=1000, d=64, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(rank, n=1000, d=64):
    return gaussian(n, rank) @ gaussian(rank, d, seed=1)


def test_a_network_of_full_rank_has_no_problem():
    assert {severity for _, _, severity in findings_of(gaussian(), gaussian() + 10)} <= {"note"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complete_collapse_is_found_in_the_last_layer_too(dtype):
    collapsed = 1 + 1e-6 * gaussian(dtype=dtype)
    assert ("1", "collapsed", "problem") in findings_of(gaussian(), collapsed)
    assert ("0", "collapsed", "problem") in findings_of(collapsed, gaussian())


def test_the_share_of_the_mean_is_told_with_the_digits_that_tell_it_from_all():
    model = Gives(1 + 1e-3 * gaussian()).eval()
    with LayerProbe(model, layers=Gives) as probe:
        model(torch.zeros(1))
    [found] = [each for each in probe.findings("eval") if each.kind == "collapsed"]
    assert found.message == "collapsed: the mean holds 99.9999 %"
    assert found.value == pytest.approx(1e-6, rel=0.1)
    assert str(found) == "problem: 'Gives' in eval: collapsed: the mean holds 99.9999 %"


def test_a_layer_that_puts_out_one_direction_where_the_one_before_has_more():
    assert ("1", "collapsed", "problem") in findings_of(gaussian(), of_rank(1))
    nearly = of_rank(1) + 0.0005 * gaussian(seed=2)  # as the first layer has for smooth inputs
    assert ("1", "collapsed", "problem") in findings_of(gaussian(), nearly)
    assert ("0", "collapsed", "problem") not in findings_of(nearly, gaussian())
    assert ("1", "collapsed", "problem") not in findings_of(nearly, nearly)


def test_one_direction_up_to_round_off_is_told_of_the_first_layer_too():
    assert ("0", "collapsed", "problem") in findings_of(of_rank(1), gaussian())


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_with_few_targets_one_direction_is_no_collapse(outputs):
    found = findings_of(gaussian(), of_rank(1), gaussian(d=outputs))
    assert ("1", "few_directions", "note") in found
    assert "problem" not in {severity for _, _, severity in found}


def test_what_the_weights_allow_is_no_collapse():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(1, 16), nn.Linear(16, 16)).eval()
    with LayerProbe(model) as probe:
        model(gaussian(d=16))
    assert ("2", "collapsed") not in {(each.layer, each.kind) for each in probe.findings("eval")}


def test_few_directions_are_a_note():
    assert ("1", "few_directions", "note") in findings_of(gaussian(), of_rank(2))
    assert ("1", "few_directions", "note") in findings_of(gaussian(), of_rank(4, d=512, n=6000))
    assert ("1", "few_directions", "note") not in findings_of(gaussian(), of_rank(9))


@pytest.mark.parametrize(("dead", "severity"), [(1, "note"), (32, "note"), (60, "problem"), (64, "problem")])
def test_dead_features(dead, severity):
    rows = gaussian()
    rows[:, :dead] = 0.1  # constants without an exact float64
    assert ("1", "dead", severity) in findings_of(gaussian(), rows)


def test_a_layer_that_puts_out_a_constant_is_dead_and_nothing_else_is_said():
    assert findings_of(gaussian(), torch.full((1000, 64), 3.0))[0] == ("1", "dead", "problem")
    assert [kind for layer, kind, _ in findings_of(gaussian(), torch.zeros(1000, 64)) if layer == "1"] == [
        "dead"
    ]


def test_few_rows_give_no_verdict():
    few = findings_of(gaussian(n=20), 1 + 1e-6 * gaussian(n=20))
    assert {kind for layer, kind, _ in few if layer == "1"} == {"few_observations"}
    dead = gaussian(n=100)
    dead[:, :60] = 0
    found = findings_of(gaussian(), dead)
    assert ("1", "dead", "note") in found
    assert ("1", "few_observations", "note") in found


def test_rows_left_out_are_a_problem_also_where_all_are():
    some = gaussian()
    some[3] = torch.nan
    found = findings_of(some, torch.full((1000, 64), torch.inf))
    assert found[:2] == [("0", "non_finite", "problem"), ("1", "non_finite", "problem")]


def test_outlier_features():
    rows = gaussian(d=128)
    rows[:, 5] *= 100
    assert ("1", "outliers", "note") in findings_of(gaussian(), rows)
    assert "outliers" not in {kind for _, kind, _ in findings_of(gaussian(d=128))}


def test_more_directions_than_the_final_weights_allow():
    model = nn.Sequential(nn.Linear(4, 16)).train()
    with LayerProbe(model) as probe:
        for _ in range(20):
            nn.init.normal_(model[0].weight)
            model(gaussian(d=4))
    assert ("0", "above_ceiling") in {(each.layer, each.kind) for each in probe.findings("train")}


def test_ceilings_tails_and_sketches():
    wide, narrow = gaussian(n=3000), of_rank(6, n=3000)
    found = findings_of(wide, narrow, narrow, gaussian(n=3000, d=10))
    assert {("0", "at_ceiling", "note"), ("1", "in_tail", "note"), ("2", "in_tail", "note")} <= set(found)
    found = findings_of(wide, narrow, gaussian(n=3000, d=10))
    assert not {each for each in found if each[1] == "in_tail"}  # one layer is not a tail
    assert ("0", "sketched", "note") in findings_of(gaussian(d=256), sketch_size=16, max_features=100)


def test_a_sketch_that_is_too_small_says_how_many_directions_there_are_at_least():
    layer = LayerNumbers("a", 100, 100, 5000, 0, spread=1.0, kurtosis=1.0, is_sketched=True, has_interval=True)
    for dimension, words in (
        ((math.nan, 9, 100), "more than 8 directions: larger sketch"),
        ((9, 9, 12), "sketched"),
    ):
        (found,) = find("train", [layer._replace(dimension=dimension)])
        assert (found.kind, found.message) == ("sketched", words)


def test_deep_networks_begin_with_small_spreads():
    """Biases outweigh the variation: with the weights of a new network, collapse is no problem."""
    torch.manual_seed(0)
    model = nn.Sequential(*[each for _ in range(8) for each in (nn.Linear(64, 64), nn.GELU())]).eval()
    digits = torch.rand(800, 64)
    with LayerProbe(model, layers=[nn.Linear, nn.GELU]) as probe:
        model(digits)
        new = probe.findings("eval")
        probe.reset()
        with torch.no_grad():
            model[8].weight.mul_(0.01)  # the network is no longer new
        model(digits)
        trained = probe.findings("eval")
    assert [each for each in new if each.kind == "collapsed"]
    assert not [each for each in new if each.severity == "problem"]
    assert "8" in {each.layer for each in trained if each.severity == "problem"}


def test_a_layer_that_does_not_tell_is_like_the_one_before():
    layers = [LayerNumbers(each, 64, 64, 1000, 0, spread=1e-5) for each in ("a", "b", "head")]

    def severities(*flags):
        known = dict(zip(["a", "b", "head"], flags, strict=True))
        return [each.severity for each in find("eval", layers, lambda names: known) if each.kind == "collapsed"]

    assert severities(True, None, None) == ["note"] * 3
    assert severities(None, None, True) == ["problem"] * 2 + ["note"]
    assert severities(True, False, None) == ["problem"] * 2 + ["note"]
    assert severities(False, True, None) == ["problem"] + ["note"] * 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(64, 32), True),
        (nn.Conv2d(8, 16, 3), True),
        (nn.ConvTranspose1d(8, 16, 3, groups=2), True),
        (nn.LayerNorm(4), None),
        (nn.Embedding(100, 32), None),
        (nn.ReLU(), None),
        (nn.LazyLinear(3), None),
        (nn.Linear(64, 32, device="meta"), None),
    ],
)
def test_untrained_weights_are_told(module, expected):
    assert is_untrained(module) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_weights_that_were_rounded_are_new(dtype):
    for fan_in in (300, 512, 768, 1000, 3072):  # rounded to eight bits, the largest weight may exceed the bound
        torch.manual_seed(0)
        assert is_untrained(nn.Linear(fan_in, 600).to(dtype)), fan_in


def test_a_few_new_weights_are_new_whatever_their_size_by_chance():
    torch.manual_seed(0)
    assert all(is_untrained(nn.Linear(8, 8)) for _ in range(300))


@pytest.mark.parametrize(
    "draw",
    [
        lambda weight: nn.init.normal_(weight, 0, 0.02),
        lambda weight: nn.init.trunc_normal_(weight, 0, 0.02, -0.04, 0.04),
        nn.init.orthogonal_,
        nn.init.kaiming_normal_,
        nn.init.xavier_uniform_,
        lambda weight: weight.mul_(2),
    ],
)
def test_new_weights_are_new_whatever_they_are_drawn_from(draw):
    torch.manual_seed(0)
    for layer in (nn.Linear(64, 48), nn.Linear(32, 200), nn.Conv2d(32, 48, 3)):
        with torch.no_grad():
            draw(layer.weight)
        assert is_untrained(layer) is True, layer


def test_weights_from_the_range_of_pytorch_show_their_first_steps():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.add_(1e-3 * torch.randn(48, 64).sign())
    assert is_untrained(layer) is False
    with torch.no_grad():
        nn.init.normal_(layer.weight, 0, float(layer.weight.std()))  # of the same size
    assert is_untrained(layer) is True


def test_weights_so_small_that_nothing_passes_are_not_those_of_a_new_layer():
    layer = nn.Linear(64, 32)
    layer.weight.data *= 0.01
    assert is_untrained(layer) is False


@pytest.mark.parametrize("draw", [lambda weight: None, lambda weight: nn.init.normal_(weight, 0, 0.02)])
def test_weights_are_not_new_after_some_training(draw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    with torch.no_grad():
        for layer in model[::2]:
            draw(layer.weight)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    mixing, teacher = torch.randn(6, 32), torch.randn(32, 8)
    assert [is_untrained(layer) for layer in model[::2]][:2] == [True, True]
    for _ in range(200):
        x = torch.randn(64, 6) @ mixing  # a few directions, as in real inputs
        optimizer.zero_grad()
        (model(x) - torch.tanh(x @ teacher)).square().mean().backward()
        optimizer.step()
    assert [is_untrained(layer) for layer in model] == [False, None, False, None, None]  # narrow


def test_intervals_are_given_where_there_are_folds():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.outer(torch.ones(16), torch.ones(16)))
    for folds in (None, 4):
        with LayerProbe(model, SaturationMetric(), folds=folds) as probe:
            for part in gaussian(d=16).split(50):
                model(part)
        [found] = [each for each in probe.findings("eval") if each.severity == "problem"]
        assert (found.layer, found.kind) == ("1", "collapsed")
        assert math.isnan(found.high) is (folds is None)


def test_problems_come_first_then_layers_in_forward_order():
    bad = 1 + 1e-6 * gaussian()
    found = findings_of(gaussian(), bad, gaussian(), bad)
    assert [severity for *_, severity in found] == sorted((s for *_, s in found), reverse=True)
    assert [layer for layer, kind, _ in found if kind == "collapsed"] == ["1", "3"]


def test_what_marginals_tell_at_any_width():
    dormant = gaussian(n=600, d=400).abs()
    dormant[:, :390] *= 1e-4
    found = findings_of(
        gaussian(n=600, d=400),
        1 + 1e-6 * gaussian(n=600, d=400),
        dormant,
        metrics=DormantFeaturesMetric(),
        max_features=100,
    )
    assert found == [("1", "collapsed", "problem"), ("2", "dormant", "problem")]
    kinds = {kind for _, kind, _ in findings_of(gaussian(), metrics=RootMeanSquareMetric())}
    assert kinds == set()  # nothing about dimensions, which are unknown


def test_no_findings_of_nothing():
    with (
        LayerProbe(nn.Linear(2, 2)) as probe,
        pytest.raises(RuntimeError, match="nothing was observed in eval"),
    ):
        probe.findings()
    with pytest.raises(ValueError, match="expected a stage among"):
        probe.findings("validation")


def test_every_rule_has_a_reason_and_every_finding_a_rule():
    kinds = {(rule.kind, rule.severity) for rule in FINDING_RULES}
    assert all(rule.when and rule.statistic for rule in FINDING_RULES)
    assert set(findings_of(gaussian(), 1 + 1e-6 * gaussian(), of_rank(2)))
    assert {(kind, severity) for _, kind, severity in findings_of(gaussian(), of_rank(1), gaussian())} <= kinds


def test_find_takes_any_spectra():
    spectrum = Spectrum.of_covariance(torch.eye(8, dtype=torch.float64) * 1e-9, torch.ones(8), 100)
    assert find("eval", [read_numbers("a", spectrum, None, 0.99)])[0].kind == "collapsed"


def test_a_comparison_names_the_side_that_has_a_problem(tmp_path):
    for name, spread in (("good", 1.0), ("bad", 1e-6)):
        model = nn.Sequential(Gives(gaussian()), Gives(1 + spread * gaussian())).eval()
        with (
            LayerProbe(model, layers=Gives) as probe,
            Recorder(tmp_path / name, probe, ["csv", "arrays"]) as recorder,
        ):
            model(torch.zeros(1))
            recorder.record()
    text = describe_comparison(tmp_path / "good", tmp_path / "bad")
    [line] = [line for line in text.splitlines() if line.startswith("problem")]
    assert line.startswith("problem on the right: 1: collapsed: the mean holds 99.99999")
    assert "problem" not in describe_comparison(tmp_path / "good", tmp_path / "good")
    assert "problem: 1: collapsed" in str(summarise_run(tmp_path / "bad"))
