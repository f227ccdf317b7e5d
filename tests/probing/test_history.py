"""Numbers of each of the last forwards, and the layer that moved first."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from checks import first_movers
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmetrics import (
    History,
    HistoryMetric,
    LayerProbe,
    LinearProbeMetric,
    MarginalMetric,
    MaxAbsMetric,
    Monitor,
    Observations,
    RootMeanSquareMetric,
    SaturationMetric,
    statistics,
)
from spectralmetrics.probing.movers import HistoryRow


def small_model():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def expected_row(forward, step, layer, values):
    """Row of the history for outputs (N, D) of a layer, computed with numpy."""
    x = values.detach().double().numpy().astype(np.longdouble)
    left_out = ~np.isfinite(x).all(1)
    x = x[~left_out]
    return HistoryRow(
        forward, step, layer, len(x), np.sqrt((x**2).mean()), x.mean(), np.abs(x).max(), (x == 0).mean(),
        int(left_out.sum()),
    )  # fmt: skip


def assert_rows(found, expected):
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row[:4] == other[:4]
        assert row.non_finite == other.non_finite
        np.testing.assert_allclose(row[4:8], [float(each) for each in other[4:8]], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("others", [[], [SaturationMetric()], [SaturationMetric(), MaxAbsMetric()]], ids=len)
@pytest.mark.parametrize("options", [{}, {"rows_per_feature": 1}, {"folds": 2}], ids=str)
def test_every_row_of_each_forward(others, options):
    model, expected = small_model(), []
    probe = LayerProbe(model, [*others, HistoryMetric(steps=4)], **options)
    outputs = {}
    for name in ("0", "2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
    for forward in range(6):
        rows = torch.randn(90, 4) * (forward + 1)
        if forward == 4:
            rows[7] = torch.nan
        model(rows)
        if forward >= 2:
            expected += [expected_row(forward, None, name, output) for name, output in outputs.items()]
    assert_rows(probe.history("train").rows, expected)
    frame = probe.history().to_pandas()
    assert list(frame.columns)[:3] == ["forward", "step", "layer"]
    assert frame["step"].isna().all()
    assert probe.history().forwards == [2, 3, 4, 5]
    assert repr(probe.history()) == "History(train: 4 forwards, 2 to 5, of 2 layers)"
    assert repr(probe.history("eval")) == "History(eval: 0 forwards, of 0 layers)"


class Mixed(nn.Module):
    """Feature maps, positions with features last, and sequences."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.positions = nn.Linear(3, 4)
        self.tokens = nn.Linear(4, 5)

    def forward(self, x):
        maps = self.positions(self.conv(x).permute(0, 2, 3, 1))  # (N, 1, 11, 11) -> (N, 9, 9, 4)
        return self.tokens(maps.flatten(1, 2))


MARGINALS = [each for each in statistics().values() if issubclass(each, MarginalMetric)]


@pytest.mark.parametrize("joins", ["history", "monitor"])
@pytest.mark.parametrize("beside", ["nothing", "covariance", "folds", "labels"])
@pytest.mark.parametrize(
    ("options", "surroundings"),
    [
        ({"rows_per_feature": 4}, ""),
        ({"rows_per_feature": 0.5, "max_samples": 20}, ""),
        ({"max_map_size": 2}, ""),
        ({"rows_per_feature": 4, "every_n_steps": 2}, ""),
        ({"rows_per_feature": 4}, "mask"),
        ({"rows_per_feature": 4}, "compiled"),
        ({"rows_per_feature": 4, "observe": "inputs"}, ""),
        ({"rows_per_feature": 4, "observe": "gradients"}, ""),
    ],
    ids=str,
)
def test_what_others_are_given_stays_as_it_is(joins, beside, options, surroundings):
    others = {
        "nothing": [],
        "covariance": [SaturationMetric()],
        "folds": [SaturationMetric(folds=2)],
        "labels": [LinearProbeMetric(2)],
    }[beside]
    metrics = [*(each() for each in MARGINALS), *others]
    model = Mixed()
    alone = LayerProbe(model, copy.deepcopy(metrics), **options)
    together = LayerProbe(model, [*metrics, *([HistoryMetric()] if joins == "history" else [])], **options)
    if joins == "monitor":
        Monitor(together)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if surroundings == "compiled" else model
    for seed in range(7):
        batch = torch.randn(4, 1, 11, 11, generator=torch.Generator().manual_seed(seed))
        with contextlib.ExitStack() as stack:
            for probe in (alone, together):
                stack.enter_context(probe.labels(torch.arange(4) % 2))
                if surroundings == "mask":
                    stack.enter_context(probe.mask(torch.arange(81) < torch.tensor([[80], [60], [30], [20]])))
            run(batch).square().sum().backward()
    expected, found = alone.compute(), together.compute()
    assert len(expected) >= 3 * len(metrics) - 3
    assert found.keys() - expected.keys() == {f"history/train/{layer}" for layer in alone.layers}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def test_steps_are_told_and_forwards_without_gradients_do_not_count():
    model = small_model()
    probe = LayerProbe(model, HistoryMetric())
    rows = torch.randn(8, 4)
    for probe.step in range(3):
        model(rows)
        with torch.no_grad():
            model(rows)  # a rollout
        model(rows)
    model.eval()
    with torch.no_grad():
        model(rows)
    train = [(row.forward, row.step) for row in probe.history("train") if row.layer == "2"]
    assert train == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [(row.forward, row.step) for row in probe.history("eval")] == [(0, 2), (0, 2)]
    for bad in (-1, 1.5, "3", True):
        with pytest.raises(ValueError, match="expected step as an integer that is not negative or None, got"):
            probe.step = bad
    probe.reset("train")
    assert len(probe.history("train")) == 0
    model.train()
    model(rows)
    assert probe.history("train").forwards == [6]  # numbering continues


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_counts_once(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model = Checkpointed()
    probe = LayerProbe(model, HistoryMetric())
    for _ in range(3):
        model(torch.randn(8, 4, requires_grad=True)).sum().backward()
    assert [row.observations for row in probe.history() if row.layer == "inner.0"] == [8] * 3


def test_a_layer_that_is_used_twice_has_one_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    model = Twice()
    probe = LayerProbe(model, HistoryMetric())
    rows = torch.randn(8, 4)
    model(rows)
    model(rows)
    with torch.no_grad():
        inner = model.fc.__class__.forward(model.fc, rows)
        both = torch.cat([inner, model.fc.__class__.forward(model.fc, inner)])
    assert_rows(probe.history().rows, [expected_row(forward, None, "fc", both) for forward in (0, 1)])


def test_a_compiled_model_tells_whether_it_had_gradients():
    model = small_model()
    probe = LayerProbe(model, HistoryMetric())
    compiled = torch.compile(model, backend="aot_eager")
    rows = torch.randn(8, 4)
    for _ in range(2):
        compiled(rows).sum().backward()
        with torch.no_grad():
            compiled(rows)
    assert probe.history().forwards == [0, 1]
    assert [row.observations for row in probe.history()] == [8] * 4


def test_what_one_state_says_another_takes_over():
    model = small_model()
    metrics = [HistoryMetric(steps=5), RootMeanSquareMetric()]
    first = LayerProbe(model, metrics)
    first.persistent()
    for _ in range(3):
        model(torch.randn(8, 4))
    first.remove()
    second = LayerProbe(model, metrics)
    second.persistent()
    second.load_state_dict(first.state_dict())
    assert second.history().rows == first.history().rows
    for _ in range(4):
        model(torch.randn(8, 4))
    assert second.history().forwards == [2, 3, 4, 5, 6]
    assert second.history().rows[:2] == first.history().rows[-2:]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def numbers_of(probe, layer="body"):
    return [(row.forward, row.observations) for row in probe.history().rows if row.layer == layer]


def test_a_forward_has_one_row_whatever_runs_in_between():
    model = Pair()
    probe = LayerProbe(model, HistoryMetric(), observe="gradients")
    first, second = model(torch.randn(3, 4)).sum(), model(torch.randn(5, 4)).sum()
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    assert numbers_of(probe) == [(0, 6), (1, 5)]


@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12])
def test_a_scale_far_below_that_of_the_origin_has_no_round_off_of_it(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity())
    probe = LayerProbe(model, [MaxAbsMetric(), HistoryMetric()], layers=["0"])
    for _ in range(4):
        model(3 + torch.rand(33, 5))
    model(torch.full((33, 5), value))
    row = probe.history("train").rows[-1]
    assert (row.max_abs, row.zero_share) == (pytest.approx(abs(value), rel=1e-6, abs=0), float(not value))
    assert row.rms == pytest.approx(abs(value), rel=1e-6, abs=0)
    assert abs(row.mean) <= abs(value) * (1 + 1e-6)


def test_layers_that_run_by_themselves_and_in_the_model_are_told_apart():
    """For example, one loss needs the whole model, and another one only its body."""
    model = Pair()
    probe = LayerProbe(model, HistoryMetric())
    monitored = LayerProbe(model, HistoryMetric())
    monitor = Monitor(monitored, every=1)
    for rows in (10, 20, 30):
        model(torch.randn(rows, 4))
        model.body(torch.randn(rows + 1, 4))
        model.body(torch.randn(rows + 2, 4))
        monitor.step()
    sizes = [10, 11, 12, 20, 21, 22, 30, 31, 32]
    for each in (probe, monitored):
        assert numbers_of(each) == list(enumerate(sizes))
        assert [row.forward for row in each.history() if row.layer == "head"] == [0, 3, 6]


@pytest.mark.parametrize("way", ["state_dict", "sharded", "merge_state"])
@pytest.mark.parametrize("whole", [True, False])
def test_another_probe_goes_on_with_the_numbers(way, whole):
    model = Pair()
    first = LayerProbe(model, HistoryMetric())
    run = model if whole else model.body
    for rows in (3, 4):
        run(torch.randn(rows, 4))
    second = LayerProbe(model, HistoryMetric())
    if way == "merge_state":
        second.merge_state(first)
    elif way == "sharded":
        second.sharded().load_state_dict(first.sharded().state_dict())
    else:
        first.persistent()
        second.persistent()
        second.load_state_dict(first.state_dict())
    for rows in (5, 6):
        run(torch.randn(rows, 4))
        model(torch.randn(7, 4))
    assert numbers_of(second) == numbers_of(first)
    assert [rows for _, rows in numbers_of(second)] == [3, 4, 5, 7, 6, 7]


def test_by_hand_each_update_is_a_forward():
    metric = HistoryMetric(steps=3)
    for scale in range(5):
        metric.update(torch.full((2, 2), float(scale)))
    assert metric.compute()[:, 2].tolist() == [2, 3, 4]
    left, right = HistoryMetric(), HistoryMetric()
    for forward in (1, 2, 3):
        left.update(Observations(torch.ones(2, 2), forward=forward))
    for forward in (2, 3, 4):
        right.update(Observations(3 * torch.ones(4, 2), forward=forward, step=7))
    left.merge_state(right)
    assert left.compute()[:, [0, 1, 2, 3, 5]].tolist() == [
        [1, -1, 1, 2, 4],
        [2, 7, 3, 6, 28],
        [3, 7, 3, 6, 28],
        [4, 7, 3, 4, 24],
    ]


def test_without_the_metric():
    with pytest.raises(ValueError, match=r"expected a HistoryMetric among the metrics of the probe, got"):
        LayerProbe(small_model()).history()


def table_of(scales, step=None, left_out=()):
    return np.array(
        [
            [t, -1 if step is None else step[t], s, 4, float(t in left_out), 0.0, 4 * s**2, 4]
            for t, s in enumerate(scales)
        ]
    )


def history_of(**tables):
    return History("train", tables, dict.fromkeys(tables, 1))


def noisy(seed, count=60, size=0.01):
    return np.exp(size * np.random.default_rng(seed).standard_normal(count))


class TestFirstMovers:
    def test_quiet_layers_have_none(self):
        assert history_of(a=table_of(noisy(0)), b=table_of(noisy(1))).first_movers() == []

    def test_in_the_order_in_which_they_left(self):
        a, b, c = noisy(0), noisy(1), noisy(2)
        a[50:], b[45:], c[50:] = 5 * a[50:], 2 * b[45:], 9 * c[50:]
        history = history_of(a=table_of(a), b=table_of(b), c=table_of(c))
        assert [(m.layer, m.forward, m.tied) for m in history.first_movers()] == [
            ("b", 45, False),
            ("a", 50, True),
            ("c", 50, True),
        ]
        assert [mover.layer for mover in history.first_movers(at=49)] == ["b"]
        assert history.first_movers(at=44) == []
        assert history.first_movers(threshold=1000) == []

    def test_forwards_of_one_step_are_pooled(self):
        """Two forwards in each step; the second has another scale."""
        scales = np.where(np.arange(80) % 2, 30.0, 1.0) * noisy(0, 80)
        steps = np.arange(80) // 2
        assert history_of(a=table_of(scales, steps)).first_movers() == []
        scales[60:] *= 3
        assert [(m.layer, m.forward) for m in history_of(a=table_of(scales, steps)).first_movers()] == [
            ("a", 60)
        ]

    def test_to_and_fro_is_no_leaving(self):
        """Real and generated batches in turn, without step numbers."""
        scales = np.where(np.arange(61) % 2, 30.0, 1.0) * noisy(0, 61)
        assert history_of(a=table_of(scales)).first_movers() == []

    def test_rows_that_are_not_finite(self):
        history = history_of(a=table_of(noisy(0)), b=table_of(noisy(1), left_out=(30,)))
        assert history.first_movers() == [("b", 30, math.inf, False)]

    def test_layers_of_zeros(self):
        assert history_of(a=table_of(np.zeros(60))).first_movers() == []
        dying = noisy(0)
        dying[40:] = 0
        assert [(m.layer, m.forward) for m in history_of(a=table_of(dying)).first_movers()] == [("a", 40)]

    @pytest.mark.parametrize("at", [-1, 60, 1.5, "3"])
    def test_a_forward_that_is_not_there(self, at):
        with pytest.raises(ValueError, match="number of a forward in the history, from 0 to 59, got"):
            history_of(a=table_of(noisy(0))).first_movers(at=at)

    @pytest.mark.parametrize("threshold", [0, -1.0, math.nan, math.inf, "6", True])
    def test_a_threshold_that_is_none(self, threshold):
        with pytest.raises(ValueError, match="expected threshold to be a positive number, got"):
            history_of(a=table_of(noisy(0))).first_movers(threshold=threshold)

    def test_outputs_and_gradients_together(self):
        a = noisy(0)
        b = noisy(1)
        b[30:] *= 7
        together = History.together(
            {"outputs": history_of(a=table_of(a)), "gradients": history_of(a=table_of(b))}
        )
        assert [mover.layer for mover in together.first_movers()] == ["gradients/a"]
        with pytest.raises(TypeError, match="expected a dict of histories, got"):
            History.together([together])


def test_pictures():
    history = history_of(**{f"layer{k}": table_of(noisy(k)) for k in range(6)})
    figure, axes = history.plot()
    assert axes.shape == (2, 4)
    assert not axes[1, 3].get_visible()
    assert history.plot("zero_share", layers=["layer1"])[1].shape == (1, 1)
    with pytest.raises(ValueError, match="expected a quantity among"):
        history.plot("variance")
    with pytest.raises(ValueError, match=r"expected layers among .* got \['layer9'\]"):
        history.plot(layers=["layer9"])
    assert figure.get_supxlabel() == "forward"


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_the_layer_that_was_disturbed_moves_first(model):
    """Some of the 50 runs each of ``checks/first_movers.py``."""
    assert first_movers.count(model, "scale", range(3)) == {"it": 3}
    assert first_movers.count(model, "quiet", range(2)) == {"none": 2}
