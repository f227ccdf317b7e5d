"""A user's own statistic needs one function and one short class; everything else works with it."""

import pytest
import torch
from torchmetrics import MetricCollection

from spectralmetrics import LayerProbe, SaturationMetric, SpectralMetric, statistics
from tests.metrics import properties


# -- all that a user writes ------------------------------------------------------------------------------
def spectral_gap(eigenvalues):
    """The relative gap between the first two eigenvalues."""
    if eigenvalues.shape[-1] < 2:
        return eigenvalues.new_zeros(())
    first, second = eigenvalues[0], eigenvalues[1]
    return torch.where(first > 0, (first - second) / first, 0.0)


class SpectralGapMetric(SpectralMetric):
    """Lead of the first direction over the second."""

    short_name = "spectral_gap"
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def statistic(self, spectrum):
        return spectral_gap(spectrum.eigenvalues)


# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", properties.ON_DATA, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("seed", "rank", "shift"), [(0, None, 0.0), (1, 3, 5.0), (2, 1, -100.0)])
def test_passes_the_shared_property_tests(check, seed, rank, shift):
    check(SpectralGapMetric, seed, 30, 8, rank, shift)


@pytest.mark.parametrize("check", properties.ON_METRIC, ids=lambda check: check.__name__)
def test_passes_the_shared_metric_tests(check):
    check(SpectralGapMetric)


def test_is_listed():
    assert statistics()["spectral_gap"] is SpectralGapMetric


def test_in_a_collection():
    collection = MetricCollection([SpectralGapMetric(), SaturationMetric()])
    collection.update(torch.randn(50, 6))
    assert collection.compute_groups == {0: ["SpectralGapMetric", "SaturationMetric"]}
    assert 0 < collection.compute()["SpectralGapMetric"] < 1


def test_in_a_probe():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    probe = LayerProbe(model, [SpectralGapMetric(), SaturationMetric()])
    model(torch.randn(20, 4))
    assert set(probe.compute()) == {
        f"{name}/train/{layer}" for name in ("spectral_gap", "saturation") for layer in "01"
    }


def test_a_short_name_cannot_be_taken():
    with pytest.raises(ValueError, match="'saturation', which names SaturationMetric"):
        type("Thief", (SpectralMetric,), {"short_name": "saturation"})


class CountMetric(SpectralMetric):
    short_name = "count_as_a_number"

    def statistic(self, spectrum):
        return self.kind(int(spectrum.num_observations))


@pytest.mark.parametrize(("kind", "dtype"), [(float, torch.float64), (int, torch.int64)])
def test_it_may_return_a_number(kind, dtype):
    metric = CountMetric()
    metric.kind = kind
    metric.update(torch.ones(1, 1).expand(2**24 + 1, 1))  # float32 has no such number
    assert metric.compute() == 2**24 + 1
    assert metric.compute().dtype == dtype
