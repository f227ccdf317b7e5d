"""Folds as a sum: dealing, merging, moving, saving and restoring."""

import numpy as np
import pytest
import torch

from spectralmetrics.functional import held_out_eigenvalues
from spectralmetrics.sums import Observations, empty_folds
from spectralmetrics.sums.folds import Folds
from tests.oracles import random_rows, relative_error, two_pass_covariance

pytestmark = pytest.mark.usefixtures("instructions")


def dealt(rows, number, batch, gram_dtype=torch.float64):
    folds = empty_folds(number, rows.shape[1])
    intake = folds.intake(gram_dtype)
    for turn, part in enumerate(rows.split(batch)):
        intake.add(folds, Observations(part), turn)
    intake.flush(folds)
    return folds


@pytest.mark.parametrize("ratio", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("batch", [5, 400])
def test_each_fold_and_the_total_are_right_far_from_zero(ratio, batch):
    rows = random_rows(0, 9 * batch, 8, mean=ratio, decay=0.5)
    folds = dealt(rows, 4, batch)
    bound = 1e-9 if ratio else 1e-12
    assert relative_error(folds.covariance(), two_pass_covariance(rows)) < bound
    np.testing.assert_allclose(folds.mean(), rows.mean(0), rtol=1e-12, atol=1e-12)
    for turn, fold in enumerate(folds.folds):
        own = torch.cat(rows.split(batch)[turn::4])
        assert relative_error(fold.covariance(), two_pass_covariance(own)) < bound
        assert int(fold.count) == len(own)


def test_the_held_out_spectrum_far_from_zero():
    rows = random_rows(0, 4000, 8, decay=0.5)
    near, far = (held_out_eigenvalues(dealt(rows + shift, 4, 125).folds) for shift in (0.0, 1e6))
    torch.testing.assert_close(far, near, rtol=1e-8, atol=0)


def test_folds_that_began_far_apart_merge():
    parts = [random_rows(k, 300, 6, mean=1e5 * k) for k in range(2)]
    sides = [dealt(part, 3, 50) for part in parts]
    before = [tensor.clone() for side in sides for tensor in side.tensors().values()]
    for left, right in (sides, sides[::-1]):
        merged = left.merged(right)
        assert merged.counts.tolist() == [200, 200, 200]
        assert relative_error(merged.covariance(), two_pass_covariance(torch.cat(parts))) < 1e-12
        for turn, fold in enumerate(merged.folds):
            own = torch.cat([torch.cat(part.split(50)[turn::3]) for part in parts])
            assert relative_error(fold.covariance(), two_pass_covariance(own)) < 1e-12
    after = [tensor for side in sides for tensor in side.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_merges_with_something():
    folds = dealt(random_rows(0, 60, 5), 3, 10)
    nothing = empty_folds(3, 5)
    for merged in (folds.merged(nothing), nothing.merged(folds)):
        for name, tensor in merged.tensors().items():
            assert torch.equal(tensor, folds.tensors()[name])


def test_other_numbers_of_folds_are_refused():
    with pytest.raises(ValueError, match="folds=3 to merge, got folds=2"):
        empty_folds(3, 4).merged(empty_folds(2, 4))


def test_views_are_those_of_the_tensors_that_are_there():
    folds = dealt(random_rows(0, 60, 5), 3, 10)
    assert folds.folds[1].second.data_ptr() == folds.seconds[1].data_ptr()
    moved = folds.map(lambda tensor: tensor + 1)
    assert moved.folds[1].second.data_ptr() == moved.seconds[1].data_ptr()
    assert torch.equal(moved.folds[1].second, folds.folds[1].second + 1)


@pytest.mark.parametrize("filled", [2, 4])
def test_saved_and_restored(filled):
    """Restored sums equal those saved, and an empty fold stays empty."""
    rows = random_rows(0, 40 * filled, 6, mean=3.0)
    rows[3, 2] = torch.nan
    folds = dealt(rows, 4, 40)
    saved = dict(folds.saved())
    assert all(tensor.isfinite().all() for tensor in saved.values())
    restored = Folds.restored(lambda name: saved[name].clone())
    assert restored.counts.tolist() == folds.counts.tolist() == [39, 40, 40, 40][:filled] + [0] * (4 - filled)
    assert restored.non_finites.tolist() == [1, 0, 0, 0]
    assert torch.equal(restored.covariance(), folds.covariance())
    assert restored.number == 4
    if filled == 4:
        expected = held_out_eigenvalues(folds.folds)
        torch.testing.assert_close(held_out_eigenvalues(restored.folds), expected, rtol=1e-11, atol=0)
    later = restored.merged(dealt(rows[:20], 4, 5))
    assert sum(later.counts.tolist()) == len(rows) - 1 + 19
