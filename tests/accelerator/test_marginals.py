"""Marginals and histories on an accelerator: correct, without waiting, in few launches."""

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from tests.accelerator.device import watching
from tests.oracles import OF_ROWS


def rows_of(seed, dtype=torch.float32):
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(seed)) + 3
    rows[:, 4] = 0.5
    rows[:, 5] = rows[:, 5].relu() * 1e-3
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OF_ROWS)
def test_values(emulated, name, dtype):
    parts = [rows_of(seed, dtype) for seed in range(5)]
    metric = sm.statistics()[name]()
    for part in parts:
        metric.update(part.to(emulated))
    spoiled = parts[0].clone()
    spoiled[3] = torch.nan
    metric.nan_strategy = "ignore"
    metric.update(spoiled.to(emulated))
    rows = torch.cat([*parts, spoiled[:3], spoiled[4:]]).double().numpy().astype(np.longdouble)
    value = metric.compute()
    assert value.device.type == metric.marginal_totals.device.type == emulated.type
    np.testing.assert_allclose(value.cpu(), float(OF_ROWS[name](rows)), rtol=1e-12)


def test_without_float64(like_mps):
    metric = sm.RootMeanSquareMetric()
    for seed in range(3):
        metric.update(rows_of(seed).to(like_mps))
    rows = torch.cat([rows_of(seed) for seed in range(3)]).double().numpy()
    np.testing.assert_allclose(metric.compute().cpu(), float(OF_ROWS["rms"](rows)), rtol=1e-6)


@pytest.mark.parametrize(("metric", "most"), [(sm.MaxAbsMetric, 24), (sm.HistoryMetric, 44)])
def test_hooks_wait_for_nothing(emulated, metric, most):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(emulated)
    probe = sm.LayerProbe(model, metric())
    images = torch.randn(5, 3, 8, 8).to(emulated)
    for _ in range(9):
        model(images)
    with watching() as seen, probe.paused():
        model(images)
    alone = seen.launches
    with watching() as seen:
        model(images)
    assert seen.reads == 0
    launches = (seen.launches - alone) / 2
    assert launches <= most, seen.operations


def test_a_history(emulated):
    model = nn.Sequential(nn.Linear(12, 4)).to(emulated)
    probe = sm.LayerProbe(model, sm.HistoryMetric(steps=3))
    outputs = [model(rows_of(seed).to(emulated)).detach().cpu().double() for seed in range(5)]
    expected = [each.square().mean().sqrt() for each in outputs]
    assert probe.history().forwards == [2, 3, 4]
    np.testing.assert_allclose([row.rms for row in probe.history()], expected[2:], rtol=1e-12)
