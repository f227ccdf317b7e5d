"""Statistics of each feature by itself against plain definitions, and the states they share with others."""

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.sums import ring
from tests.oracles import OF_ROWS

METRICS = {name: kind for name, kind in sm.statistics().items() if issubclass(kind, sm.MarginalMetric)}


def rows_with_everything(dtype=torch.float64):
    rows = torch.randn(500, 16, dtype=torch.float64) * torch.logspace(-3, 1, 16, dtype=torch.float64)
    rows[:, 2] = 0
    rows[:, 3] = -1.5
    rows[:, 4] = rows[:, 4].relu()
    return rows.to(dtype)


def test_all_have_a_plain_definition():
    assert set(METRICS) == set(OF_ROWS)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_against_plain_definitions(name, dtype):
    rows = rows_with_everything(dtype)
    metric = METRICS[name]()
    for part in rows.split(37):
        metric.update(part)
    expected = OF_ROWS[name](rows.double().numpy().astype(np.longdouble))
    np.testing.assert_allclose(metric.compute(), float(expected), rtol=1e-12)


@pytest.mark.parametrize("name", ["rms", "spread", "signal_to_noise", "dead_features", "outlier_features"])
@pytest.mark.parametrize("mean", [1e4, 1e8])
def test_far_from_zero(name, mean):
    rows = torch.randn(3000, 8, dtype=torch.float64) + mean
    rows[:, 1] = mean
    metric = METRICS[name]()
    for part in rows.split(100):
        metric.update(part)
    expected = OF_ROWS[name](rows.numpy().astype(np.longdouble))
    np.testing.assert_allclose(metric.compute(), float(expected), rtol=1e-9)


def test_dead_and_dormant_units_of_a_network_made_to_have_them():
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:5] = -100  # dead
        model[0].weight[5:9] *= 1e-4  # dormant
        model[0].bias[5:9] = 0
    captured = []
    model[1].register_forward_hook(lambda module, args, output: captured.append(output.detach()))
    probe = sm.LayerProbe(model, [sm.DeadFeaturesMetric(), sm.DormantFeaturesMetric()], layers=nn.ReLU)
    for _ in range(6):
        model(torch.randn(40, 10))
    activations = torch.cat(captured).double()
    dead = sum(len(set(unit.tolist())) == 1 for unit in activations.T) / 32
    scores = [float(unit.abs().mean()) for unit in activations.T]
    dormant = sum(score <= 0.025 * sum(scores) / 32 for score in scores) / 32
    values = probe.compute("train")
    assert dead == 5 / 32
    assert dormant == 9 / 32
    assert values["dead_features/train/1"] == dead
    assert values["dormant_features/train/1"] == dormant


def test_a_probe_of_these_alone_takes_any_width():
    model = nn.Sequential(nn.Linear(3, 20_000), nn.ReLU(), nn.Linear(20_000, 2))
    probe = sm.LayerProbe(model, [kind() for kind in METRICS.values()])  # without a warning
    model(torch.randn(30, 3))
    values = probe.compute("train")
    assert len(values) == 2 * len(METRICS)
    assert probe["train", "0"].compute_groups == {0: list(METRICS)}
    memory = sum(tensor.nbytes for each in probe.sums("train", "0") for tensor in each.tensors().values())
    assert memory < 100 * 20_000
    with pytest.warns(UserWarning, match="covariances that are not there in train are left out"):
        assert probe.covariances("train") == {}
    unread = "'intrinsic_dimension' of '0', '2': not read, the covariance of 20000 features is not kept"
    with pytest.raises(ValueError, match=unread):
        probe.summary("train")
    assert [row.value for row in probe.summary("train", "rms").rows] == [
        float(values[f"rms/train/{layer}"]) for layer in ("0", "2")
    ]


@pytest.mark.parametrize("options", [{}, {"folds": 3}, {"max_features": 4, "sketch_size": 8}], ids=str)
def test_where_a_matrix_is_kept_it_is_read(options):
    model = nn.Sequential(nn.Linear(3, 6)).double()
    metrics = [sm.RootMeanSquareMetric(), sm.SpreadMetric(), sm.DeadFeaturesMetric(), sm.MaxAbsMetric()]
    probe = sm.LayerProbe(model, [*metrics, sm.CovarianceTraceMetric()], **options)
    outputs = [model(torch.randn(30, 3).double()).detach() for _ in range(5)]
    groups = probe["train", "0"].compute_groups
    assert sorted(map(sorted, groups.values())) == [
        ["covariance_trace", "dead_features", "rms", "spread"],
        ["max_abs"],
    ]
    rows = torch.cat(outputs).numpy().astype(np.longdouble)
    values = probe.compute("train")
    for name in ("rms", "spread", "dead_features", "max_abs"):
        np.testing.assert_allclose(values[f"{name}/train/0"], float(OF_ROWS[name](rows)), rtol=1e-12)
    if options == {"folds": 3}:
        assert probe.intervals("train").keys() == {"covariance_trace/train/0"}


def test_a_history_holds_256_forwards_unless_another_number_is_asked_for():
    metrics = sm.HistoryMetric(), sm.HistoryMetric(steps=3)
    for metric in metrics:
        for _ in range(300):
            metric.update(torch.ones(2, 3))
    assert [len(metric.compute()) for metric in metrics] == [256, 3]


def test_a_history_that_was_restored_goes_on_with_its_last_forward():
    first, second = sm.HistoryMetric(steps=3), sm.HistoryMetric(steps=3)
    first.persistent(True)
    first.update(sm.Observations(torch.ones(4, 2), forward=7))
    second.load_state_dict(first.state_dict(), strict=False)
    second.update(sm.Observations(torch.full((5, 2), 2.0), forward=7))
    second.update(sm.Observations(torch.ones(6, 2), forward=8))
    table = second.compute()
    assert table[:, ring.FORWARD].tolist() == [7, 8]
    assert table[:, ring.COUNT].tolist() == [9, 6]
    assert table[:, ring.LARGEST].tolist() == [2, 1]


def test_a_run_keeps_them_and_recomputes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    metrics = [sm.RootMeanSquareMetric(), sm.DormantFeaturesMetric(), sm.HistoryMetric(steps=4)]
    probe = sm.LayerProbe(model, metrics)
    with sm.Recorder(tmp_path, probe, ["csv", "arrays", "history"]) as recorder:
        for _ in range(2):
            for probe.step in range(3):
                model(torch.randn(30, 3))
            values = recorder.record()
    rows = sm.recompute(tmp_path)
    last = {(row["statistic"], row["layer"]): row["value"] for row in rows if row["epoch"] == 1}
    assert last["rms", "0"] == float(values["rms/train/0"])
    assert last["dormant_features", "2"] == float(values["dormant_features/train/2"])
    others = sm.recompute(tmp_path, statistics=["max_abs", "dormant_features"], threshold=0.9)
    assert {row["statistic"] for row in others} == {"max_abs", "dormant_features"}
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,stage,forward,step,layer,observations,rms")
    assert [line.split(",")[:5] for line in lines[1:]] == [
        [str(epoch), "train", str(3 * epoch + step), str(step), layer]
        for epoch in range(2)
        for step in range(3)
        for layer in ("0", "2")
    ]
    with sm.Recorder(tmp_path, probe, ["csv", "arrays", "history"], mode="resume") as recorder:
        assert recorder.next_epoch == 2
    wanted = "'saturation' of '0' in train, epoch 0: expected a covariance for 'saturation'; only marginals"
    with pytest.raises(ValueError, match=wanted):
        sm.recompute(tmp_path, statistics="saturation")
