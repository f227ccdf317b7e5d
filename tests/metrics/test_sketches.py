"""Bounds from a sketch enclose the value from the covariance, for any data."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectralmetrics as sm
from spectralmetrics.functional.sketched import stable_rank
from spectralmetrics.sums import Observations, empty_sketch

READABLE = [
    sm.IntrinsicDimensionMetric,
    sm.SaturationMetric,
    sm.StableRankMetric,
    sm.ParticipationRatioMetric,
    sm.CovarianceTraceMetric,
    sm.DiagonalTraceMetric,
]
SPECTRA = {
    "flat": lambda i, width: torch.ones_like(i),
    "1/i": lambda i, width: 1 / i,
    "1/i^2": lambda i, width: i**-2,
    "two levels": lambda i, width: torch.where(i <= width / 4, 1.0, 1e-3),
    "sixteen decades": lambda i, width: 10 ** (-16 * (i - 1) / width),
    "low rank": lambda i, width: (i <= 3).double(),
    "one direction": lambda i, width: (i == 1).double(),
    "nothing": lambda i, width: torch.zeros_like(i),
}


def rows_with(spectrum, count, width, seed, shift=0.0, constant=False):
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(1, width + 1, dtype=torch.float64)
    deviations = SPECTRA[spectrum](index, width).sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64) * deviations @ rotation.mT
    if constant:
        rows[:, ::3] = 0.25
    return rows + shift


def fed(new, rows, batch=40, **settings):
    metric = new(**settings)
    for each in rows.split(batch):
        metric.update(each)
    return metric


@settings(max_examples=max(settings.default.max_examples, min(15 * settings.default.max_examples, 300)))
@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    count=st.integers(1, 120),
    width=st.integers(1, 60),
    size=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    shift=st.sampled_from([0.0, 1.0, 1e4, 1e8]),
    constant=st.booleans(),
    center=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threshold=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
)
def test_the_bounds_hold(spectrum, count, width, size, seed, shift, constant, center, dtype, threshold):
    rows = rows_with(spectrum, count, width, seed, shift if center else min(shift, 1.0), constant)
    error = 1e-9 if dtype == torch.float64 else 1e-4
    options = {"center": center, "gram_dtype": dtype}
    of_all = fed(sm.StableRankMetric, rows, **options).spectrum
    of_sketch = fed(sm.StableRankMetric, rows, sketch_size=size, **options).spectrum
    for new in READABLE:
        metric = new()
        if hasattr(metric, "threshold"):
            metric.threshold = threshold
        truth, (low, high) = float(metric.value_of(of_all)), metric.interval_of(of_sketch)
        slack = error * max(abs(truth), 1e-300)
        if hasattr(metric, "threshold") and not low <= truth <= high:
            # Within rounding, two numbers of directions reach this share.
            near = []
            for metric.threshold in (threshold * (1 - error), min(threshold * (1 + error), 1.0)):
                near.append(float(metric.value_of(of_all)))
            assert low <= max(near)
            assert min(near) <= high
            continue
        assert float(low) - slack <= truth <= float(high) + slack


@pytest.mark.parametrize("new", READABLE)
def test_a_sketch_that_holds_everything_is_exact(new):
    rows = rows_with("low rank", 200, 40, 0, shift=1e3)
    exact, sketched = fed(new, rows), fed(new, rows, sketch_size=8)
    value, truth = sketched.compute(), exact.compute()
    torch.testing.assert_close(value, truth, rtol=0.5 if new is sm.ParticipationRatioMetric else 1e-9, atol=0)
    assert value.dtype == truth.dtype
    for end in sketched.interval():
        torch.testing.assert_close(end, truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("magnitude", [1e-145, 1e90, 1e150])
@pytest.mark.parametrize("new", [*READABLE, sm.SpectrumMetric])
def test_magnitudes(new, magnitude):
    rows = rows_with("1/i^2", 200, 40, 0, shift=1.0)
    plain, scaled = (fed(new, rows * scale, sketch_size=40) for scale in (1.0, magnitude))
    has_unit = new in (sm.CovarianceTraceMetric, sm.DiagonalTraceMetric, sm.SpectrumMetric)
    unit = magnitude**2 if has_unit else 1.0
    torch.testing.assert_close(scaled.compute().double(), plain.compute().double() * unit, rtol=1e-6, atol=0)
    for end, other in zip(scaled.interval(), plain.interval(), strict=True):
        torch.testing.assert_close(end.double(), other.double() * unit, rtol=1e-6, atol=0)


def test_the_sum_of_squares_is_not_biased():
    rows = rows_with("1/i", 400, 50, 0)
    truth = rows.T.cov(correction=0).square().sum()
    estimates = []
    for seed in range(400):
        sketch = empty_sketch(4, 50, seed=seed)
        intake = sketch.intake(torch.float64)
        intake.add(sketch, Observations(rows), 0)
        estimates.append(float(sketch.square_sum() / truth))
    mean = sum(estimates) / 400
    error = (sum((each - mean) ** 2 for each in estimates) / 399 / 400) ** 0.5
    assert abs(mean - 1) < 4 * error
    assert error < 0.05


def test_what_it_does_not_reach_is_nan_with_a_lower_bound_and_a_word():
    metric = fed(sm.IntrinsicDimensionMetric, rows_with("flat", 500, 60, 0), sketch_size=6)
    with pytest.warns(UserWarning, match="a sketch of 6 columns does not hold the share"):
        value = metric.compute()
    assert value.isnan()
    low, high = metric.interval()
    assert 2 <= int(low) < 60 == int(high)
    by_delve = fed(sm.IntrinsicDimensionMetric, rows_with("flat", 500, 60, 0), sketch_size=6, rule="delve")
    assert [int(end) for end in by_delve.interval()] == [int(low) - 1, 59]


@pytest.mark.parametrize(
    "new",
    [sm.EffectiveRankMetric, sm.PowerLawExponentMetric, sm.CovarianceMetric, sm.CovarianceDeterminantMetric],
)
def test_what_a_sketch_cannot_give_says_why(new):
    metric = fed(new, torch.randn(100, 20), sketch_size=4)
    with pytest.raises(RuntimeError, match="cannot be read from a sketch: it needs the whole spectrum"):
        metric.compute()
    with pytest.raises(RuntimeError, match="of 20 features is not kept: a sketch of 4 columns is"):
        metric.sums[0].covariance()


def test_leading_eigenvalues_and_directions():
    rows = rows_with("1/i^2", 500, 40, 1)
    spectrum = fed(sm.SpectrumMetric, rows, sketch_size=20).compute()
    truth = fed(sm.SpectrumMetric, rows).compute()
    assert spectrum.shape == (20,)
    torch.testing.assert_close(spectrum[:5], truth[:5], rtol=0.1, atol=0)
    embedding = fed(sm.EigenspaceEmbeddingMetric, rows, sketch_size=20, num_components=2, max_samples=30)
    exact = fed(sm.EigenspaceEmbeddingMetric, rows, num_components=2, max_samples=30)
    torch.testing.assert_close(embedding.compute(), exact.compute(), rtol=0.05, atol=0.05)


def test_folds_are_refused():
    with pytest.raises(ValueError, match="expected folds=1 with sketch_size=8, got folds=2"):
        sm.SaturationMetric(folds=2, sketch_size=8)
    with pytest.raises(ValueError, match="expected folds=1 of a metric with sketch_size=8, got 2"):
        sm.SaturationMetric(sketch_size=8).with_folds(2)


def test_copies_pickles_saved_states_and_merges():
    rows = rows_with("1/i", 300, 30, 2, shift=1e6)
    whole, first, second = (sm.ParticipationRatioMetric(sketch_size=8) for _ in range(3))
    for number, each in enumerate(rows.split(25)):
        whole.update(each)
        (first, second)[number % 2].update(each)
    second.persistent(True)
    loaded = sm.ParticipationRatioMetric(sketch_size=8)
    loaded.load_state_dict(second.state_dict())
    for twin in (copy.deepcopy(second), pickle.loads(pickle.dumps(second)), loaded):
        merged = copy.deepcopy(first)
        merged.merge_state(twin)
        torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-9, atol=0)
    with pytest.raises(RuntimeError, match="sketch_size=9"):
        sm.ParticipationRatioMetric(sketch_size=9).load_state_dict(second.state_dict())


def test_the_test_matrix_is_the_same_everywhere():
    omega = empty_sketch(3, 4).test_matrix()
    # From the raw bits of Philox, which numpy promises to keep.
    assert omega.tolist() == EXPECTED_SIGNS
    assert torch.equal(empty_sketch(3, 4).test_matrix(), omega)
    assert not torch.equal(empty_sketch(3, 4, seed=1).test_matrix(), omega)


EXPECTED_SIGNS = [[1.0, -1.0, -1.0], [1.0, 1.0, -1.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]


def test_compute_groups_tell_sizes_apart():
    from torchmetrics import MetricCollection

    collection = MetricCollection(
        {
            name: sm.SaturationMetric(sketch_size=size)
            for name, size in (("a", 4), ("b", 5), ("c", None), ("d", 4))
        }
    )
    collection.update(torch.randn(50, 12))
    assert sorted(map(sorted, collection.compute_groups.values())) == [["a", "d"], ["b"], ["c"]]


def test_it_has_no_moments():
    metric = fed(sm.SaturationMetric, torch.randn(100, 20), sketch_size=4)
    assert metric.moments is None
    assert sm.SaturationMetric().moments is None
    assert fed(sm.SaturationMetric, torch.randn(100, 20)).moments.num_features == 20


def test_a_dimension_is_told_if_eigenvalues_have_been_read_and_are_all():
    rows = torch.randn(200, 12) * torch.logspace(0, -3, 12)
    metric, sketched = sm.SaturationMetric(threshold=0.9), sm.SaturationMetric(threshold=0.9, sketch_size=6)
    for each in (metric, sketched):
        each.update(rows)
        assert each.dimension_read() == 0
        each.compute()
    expected = sm.IntrinsicDimensionMetric(threshold=0.9)
    assert metric.dimension_read() == int(expected(rows)) > 1
    assert sketched.dimension_read() == 0


def test_a_stable_rank_is_at_least_one_up_to_no_round_off():
    total = torch.tensor(10.0, dtype=torch.float64)
    estimate = stable_rank(total[None] * (1 + 1e-12), total)
    assert float(estimate.low) == 1.0
    nothing = stable_rank(torch.zeros(2), torch.tensor(0.0))
    assert float(nothing.low) == 0.0
