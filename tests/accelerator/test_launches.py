"""Number of operations on an accelerator, and of waits of the host for it."""

import pytest
import torch
from torch import nn

from spectralmetrics import (
    CovarianceMetric,
    CovarianceTraceMetric,
    EffectiveRankMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    SaturationMetric,
)
from tests.accelerator.device import watching


def steady(metric, rows):
    """Counts of the next update with these rows, once the origin has settled."""
    for _ in range(9):
        metric.update(rows)
    with watching() as seen:
        metric.update(rows)
    return seen


@pytest.mark.parametrize(
    ("shape", "feature_dim"),
    [((2048, 1024), -1), ((8192, 1024), -1), ((3001, 64), -1), ((32, 64, 14, 14), 1), ((2, 3001, 8), -1)],
)
@pytest.mark.parametrize(
    ("dtype", "gram_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_a_steady_update(emulated, shape, feature_dim, dtype, gram_dtype):
    from spectralmetrics import Observations

    values = torch.randn(shape).to(dtype).to(emulated)
    seen = steady(CovarianceMetric(gram_dtype=gram_dtype), Observations(values, feature_dim))
    assert seen.launches <= 15, seen.operations
    assert seen.reads == 0


def test_rows_that_wait(emulated):
    seen = steady(CovarianceMetric(), torch.randn(16, 64).to(emulated))
    assert seen.launches <= 2, seen.operations
    assert seen.reads == 0


def small_model(depth=3, width=24):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, width),
        *[nn.Linear(width, width) for _ in range(depth)],
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"rows_per_feature": 2}, {"folds": 3}], ids=str)
def test_the_hooks_of_a_thousand_steps_wait_for_nothing(emulated, options):
    model = small_model(1, 6).to(emulated)
    probe = LayerProbe(model, SaturationMetric(), **options)
    images = torch.randn(5, 3, 8, 8).to(emulated)
    for _ in range(12):  # each fold has had rows
        model(images)
    launches = []
    with torch.no_grad():
        for _ in range(1000):
            with watching() as seen, probe.paused():
                model(images)
            alone = seen.launches
            with watching() as seen:
                model(images)
            assert seen.reads == 0
            launches.append((seen.launches - alone) / len(probe.layers))
    # Per hook. Most rows wait, and sampled rows are selected first.
    assert sorted(launches)[500] <= 8
    assert sum(launches) / 1000 <= 15


def test_deterministic_hooks_wait_for_nothing(emulated):
    model = small_model().to(emulated)
    probe = LayerProbe(model, SaturationMetric(), rows_per_feature=2)
    images = torch.randn(50, 3, 8, 8).to(emulated)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(4):
            model(images)
        with watching() as seen:
            for _ in range(60):
                model(images)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen.reads == 0
    assert int(probe["train", "0"].saturation.count) > 0


def reads_of_compute(emulated, depth, read):
    model = small_model(depth).to(emulated)
    metrics = [SaturationMetric(), IntrinsicDimensionMetric(), EffectiveRankMetric(), CovarianceTraceMetric()]
    probe = LayerProbe(model, metrics)
    for _ in range(3):
        model(torch.randn(50, 3, 8, 8).to(emulated))
    with watching() as seen:
        values = read(probe)
    return seen, values


def compute(probe):
    return probe.compute("train")


@pytest.mark.parametrize("read", [compute, LayerProbe.summary], ids=["compute", "summary"])
def test_how_often_reading_waits_does_not_grow_with_the_layers(emulated, read):
    arguments = () if read is compute else ("train",)
    few, _ = reads_of_compute(emulated, 3, lambda probe: read(probe, *arguments))
    many, values = reads_of_compute(emulated, 30, lambda probe: read(probe, *arguments))
    if read is compute:
        assert len(values) == 4 * 32
        assert all(value.device.type == "cpu" for value in values.values())
        assert many.operations["_linalg_eigh"] == 2  # one batch for each width
        assert many.reads == few.reads <= 9
    else:
        assert many.operations["_linalg_eigh"] == 2


def test_equal_layers_do_not_multiply_on_one_step(emulated):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(16)]).to(emulated)
    probe = LayerProbe(model, SaturationMetric())
    rows = torch.randn(128, 8).to(emulated)
    products = []
    with torch.no_grad():
        for _ in range(100):
            with watching() as seen:
                model(rows)
            products.append(seen.operations["bmm"])
    # Each layer multiplies every 16th step, so one layer in 16 multiplies in each step.
    assert max(products[40:]) <= 5
    assert sum(products[40:]) >= 40
    assert len(probe.compute()) == 16


def test_equal_layers_stay_apart_after_they_were_read(emulated):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(16)]).to(emulated)
    probe = LayerProbe(model, SaturationMetric())
    rows = torch.randn(128, 8).to(emulated)
    products = []
    with torch.no_grad():
        for step in range(100):
            if step == 40:
                probe.compute()
            with watching() as seen:
                model(rows)
            products.append(seen.operations["bmm"])
    assert max(products[40:]) <= 5
