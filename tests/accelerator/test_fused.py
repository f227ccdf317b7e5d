"""Kernels for GPUs have the values of PyTorch. They run where there is a GPU, or in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/accelerator/test_fused.py
"""

import os

import pytest
import torch

import spectralmetrics as sm
from spectralmetrics import Observations
from spectralmetrics.sums import accelerated, accumulate, covariance, empty_moments, fused
from spectralmetrics.sums.measuring import measure
from spectralmetrics.sums.per_feature import empty_marginals

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if INTERPRETED:
        pytest.importorskip("triton")
        monkeypatch.setattr(fused, "takes", lambda values: True)
        monkeypatch.setattr(sm.sums.compiled, "reads", lambda values: False)
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    elif fused.why_not(DEVICE) is not None:
        pytest.fail(f"the kernels are not used: {fused.why_not(DEVICE)}")


LAYOUTS = {
    "rows": ((70, 33), -1),
    "tokens": ((3, 21, 130), -1),
    "maps": ((4, 70, 5, 3), 1),
    "one row": ((1, 9), -1),
    "one feature": ((2, 1, 300), 1),
    "features in the middle": ((5, 4, 6, 3), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("flags", [False, True])
def test_marginals(layout, dtype, flags):
    shape, dim = LAYOUTS[layout]
    values = ((torch.randn(shape) * 3 + 5).relu()).to(dtype)
    if values.numel() > 100:
        values.flatten()[7] = torch.nan
        values.flatten()[-3] = torch.inf
    rows = Observations(values, dim).rows().double()
    valid = torch.rand(len(rows)) < 0.6 if flags else None
    offered = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
    kept = rows[offered & rows.isfinite().all(1)]
    origin = torch.randn(rows.shape[1], dtype=torch.float64)
    seen = Observations(values.to(DEVICE), dim, None if valid is None else valid.to(DEVICE))
    counts, totals, largest, _ = measure(seen, origin.to(DEVICE))
    assert counts.tolist() == [len(kept), int(offered.sum()) - len(kept)]
    centred = kept - origin
    sums = [centred.sum(0), centred.square().sum(0), kept.abs().sum(0), (kept != 0).double().sum(0)]
    torch.testing.assert_close(totals.cpu(), torch.stack(sums), rtol=1e-12, atol=1e-11)
    expected = kept.abs().amax(0) if len(kept) else torch.zeros_like(origin)
    assert torch.equal(largest.cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [False, True])
def test_products(layout, gram_dtype, flags, monkeypatch):
    monkeypatch.setattr(accelerated, "_rows_of_a_piece", lambda features, dtype: 25)
    shape, dim = LAYOUTS[layout]
    here, there = (empty_moments(shape[dim], each) for each in ("cpu", DEVICE))
    for number in range(3):
        values = torch.randn(shape) * 3 + 100
        if values.numel() > 100:
            values.flatten()[7] = torch.nan
        count = values.numel() // shape[dim]
        valid = torch.rand(count) < 0.6 if flags and number else None
        seen = Observations(values.to(DEVICE), dim, None if valid is None else valid.to(DEVICE))
        accumulate(here, Observations(values, dim, valid), recentre=not number)
        if not number:
            accumulate(there, seen)
            continue
        centre = accelerated.centring(there, DEVICE, gram_dtype)
        accelerated.add(there, seen, centre)
    assert int(there.count) == int(here.count)
    assert int(there.non_finite) == int(here.non_finite)
    tolerance = 1e-5 if gram_dtype == torch.float32 else 1e-11
    expected = covariance(here)
    torch.testing.assert_close(covariance(there).cpu(), expected, rtol=0, atol=20 * tolerance, equal_nan=True)


def test_a_history():
    metrics = [sm.HistoryMetric(steps=4).to(each) for each in ("cpu", DEVICE)]
    for forward in range(6):
        for _ in range(1 + forward % 2):
            rows = torch.randn(9, 5) + forward
            for metric, device in zip(metrics, ("cpu", DEVICE), strict=True):
                metric.update(Observations(rows.to(device), forward=forward, step=forward // 2))
    here, there = (metric.history_ring.cpu() for metric in metrics)
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)


def test_many_rows_far_from_zero():
    values = torch.randn(3000, 7, dtype=torch.float64) * torch.logspace(0, -4, 7, dtype=torch.float64) + 1e6
    marginals = empty_marginals(7, DEVICE)
    intake = marginals.intake(None)
    for rows in values.to(DEVICE).split(1500):
        intake.add(marginals, Observations(rows), 0)
    expected = (values - values.mean(0)).square().mean(0)
    torch.testing.assert_close(marginals.variances().cpu(), expected, rtol=1e-7, atol=0)
