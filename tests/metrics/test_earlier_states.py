"""States saved by earlier releases load, give the values that those releases gave, and accumulate further."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spectralmetrics import (
    CovarianceTraceMetric,
    EigenspaceEmbeddingMetric,
    LayerProbe,
    LinearCKAMetric,
    SaturationMetric,
)

DATA = Path(__file__).parent.parent / "data"


def read(release):
    states = torch.load(DATA / f"state-{release}.pt", weights_only=True)
    return states, json.loads((DATA / f"state-{release}.json").read_text())


@pytest.fixture(params=["0.1.0", "0.2.0"])
def saved(request):
    return read(request.param)


METRICS = {
    "saturation": lambda: SaturationMetric(threshold=0.9),
    "embedding": lambda: EigenspaceEmbeddingMetric(num_components=2, max_samples=8),
}
OF_0_2_0 = {
    "with folds": lambda: CovarianceTraceMetric(folds=3),
    "sketched": lambda: CovarianceTraceMetric(sketch_size=2),
}


@pytest.mark.parametrize("name", OF_0_2_0)
def test_folds_and_sketches(name):
    states, expected = read("0.2.0")
    metric = OF_0_2_0[name]()
    metric.load_state_dict(states[name])
    assert metric.compute().item() == pytest.approx(expected[name], rel=1e-13)
    if name == "with folds":
        # Releases of SciPy differ by 1e-11 in the quantiles behind it.
        assert [float(each) for each in metric.interval()] == pytest.approx(expected["interval"], rel=1e-9)
    metric.update(torch.randn(6, 4))
    assert int(metric.count) == 18


def test_linear_cka():
    states, expected = read("0.2.0")
    metric = LinearCKAMetric()
    metric.load_state_dict(states["cka"])
    assert metric.compute().item() == pytest.approx(expected["cka"], rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_metrics(saved, name):
    states, expected = saved
    metric = METRICS[name]()
    metric.persistent(True)
    metric.load_state_dict(states[name])
    torch.testing.assert_close(metric.compute(), torch.tensor(expected[name], dtype=torch.float64))
    assert int(metric.count) == 12
    metric.update(torch.randn(6, 4))
    assert int(metric.count) == 18


def test_a_probe(saved):
    states, expected = saved
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    probe = LayerProbe(model, [make() for make in METRICS.values()])
    probe.persistent(True)
    probe.load_state_dict(states["probe"])
    values = probe.compute()
    assert set(values) == set(expected["probe"])
    for key, value in values.items():
        torch.testing.assert_close(value, torch.tensor(expected["probe"][key], dtype=torch.float64), msg=key)
    model(torch.randn(7, 5))
    assert int(probe["train", "0"]["saturation"].count) == 19


@pytest.mark.parametrize("name", METRICS)
def test_a_state_of_another_width_is_refused(saved, name):
    metric = type(METRICS[name]())(3, **({"max_samples": 8} if name == "embedding" else {}))
    metric.persistent(True)
    with pytest.raises(RuntimeError, match=r"num_features=3.*got one of 4"):
        metric.load_state_dict(saved[0][name])
    metric.update(torch.ones(2, 3))
    assert int(metric.count) == 2
