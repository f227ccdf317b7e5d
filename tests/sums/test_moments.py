import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmetrics.functional import (
    Observations,
    accumulate,
    covariance,
    empty_moments,
    mean,
    merge,
    rebase,
    variances,
)
from spectralmetrics.sums import empty_folds, moments_of_covariance
from tests.oracles import random_rows, relative_error, two_pass_covariance

pytestmark = pytest.mark.usefixtures("instructions")  # by PyTorch and by the compiled code


def stream(rows, batch, gram_dtype=torch.float64):
    moments = empty_moments(rows.shape[1])
    for part in rows.split(batch):
        accumulate(moments, Observations(part), gram_dtype)
    return moments


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, 1e6, 1e8])
def test_covariance_is_right_far_from_zero(ratio):
    rows = torch.randn(4000, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64) + ratio
    expected = two_pass_covariance(rows)
    bound = 1e-12 if ratio <= 1e2 else 1e-9
    assert relative_error(covariance(stream(rows, 117)), expected) < bound
    uncentred = two_pass_covariance(rows, center=False)
    assert relative_error(covariance(stream(rows, 117), center=False), uncentred) < 1e-12


@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_merge_of_streams_that_began_far_apart(ratio, order):
    means = [0.0, ratio, -ratio, 3 * ratio]
    # The first batch of each stream also lies far from the rest of it.
    parts = [
        torch.cat([random_rows(k, 3, 12, mean=-5 * ratio), random_rows(10 + k, 500 + k, 12, mean=m)])
        for k, m in enumerate(means)
    ]
    merged = stream(parts[order[0]], 3)
    for index in order[1:]:
        merged = merge(merged, stream(parts[index], 3))
    assert relative_error(covariance(merged), two_pass_covariance(torch.cat(parts))) < 1e-12


@pytest.mark.parametrize("ratio", [1e4, 1e8])
def test_merge_of_streams_of_one_distribution_far_from_zero(ratio):
    rows = random_rows(3, 3000, 10, mean=ratio)
    merged = stream(rows[:1], 1)
    for part in rows[1:].split(500):
        merged = merge(merged, stream(part, 7))
    assert relative_error(covariance(merged), two_pass_covariance(rows)) < 1e-9


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 60),
    features=st.integers(1, 20),
    batch=st.integers(1, 70),
    shift=st.sampled_from([0.0, 1.0, -1e3, 1e5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_split_of_any_rows(seed, count, features, batch, shift, dtype):
    if dtype == torch.float16:
        shift = max(min(shift, 100.0), -100.0)
    rows = random_rows(seed, count, features, mean=shift, dtype=dtype)
    moments = stream(rows, batch)
    exact = two_pass_covariance(rows)
    scale = max(float(np.abs(exact).max()), 1e-300)
    np.testing.assert_allclose(covariance(moments).numpy(), exact.astype(float), atol=1e-10 * scale, rtol=0)
    np.testing.assert_allclose(variances(moments), covariance(moments).diagonal(), atol=1e-12 * scale, rtol=0)
    np.testing.assert_allclose(mean(moments), rows.double().mean(0), rtol=1e-12, atol=1e-12)
    assert int(moments.count) == count


@given(seed=st.integers(0, 10**6), features=st.integers(1, 300), shift=st.floats(-1e4, 1e4))
def test_float32_products_stay_near(seed, features, shift):
    rows = random_rows(seed, 150, features, mean=shift, decay=0.2)
    exact = two_pass_covariance(rows)
    assert relative_error(covariance(stream(rows, 40, torch.float32)), exact) < 3e-6


KINDS = {"relu": lambda x: x.relu(), "binary": lambda x: (x > 0).double(), "normal": lambda x: x}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [1, 2, 3, 4, 8, 300])
def test_float32_products_are_bounded_whatever_the_width(features, kind, dtype):
    """A plain float32 sum of products of like sign drifts with their number: by 2.4e-3 for 131,072 products."""
    count = 70_000 if features <= 8 else 5_000
    generator = torch.Generator().manual_seed(features)
    rows = KINDS[kind](torch.randn(count, features, generator=generator, dtype=torch.float64)).to(dtype)
    for recentre in (True, False):
        moments = empty_moments(features)
        accumulate(moments, Observations(rows), torch.float32, recentre=recentre)
        deviations = rows.double() - moments.origin
        sizes = deviations.square().sum(0).sqrt()
        error = (moments.second - deviations.T @ deviations).triu().abs()
        assert (error <= 1e-5 * sizes.outer(sizes)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smaller", [1e-6, 1e-12, 1e-18])
def test_float32_products_beside_a_much_smaller_feature(smaller, dtype):
    """All features share one scale, which must keep the smallest in the range of float32."""
    rows = (random_rows(0, 4000, 3, decay=0.0) * torch.tensor([1.0, smaller, 1.0]).double()).to(dtype)
    actual = torch.as_tensor(covariance(stream(rows, 700, torch.float32)))
    exact = torch.as_tensor(np.asarray(two_pass_covariance(rows), dtype=np.float64))
    sizes = exact.diagonal().sqrt()
    assert ((actual - exact).abs() <= 1e-5 * sizes.outer(sizes)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 3, 40])
def test_rows_that_overflow_are_no_rows_of_nan(features, gram_dtype, dtype):
    """They are finite, so they count; reading the sums reports the overflow."""
    largest = 3e38 if dtype == torch.float32 else 1e308
    rows = largest * (1 - 1e-3 * torch.rand(300, features, dtype=dtype))
    rows[150:160] = -largest
    rows[157, 0] = torch.nan
    moments = stream(rows, 100, gram_dtype)
    assert (int(moments.count), int(moments.non_finite)) == (299, 1)
    # A distance of 6e38 exceeds float32, and the square of 1e308 exceeds float64.
    assert moments.in_range() == (dtype == torch.float32 and gram_dtype == torch.float64)
    ordinary = torch.randn(300, features, dtype=dtype)
    ordinary[157, 0] = torch.nan
    assert stream(ordinary, 100, gram_dtype).in_range()


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [3e38, -3e38, 3.4e38])
def test_large_rows_that_do_not_overflow(largest, gram_dtype):
    rows = torch.full((50, 2), largest) * (1 + 0.01 * torch.rand(50, 2)).clamp(max=3.4e38 / abs(largest))
    moments = stream(rows, 10, gram_dtype)
    assert (int(moments.count), int(moments.non_finite), moments.in_range()) == (50, 0, True)
    bound = 1e-12 if gram_dtype == torch.float64 else 1e-5
    exact = two_pass_covariance(rows)
    if exact.max() > 0:
        assert relative_error(covariance(moments) / float(exact.max()), exact / exact.max()) < bound


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e-20, 1e20, 1e30])
def test_float32_products_of_tiny_and_huge_float32_rows(magnitude):
    rows = (random_rows(0, 500, 8) * magnitude).to(torch.float32)
    exact = two_pass_covariance(rows)
    assert relative_error(covariance(stream(rows, 40, torch.float32)), exact) < 1e-5


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-150, 1e-100, 1e100, 1e150])
def test_tiny_and_huge_float64_rows(magnitude, gram_dtype):
    rows = random_rows(0, 500, 8) * magnitude
    exact = two_pass_covariance(rows)
    bound = 1e-12 if gram_dtype == torch.float64 else 1e-5
    # Rescaled matrices, because squares of 1e300 exceed the range of the norm.
    actual = covariance(stream(rows, 40, gram_dtype)).numpy().astype(np.longdouble) / exact[0, 0]
    assert relative_error(actual, exact / exact[0, 0]) < bound


@pytest.mark.parametrize(
    "features",
    [1, 2, 127, 128, 129, 513, *(pytest.param(each, marks=pytest.mark.long) for each in (200, 700))],
)
@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
def test_every_block_of_the_product(features, gram_dtype):
    rows = random_rows(1, 300, features, decay=0.3)
    bound = 1e-12 if gram_dtype == torch.float64 else 1e-5
    assert relative_error(covariance(stream(rows, 150, gram_dtype)), two_pass_covariance(rows)) < bound


def layouts(maps):
    """One batch of feature maps (N, C, H, W) in several memory layouts."""
    yield maps
    yield maps.to(memory_format=torch.channels_last)
    yield maps.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    yield torch.cat([maps, maps], dim=1)[:, : maps.shape[1]]
    yield torch.stack([maps, maps], dim=-1)[..., 0]


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (1, 3, 70, 60), (40, 130, 1, 1), (3, 2, 1500, 2)])
def test_memory_layouts_give_the_same_sums(shape, gram_dtype):
    maps = torch.randn(shape, dtype=torch.float64) + 3
    rows = maps.movedim(1, -1).reshape(-1, shape[1])
    expected = two_pass_covariance(rows)
    for layout in layouts(maps):
        observations = Observations(layout, feature_dim=1)
        assert torch.equal(observations.rows(), rows)
        index = torch.tensor([0, rows.shape[0] - 1, rows.shape[0] // 2])
        assert torch.equal(observations.take(index).rows(), rows[index])
        moments = empty_moments(shape[1])
        accumulate(moments, observations, gram_dtype)
        assert relative_error(covariance(moments), expected) < (1e-12 if gram_dtype == torch.float64 else 1e-5)
        assert int(moments.count) == len(rows)


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
def test_non_finite_and_invalid_rows_are_left_out(gram_dtype):
    rows = random_rows(0, 100, 6, mean=10.0)
    spoiled = rows.clone()
    spoiled[3, 2], spoiled[50, 0], spoiled[99, 5] = torch.nan, torch.inf, -torch.inf
    valid = torch.ones(100, dtype=torch.bool)
    valid[10:20] = False
    valid[50] = False  # not valid, so not counted as non-finite either
    kept = valid & spoiled.isfinite().all(1)
    moments = empty_moments(6)
    for part, mask in zip(spoiled.split(30), valid.split(30), strict=True):
        accumulate(moments, Observations(part, valid=mask), gram_dtype)
    assert (int(moments.count), int(moments.non_finite)) == (int(kept.sum()), 2)
    bound = 1e-12 if gram_dtype == torch.float64 else 1e-5
    assert relative_error(covariance(moments), two_pass_covariance(rows[kept])) < bound


def test_an_all_nan_beginning_leaves_the_origin_open():
    moments = empty_moments(3)
    accumulate(moments, Observations(torch.full((5, 3), torch.nan)))
    rows = random_rows(0, 50, 3, mean=1e8)
    accumulate(moments, Observations(rows))
    assert relative_error(covariance(moments), two_pass_covariance(rows)) < 1e-9
    assert int(moments.non_finite) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_features_have_exactly_no_variance(dtype):
    rows = torch.full((1000, 4), 0.1, dtype=dtype) * torch.tensor([1, 3, 1e6, -7], dtype=dtype)
    for gram_dtype in (torch.float64, torch.float32):
        moments = stream(rows, 17, gram_dtype)
        assert torch.count_nonzero(covariance(moments)) == 0
        merged = merge(moments, stream(rows, 900, gram_dtype))
        assert torch.count_nonzero(covariance(merged)) == 0


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_float32_products_about_an_origin_that_is_no_float32(dtypes):
    rows = [random_rows(k, 400, 5, mean=1e6).to(dtype) for k, dtype in enumerate(dtypes)]
    moments = empty_moments(5)
    for part in rows:
        accumulate(moments, Observations(part), torch.float32)
    exact = two_pass_covariance(torch.cat([part.double() for part in rows]))
    assert relative_error(covariance(moments), exact) < 1e-5


@pytest.mark.parametrize("beginning", [torch.zeros(1, 64), torch.full((3, 64), -1e7)], ids=["dry run", "far"])
def test_float32_products_after_an_unlike_first_batch(beginning):
    from spectralmetrics import CovarianceMetric

    rows = 1e4 + torch.randn(30 * 128, 64)
    metric = CovarianceMetric(gram_dtype=torch.float32)
    metric.update(beginning)
    for part in rows.split(128):
        metric.update(part)
    exact = two_pass_covariance(torch.cat([beginning, rows]).double())
    assert relative_error(metric.compute(), exact) < 1e-6
    # Small eigenvalues are accurate, too: the spread of the many rows.
    within = torch.linalg.eigvalsh(metric.compute())[:-1]
    expected = torch.linalg.eigvalsh(torch.from_numpy(two_pass_covariance(rows).astype(float)))
    torch.testing.assert_close(within[:20], expected[:20], rtol=0.02, atol=0)


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("when", [1, 3, 7])
def test_one_outlying_row_does_not_carry_the_origin_away(when, gram_dtype):
    from spectralmetrics import CovarianceMetric

    parts = list(torch.randn(20 * 256, 16).split(256))
    parts.insert(when, torch.full((1, 16), 1e6))
    metric = CovarianceMetric(gram_dtype=gram_dtype)
    for part in parts:
        metric.update(part)
    assert metric.origin.abs().max() < 10
    # In float32, rows that wait with the outlying one share its rounding.
    bound = 1e-12 if gram_dtype == torch.float64 else 1e-5
    assert relative_error(metric.compute(), two_pass_covariance(torch.cat(parts).double())) < bound


@pytest.mark.parametrize("first", [0.0, torch.nan, 1e-3])
def test_the_scale_of_float32_products_is_not_that_of_the_first_block_alone(first):
    rows = torch.randn(2048, 512)
    rows[:1024] *= 1e-3
    rows[:1024] = first if first != 1e-3 else rows[:1024]
    rows[1024:] *= 1e15
    moments = empty_moments(512)
    accumulate(moments, Observations(rows), torch.float32)
    finite = rows[rows.isfinite().all(1)]
    scale, some = 1e30, slice(3, None, 8)  # features of each block; extended precision of all takes seconds
    actual = covariance(moments)[some, some] / scale
    assert relative_error(actual, two_pass_covariance(finite[:, some]) / scale) < 1e-5


def test_float32_products_after_a_merge_with_an_origin_that_is_no_float32():
    from spectralmetrics import CovarianceMetric

    base = torch.full((3,), 1e6 / 3, dtype=torch.float64)
    parts = [
        (base + torch.randn(10, 3)).float(),
        base + 0.01 * torch.randn(20, 3, dtype=torch.float64),
        (base + 0.01 * torch.randn(200, 3)).float(),
    ]
    metric, other = CovarianceMetric(gram_dtype=torch.float32), CovarianceMetric(gram_dtype=torch.float32)
    metric.update(parts[0])
    other.update(parts[1])
    metric.merge_state(other)
    metric.update(parts[2])
    exact = two_pass_covariance(torch.cat([part.double() for part in parts]))
    assert relative_error(metric.compute(), exact) < 1e-5


def test_rebase_changes_nothing_but_the_origin():
    moments = stream(random_rows(5, 200, 7, mean=3.0), 50)
    moved = rebase(moments, torch.linspace(-2, 9, 7, dtype=torch.float64))
    torch.testing.assert_close(covariance(moved), covariance(moments), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean(moved), mean(moments), rtol=1e-14, atol=0)


def test_merge_with_nothing_is_nothing():
    moments = stream(random_rows(5, 20, 3, mean=1e8), 5)
    for merged in (merge(moments, empty_moments(3)), merge(empty_moments(3), moments)):
        assert torch.equal(merged.origin, moments.origin)
        assert torch.equal(covariance(merged), covariance(moments))


def test_what_was_left_out_before_a_width_is_known_is_counted():
    moments = stream(random_rows(5, 20, 3), 5)
    unknown = dataclasses.replace(empty_moments(0), non_finite=torch.tensor(2))
    for merged in (moments.merged(unknown), unknown.merged(moments)):
        assert (int(merged.count), int(merged.non_finite), merged.num_features) == (20, 2, 3)
    assert int(unknown.merged(unknown).non_finite) == 4


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_matmul_precision_settings_do_not_reach_the_products(setting):
    rows = torch.randn(500, 64)
    before = torch.get_float32_matmul_precision()
    expected = covariance(stream(rows, 100, torch.float32))
    try:
        torch.set_float32_matmul_precision(setting)
        actual = covariance(stream(rows, 100, torch.float32))
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, expected)


PRECISION_SETTINGS = {
    "backends.fp32_precision": ("", "fp32_precision", "tf32"),
    "cuda.matmul.fp32_precision": ("cuda.matmul", "fp32_precision", "tf32"),
    "mkldnn.matmul.fp32_precision": ("mkldnn.matmul", "fp32_precision", "bf16"),
    "mkldnn.matmul.fp32_precision, tf32": ("mkldnn.matmul", "fp32_precision", "tf32"),
    "cuda.matmul.allow_tf32": ("cuda.matmul", "allow_tf32", True),
}


@pytest.mark.parametrize("setting", PRECISION_SETTINGS)
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
def test_precision_settings_are_left_as_they_were(setting):
    """Also the settings of the newer interface, which PyTorch refuses to mix with the older one."""
    path, name, value = PRECISION_SETTINGS[setting]
    modules = {"cuda.matmul": torch.backends.cuda.matmul, "": torch.backends}
    if hasattr(torch.backends, "fp32_precision"):
        modules["mkldnn.matmul"] = torch.backends.mkldnn.matmul
        watched = [(each, "fp32_precision") for each in modules.values()]
    elif name == "fp32_precision":
        pytest.skip("the newer interface has been there since torch 2.9")
    else:
        watched = [(torch.backends.cuda.matmul, "allow_tf32")]
    module = modules[path]
    rows = torch.randn(50, 6)
    expected = covariance(stream(rows, 20, torch.float32))
    start = [getattr(*each) for each in watched]
    before = getattr(module, name)
    try:
        setattr(module, name, value)
        kept = [getattr(*each) for each in watched]
        actual = covariance(stream(rows, 20, torch.float32))
        covariance(stream(rows, 20))
        assert [getattr(*each) for each in watched] == kept
    finally:
        setattr(module, name, before)
        for each, precision in zip(watched, start, strict=True):
            setattr(*each, precision)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
def test_autocast_does_not_reach_the_products(gram_dtype):
    rows = torch.randn(500, 64)
    expected = covariance(stream(rows, 100, gram_dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (rows @ rows.T).dtype == torch.bfloat16  # autocast is active
        actual = covariance(stream(rows, 100, gram_dtype))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("folds", [None, 3])
def test_what_is_decomposed_is_the_covariance(folds):
    rows = random_rows(0, 200, 6, mean=3.0)
    sums = empty_moments(6) if folds is None else empty_folds(folds, 6)
    intake = sums.intake(torch.float64)
    for batch, part in enumerate(rows.split(40)):
        intake.add(sums, Observations(part), batch)
    intake.flush(sums)
    for options in ({}, {"center": True}, {"center": False}):
        matrix = sums.matrix(**options).triu()
        torch.testing.assert_close(matrix, sums.covariance(**options).triu())
    assert not torch.allclose(sums.matrix(), sums.matrix(center=False))


def test_of_a_single_observation_there_is_a_covariance_too():
    moments = moments_of_covariance(torch.zeros(2, 2), torch.tensor([3.0, 4.0]), 1)
    assert moments.mean().tolist() == [3.0, 4.0]
    assert moments.covariance().abs().max() == 0
    with pytest.raises(ValueError, match="got 0"):
        moments_of_covariance(torch.zeros(2, 2), torch.tensor([3.0, 4.0]), 0)


def test_moments_of_a_covariance_stay_those_about_another_origin():
    mean = torch.tensor([3.0, 4.0], dtype=torch.float64)
    given = torch.eye(2, dtype=torch.float64) * 0.1
    moments = moments_of_covariance(given, mean, 3)
    assert not torch.equal(moments.second / 3, given)
    assert torch.equal(moments.covariance(), given)  # to the last digit
    moved = rebase(moments, torch.ones(2, dtype=torch.float64))
    for center in (True, False):
        torch.testing.assert_close(moved.covariance(center=center), moments.covariance(center=center))
