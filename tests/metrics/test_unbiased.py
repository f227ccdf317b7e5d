"""The participation ratio of few observations, without bias."""

import itertools
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.functional import held_out, unbiased_participation_ratio
from spectralmetrics.sums import Moments
from tests.metrics.properties import feed
from tests.oracles import random_rows

WIDTH = 192
SPECTRA = {
    "flat": np.ones(WIDTH),
    "twelve large": np.where(np.arange(WIDTH) < 12, 1.0, 0.01),
    "1/i": 1 / np.arange(1, WIDTH + 1),
}


def by_definition(parts, center=True):
    """Averages over pairs of folds, in extended precision."""
    above = below = np.longdouble(0)
    covariances = []
    for part in parts:
        rows = np.asarray(part, dtype=np.longdouble)
        rows = rows - rows.mean(0) if center else rows
        freedom = len(rows) - center
        covariances.append((freedom, rows.T @ rows / freedom))
    for a, (n, left) in enumerate(covariances):
        for b, (m, right) in enumerate(covariances):
            if a != b:
                above += n * m * np.trace(left) * np.trace(right)
                below += n * m * np.trace(left @ right)
    return float(above / below)


def moments_of(rows):
    return Moments.of_covariance(torch.cov(rows.T, correction=0), rows.mean(0), len(rows), 0)


def unbiased(rows, folds, batch, **options):
    return feed(sm.ParticipationRatioMetric(unbiased=True, folds=folds, **options), rows, batch)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize(("count", "batch", "folds"), [(60, 5, 4), (31, 7, 3), (200, 9, 8), (12, 6, 2)])
def test_it_is_what_the_definition_says(count, batch, folds, mean, center):
    rows = random_rows(count, count, 9, mean=mean, decay=0.7)
    metric = unbiased(rows, folds, batch, center=center)
    batches = rows.split(batch)
    parts = [torch.cat(batches[turn::folds]).numpy() for turn in range(folds)]
    expected = np.clip(by_definition(parts, center), 1, 9)
    rtol = 1e-12 if mean < 10 else 1e-8
    np.testing.assert_allclose(metric.compute(), expected, rtol=rtol)
    np.testing.assert_allclose(unbiased_participation_ratio(metric.sums[0].folds, center), expected, rtol=rtol)


@pytest.mark.parametrize("values", [1, 50, 2**21])
def test_matrices_are_read_in_blocks(monkeypatch, values):
    monkeypatch.setattr(held_out, "_BLOCK_VALUES", values)
    rows = random_rows(0, 90, 11, mean=2.0, decay=0.8)
    np.testing.assert_allclose(
        unbiased(rows, 3, 10).compute(),
        by_definition([torch.cat(rows.split(10)[turn::3]).numpy() for turn in range(3)]),
        rtol=1e-12,
    )


@pytest.mark.parametrize("folds", [pytest.param(4, marks=pytest.mark.long), 8])
@pytest.mark.parametrize("count", [WIDTH // 8, WIDTH // 2, 2 * WIDTH])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name, count, folds):
    variances = torch.tensor(SPECTRA[name])
    truth = float(variances.sum() ** 2 / (variances**2).sum())
    generator = torch.Generator().manual_seed(0)
    values, plain, held = [], [], 0
    for _ in range(200 if count < WIDTH else 50):
        rows = torch.randn(count, WIDTH, dtype=torch.float64, generator=generator) * variances.sqrt()
        parts = [moments_of(part) for part in rows.chunk(folds)]
        products = held_out.fold_products(parts)
        values.append(float(held_out.participation_of_products(products)))
        low, high = held_out.participation_interval(products, WIDTH)
        held += bool(low <= truth <= high)
        if len(plain) < 3:
            eigenvalues = torch.linalg.eigvalsh(torch.cov(rows.T))
            plain.append(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()))
    # The ratio's denominator is uncertain, so its mean is too large where few directions are large.
    tolerance = 0.2 if name == "1/i" and count < WIDTH / 4 else 0.05
    assert np.mean(values) == pytest.approx(truth, rel=tolerance)
    assert held >= 0.92 * len(values)
    if count < WIDTH:
        assert abs(np.mean(plain) - truth) > abs(np.mean(values) - truth)


def test_rows_that_come_in_dependent_groups():
    """Six positions of one input resemble each other, and share a fold."""
    generator = torch.Generator().manual_seed(0)
    values, plain = [], []
    for _ in range(200):
        inputs = torch.randn(32, 1, WIDTH, dtype=torch.float64, generator=generator)
        own = torch.randn(32, 6, WIDTH, dtype=torch.float64, generator=generator)
        rows = 0.8**0.5 * inputs + 0.2**0.5 * own
        parts = [moments_of(part.reshape(-1, WIDTH)) for part in rows.chunk(8)]
        values.append(float(held_out.participation_of_products(held_out.fold_products(parts))))
        if len(plain) < 3:
            eigenvalues = torch.linalg.eigvalsh(torch.cov(rows.reshape(-1, WIDTH).T))
            plain.append(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()))
    assert np.mean(values) == pytest.approx(WIDTH, rel=0.05)
    assert np.mean(plain) < 0.3 * WIDTH


def test_nothing_is_kept_besides():
    states = [
        {name: value.shape for name, value in metric.metric_state.items()}
        for metric in (
            unbiased(torch.randn(40, 5), 4, 5),
            feed(sm.SaturationMetric(folds=4), torch.randn(40, 5), 5),
        )
    ]
    assert states[0] == states[1]


def test_merged_sides_equal_their_folds_together():
    rows = random_rows(0, 160, 7, decay=0.8)
    whole = sm.ParticipationRatioMetric(unbiased=True, folds=4)
    sides = [sm.ParticipationRatioMetric(unbiased=True, folds=4) for _ in range(2)]
    for number, part in enumerate(rows.split(10)):
        for metric in (whole, sides[number % 2]):
            metric.update(sm.Observations(part, group=number // 2))
    sides[0].merge_state(sides[1])
    np.testing.assert_allclose(sides[0].compute(), whole.compute(), rtol=1e-12)


def test_without_folds_the_error_says_how_to_get_it():
    metric = feed(sm.ParticipationRatioMetric(unbiased=True), torch.randn(40, 5), 10)
    for read in (metric.compute, metric.interval):
        with pytest.raises(RuntimeError, match="with folds=8"):
            read()


def test_a_probe_gives_the_folds():
    model = nn.Sequential(nn.Linear(20, 12))
    with pytest.raises(ValueError, match="folds=8"):
        sm.LayerProbe(model, sm.ParticipationRatioMetric(unbiased=True))
    probe = sm.LayerProbe(model, sm.ParticipationRatioMetric(unbiased=True), folds=4)
    for _ in range(12):
        model(torch.randn(9, 20))
    metric = probe["train", "0"]["participation_ratio"]
    expected = unbiased_participation_ratio(metric.sums[0].folds)
    assert float(probe.compute()["participation_ratio/train/0"]) == pytest.approx(float(expected), rel=1e-12)
    low, high = probe.intervals()["participation_ratio/train/0"]
    assert 1 <= low < expected < high <= 12
    assert float(probe.summary("train", "participation_ratio").rows[0].value) == pytest.approx(float(expected))


@pytest.mark.parametrize("options", [{"rows_per_feature": 1}, {"every_n_steps": 3}, {"budget": 0.9}], ids=str)
def test_sampled_layers(options, monkeypatch):
    ticks = itertools.count()  # with a budget, a slow machine would observe few forwards
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * next(ticks))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False)).eval()
    metrics = {"plain": sm.ParticipationRatioMetric(), "unbiased": sm.ParticipationRatioMetric(unbiased=True)}
    probe = sm.LayerProbe(model, metrics, folds=8, **options)
    whole = sm.LayerProbe(model, sm.ParticipationRatioMetric())
    with torch.no_grad():
        for _ in range(120):
            model(torch.randn(2, 3, 8, 8))
    found = probe.compute("eval")
    truth = float(whole.compute("eval")["participation_ratio/eval/0"])
    assert float(found["unbiased/eval/0"]) == pytest.approx(truth, rel=0.1)


def test_a_value_beyond_the_width_is_clipped_and_told():
    torch.manual_seed(0)
    rows = 1e-3 * torch.randn(16, 40)
    # Each fold varies along its own direction.
    rows[torch.arange(16), torch.arange(16) // 4] += torch.randn(16)
    metric = unbiased(rows, 4, 4)
    with pytest.warns(UserWarning, match="beyond what is possible"):
        assert metric.compute() == 40
    model = nn.Sequential(nn.Identity(), nn.Identity())
    probe = sm.LayerProbe(model, sm.ParticipationRatioMetric(unbiased=True), layers=["0", "1"], folds=4)
    for part in rows.split(4):
        model(part)
    with pytest.warns(UserWarning, match="beyond what is possible of '0', '1';") as told:
        assert {float(value) for value in probe.compute().values()} == {40.0}
    assert sum("beyond" in str(each.message) for each in told) == 1


@pytest.mark.parametrize("batches", [1, 2])
def test_too_few_folds_leave_it_unknown(batches):
    metric = unbiased(torch.randn(10 * batches, 5), 8, 10)
    assert metric.compute().isnan() == (batches == 1)
    assert all(end.isnan() for end in metric.interval())
    alone = unbiased(torch.randn(3, 5), 8, 1)  # no fold has two observations, and nothing is constant
    assert alone.compute().isnan()
    assert all(end.isnan() for end in alone.interval())


def test_constant_features_fill_nothing():
    metric = unbiased(torch.full((40, 3), 2.5), 4, 5)
    assert metric.compute() == 0


def test_of_one_feature_it_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(unbiased(torch.randn(40, 1), 4, 5).compute()) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_units_do_not_matter(scale):
    rows = random_rows(0, 80, 6, decay=0.8)
    expected = unbiased(rows, 4, 5).compute()
    np.testing.assert_allclose(unbiased(rows * scale, 4, 5).compute(), expected, rtol=1e-10)
