"""Relations between layers against scipy, extended precision, another package, and cases known by analysis."""

import math

import cka as pytorch_cka
import numpy as np
import pytest
import scipy.linalg
import torch

from spectralmetrics import functional
from spectralmetrics.functional.relations import usable_samples


def basis(features, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, columns, generator=generator, dtype=torch.float64)).Q


def covariance(features, seed, rank=None, decay=0.0):
    rank = features if rank is None else rank
    values = torch.exp(-decay * torch.arange(rank, dtype=torch.float64))
    vectors = basis(features, rank, seed)
    return (vectors * values) @ vectors.T


def hsic_by_definition(left, right):
    """Equation 5 of Song et al. (2012), in extended precision, from uncentred rows."""
    x, y = np.asarray(left, dtype=np.longdouble), np.asarray(right, dtype=np.longdouble)
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    trace = np.trace(k @ l)
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    cross = 2 / np.longdouble(n - 2) * (k @ l).sum()
    return (trace + sums - cross) / (n * (n - 3))


def cka_by_definition(left, right):
    cross, *own = (hsic_by_definition(*pair) for pair in ((left, right), (left, left), (right, right)))
    return float(cross / np.sqrt(own[0] * own[1]))


def related(samples, width_1, width_2, seed, dtype=torch.float64, mean=0.0):
    """Rows of two related layers."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(samples, width_1, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width_1, width_2, generator=generator, dtype=torch.float64) / math.sqrt(width_1)
    noise = torch.randn(samples, width_2, generator=generator, dtype=torch.float64)
    return (left + mean).to(dtype), (left @ mixing + noise - mean).to(dtype)


class TestSubspaceOverlap:
    @pytest.mark.parametrize(("k", "l"), [(1, 1), (3, 3), (2, 7), (9, 4)])
    def test_equals_the_mean_squared_cosine_of_scipys_principal_angles(self, k, l):  # noqa: E741
        left, right = basis(12, k, 0), basis(12, l, 1)
        angles = scipy.linalg.subspace_angles(left.numpy(), right.numpy())
        assert float(functional.subspace_overlap(left, right)) == pytest.approx(np.mean(np.cos(angles) ** 2))

    def test_ends_of_the_range(self):
        whole = basis(10, 10, 0)
        inside, outside = whole[:, :3], whole[:, 3:]
        assert float(functional.subspace_overlap(inside, inside)) == pytest.approx(1, abs=1e-15)
        assert functional.subspace_overlap(inside, inside @ basis(3, 3, 1)) <= 1
        assert float(functional.subspace_overlap(inside, whole)) == pytest.approx(1)
        assert float(functional.subspace_overlap(inside, outside)) == pytest.approx(0, abs=1e-15)

    def test_random_subspaces_share_the_larger_dimension_over_the_width(self):
        shares = [
            float(functional.subspace_overlap(basis(60, 6, s), basis(60, 15, 1000 + s))) for s in range(40)
        ]
        assert np.mean(shares) == pytest.approx(15 / 60, abs=0.02)

    def test_batches_are_broadcast(self):
        left = torch.stack([basis(6, 2, s) for s in range(3)])
        right = basis(6, 4, 9)
        alone = torch.stack([functional.subspace_overlap(each, right) for each in left])
        assert torch.equal(functional.subspace_overlap(left, right), alone)
        assert functional.subspace_overlap(left[:0], right).shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_takes_bases_in_lower_precision(self, dtype):
        left, right = basis(64, 8, 0), basis(64, 16, 1)
        exact = float(functional.subspace_overlap(left, right))
        value = functional.subspace_overlap(left.to(dtype), right.to(dtype))
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(exact, rel=0.02)

    @pytest.mark.parametrize(
        ("left", "right", "error", "message"),
        [
            (torch.eye(3), torch.eye(4), ValueError, "3 and 4 features"),
            (2 * torch.eye(3), torch.eye(3), ValueError, "deviate from 0 and 1 by 3"),
            (torch.full((3, 1), torch.nan), torch.eye(3), ValueError, "orthonormal"),
            (torch.eye(3)[:, :0], torch.eye(3), ValueError, r"\(3, 0\)"),
            (torch.eye(3)[0], torch.eye(3), ValueError, r"\(3,\)"),
            (torch.eye(3, dtype=torch.int64), torch.eye(3), TypeError, "torch.int64"),
            (np.eye(3), torch.eye(3), TypeError, "ndarray"),
        ],
    )
    def test_refuses(self, left, right, error, message):
        with pytest.raises(error, match=message):
            functional.subspace_overlap(left, right)


def frechet_by_scipy(mean_1, cov_1, mean_2, cov_2):
    root = scipy.linalg.sqrtm((cov_1 @ cov_2).numpy())
    return float((mean_1 - mean_2).square().sum() + torch.trace(cov_1 + cov_2)) - 2 * np.trace(root).real


class TestFrechetDistance:
    @pytest.mark.parametrize("features", [1, 5, 40])
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_scipys_square_root_where_that_is_well_conditioned(self, features, seed):
        first = covariance(features, seed) + torch.eye(features)
        second = 3 * covariance(features, 10 + seed, decay=0.05) + 0.5 * torch.eye(features)
        means = torch.randn(2, features, dtype=torch.float64)
        value = functional.frechet_distance(means[0], first, means[1], second)
        assert float(value) == pytest.approx(frechet_by_scipy(means[0], first, means[1], second), rel=1e-10)

    @pytest.mark.parametrize(("rank_1", "rank_2"), [(0, 0), (0, 3), (1, 1), (5, 9), (20, 7)])
    def test_singular_covariances_that_commute(self, rank_1, rank_2):
        # With a shared eigenbasis the distance is the one of the standard deviations: sum (sqrt a - sqrt b)^2.
        vectors = basis(20, 20, 0)
        generator = torch.Generator().manual_seed(1)
        values = torch.rand(2, 20, generator=generator, dtype=torch.float64)
        values[0, rank_1:], values[1, rank_2:] = 0, 0
        first, second = ((vectors * each) @ vectors.T for each in values)
        mean = torch.zeros(20, dtype=torch.float64)
        expected = (values[0].sqrt() - values[1].sqrt()).square().sum()
        value = functional.frechet_distance(mean, first, mean, second)
        assert float(value) == pytest.approx(float(expected), rel=1e-10, abs=1e-14)

    def test_two_directions_at_an_angle(self):
        # a uu' and b vv': the only singular value of the roots' product is sqrt(ab) |cos|.
        angle, a, b = 0.7, 4.0, 9.0
        u = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        v = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
        zero = torch.zeros(3, dtype=torch.float64)
        value = functional.frechet_distance(zero, a * torch.outer(u, u), zero, b * torch.outer(v, v))
        assert float(value) == pytest.approx(a + b - 2 * math.sqrt(a * b) * math.cos(angle), rel=1e-12)

    def test_steep_spectra_keep_their_digits(self):
        # The eigenvalues of the product fall below 1e-16 of the largest: their roots would be noise.
        values = torch.logspace(0, -11, 30, dtype=torch.float64)
        vectors = basis(30, 30, 3)
        first, second = (vectors * values) @ vectors.T, (vectors * values * 4) @ vectors.T
        zero = torch.zeros(30, dtype=torch.float64)
        value = functional.frechet_distance(zero, first, zero, second)
        assert float(value) == pytest.approx(float(values.sum()), rel=1e-9)

    @pytest.mark.parametrize("rank", [0, 1, 7, 12])
    def test_of_equal_inputs_it_is_exactly_zero(self, rank):
        matrix = covariance(12, 0, rank=rank, decay=1.3) * 1e7
        mean = torch.randn(12) * 1e9
        assert functional.frechet_distance(mean, matrix, mean, matrix) == 0

    def test_nearly_equal_inputs_give_nothing_below_zero(self):
        zero = torch.zeros(30, dtype=torch.float64)
        for seed in range(20):
            first = covariance(30, seed, rank=12, decay=0.5)
            second = first + 1e-15 * covariance(30, 100 + seed)
            value = float(functional.frechet_distance(zero, first, zero, second))
            assert 0 <= value < 1e-12

    def test_symmetric_and_additive_in_the_means(self):
        first, second = covariance(9, 0, decay=0.3), covariance(9, 1, rank=4)
        means = torch.randn(2, 9, dtype=torch.float64)
        forth = functional.frechet_distance(means[0], first, means[1], second)
        back = functional.frechet_distance(means[1], second, means[0], first)
        apart = functional.frechet_distance(means[0], first, means[0], second)
        torch.testing.assert_close(forth, back, rtol=1e-12, atol=0)
        torch.testing.assert_close(forth, apart + (means[0] - means[1]).square().sum(), rtol=1e-12, atol=0)

    def test_batches_are_broadcast(self):
        mean = torch.randn(5, dtype=torch.float64)
        many = torch.stack([covariance(5, s) * (s + 1) for s in range(3)])
        together = functional.frechet_distance(mean, many, mean, many[1])
        assert together.shape == (3,)
        assert together[1] == 0
        alone = torch.stack([functional.frechet_distance(mean, each, mean, many[1]) for each in many])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)
        means = torch.randn(3, 5, dtype=torch.float64)
        together = functional.frechet_distance(means, many, mean, many[1])
        alone = [functional.frechet_distance(*each, mean, many[1]) for each in zip(means, many, strict=True)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), ValueError, r"mean_2 \(3,\)"),
            ((torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)), ValueError, r"cov_1 \(3, 3\)"),
            ((torch.zeros(2), torch.ones(2, 3), torch.zeros(2), torch.eye(2)), ValueError, r"\(2, 3\)"),
            ((torch.tensor(0.0), torch.eye(1), torch.zeros(1), torch.eye(1)), ValueError, r"mean_1 \(\)"),
            (
                (torch.zeros(1), torch.full((1, 1), math.nan), torch.zeros(1), torch.eye(1)),
                ValueError,
                "finite",
            ),
            ((torch.full((1,), math.inf), torch.eye(1), torch.zeros(1), torch.eye(1)), ValueError, "mean_1"),
            ((torch.zeros(1).int(), torch.eye(1), torch.zeros(1), torch.eye(1)), TypeError, "torch.int32"),
        ],
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=message):
            functional.frechet_distance(*arguments)


SHAPES = [
    (4, 1, 1),
    (5, 3, 40),
    (40, 3, 5),
    (12, 200, 7),
    (16, 100, 300),
    (30, 30, 30),
    (9, 18, 18),
    (9, 19, 19),
]


class TestDebiasedHSIC:
    @pytest.mark.parametrize(("samples", "width_1", "width_2"), SHAPES)
    def test_equals_the_definition(self, samples, width_1, width_2):
        # Some shapes are computed by products of features, others by products of samples.
        left, right = related(samples, width_1, width_2, samples)
        for pair in ((left, right), (left, left), (right, right)):
            expected = float(hsic_by_definition(*pair))
            assert float(functional.debiased_hsic(*pair)) == pytest.approx(expected, rel=1e-10)

    def test_is_unbiased(self):
        # The squared Frobenius norm of the cross-covariance is 2 * 0.5^2; mean of 4,000 draws of 6 samples.
        generator = torch.Generator().manual_seed(0)
        values = []
        for _ in range(4000):
            left = torch.randn(6, 2, generator=generator, dtype=torch.float64)
            right = 0.5 * left + torch.randn(6, 2, generator=generator, dtype=torch.float64)
            values.append(float(functional.debiased_hsic(left, right)))
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values) / math.sqrt(len(values)))

    @pytest.mark.parametrize(("samples", "width_1", "width_2"), SHAPES)
    def test_a_far_mean_changes_nothing(self, samples, width_1, width_2):
        left, right = related(samples, width_1, width_2, 0)
        near = functional.debiased_hsic(left, right)
        far = functional.debiased_hsic(left + 1e6, right - 1e6)
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize(("width_1", "width_2"), [(3, 5), (200, 300), (3, 300)])
    def test_invalid_samples_count_as_absent(self, width_1, width_2):
        left, right = related(20, width_1, width_2, 0)
        valid = torch.ones(20, dtype=torch.bool)
        valid[[0, 3, 19]] = False
        holed = left.clone()
        holed[~valid] = torch.nan
        value = functional.debiased_hsic(holed, right, valid)
        torch.testing.assert_close(
            value, functional.debiased_hsic(left[valid], right[valid]), rtol=1e-12, atol=0
        )
        valid[3:] = False
        assert functional.debiased_hsic(holed, right, valid) == 0

    @pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e70])
    def test_a_first_sample_that_cannot_be_used_costs_no_digits(self, bad):
        rows = 1e8 + related(20, 300, 1, 0)[0]
        rows[0, 2] = bad
        centred = functional.u_centred(functional.gram(rows), torch.arange(20) > 0)
        expected = functional.u_centred(functional.gram(rows[1:]))
        torch.testing.assert_close(centred[1:, 1:], expected, rtol=1e-9, atol=1e-9)
        assert functional.gram(rows[:0]).shape == (0, 0)
        zero = rows.clone()
        zero[0] = 0  # far from the other rows, on one side only
        value = functional.debiased_hsic(zero, rows, torch.arange(20) > 0)
        torch.testing.assert_close(value, functional.debiased_hsic(rows[1:], rows[1:]), rtol=1e-9, atol=0)

    def test_batches_of_grams(self):
        grams = functional.gram(torch.randn(30, 4)).reshape(1, 1, 30, 30) * torch.rand(2, 3, 1, 1)
        grams[1, 2, 5, 5] = torch.inf
        singly = [functional.u_centred(each) for each in grams.flatten(0, 1)]
        centred = functional.u_centred(grams).flatten(0, 1)
        torch.testing.assert_close(centred[:5], torch.stack(singly[:5]))
        assert (~usable_samples(grams)).nonzero().tolist() == [[1, 2, 5]]

    def test_u_centred_sums_are_zero(self):
        left, _ = related(15, 4, 1, 0)
        centred = functional.u_centred(functional.gram(left))
        assert centred.diagonal().abs().max() == 0
        assert centred.sum(0).abs().max() < 1e-12
        shifted = functional.u_centred((left + 3) @ (left + 3).T)
        torch.testing.assert_close(shifted, centred, rtol=0, atol=1e-10)

    def test_gram_goes_by_blocks(self, monkeypatch):
        rows = torch.randn(7, 500) + 5
        whole = functional.gram(rows)
        moved = rows.double() - rows[whole.diagonal().argmin()].double()
        monkeypatch.setattr("spectralmetrics.functional.relations._BLOCK_BYTES", 1)
        torch.testing.assert_close(functional.gram(rows), whole, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(whole, moved @ moved.T, rtol=1e-12, atol=1e-10)


class TestLinearCKA:
    @pytest.mark.parametrize(("samples", "width_1", "width_2"), SHAPES)
    def test_equals_the_definition(self, samples, width_1, width_2):
        left, right = related(samples, width_1, width_2, 1)
        value = float(functional.linear_cka(left, right))
        assert value == pytest.approx(cka_by_definition(left, right), rel=1e-10)

    @pytest.mark.parametrize(("samples", "width_1", "width_2"), SHAPES)
    def test_equals_that_of_pytorch_cka(self, samples, width_1, width_2):
        left, right = related(samples, width_1, width_2, 1)
        centred = [rows - rows.mean(0) for rows in (left, right)]
        cross, own_1, own_2 = pytorch_cka.hsic(*((rows @ rows.T)[None] for rows in centred))
        assert float(functional.debiased_hsic(left, right)) == pytest.approx(float(cross), rel=1e-9)
        value = functional.linear_cka(left, right)
        assert float(value) == pytest.approx(float(cross / (own_1 * own_2).sqrt()), rel=1e-9)

    def test_rotations_shifts_and_scales_do_not_matter(self):
        left, right = related(40, 12, 9, 2)
        value = functional.linear_cka(left, right)
        moved = functional.linear_cka(left @ basis(12, 12, 0) * 7 + 3, right * 1e-3 - 2)
        torch.testing.assert_close(moved, value, rtol=1e-11, atol=0)
        assert float(functional.linear_cka(left, left @ basis(12, 12, 1))) == pytest.approx(1, abs=1e-12)

    def test_independent_features_score_zero_where_the_biased_estimator_does_not(self):
        debiased, biased = [], []
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            left, right = torch.randn(2, 32, 16, generator=generator, dtype=torch.float64)
            debiased.append(float(functional.linear_cka(left, right)))
            x, y = left - left.mean(0), right - right.mean(0)
            norms = (x.T @ x).norm() * (y.T @ y).norm()
            biased.append(float((x.T @ y).square().sum() / norms))
        assert np.mean(debiased) == pytest.approx(0, abs=4 * np.std(debiased) / math.sqrt(len(debiased)))
        assert np.mean(biased) > 0.2

    @pytest.mark.parametrize("samples", [4, 5, 6, 9])
    @pytest.mark.parametrize("width", [1, 2, 50])
    def test_tiny_batches_stay_within_the_range(self, samples, width):
        generator = torch.Generator().manual_seed(samples * width)
        for _ in range(100):
            left, right = torch.randn(2, samples, width, generator=generator, dtype=torch.float64)
            assert -1 <= functional.linear_cka(left, right) <= 1
            # Not only because the result is clamped.
            assert abs(cka_by_definition(left, right)) <= 1 + 1e-12

    @pytest.mark.parametrize("width", [2, 100])
    @pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -3e-40])
    def test_constant_features_give_zero(self, width, value):
        varying = torch.randn(10, 5)
        constant = torch.full((10, width), value)
        assert functional.linear_cka(constant, varying) == 0
        assert functional.linear_cka(varying.double(), constant.double()) == 0
        assert functional.linear_cka(constant, constant) == 0

    @pytest.mark.parametrize("width", [1, 2, 100])
    def test_a_single_sample_that_differs_gives_zero(self, width):
        # Debiasing leaves nothing but round-off, and a ratio of round-off could be anything.
        left, right = torch.zeros(30, width), torch.zeros(30, width)
        left[7], right[11] = torch.randn(width), 1e3
        assert functional.linear_cka(left + 0.3, right - 5) == 0
        assert functional.linear_cka(left, left) == 0

    @pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
    def test_any_float32_scale(self, scale):
        left = (torch.randn(10, 4).sign() + torch.randn(10, 4).sign()) / 4 * scale
        assert float(functional.linear_cka(left, left)) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("left", "right", "error", "message"),
        [
            (torch.zeros(3, 2), torch.zeros(3, 2), ValueError, "at least 4 samples, got 3"),
            (torch.zeros(5, 2), torch.zeros(6, 2), ValueError, "5 and 6"),
            (torch.zeros(5, 2, 2), torch.zeros(5, 2), ValueError, r"left rows.*\(5, 2, 2\)"),
            (torch.zeros(5, 2), torch.zeros(5), ValueError, r"right rows.*\(5,\)"),
            (torch.zeros(5, 2), torch.zeros(5, 2).int(), TypeError, "right .*torch.int32"),
            (torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.complex64), TypeError, "torch.complex64"),
        ],
    )
    def test_refuses(self, left, right, error, message):
        with pytest.raises(error, match=message):
            functional.linear_cka(left, right)
