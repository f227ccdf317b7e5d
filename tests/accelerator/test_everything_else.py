"""Probes, projections, records and comparisons of a model on an accelerator."""

import copy

import pytest
import torch
from torch import nn

from spectralmetrics import (
    EigenspaceEmbeddingMetric,
    LayerProbe,
    LayerSimilarity,
    Recorder,
    SaturationMetric,
    SpectrumMetric,
    insert_projections,
    read_records,
    recompute,
    set_projection_threshold,
)


def new_model():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10), nn.Dropout(0.2),
        nn.Linear(10, 3),
    )  # fmt: skip


def train(model, device, steps=6, seed=1):
    generator = torch.Generator("cpu").manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        images = torch.randn(20, 1, 8, 8, generator=generator).to(device)
        labels = torch.randint(3, (20,), generator=generator).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


OPTIONS = [{}, {"folds": 2}, {"rows_per_feature": 3}, {"every_n_steps": 2}, {"feature_maps": "median"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_bit_identical(accelerator, options):
    model = new_model().to(accelerator)
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    plain = train(twin, accelerator)
    torch.manual_seed(3)
    with LayerProbe(model, [SaturationMetric(), EigenspaceEmbeddingMetric()], **options) as probe:
        probed = train(model, accelerator)
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert len(probe.compute()) == 2 * 3


def test_values_are_those_of_the_cpu(accelerator):
    model = new_model().eval()
    twin = copy.deepcopy(model).to(accelerator)
    here, there = LayerProbe(model, SpectrumMetric()), LayerProbe(twin, SpectrumMetric())
    for _ in range(5):
        images = torch.randn(40, 1, 8, 8)
        with torch.inference_mode():
            model(images)
            twin(images.to(accelerator))
    expected, values = here.compute(), there.compute()
    assert expected.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    assert str(there.summary()) == str(here.summary())


def test_a_record_and_what_is_made_of_it(accelerator, tmp_path):
    model = new_model().to(accelerator)
    probe = LayerProbe(model, [SaturationMetric(), EigenspaceEmbeddingMetric(max_samples=7)], folds=2)
    with Recorder(tmp_path / "run", probe, ["csv", "arrays"]) as recorder:
        for _ in range(2):
            train(model, accelerator, 4)
            recorder.record()
    recorded = {
        (row["epoch"], row["layer"]): row["value"]
        for row in read_records(tmp_path / "run")
        if row["statistic"] == "saturation" and row["layer"] != "mean"
    }
    again = {
        (row["epoch"], row["layer"]): row["value"]
        for row in recompute(tmp_path / "run")
        if row["layer"] != "mean"
    }
    assert len(recorded) == 6
    assert recorded == again


def test_an_epoch_goes_on_after_a_crash(accelerator):
    model = new_model().to(accelerator).eval()
    images = [torch.randn(30, 1, 8, 8).to(accelerator) for _ in range(4)]
    whole, first, second = (LayerProbe(model, SpectrumMetric()) for _ in range(3))
    for probe in (whole, first, second):
        probe.persistent()
    with torch.no_grad():
        with second.paused():
            [model(each) for each in images[:2]]
        with first.paused():
            second.load_state_dict(first.state_dict())
            [model(each) for each in images[2:]]
    for key, value in whole.compute().items():
        torch.testing.assert_close(second.compute()[key], value, rtol=1e-6, atol=1e-7)


def test_projections(accelerator):
    model = new_model().eval()
    twin = copy.deepcopy(model).to(accelerator)
    images = torch.randn(60, 1, 8, 8)
    outputs = []
    for each, data in ((model, images), (twin, images.to(accelerator))):
        with insert_projections(each, layers=["0", "4"]) as projections, torch.no_grad():
            with projections.collect():
                each(data)
            rows = set_projection_threshold(each, 0.9)
            outputs.append((each(data).cpu(), [(row.name, row.dimension) for row in rows]))
    assert outputs[0][1] == outputs[1][1]
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-3, atol=1e-3)


def test_similarity_of_layers(accelerator):
    model = new_model().eval()
    twin = copy.deepcopy(model).to(accelerator)
    with LayerSimilarity(model) as here, LayerSimilarity(twin) as there, torch.no_grad():
        for _ in range(3):
            images = torch.randn(16, 1, 8, 8)
            model(images)
            twin(images.to(accelerator))
    torch.testing.assert_close(there.compute().matrix.cpu(), here.compute().matrix, rtol=1e-4, atol=1e-4)
