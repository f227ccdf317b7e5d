import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spectralmetrics.functional import (
    Observations,
    accumulate,
    empty_moments,
    held_out_eigenvalues,
    intrinsic_dimension,
    participation_ratio,
    stable_rank,
)
from spectralmetrics.functional.held_out import leave_one_out, sampling_margin
from tests.oracles import random_rows, rotation, two_pass_covariance


def moments(rows, batch=37):
    kept = empty_moments(rows.shape[1])
    for part in rows.split(batch):
        accumulate(kept, Observations(part))
    return kept


def second_moment(rows, about):
    deviations = rows.astype(np.longdouble) - about
    return deviations.T @ deviations / len(rows)


def non_increasing(values):
    """Isotonic regression by its definition as a minimum of maxima of means (Barlow & Brunk 1972)."""
    size = len(values)
    means = {(a, b): values[a : b + 1].mean() for a in range(size) for b in range(a, size)}
    return np.array([min(max(means[a, b] for b in range(k, size)) for a in range(k + 1)) for k in range(size)])


def plain_definition(parts, center):
    """Variance of each fold's rows along the eigenvectors of the other folds."""
    parts = [np.asarray(part) for part in parts]
    found = np.zeros(parts[0].shape[1])
    for index, fold in enumerate(parts):
        others = np.concatenate(parts[:index] + parts[index + 1 :])
        about = others.astype(np.longdouble).mean(0) if center else np.zeros(others.shape[1])
        values, vectors = np.linalg.eigh(second_moment(others, about).astype(float))
        values, vectors = values[::-1], vectors[:, ::-1]
        along = ((fold.astype(np.longdouble) - about).astype(float) @ vectors) ** 2
        held = along.sum(0)
        unordered = values <= 1e-13 * values[0]  # no data tells these directions apart
        if unordered.any():
            held[unordered] = held[unordered].mean()
        found += held
    return non_increasing(found / sum(map(len, parts)))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("number", range(2, 9))
def test_against_the_plain_definition(number, center):
    parts = [random_rows(number, 40 + 15 * k, 9, mean=0.5, decay=0.7) for k in range(number)]
    held_out = held_out_eigenvalues([moments(part) for part in parts], center)
    assert held_out.dtype == torch.float64
    np.testing.assert_allclose(held_out, plain_definition(parts, center), rtol=1e-11)


@pytest.mark.parametrize("sizes", [(1, 200), (3, 50, 400), (1, 1, 1, 90)])
def test_folds_of_very_different_sizes(sizes):
    parts = random_rows(1, sum(sizes), 7, mean=2.0).split(sizes)
    expected = plain_definition(parts, True)
    np.testing.assert_allclose(held_out_eigenvalues([moments(p) for p in parts]), expected, rtol=1e-10)


@pytest.mark.parametrize("ratio", [1e2, 1e6, 1e8])
def test_far_from_zero(ratio):
    rows = torch.randn(900, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + ratio
    parts = rows.split([100, 300, 500])
    found = held_out_eigenvalues([moments(part) for part in parts])
    expected = plain_definition(parts, True)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9 * expected[0])


@pytest.mark.parametrize("ratio", [1.0, 1e4])
def test_folds_about_means_of_their_own(ratio):
    parts = [random_rows(k, 60, 6, mean=ratio * k) for k in range(4)]
    found = held_out_eigenvalues([moments(part) for part in parts])
    expected = plain_definition(parts, True)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15 * expected[0])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_features_on_fewer_directions(rank, center):
    parts = random_rows(0, 90, 8, rank=rank, mean=0.0).split(30)
    found = held_out_eigenvalues([moments(part) for part in parts], center)
    np.testing.assert_allclose(found[:rank], plain_definition(parts, center)[:rank], rtol=1e-11)
    assert (found[rank:] == 0).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("count", [12, 20, 31])
def test_fewer_observations_than_features(count, center):
    parts = random_rows(count, count, 32).chunk(4)
    found = held_out_eigenvalues([moments(part) for part in parts], center)
    np.testing.assert_allclose(found, plain_definition(parts, center), rtol=1e-9)


@pytest.mark.parametrize("count", [12, 20, 31, 200])
def test_axes_do_not_matter(count):
    """Also with fewer observations than features: directions that no row determines have no order."""
    rows = random_rows(count, count, 32)
    expected = held_out_eigenvalues([moments(part) for part in rows.chunk(4)])
    for seed in range(3):
        turned = (rows @ rotation(seed, 32)).chunk(4)
        found = held_out_eigenvalues([moments(part) for part in turned])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3])
@pytest.mark.parametrize("center", [True, False])
def test_constant_features(value, center):
    folds = [moments(torch.full((10 + k, 4), value, dtype=torch.float64)) for k in range(3)]
    found = held_out_eigenvalues(folds, center)
    expected = [0.0 if center else 4 * value**2, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found[1:] == 0).all()
    assert center is False or found[0] == 0


def test_the_order_of_folds_does_not_matter():
    folds = [moments(part) for part in random_rows(5, 200, 6, mean=1.0).split([20, 80, 100])]
    expected = held_out_eigenvalues(folds)
    for order in itertools.permutations(folds):
        torch.testing.assert_close(held_out_eigenvalues(order), expected, rtol=1e-12, atol=0)


def test_alike_folds_hold_out_what_they_fit():
    """With the same data in each fold, held-out values are the plain ones."""
    rows = random_rows(2, 300, 7, mean=4.0)
    found = held_out_eigenvalues([moments(rows) for _ in range(3)])
    expected = np.linalg.eigvalsh(two_pass_covariance(rows).astype(float))[::-1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_folds_are_left_as_they_were():
    folds = [moments(random_rows(k, 50, 5, mean=3.0)) for k in range(2)]
    before = [tensor.clone() for fold in folds for tensor in vars(fold).values()]
    held_out_eigenvalues(folds)
    after = [tensor for fold in folds for tensor in vars(fold).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


shapes = {
    "seed": st.integers(0, 10**6),
    "sizes": st.lists(st.integers(1, 25), min_size=2, max_size=8),
    "features": st.integers(1, 12),
    "mean": st.sampled_from([0.0, 1.0, -20.0]),
}


@given(**shapes)
def test_the_sum_is_the_scatter_about_the_others_means(seed, sizes, features, mean):
    """The sum is at least the total variance: no point is nearer to the data than their mean."""
    rows = random_rows(seed, sum(sizes), features, mean=mean)
    parts = [part.numpy() for part in rows.split(sizes)]
    found = float(held_out_eigenvalues([moments(torch.from_numpy(part)) for part in parts]).sum())
    scatter = sum(
        ((part - np.concatenate(parts[:k] + parts[k + 1 :]).mean(0)) ** 2).sum() for k, part in enumerate(parts)
    )
    np.testing.assert_allclose(found, scatter / sum(sizes), rtol=1e-10, atol=1e-25)
    assert found >= float(np.trace(two_pass_covariance(rows))) * (1 - 1e-10)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [(40, 50), (30, 9, 60), (5, 4, 6, 3)])
def test_the_eigenvalues_of_all_folds_but_one(sizes, center):
    parts = random_rows(3, sum(sizes), 8, mean=1.0, decay=0.5).split(sizes)
    found = leave_one_out([moments(part) for part in parts], center).others
    assert found.shape == (len(sizes), 8)
    assert found.dtype == torch.float64
    for k, values in enumerate(found):
        rows = torch.cat([*parts[:k], *parts[k + 1 :]]).numpy()
        covariance = np.cov(rows.T, bias=True) if center else rows.T @ rows / len(rows)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-10, atol=1e-13)


class TestSamplingMargin:
    @pytest.mark.parametrize("folds", [2, 3, 8, 40])
    def test_of_a_mean_it_is_that_of_the_t_interval(self, folds):
        """The jackknife error of a mean of g values is their standard error."""
        values = np.random.default_rng(folds).normal(3.0, 2.0, (folds, 4))
        without = [torch.from_numpy(np.delete(values, k, 0).mean(0)) for k in range(folds)]
        low, high = stats.t.interval(0.95, folds - 1, values.mean(0), stats.sem(values))
        np.testing.assert_allclose(sampling_margin(without), (high - low) / 2, rtol=1e-12)

    def test_numbers_that_are_counts(self):
        margin = sampling_margin([torch.tensor(4), torch.tensor(6)])
        assert margin.dtype == torch.float64
        np.testing.assert_allclose(margin, stats.t.ppf(0.975, 1), rtol=1e-12)

    def test_alike_values_leave_none(self):
        assert sampling_margin([torch.tensor(0.7)] * 5) == 0


@given(**shapes)
def test_about_zero_it_is_never_steeper_than_the_spectrum(seed, sizes, features, mean):
    r"""The first k held-out values never hold more than the first k eigenvalues, and all hold the same.

    Let V hold the k leading directions of the sum S, and V_i those of S - S_i. Each is the best for its own:
    <V_i, S - S_i> >= <V, S - S_i> and <V_i, S> <= <V, S>. The difference is <V_i, S_i> <= <V, S_i>, and
    the right-hand sides sum to <V, S>. Isotonic regression gives the least concave majorant of the sums of the
    first k, and those of eigenvalues are concave. So statistics that grow as a spectrum gets more equal are not
    smaller on held-out values.
    """
    rows = random_rows(seed, sum(sizes), features, mean=mean)
    found = held_out_eigenvalues([moments(part) for part in rows.split(sizes)], center=False)
    plain = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0).clamp(min=0)
    scale = float(plain.sum())
    assert (found.cumsum(0) <= plain.cumsum(0) + 1e-12 * scale).all()
    torch.testing.assert_close(found.sum(), plain.sum(), rtol=1e-11, atol=0)
    assert (found.diff() <= 0).all()
    assert (found >= 0).all()
    for statistic in (lambda v: intrinsic_dimension(v, 0.9), participation_ratio, stable_rank):
        assert statistic(found) >= statistic(plain) * (1 - 1e-9)


class TestErrors:
    @pytest.mark.parametrize("number", [0, 1])
    def test_too_few_folds(self, number):
        with pytest.raises(ValueError, match=f"at least 2 folds, got {number}"):
            held_out_eigenvalues([moments(torch.randn(5, 3))] * number)

    def test_widths_that_differ(self):
        with pytest.raises(ValueError, match=r"one width, got \[3, 4\] features"):
            held_out_eigenvalues([moments(torch.randn(5, 3)), moments(torch.randn(5, 4))])

    @pytest.mark.parametrize("empty", range(3))
    def test_an_empty_fold(self, empty):
        folds = [moments(torch.randn(5, 3)) for _ in range(3)]
        folds[empty] = empty_moments(3)
        counts = [5] * 3
        counts[empty] = 0
        with pytest.raises(ValueError, match="observations in every fold") as raised:
            held_out_eigenvalues(folds)
        assert str(counts) in str(raised.value)
