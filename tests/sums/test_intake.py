"""When the origin follows the data, and when it is rounded so that float32 rows lose nothing."""

import pytest
import torch

from spectralmetrics.sums import Observations, accumulate, covariance, empty_moments, mean

pytestmark = pytest.mark.usefixtures("instructions")
F32, F64 = torch.float32, torch.float64


def origins(dtypes, gram_dtype):
    """Origin after each batch. Every batch is too large to wait, and has its own mean."""
    sums = empty_moments(2)
    intake = sums.intake(gram_dtype)
    found = []
    for batch, dtype in enumerate(dtypes):
        rows = torch.randn(300, 2, dtype=F64) + (batch + 1) / 3
        intake.add(sums, Observations(rows.to(dtype)), batch)
        found.append(sums.origin.clone())
    return found


def moves(found):
    """Numbers of the batches, from 1, at which the origin moved."""
    before = [torch.zeros(2, dtype=F64), *found[:-1]]
    return [k for k, (old, new) in enumerate(zip(before, found, strict=True), 1) if not torch.equal(old, new)]


def are_float32(found):
    return [torch.equal(origin.to(F32).to(F64), origin) for origin in found]


@pytest.mark.parametrize("gram_dtype", [F32, F64])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_origin_follows_ever_more_seldom(dtype, gram_dtype):
    assert moves(origins([dtype] * 35, gram_dtype)) == [1, 2, 3, 4, 8, 16, 32]


def test_float32_rows_set_an_origin_that_is_a_float32():
    assert all(are_float32(origins([F32] * 9, F32)))


def test_float64_rows_set_an_origin_with_all_its_digits():
    assert not any(are_float32(origins([F64] * 9, F32)))


def test_float32_rows_after_float64_rows_set_it_anew():
    dtypes = [F32] * 5 + [F64] * 3 + [F32] * 2 + [F64] * 2
    found = origins(dtypes, F32)
    # The eighth batch is float64 and moves the origin, so the float32 rows after it need another origin.
    assert moves(found) == [1, 2, 3, 4, 8, 9, 10]
    assert are_float32(found) == [True] * 7 + [False] + [True] * 4


@pytest.mark.parametrize("step", [-1, 1])
def test_an_origin_that_is_no_float32_is_told_on_either_side_of_one(step):
    origin = torch.tensor([1.0, 1.0 + step * 2.0**-26], dtype=F64)  # one feature of two
    sums = empty_moments(2)
    intake = sums.intake(F32)
    rows = origin + 2.0**-20 * torch.tensor([[1.0], [-1.0]], dtype=F64).repeat(150, 2)
    for batch in range(4):
        intake.add(sums, Observations(rows), batch)
    assert torch.equal(sums.origin, origin)
    intake.add(sums, Observations(rows.to(F32)), 4)
    assert are_float32([sums.origin]) == [True]


def test_float64_products_take_any_origin():
    assert moves(origins([F64] * 5 + [F32] * 5, F64)) == [1, 2, 3, 4, 8]


def test_a_row_far_away_does_not_draw_the_origin_to_it():
    sums = empty_moments(2)
    intake = sums.intake(F64)
    for batch, rows in enumerate([torch.randn(1000, 2), *torch.full((3, 257, 2), 1e8)[:, :1].unbind()]):
        intake.add(sums, Observations(rows.to(F64), valid=torch.ones(len(rows), dtype=torch.bool)), batch)
        assert sums.origin.abs().max() < 1
    many = torch.full((300, 2), 1e8, dtype=F64)  # more than the square root of all rows before
    intake.add(sums, Observations(many), 4)
    assert sums.origin.abs().max() < 1  # the origin does not move at the fifth batch
    for batch in range(5, 8):
        intake.add(sums, Observations(many), batch)
    assert sums.origin.min() > 1e7


@pytest.mark.parametrize(
    ("width", "count", "waits"), [(4, 256, True), (4, 257, False), (400, 400, True), (400, 401, False)]
)
def test_a_batch_waits_if_it_is_small_or_no_larger_than_the_width(width, count, waits):
    sums = empty_moments(width)
    intake = sums.intake(F64)
    intake.add(sums, Observations(torch.randn(2, width)), 0)
    intake.add(sums, Observations(torch.randn(count, width)), 1)
    assert (int(sums.count) == 2) == waits
    intake.flush(sums)
    assert int(sums.count) == 2 + count


def test_rows_wait_whatever_their_memory_is_like():
    rows = torch.randn(6, 4)
    layouts = [
        (rows, -1),
        (rows.view(2, 3, 4), -1),
        (rows.view(2, 3, 4), 2),
        (rows.t().contiguous(), 0),
        (rows.repeat(1, 2)[:, :4], -1),
        (torch.complex(rows, -rows).conj().imag, -1),
        (rows.double(), -1),
        (rows.bfloat16(), -1),
        (torch._efficientzerotensor((6, 4)), -1),
    ]
    for values, dim in layouts:
        sums, alone = empty_moments(4), empty_moments(4)
        intake = sums.intake(F64)
        first = Observations(torch.ones(1, 4, dtype=torch.promote_types(values.dtype, torch.float32)))
        intake.add(sums, first, 0)
        for batch in range(1, 4):
            intake.add(sums, Observations(values, dim), batch)
        assert intake.waiting == 18
        intake.flush(sums)
        for each in (first, *[Observations(values, dim)] * 3):
            accumulate(alone, each)
        torch.testing.assert_close(covariance(sums), covariance(alone), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mean(sums), mean(alone), rtol=1e-12, atol=1e-14)
