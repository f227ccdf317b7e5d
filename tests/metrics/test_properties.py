import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spectralmetrics as sm
from tests.metrics import properties
from tests.oracles import OF_ROWS, STATISTICS, random_rows, two_pass_covariance

# Defined by the package; doctests and other tests define more later.
BUILT_IN = {
    name: cls
    for name, cls in sm.statistics().items()
    if cls.__module__.startswith("spectralmetrics.metrics") and not cls.needs_labels
}
VARIANTS = BUILT_IN | {
    "determinant_log": functools.partial(sm.CovarianceDeterminantMetric, log=True),
    "rankme": functools.partial(sm.EffectiveRankMetric, center=False),
    "unbiased": functools.partial(sm.CovarianceMetric, unbiased=True),
    "delve": functools.partial(sm.SaturationMetric, rule="delve"),
    "uncentred_spectrum": functools.partial(sm.SpectrumMetric, center=False),
}
shapes = {
    "seed": st.integers(0, 10**6),
    "count": st.integers(2, 40),
    "features": st.integers(1, 15),
    "rank": st.one_of(st.none(), st.integers(1, 4)),
    "shift": st.sampled_from([0.0, 1.0, -100.0]),
}


@pytest.mark.parametrize("check", properties.ON_DATA, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", VARIANTS)
@given(**shapes)
def test_property(check, name, seed, count, features, rank, shift):
    if name == "power_law_exponent" and rank is not None:
        rank = None  # the logarithm of round-off means nothing
    if name == "power_law_exponent" or name.endswith(("determinant", "log")):
        count = count + 2 * features  # regular covariances: near-singular ones magnify round-off
    if name == "unbiased" and check is properties.check_repeated_data:
        return  # n - 1 changes
    if name in ("rankme", "uncentred_spectrum", "determinant_log", "covariance_determinant"):
        shift = 0.0 if check is not properties.check_translation else shift
    check(VARIANTS[name], seed, count, features, rank, shift)


@pytest.mark.parametrize("check", properties.ON_METRIC, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_property_of_the_metric(check, name):
    if name == "determinant_log" and check is properties.check_constant_features:
        metric = properties.feed(VARIANTS[name](), torch.ones(4, 2))
        assert metric.compute() == -torch.inf
    elif name in ("rankme", "uncentred_spectrum") and check is properties.check_constant_features:
        assert properties.feed(VARIANTS[name](), torch.ones(4, 2)).compute().max() > 0
    else:
        check(VARIANTS[name])


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"embedding"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_numpy(name, dtype):
    rows = random_rows(4, 300, 6, mean=2.0, decay=0.5, dtype=dtype)
    covariance = two_pass_covariance(rows).astype(float)
    values = np.linalg.eigvalsh(covariance)[::-1]
    metric = properties.feed(BUILT_IN[name](), rows, 64)
    actual = metric.compute()
    if name in OF_ROWS:
        expected = OF_ROWS[name](rows.double().numpy().astype(np.longdouble)).astype(float)
    else:
        expected = STATISTICS[name](values, covariance)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert actual.dtype == (torch.int64 if name == "intrinsic_dimension" else torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_feature(name):
    """torchmetrics squeezes tensors of one element; shapes must not depend on the width."""
    metric = properties.feed(VARIANTS[name](), torch.tensor([[1.0], [3.0]]))
    expected = {
        "covariance": (1, 1),
        "unbiased": (1, 1),
        "spectrum": (1,),
        "uncentred_spectrum": (1,),
        "embedding": (2, 1),
    }
    assert metric.compute().shape == expected.get(name, ())
    assert metric.compute().shape == expected.get(name, ())  # also from the cache


@pytest.mark.parametrize("seed", range(5))
def test_rankme_is_that_of_the_data_matrix(seed):
    rows = random_rows(seed, 50, 8, mean=1.0)
    singular = np.linalg.svd(rows.numpy(), compute_uv=False)
    shares = singular / singular.sum()
    metric = properties.feed(sm.EffectiveRankMetric(center=False), rows, 13)
    np.testing.assert_allclose(metric.compute(), np.exp(-(shares * np.log(shares)).sum()), rtol=1e-10)


class TestEmbedding:
    def test_all_observations_where_they_fit(self):
        rows = random_rows(0, 200, 6, mean=5.0)
        metric = properties.feed(sm.EigenspaceEmbeddingMetric(num_components=3), rows, 30)
        embedded = metric.compute()
        assert embedded.shape == (200, 3)
        # The covariance is diagonal, with the leading eigenvalues.
        covariance = embedded.T @ embedded / 200
        spectrum = properties.feed(sm.SpectrumMetric(), rows).compute()
        torch.testing.assert_close(covariance, torch.diag(spectrum[:3]), atol=1e-12, rtol=1e-9)

    @pytest.mark.parametrize("features", [1, 2, 5])
    def test_no_more_components_than_features(self, features):
        metric = properties.feed(sm.EigenspaceEmbeddingMetric(num_components=2), random_rows(0, 9, features))
        assert metric.compute().shape == (9, min(2, features))

    def test_the_sample_is_uniform_over_batches_and_merges(self):
        chosen = torch.zeros(60)
        for seed in range(600):
            rows = torch.arange(60.0, dtype=torch.float64)[:, None]
            metrics = [sm.EigenspaceEmbeddingMetric(max_samples=6, seed=2 * seed + k) for k in range(2)]
            properties.feed(metrics[0], rows[:50], 11)
            properties.feed(metrics[1], rows[50:], 3)
            metrics[0].merge_state(metrics[1])
            kept = metrics[0].sample_rows[:, 0].to(torch.int64)
            assert len(set(kept.tolist())) == 6
            chosen[kept] += 1
        # Each row is kept 60 times on average, with a standard deviation of 7.3.
        assert chosen.min() > 60 - 5 * 7.3
        assert chosen.max() < 60 + 5 * 7.3
        assert abs(chosen[50:].mean() - 60) < 4 * 7.3 / 10**0.5

    def test_reproducible_by_seed_and_without_touching_the_global_generator(self):
        rows = random_rows(0, 500, 4)
        state = torch.get_rng_state()
        samples = [
            properties.feed(sm.EigenspaceEmbeddingMetric(max_samples=9, seed=s), rows, 50).sample_rows
            for s in (1, 1, 2)
        ]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(samples[0], samples[1])
        assert not torch.equal(samples[0], samples[2])

    def test_forward_draws_afresh(self):
        rows = torch.arange(40.0, dtype=torch.float64).reshape(20, 2)
        metric = sm.EigenspaceEmbeddingMetric(max_samples=4)
        positions = set()
        for _ in range(20):
            before = metric.sample_keys.clone()
            metric(rows)
            positions.add(tuple(metric.sample_keys.tolist()))
            assert before.numel() == 0 or (metric.sample_keys <= before).all()
        assert len(positions) > 3

    def test_bad_rows_are_not_sampled(self):
        rows = random_rows(0, 30, 3)
        rows[::2] = torch.nan
        metric = properties.feed(sm.EigenspaceEmbeddingMetric(nan_strategy="ignore"), rows, 8)
        assert metric.compute().shape == (15, 2)
        assert metric.compute().isfinite().all()
