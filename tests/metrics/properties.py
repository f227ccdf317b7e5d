"""Properties that every statistic must have, including one defined in a test."""

import copy
import pickle

import pytest
import torch

from spectralmetrics import Observations, SpectralMetric, Spectrum
from spectralmetrics.functional import accumulate, empty_moments
from spectralmetrics.sums import empty_marginals
from tests.oracles import random_rows, rotation

# Statistics that depend on the axes or on a sample; all others depend on eigenvalues only.
ALONG_AXES = {"max_abs", "zero_share", "dead_features", "dormant_features", "outlier_features"}
AXES_MATTER = {"covariance", "embedding", *ALONG_AXES}
SAMPLED = {"embedding"}
# Values for features that are all 0.1, where they are not zero.
CONSTANT = {"rms": 0.1, "max_abs": 0.1, "dead_features": 1.0, "outlier_features": 1.0}
CONSTANT["signal_to_noise"] = float("inf")
# Statistics that depend on more than deviations from the mean.
ABOUT_ZERO = {"rms", "spread", "max_abs", "zero_share", "dormant_features", "outlier_features"}
ABOUT_ZERO.add("signal_to_noise")


def feed(metric: SpectralMetric, rows: torch.Tensor, batch: int = 10**6) -> SpectralMetric:
    for part in rows.split(batch):
        metric.update(part)
    return metric


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-8) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item() if expected.numel() and expected.isfinite().all() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-300), equal_nan=True
    )


def read_directly(metric: SpectralMetric, rows: torch.Tensor) -> torch.Tensor:
    """The statistic in one pass over all rows, without a state."""
    moments = empty_moments(rows.shape[1])
    accumulate(moments, Observations(rows.double()))
    marginals = empty_marginals(rows.shape[1])
    marginals.intake(None).add(marginals, Observations(rows.double()), 0)
    return metric.statistic(Spectrum(moments, center=metric.center, others=[marginals]))


def check_split_into_batches(new, seed, count, features, rank, shift):
    rows = random_rows(seed, count, features, rank=rank, mean=shift)
    if new().short_name in SAMPLED:
        return
    expected = read_directly(new(), rows)
    for batch in (1, 7, count):
        assert_same(feed(new(), rows, batch).compute(), expected)


def check_order_of_rows(new, seed, count, features, rank, shift):
    rows = random_rows(seed, count, features, rank=rank, mean=shift)
    shuffled = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    if new().short_name not in SAMPLED:
        assert_same(feed(new(), shuffled, 9).compute(), feed(new(), rows, 9).compute())


def check_translation(new, seed, count, features, rank, shift):
    rows = random_rows(seed, count, features, rank=rank)
    if new().center and new().short_name not in SAMPLED | ABOUT_ZERO:
        assert_same(feed(new(), rows + shift, 9).compute(), feed(new(), rows, 9).compute(), 1e-7)


def check_rotation(new, seed, count, features, rank, shift):
    rows = random_rows(seed, count, features, rank=rank, mean=shift)
    if new().short_name not in AXES_MATTER | SAMPLED:
        turned = feed(new(), rows @ rotation(seed + 1, features), 9).compute()
        assert_same(turned, feed(new(), rows, 9).compute(), 1e-6)


def check_merge(new, seed, count, features, rank, shift):
    rows = random_rows(seed, count, features, rank=rank, mean=shift)
    if new().short_name in SAMPLED:
        return
    expected = read_directly(new(), rows)
    cut = max(count // 3, 1)
    for order in ((0, 1), (1, 0)):
        parts = [feed(new(), part, 5) if len(part) else new() for part in (rows[:cut], rows[cut:])]
        parts[order[0]].merge_state(parts[order[1]])
        assert_same(parts[order[0]].compute(), expected)


def check_repeated_data(new, seed, count, features, rank, shift):
    """Statistics of the population do not change when all rows come twice."""
    rows = random_rows(seed, count, features, rank=rank, mean=shift)
    if new().short_name not in SAMPLED:
        once, twice = feed(new(), rows), feed(feed(new(), rows), rows)
        assert_same(twice.compute(), once.compute())


def check_life_cycle(new):
    rows = random_rows(1, 60, 5, mean=3.0)
    metric = feed(new(), rows, 20)
    value = metric.compute()
    assert value.dtype == (torch.int64 if not value.is_floating_point() else torch.float64)
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert_same(twin.compute(), value)
        twin.update(rows[:20])
        assert int(twin.count) == 80
        assert int(metric.count) == 60
    assert new().state_dict() == {}
    metric.persistent(True)
    saved = metric.state_dict()
    fresh = new()
    fresh.load_state_dict(saved)
    assert_same(fresh.compute(), value)
    fresh.update(rows)
    assert_same(metric.compute(), value)  # the checkpoint's tensors are not updated in place
    assert all(torch.equal(saved[name], tensor) for name, tensor in metric.sums[0].tensors().items())
    metric.reset()
    metric.update(rows[:20, :4])  # the width read from rows is forgotten
    assert metric.num_features == 4


def check_constant_features(new):
    value = feed(new(), torch.full((20, 6), 0.1), 7).compute()
    if value.ndim == 0 and not value.isnan() and new().short_name in CONSTANT:
        assert value == pytest.approx(CONSTANT[new().short_name], rel=1e-7)
    elif value.ndim == 0 and not value.isnan():
        assert value == 0


ON_DATA = [
    check_split_into_batches,
    check_order_of_rows,
    check_translation,
    check_rotation,
    check_merge,
    check_repeated_data,
]
ON_METRIC = [check_life_cycle, check_constant_features]
