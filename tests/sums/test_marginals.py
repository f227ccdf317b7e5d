"""Marginals against extended precision, in every layout and on every instruction set."""

import numpy as np
import pytest
import torch

from spectralmetrics.sums import Observations, compiled, empty_marginals, ring
from spectralmetrics.sums.measuring import measure, measured_last

LAYOUTS = {
    "rows": lambda x: Observations(x),
    "every second feature": lambda x: Observations(torch.stack([x, x], -1).flatten(1)[:, ::2]),
    "every second row": lambda x: Observations(torch.stack([x, x], 1).flatten(0, 1)[::2]),
    "transposed": lambda x: Observations(x.t().contiguous(), 0),
    "sequences": lambda x: Observations(x.reshape(4, -1, x.shape[1])),
    "maps": lambda x: Observations(x.reshape(4, -1, x.shape[1]).mT.contiguous(), 1),
    "maps, two extents": lambda x: Observations(
        x.reshape(4, 3, -1, x.shape[1]).permute(0, 3, 1, 2).contiguous(), 1
    ),
    "maps, channels last": lambda x: Observations(x.reshape(4, 3, -1, x.shape[1]).movedim(-1, 1), 1),
    "wide maps": lambda x: Observations(x.reshape(1, -1, x.shape[1]).mT.contiguous(), 1),
    "part of maps": lambda x: Observations(
        torch.stack([x.reshape(4, -1, x.shape[1]).mT] * 2, 3).flatten(2)[:, :, ::2], 1
    ),
}


def rows_like(features, dtype=torch.float64, mean=0.0, count=600):
    generator = torch.Generator().manual_seed(features)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64)
    rows[:, 0] = 0.0
    rows[torch.rand(rows.shape, generator=generator) < 0.2] = 0.0
    return (rows + mean).to(dtype)


def check(found, rows, origin, error):
    x = rows.double().numpy().astype(np.longdouble)
    kept = np.isfinite(x).all(1)
    assert found.counts.tolist() == [kept.sum(), (~kept).sum()]
    x, moved = x[kept], x[kept] - origin.numpy().astype(np.longdouble)
    expected = [moved.sum(0), (moved**2).sum(0), np.abs(x).sum(0), (x != 0).sum(0)]
    sizes = [np.abs(moved).sum(0), (moved**2).sum(0), np.abs(x).sum(0), 0]
    for total, exact, size in zip(found.totals.numpy(), expected, sizes, strict=True):
        assert (np.abs(total - exact) <= error * size).all()
    np.testing.assert_array_equal(found.largest.numpy(), np.abs(x).max(0))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_in_any_layout(layout, dtype):
    for features in (1, 3, 8, 37, 130):
        rows = rows_like(features, dtype)
        origin = torch.linspace(-1, 1, features, dtype=torch.float64)
        check(measure(LAYOUTS[layout](rows), origin), rows, origin, 1e-13)
        rows[5::97, features // 2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(3)[:7].to(dtype)
        check(measure(LAYOUTS[layout](rows), origin), rows, origin, 1e-13)


@pytest.mark.usefixtures("instructions", "two_threads")
@pytest.mark.parametrize("layout", ["rows", "maps", "sequences"])
def test_on_several_threads(layout):
    rows = rows_like(64, torch.float32, count=12_000)
    rows[::1001, 3] = torch.nan
    origin = torch.zeros(64, dtype=torch.float64)
    first = measure(LAYOUTS[layout](rows), origin)
    check(first, rows, origin, 1e-12)
    for _ in range(5):  # to the last digit, whichever thread is faster
        again = measure(LAYOUTS[layout](rows), origin)
        assert torch.equal(again.totals, first.totals)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("layout", ["rows", "maps", "transposed"])
def test_rows_that_are_not_valid_are_not_looked_at(layout):
    rows = rows_like(19)
    valid = torch.arange(len(rows)) % 3 > 0
    rows[~valid] = torch.nan
    observations = LAYOUTS[layout](rows)
    masked = Observations(observations.values, observations.feature_dim, valid)
    check(measure(masked, torch.zeros(19, dtype=torch.float64)), rows[valid], torch.zeros(19), 1e-13)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("mean", "error"), [(0.0, 1e-13), (1e4, 1e-12), (1e8, 1e-9)])
@pytest.mark.parametrize("first", [0.0, None])
def test_far_from_zero(mean, error, first):
    """Also if the first row is unlike all others."""
    rows = torch.randn(4000, 12, dtype=torch.float64) + mean
    rows[:, 3] = mean + 0.1  # constant
    if first is not None:
        rows[0] = first
    sums = empty_marginals(12)
    intake = sums.intake(None)
    for number, part in enumerate(rows.split(130)):
        intake.add(sums, Observations(part), number)
    x = rows.numpy().astype(np.longdouble)
    exact = ((x - x.mean(0)) ** 2).mean(0)
    size = np.abs(x - x.mean(0)).max() ** 2
    assert np.abs(sums.variances().numpy() - exact).max() <= error * max(size / 16, 1)
    assert np.abs(sums.mean().numpy() - x.mean(0)).max() <= 1e-15 * (mean + 10)
    if first is None:
        assert sums.variances()[3] == 0


@pytest.mark.usefixtures("instructions")
def test_half_precision_neither_overflows_nor_rounds():
    for dtype, value in ((torch.float16, 300.0), (torch.bfloat16, 257.0)):
        rows = torch.full((5000, 4), value).to(dtype)
        sums = empty_marginals(4)
        sums.intake(None).add(sums, Observations(rows), 0)
        exact = rows[0, 0].double()
        assert torch.equal(sums.mean(), exact.expand(4))
        assert torch.equal(sums.variances(center=False), exact.square().expand(4))
        assert torch.equal(sums.magnitudes(), exact.expand(4))


@pytest.mark.usefixtures("instructions")
def test_a_history_of_numbers_beyond_range_says_nothing():
    history = ring.empty_history(3, 2)
    intake = history.intake(None)
    for forward, size in enumerate((1.0, 1e200, 1e308, 1e308, 2.0)):
        values = torch.tensor([[size, -size]] * 3, dtype=torch.float64)
        intake.add(history, Observations(values, forward=min(forward, 3)), 0)
    rows = history.forwards()
    assert rows[:, ring.FORWARD].tolist() == [1, 2, 3]
    assert rows[:, ring.LARGEST].tolist() == [1e200, 1e308, 1e308]
    assert rows[:, ring.COUNT].tolist() == [3, 3, 6]
    assert not rows[:, ring.SQUARES].isfinite().any()


def test_squares_that_overflow_are_told():
    sums = empty_marginals(2)
    sums.intake(None).add(
        sums, Observations(torch.tensor([[1e200, 1.0], [-1e200, 2.0]], dtype=torch.float64)), 0
    )
    assert int(sums.count) == 2
    assert not sums.in_range()


def test_the_last_pass_is_kept_for_the_same_observations_only():
    observations, others = Observations(torch.ones(3, 2)), Observations(torch.ones(3, 2))
    found = measure(observations, torch.zeros(2, dtype=torch.float64))
    assert measured_last(observations) is found
    assert measured_last(others) is None


def test_there_is_no_covariance():
    for read in ("covariance", "eigenvalues", "eigenvectors"):
        with pytest.raises(RuntimeError, match="the covariance of 3 features is not kept"):
            getattr(empty_marginals(3), read)()


@pytest.mark.skipif(compiled.instruction_set() is None, reason="nothing is compiled here")
def test_what_is_compiled_reads_no_subclass():
    class Mine(torch.Tensor):
        pass

    assert compiled.reads(torch.ones(2, 2))
    assert not compiled.reads(torch.ones(2, 2).as_subclass(Mine))
    with compiled.using(None):
        assert not compiled.reads(torch.ones(2, 2))
