"""The compiled accumulation against plain float64 arithmetic; test_moments.py has further requirements."""

import concurrent.futures
import dataclasses
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmetrics.sums import Moments, Observations, accumulate, compiled, empty_moments
from spectralmetrics.sums.library import find

pytestmark = pytest.mark.usefixtures("instructions")

DTYPES = [  # (dtype of values, dtype of products)
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
]


def bound(gram_dtype):
    """Bound on the error of a sum, relative to the magnitudes of its terms."""
    if gram_dtype == torch.float64:
        # BLAS rounds 64,000 products of few digits, such as products of float16, all in one direction.
        return 1e-12 if compiled.instruction_set() is None else 1e-13
    # The compiled accumulation sums at most 256 float32 products, and continues in float64.
    return 1e-5 if compiled.instruction_set() is None else 3e-6


def moments_about(origin):
    moments = empty_moments(len(origin))
    moments.origin.copy_(origin)
    return moments


def plain_sums(rows, origin):
    """Sums over rows without NaN and infinities; 64 rows at a time, which BLAS adds accurately."""
    finite = rows.isfinite().all(1)
    centred = rows[finite].double() - origin
    return int(finite.sum()), centred.sum(0), sum(part.T @ part for part in centred.split(64))


def assert_sums(moments, rows, gram_dtype):
    count, first, second = plain_sums(rows, moments.origin)
    assert (int(moments.count), int(moments.non_finite)) == (count, len(rows) - count)
    sizes = (rows[rows.isfinite().all(1)].double() - moments.origin).square().sum(0).sqrt()
    tolerance = bound(gram_dtype) * sizes.outer(sizes) + 1e-300
    assert ((moments.second - second).triu().abs() <= tolerance).all()
    assert ((moments.first - first).abs() <= bound(gram_dtype) * count**0.5 * sizes + 1e-300).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "features",
    [
        *(1, 3, 7, 8, 16, 17, 49, 65, 257, 530),
        *(pytest.param(each, marks=pytest.mark.long) for each in (4, 15, 31, 48, 64, 100, 256, 300, 400)),
    ],
)
def test_every_width(features, dtypes, monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST_WORK_TO_SHARE", 0)
    values_dtype, gram_dtype = dtypes
    for samples, positions in ((1, 1), (5, 1), (4, 8), (5, 51), (1, 256), (257, 1), (7, 100), (3, 700)):
        maps = (torch.randn(samples, features, positions) + 1).to(values_dtype)
        for values in (maps, maps.mT.contiguous().mT):
            observations = Observations(values, 1)
            moments = moments_about(torch.linspace(0.5, 1.5, features))
            accumulate(moments, observations, gram_dtype, recentre=False)
            assert_sums(moments, observations.rows(), gram_dtype)


def test_an_origin_that_is_no_float32(instructions):
    if instructions is None:
        pytest.skip("PyTorch subtracts what rounding the origin loses only where it moves the origin")
    origin = torch.full((20,), 1e6 + 1 / 3, dtype=torch.float64)
    rows = (origin + 0.5 * torch.randn(500, 20)).float()
    moments = moments_about(origin)
    accumulate(moments, Observations(rows), torch.float32, recentre=False)
    assert_sums(moments, rows, torch.float32)


@st.composite
def batches(draw):
    """Values with up to four dimensions in any memory layout, and the dimension of the features."""
    ndim = draw(st.integers(2, 4))
    shape = [draw(st.integers(1, 40)) for _ in range(ndim)]
    feature_dim = draw(st.integers(0, ndim - 1))
    order = draw(st.permutations(range(ndim)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    step = draw(st.sampled_from([1, 1, 2]))
    whole = torch.full([2 * size + 3 for size in (shape[i] for i in order)], torch.nan)
    inner = whole[tuple(slice(2, 2 + shape[i] * step, step) for i in order)]
    inner.copy_(torch.randn(inner.shape, generator=generator))
    if draw(st.booleans()):
        inner.flatten()[0] = torch.inf  # of a copy unless the layout is contiguous
        inner.select(0, 0).select(0, 0).fill_(draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 3.0])))
    values = inner.permute([order.index(i) for i in range(ndim)])
    if draw(st.booleans()):
        values = values.contiguous()
    return values, feature_dim


@given(batch=batches(), dtypes=st.sampled_from(DTYPES), masked=st.booleans(), seed=st.integers(0, 10**6))
def test_any_memory_layout(batch, dtypes, masked, seed):
    values, feature_dim = batch
    values = values.to(dtypes[0])
    observations = Observations(values, feature_dim)
    rows = observations.rows()
    moments = moments_about(torch.full((rows.shape[1],), 1 / 3))
    if masked:
        valid = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.7
        observations = Observations(values, feature_dim, valid)
        rows = rows[valid]
    accumulate(moments, observations, dtypes[1], recentre=False)
    assert_sums(moments, rows, dtypes[1])


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(4, 20, 37), (300, 20, 1), (1, 20, 3000), (3, 300, 256)])
def test_nothing_outside_is_read_or_written(shape, gram_dtype):
    samples, features, positions = shape
    outside = torch.full((samples * features * positions + 64,), torch.nan)
    values = outside[32:-32].view(shape).copy_(torch.randn(shape))
    for layout in (values, values.transpose(1, 2).contiguous().transpose(1, 2)):
        around = [torch.full((64 + size,), 7.0, dtype=torch.float64) for size in (features, features**2)]
        first, second = around[0][32:-32].zero_(), around[1][32:-32].view(features, features).zero_()
        empty = empty_moments(features)
        moments = Moments(empty.count, empty.non_finite, empty.origin, first, second)
        accumulate(moments, Observations(layout, 1), gram_dtype, recentre=False)
        assert_sums(moments, Observations(layout, 1).rows(), gram_dtype)
        for memory in around:
            assert (memory[:32] == 7).all()
            assert (memory[-32:] == 7).all()
        before = values.clone()
        assert torch.equal(values, before)


@pytest.mark.parametrize("features", [40, 300])
@pytest.mark.parametrize("spoiled", ["first", "last", "some", "all"])
def test_rows_that_are_not_finite(spoiled, features):
    rows = torch.randn(600, features)
    where = {"first": [0], "last": [599], "some": [3, 31, 32, 255, 256, 400], "all": list(range(600))}[spoiled]
    for index, row in enumerate(where):
        rows[row, index % features] = (torch.nan, torch.inf, -torch.inf)[index % 3]
    for gram_dtype in (torch.float64, torch.float32):
        maps = rows.view(6, 100, features).mT.contiguous()
        for observations in (Observations(rows), Observations(maps, 1)):
            moments = empty_moments(features)
            accumulate(moments, observations, gram_dtype, recentre=False)
            assert int(moments.non_finite) == len(where)
            assert_sums(moments, rows, gram_dtype)


@pytest.mark.parametrize("features", [40, 300])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e-6, 1e6, 1e16, 1e30, 1e37])
def test_float32_products_of_any_magnitude(magnitude, features):
    # Every second chunk of rows is small beside the others, and must keep its accuracy.
    rows = torch.randn(2000, features)
    rows[500:1000] *= 1e-3
    rows *= magnitude
    moments = empty_moments(features)
    accumulate(moments, Observations(rows), torch.float32, recentre=False)
    assert_sums(moments, rows, torch.float32)


@pytest.mark.parametrize("feature_dim", [1, -1])
@pytest.mark.parametrize("far", [0, 1e30])
@pytest.mark.parametrize("magnitudes", [(1, 1e30), (1e-30, 1e-25, 1, 1e3), (1e-6, 1e-6, 1e12)], ids=str)
def test_float32_products_of_magnitudes_that_grow(magnitudes, far, feature_dim):
    # Features differ by 1e15, too. Those after batches of larger rows must not overflow or vanish.
    origin = torch.zeros(40)
    origin[0] = far
    sizes = torch.logspace(0, -15, 40)[:, None]
    moments, seen = moments_about(origin), []
    for magnitude in magnitudes:
        maps = torch.randn(3, 40, 130) * sizes * magnitude + origin[:, None]
        values = maps if feature_dim == 1 else maps.mT.contiguous()
        accumulate(moments, Observations(values, feature_dim), torch.float32, recentre=False)
        seen.append(Observations(maps, 1).rows())
        assert_sums(moments, torch.cat(seen), torch.float32)


@pytest.mark.parametrize("sign", [-1, 1])
def test_float32_products_of_rows_on_one_side_of_the_origin(sign):
    rows = sign * torch.randn(300, 20).abs() * 1e25
    moments = empty_moments(20)
    accumulate(moments, Observations(rows), torch.float32, recentre=False)
    assert_sums(moments, rows, torch.float32)


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("features", [48, 400, 520])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads(threads, features, gram_dtype):
    rows = torch.randn(2050, features)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(3):
            moments = empty_moments(features)
            for some in rows.split([50, 2000]):  # the second part adds to the sums of the first
                accumulate(moments, Observations(some), gram_dtype, recentre=False)
            runs.append(moments)
    finally:
        torch.set_num_threads(before)
    assert_sums(runs[0], rows, gram_dtype)
    for again in runs[1:]:  # whichever thread came first
        assert torch.equal(again.second, runs[0].second)
        assert torch.equal(again.first, runs[0].first)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 7), (3, 5, 0)])
def test_no_observation_is_no_news(shape):
    for recentre in (True, False):
        moments = empty_moments(5)
        accumulate(moments, Observations(torch.ones(shape), 1), recentre=recentre)
        assert not any(tensor.any() for tensor in (moments.count, moments.non_finite, moments.second))


def test_observations_that_do_not_fit():
    for values in (torch.ones(9, 4), torch.ones(9, 6)):
        with pytest.raises(ValueError, match=rf"with 5 features, got {values.shape[1]} \(shape \(9,"):
            accumulate(empty_moments(5), Observations(values), recentre=False)
    with pytest.raises(TypeError, match=r"floating dtype, got torch.int64"):
        accumulate(empty_moments(5), Observations(torch.ones(9, 5, dtype=torch.int64)), recentre=False)
    with pytest.raises(ValueError, match=r"valid of shape \(9,\), got \(8,\)"):
        accumulate(empty_moments(5), Observations(torch.ones(9, 5), valid=torch.ones(8, dtype=torch.bool)))


def test_updates_from_several_python_threads():
    rows = [torch.randn(3000, features) for features in (30, 64, 300, 90)]

    def one(values):
        moments = empty_moments(values.shape[1])
        for part in values.split(500):
            accumulate(moments, Observations(part), recentre=False)
        return moments

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for values, moments in zip(rows, pool.map(one, rows), strict=True):
            assert_sums(moments, values, torch.float64)


def test_what_it_does_not_take(instructions, monkeypatch):
    if instructions is None:
        pytest.skip("nothing is compiled")
    rows = torch.randn(50, 6)
    moments = empty_moments(6)
    calls = []
    add = compiled.add
    monkeypatch.setattr(compiled, "add", lambda *args: (calls.append(args), add(*args)))
    accumulate(moments, Observations(rows))
    assert len(calls) == 1

    def other(**tensors):
        return dataclasses.replace(moments, **tensors)

    class Subclass(torch.Tensor):
        pass

    for sums, values, gram_dtype in [
        (moments, rows.double(), torch.float32),
        (moments, rows.as_subclass(Subclass), torch.float64),
        (moments, torch._neg_view(rows), torch.float64),
        (moments, torch._efficientzerotensor(5, 6), torch.float64),
        (other(second=moments.second.T), rows, torch.float64),
        (other(second=moments.second.float()), rows, torch.float64),
        (other(first=moments.first[:1]), rows, torch.float64),
        (other(origin=moments.origin.float()), rows, torch.float64),
        (other(count=moments.count.int()), rows, torch.float64),
        (other(non_finite=moments.non_finite.reshape(1)), rows, torch.float64),
    ]:
        assert not compiled.takes(sums, values, gram_dtype)
    with compiled.using(None):
        assert not compiled.takes(moments, rows, torch.float64)


def test_the_environment_can_switch_it_off(instructions):
    if instructions is not None:
        pytest.skip("once is enough")
    script = "from spectralmetrics.functional import compiled; print(compiled.instruction_set())"
    environment = {**os.environ, "SPECTRALMETRICS_COMPILED": "0"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "None"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("c++") is None,
    reason="only built on Linux on x86-64, with a C++ compiler",
)
def test_it_has_been_built_where_it_can_be():
    assert find().library is not None


@pytest.mark.skipif(find().library is None, reason="nothing is compiled")
def test_it_uses_the_instructions_that_the_processor_has():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    avx2 = {"avx2", "fma"} <= set(flags)
    avx512 = avx2 and {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= set(flags)
    assert find().library.best_instructions() == avx2 + avx512


@pytest.mark.skipif(not compiled.instruction_set(), reason="nothing is compiled here")
def test_it_uses_the_best_that_the_processor_has():
    """Compared with PyTorch's own detection."""
    theirs = torch.backends.cpu.get_cpu_capability()
    with compiled.using("avx512"):
        assert compiled.instruction_set() == {"AVX512": "avx512", "AVX2": "avx2"}[theirs]
    with compiled.using("avx2"):
        assert compiled.instruction_set() == "avx2"
