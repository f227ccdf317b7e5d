import fractions

import numpy as np
import pytest
import scipy.linalg
import torch
from delve.metrics import compute_intrinsic_dimensionality
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp

from spectralmetrics import SaturationMetric
from spectralmetrics import functional as F  # noqa: N812
from spectralmetrics.functional.dimension import _scan
from tests.oracles import STATISTICS, random_rows, rotation

OF_EIGENVALUES = {
    "intrinsic_dimension": F.intrinsic_dimension,
    "saturation": F.saturation,
    "effective_rank": F.effective_rank,
    "participation_ratio": F.participation_ratio,
    "stable_rank": F.stable_rank,
    "power_law_exponent": F.power_law_exponent,
    "diagonal_trace": F.diagonal_trace,
}
spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


@pytest.mark.parametrize("name", OF_EIGENVALUES)
@given(values=spectra, zeros=st.integers(0, 5))
def test_against_plain_definitions(name, values, zeros):
    values = np.array(sorted(values, reverse=True) + [0.0] * zeros)
    expected = STATISTICS[name](values, None)
    actual = OF_EIGENVALUES[name](torch.tensor(values))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


BATCHED = {
    **OF_EIGENVALUES,
    "intrinsic_dimension, delve": lambda values: F.intrinsic_dimension(values, 0.8, "delve"),
    "saturation, delve": lambda values: F.saturation(values, 0.8, "delve"),
}


@pytest.mark.parametrize("shape", [(3, 4, 9), (9, 9), (1, 9)])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_of_spectra(name, shape):
    values = torch.rand(shape, dtype=torch.float64)
    batched = BATCHED[name](values)
    assert batched.shape == shape[:-1]
    singly = torch.stack([BATCHED[name](each) for each in values.flatten(0, -2)])
    torch.testing.assert_close(batched.flatten(), singly)
    assert len(set(singly.tolist())) > 1 or len(singly) == 1


def test_round_off_goes_by_the_width_and_not_by_the_batch():
    spectrum = torch.zeros(1000, dtype=torch.float64)
    spectrum[1:100], spectrum[0] = 4e-16, 1  # together less than the round-off of so many values
    for batch in (spectrum, spectrum[None], spectrum.expand(2, 3, -1)):
        found = F.intrinsic_dimension(batch, threshold=1.0)
        assert (found == 1).all()
    assert F.intrinsic_dimension(torch.cat([spectrum, spectrum]), threshold=1.0) == 2


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (6, 6, 6), (2, 6, 6)])
def test_batches_of_covariances(shape):
    factors = torch.randn(shape, dtype=torch.float64)
    covariances = factors @ factors.mT
    values, vectors = F.eigenvectors(covariances)
    singly = [F.eigenvectors(each) for each in covariances.flatten(0, -3)]
    torch.testing.assert_close(values.flatten(0, -2), torch.stack([each for each, _ in singly]))
    torch.testing.assert_close(vectors.flatten(0, -3), torch.stack([each for _, each in singly]))
    # Each vector of each covariance has its own sign.
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, covariances)


@pytest.mark.parametrize("name", OF_EIGENVALUES)
def test_order_and_negative_round_off_do_not_matter(name):
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    messy = torch.tensor([0.5, -1e-18, 3.0, 1.0, 2.0, -1e-17], dtype=torch.float64)
    padded = torch.cat([values, torch.zeros(2, dtype=torch.float64)])
    torch.testing.assert_close(OF_EIGENVALUES[name](messy), OF_EIGENVALUES[name](padded))


@pytest.mark.parametrize("name", sorted(set(OF_EIGENVALUES) - {"power_law_exponent"}))
def test_a_constant_feature_space_has_no_dimension(name):
    assert OF_EIGENVALUES[name](torch.zeros(5)) == 0
    assert not OF_EIGENVALUES[name](torch.zeros(5)).isnan()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
@pytest.mark.parametrize("name", sorted(set(OF_EIGENVALUES) - {"diagonal_trace"}))
def test_scale_free_statistics_survive_any_magnitude(name, scale):
    values = torch.tensor([4.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(OF_EIGENVALUES[name](values * scale), OF_EIGENVALUES[name](values))


@pytest.mark.parametrize("width", [1, 2, 10, 100, 1000])
def test_equal_shares_reach_the_threshold_where_they_should(width):
    # 99 of 100 equal eigenvalues explain 99 %, however the sum is rounded.
    values = torch.full((width,), 0.1, dtype=torch.float64)
    assert F.intrinsic_dimension(values, 0.99) == int(np.ceil(width * 99 / 100))
    assert F.intrinsic_dimension(values, 1.0) == width
    assert F.intrinsic_dimension(values, 0.5) == int(np.ceil(width / 2))


@pytest.mark.parametrize("unit", [5e-324, 1.5e308])
def test_the_dimension_at_the_ends_of_the_range(unit):
    # Shares of the smallest numbers cannot be multiplied by a threshold; sums of the largest are infinite.
    values = torch.full((10,), unit, dtype=torch.float64)
    assert F.intrinsic_dimension(values, 0.75) == 8
    assert F.intrinsic_dimension(values, 0.75, "delve") == 7
    assert F.saturation(values, 0.05) == 0.1


def test_single_features_at_the_ends_of_the_range():
    most = torch.full((4,), 1e308, dtype=torch.float64)
    assert float(F.root_mean_square(most)) == pytest.approx(1e154)
    assert float(F.spread(most / 4, most)) == 0.25
    assert F.dormant_features(most) == 0
    assert float(F.signal_to_noise(most**0.52, most)) == pytest.approx(float(1e308**0.04))
    small = torch.full_like(most, 1e-170)
    assert float(F.signal_to_noise(small, small ** (30 / 17))) == pytest.approx(1e-40)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, fractions.Fraction])
def test_thresholds_of_numpy(kind):
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for threshold, dimension in ((kind(1), 4), *([] if kind is np.int64 else [(kind(0.5), 2)])):
        assert F.intrinsic_dimension(values, threshold) == dimension
        assert F.intrinsic_dimension(values, threshold, "delve") == dimension - 1
        assert F.saturation(values, threshold) == dimension / 4
        metric = SaturationMetric(threshold=threshold)
        assert type(metric.threshold) is float
        metric.update(torch.diag(values.sqrt()).repeat(2, 1) * torch.tensor([[1.0]] * 4 + [[-1.0]] * 4))
        assert metric.compute() == dimension / 4
    for wrong in (np.float32(0), np.float32(1.5), np.float32("nan"), np.bool_(True), True, torch.tensor(0.5)):
        with pytest.raises(ValueError, match="got"):
            F.intrinsic_dimension(values, wrong)


@given(values=spectra, threshold=st.sampled_from([0.3, 0.5, 0.9, 0.99, 1.0]))
def test_the_deterministic_sum_is_the_cumulative_one(values, threshold):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    exact = [float(sum(map(fractions.Fraction, values[: k + 1].tolist()))) for k in range(len(values))]
    torch.testing.assert_close(_scan(values), torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)
    assert torch.equal(_scan(torch.stack([values, values])), torch.stack([_scan(values)] * 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_deterministic_algorithms_on_cuda():
    values = torch.rand(4, 300, dtype=torch.float64)
    expected = F.saturation(values, 0.9)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(F.saturation(values.cuda(), 0.9).cpu(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_delve_rule_is_what_the_delve_package_returns():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        width = int(generator.integers(1, 40))
        values = generator.exponential(size=width) ** generator.uniform(0.1, 6)
        basis = scipy.linalg.qr(generator.standard_normal((width, width)))[0]
        covariance = torch.from_numpy((basis * values) @ basis.T)
        covariance = (covariance + covariance.T) / 2
        threshold = float(generator.uniform(0.3, 0.9999))
        theirs = compute_intrinsic_dimensionality(covariance, threshold)
        assert F.intrinsic_dimension(F.eigenvalues(covariance), threshold, rule="delve") == theirs


def test_delve_rule_counts_one_less_and_zero_for_one_direction():
    values = torch.tensor([5.0, 3.0, 2.0])
    assert F.intrinsic_dimension(values, 0.75, rule="delve") + 1 == F.intrinsic_dimension(values, 0.75)
    assert F.intrinsic_dimension(torch.tensor([1.0, 0.0]), rule="delve") == 0
    assert F.intrinsic_dimension(torch.zeros(3), rule="delve") == 0


@given(seed=st.integers(0, 10**6), features=st.integers(1, 30), decay=st.floats(0, 3))
def test_eigenvalues_and_vectors_against_scipy(seed, features, decay):
    rows = random_rows(seed, 80, features, decay=decay)
    covariance = torch.cov(rows.T, correction=0).reshape(features, features)
    expected, _ = scipy.linalg.eigh(covariance.numpy())
    values, vectors = F.eigenvectors(covariance)
    scale = float(values[0])
    np.testing.assert_allclose(F.eigenvalues(covariance), expected[::-1], atol=1e-13 * scale, rtol=0)
    np.testing.assert_allclose(values, expected[::-1], atol=1e-13 * scale, rtol=0)
    identity = torch.eye(features, dtype=torch.float64)
    np.testing.assert_allclose(vectors.T @ vectors, identity, atol=1e-12)
    np.testing.assert_allclose(vectors * values @ vectors.T, covariance, atol=1e-12 * scale)


def test_eigenvector_signs_do_not_depend_on_the_solver():
    covariance = torch.cov(random_rows(0, 100, 12).T)
    _, vectors = F.eigenvectors(covariance)
    _, flipped = F.eigenvectors(covariance + 0.0)
    assert torch.equal(vectors, flipped)
    leading = vectors.abs().argmax(0)
    assert (vectors[leading, torch.arange(12)] > 0).all()
    _, pair = F.eigenvectors(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    # Both entries of each vector have the same magnitude; the first one decides the sign.
    assert (pair[0] > 0).all()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_round_off_of_a_singular_covariance_counts_as_zero(rank):
    basis = rotation(1, 40)[:, :rank]
    covariance = basis @ torch.diag(torch.arange(1, rank + 1, dtype=torch.float64)) @ basis.T
    values = F.eigenvalues(covariance)
    assert int((values > 0).sum()) == rank
    assert F.intrinsic_dimension(values, 1.0) == rank
    expected = STATISTICS["effective_rank"](np.arange(1, rank + 1.0), None)
    np.testing.assert_allclose(F.effective_rank(values), expected, rtol=1e-12)
    assert F.determinant(covariance, log=True) == -torch.inf
    assert F.determinant(covariance) == 0


@pytest.mark.parametrize("batches", [1, 40])
def test_the_rank_of_real_feature_maps_is_exact(batches):
    """A convolution of one channel with 3x3 kernels has rank 9, on images that are mostly one colour."""
    from sklearn.datasets import load_digits

    import spectralmetrics as sm

    images = torch.from_numpy(load_digits().images)[:, None] / 16
    torch.manual_seed(0)
    maps = torch.nn.functional.conv2d(images, torch.randn(32, 1, 3, 3, dtype=torch.float64), padding=1) + 0.3
    metrics = [
        sm.SpectrumMetric(),
        sm.IntrinsicDimensionMetric(threshold=1.0),
        sm.CovarianceDeterminantMetric(),
    ]
    for part in maps.split(len(maps) // batches):
        for metric in metrics:
            metric.update(sm.Observations(part, feature_dim=1))
    assert int((metrics[0].compute() > 0).sum()) == 9
    assert metrics[1].compute() == 9
    assert metrics[2].compute() == 0


@given(seed=st.integers(0, 10**6), features=st.integers(1, 12), spread=st.floats(0, 8))
def test_determinant_against_extended_precision(seed, features, spread):
    generator = np.random.default_rng(seed)
    factor = generator.standard_normal((features, 3 * features + 2))
    factor *= 10.0 ** generator.uniform(-spread, spread, (features, 1))  # features in different units
    covariance = factor @ factor.T
    with mp.workdps(60):
        exact = mp.log(mp.det(mp.matrix(covariance.tolist())))
    np.testing.assert_allclose(
        float(F.determinant(torch.tensor(covariance), log=True)), float(exact), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 4, 3, 3)])
@pytest.mark.parametrize("log", [False, True])
def test_determinants_of_batches(shape, log):
    factors = torch.randn(shape, dtype=torch.float64)
    covariances = factors @ factors.mT
    covariances[1] = 0  # singular, among regular ones
    singly = [F.determinant(each, log) for each in covariances.flatten(0, -3)]
    torch.testing.assert_close(F.determinant(covariances, log).flatten(), torch.stack(singly))


@pytest.mark.parametrize("features", [3, 6, 12])
def test_a_dependent_feature_makes_it_singular_however_badly_the_others_depend(features):
    for seed in range(400):
        rows = random_rows(seed, 2 + seed % 40, features, rank=1 + seed % (features - 1))
        covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
        assert F.determinant(covariance) == 0
        assert F.determinant(covariance, log=True) == -torch.inf


def test_determinant_underflows_only_without_the_logarithm():
    covariance = torch.eye(2000, dtype=torch.float64) * 1e-3
    assert F.determinant(covariance) == 0
    torch.testing.assert_close(F.determinant(covariance, log=True).item(), 2000 * np.log(1e-3))


def test_power_law_is_recovered_in_the_stated_range():
    index = torch.arange(1, 201, dtype=torch.float64)
    values = torch.where(index < 11, 100 * index**-0.1, index**-1.7)
    torch.testing.assert_close(F.power_law_exponent(values, first=11, last=50).item(), 1.7)
    assert F.power_law_exponent(values).item() != pytest.approx(1.7, abs=0.01)
    assert F.power_law_exponent(torch.tensor([1.0, 0.0])).isnan()


@pytest.mark.parametrize("scale", [1e-290, 1.0, 1e290])
def test_a_power_law_of_any_scale_loses_no_digits(scale):
    index = torch.arange(1, 1001, dtype=torch.float64)
    exponent = F.power_law_exponent(scale * index**-1.5)
    torch.testing.assert_close(exponent.item(), 1.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.0001, float("nan"), "0.9", True])
def test_thresholds_out_of_range_are_quoted(threshold):
    with pytest.raises(ValueError, match=r"threshold in \(0, 1\].*got"):
        F.intrinsic_dimension(torch.ones(3), threshold)


def test_other_bad_arguments_are_quoted():
    with pytest.raises(ValueError, match="'mine'"):
        F.saturation(torch.ones(3), rule="mine")
    with pytest.raises(ValueError, match="first=0"):
        F.power_law_exponent(torch.ones(3), first=0)
    with pytest.raises(ValueError, match="last=2"):
        F.power_law_exponent(torch.ones(3), first=2, last=2)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        F.eigenvalues(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite"):
        F.eigenvalues(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("name", OF_EIGENVALUES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_do_not_pass_for_zero(name, bad):
    values = torch.tensor([1.0, bad])
    if name == "diagonal_trace":
        assert not OF_EIGENVALUES[name](values).isfinite()
    else:
        with pytest.raises(ValueError, match="finite eigenvalues"):
            OF_EIGENVALUES[name](values)
    with pytest.raises(ValueError, match="finite covariance"):
        F.determinant(torch.diag(values))
    # Every entry is finite, but their sum is not.
    assert F.eigenvalues(torch.full((2,), 1.5e308, dtype=torch.float64).diag()).isfinite().all()
