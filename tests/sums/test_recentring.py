"""The origin lies near the rows, whether compiled code or PyTorch finds it, or no value can be read."""

import pytest
import torch

from spectralmetrics.sums import Observations, about_origin, accumulate, covariance, empty_moments
from tests.oracles import relative_error, two_pass_covariance
from tests.sums.test_compiled import assert_sums

pytestmark = pytest.mark.usefixtures("instructions")

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
GRAM_DTYPES = [torch.float64, torch.float32]


@pytest.fixture(params=[True, False], ids=["reads", "reads nothing"], autouse=True)
def reads(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(about_origin, "is_read_freely", lambda values: False)


def drifting(dtype, features=20):
    """Batches whose mean moves, with a feature that is constant within each batch, and rows to leave out."""
    generator = torch.Generator().manual_seed(0)
    for batch in range(4):
        rows = 3 + 10 * batch + torch.randn(300, features, generator=generator, dtype=torch.float64)
        rows[:, 3] = 0.1 * (batch + 1)
        rows = rows.to(dtype)
        rows[0] = torch.nan
        rows[7, 5] = -torch.inf
        yield rows


@pytest.mark.parametrize("gram_dtype", GRAM_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "maps", "features first", "masked"])
def test_it_follows_and_the_sums_with_it(layout, dtype, gram_dtype):
    moments, seen = empty_moments(20), []
    for rows in drifting(dtype):
        observations, valid = Observations(rows), torch.arange(len(rows)) % 3 > 0
        if layout == "maps":
            observations = Observations(rows.unflatten(0, (3, 10, 10)).movedim(-1, 1).contiguous(), 1)
        elif layout == "features first":
            observations = Observations(rows.t().contiguous(), 0)
        elif layout == "masked":
            observations, rows = Observations(rows, valid=valid), rows[valid]
        accumulate(moments, observations, gram_dtype)
        seen.append(rows)
        finite = rows[rows.isfinite().all(1)].double()
        near = 1e-6 if dtype == torch.float64 and gram_dtype == torch.float64 else 1e-5
        torch.testing.assert_close(moments.origin, finite.mean(0), rtol=near, atol=0)
        assert moments.origin[3] == finite[0, 3]
        if dtype != torch.float64:
            assert torch.equal(moments.origin, moments.origin.float().double())
    assert_sums(moments, torch.cat(seen), gram_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_few_rows_move_it_nor_rows_that_do_not_count(dtype):
    moments = empty_moments(5)
    accumulate(moments, Observations(torch.randn(400, 5).to(dtype)))
    before = moments.origin.clone()
    accumulate(moments, Observations(torch.full((19, 5), 1e4, dtype=dtype)))
    accumulate(moments, Observations(torch.full((1000, 5), torch.nan, dtype=dtype)))
    of_none = Observations(torch.full((1000, 5), 1e4, dtype=dtype), valid=torch.zeros(1000, dtype=torch.bool))
    accumulate(moments, of_none)
    assert torch.equal(moments.origin, before)
    assert (int(moments.count), int(moments.non_finite)) == (419, 1000)


def test_rows_too_far_apart_to_be_subtracted_are_told_by_the_sums():
    moments = empty_moments(2)
    largest = torch.finfo(torch.float64).max
    accumulate(moments, Observations(torch.tensor([[-largest, 1.0], [largest, 2.0]], dtype=torch.float64)))
    assert (int(moments.count), int(moments.non_finite)) == (2, 0)
    assert moments.origin.isfinite().all()
    assert not moments.second.triu().isfinite().all()


def test_maps_in_no_order():
    maps = torch.randn(6, 4, 5, 7).permute(2, 1, 3, 0)  # (5, 4, 7, 6), without neighbours along the positions
    moments, seen = empty_moments(4), []
    for step in range(3):
        accumulate(moments, Observations(maps + 5 * step, 1))
        seen.append((maps + 5 * step).movedim(1, -1).reshape(-1, 4))
    assert relative_error(covariance(moments), two_pass_covariance(torch.cat(seen))) < 1e-14
