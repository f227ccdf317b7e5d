"""The demo's network on real digits: accuracy of the fast paths."""

import pytest
import torch
from torch.nn import functional

import spectralmetrics as sm
from spectralmetrics import demo

PATHS = {
    "sampled": {"rows_per_feature": 4},
    "float32": {"metrics": sm.IntrinsicDimensionMetric(gram_dtype=torch.float32)},
}


@pytest.fixture(scope="module")
def epoch():
    """Intrinsic dimensions of all layers on every path, over one training epoch and one validation."""
    images, labels, validation, _ = demo.load_digits(seed=0)
    torch.manual_seed(0)
    model = demo.ResidualNetwork()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    exact = sm.LayerProbe(model, sm.IntrinsicDimensionMetric())
    probes = {
        name: sm.LayerProbe(model, **{"metrics": sm.IntrinsicDimensionMetric()} | settings)
        for name, settings in PATHS.items()
    }
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for part in validation.split(64):
            model(part)
    return exact.compute(), {name: probe.compute() for name, probe in probes.items()}


@pytest.mark.long
@pytest.mark.xdist_group("real data")
@pytest.mark.parametrize(("path", "tolerance"), [("sampled", 1), ("float32", 0)])
def test_intrinsic_dimensions(epoch, path, tolerance):
    exact, others = epoch
    assert len(exact) == 2 * 21
    assert max(exact.values()) > 50
    differences = {key: int(others[path][key] - value) for key, value in exact.items()}
    assert max(map(abs, differences.values())) <= tolerance, differences
