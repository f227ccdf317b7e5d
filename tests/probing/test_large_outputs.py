"""Outputs with many positions: feature maps are interpolated, rows of all other outputs are drawn."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from spectralmetrics.probing.rules import ObservationRule
from spectralmetrics.probing.sampling import draw
from spectralmetrics.sums import compiled

# Layer, shape of its input, dimension of the features.
DRAWN = {
    "Linear on maps with channels last": (nn.Linear(6, 4), (3, 10, 9, 6), 3),
    "a norm of heads": (nn.LayerNorm(6), (3, 30, 5, 6), 3),
    "videos with channels last": (nn.Linear(6, 4), (2, 6, 7, 8, 6), 4),
    "series": (nn.Conv1d(6, 4, 3), (3, 6, 90), 1),
    "transposed series": (nn.ConvTranspose1d(6, 4, 3), (3, 6, 90), 1),
    "behind a convolution": (nn.Sequential(nn.Conv1d(6, 4, 3), nn.GELU()), (3, 6, 90), 1),
    "behind Linear": (nn.Sequential(nn.Linear(6, 4), nn.GELU()), (3, 10, 9, 6), 3),
}


def rows_of(output, dim):
    return output.detach().movedim(dim, -1).reshape(-1, output.shape[dim])


def noise(*shape):
    """Values whose neighbours differ, so that averaging shows."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("situation", DRAWN)
class TestDrawn:
    def observe(self, situation, forwards=1, **settings):
        layer, shape, dim = DRAWN[situation]
        model = nn.Sequential(layer)
        with LayerProbe(model, sm.CovarianceMetric(), layers="0", **settings) as probe:
            for _ in range(forwards):
                output = model(noise(*shape))
        return probe, rows_of(output, dim).double().numpy(), shape[0], output.ndim - 2

    def test_as_many_as_of_a_map_of_that_size(self, situation):
        probe, rows, samples, spatial = self.observe(situation, max_map_size=3)
        assert int(probe["train", "0"].covariance.count) == samples * 3 ** max(spatial, 2) < len(rows)

    def test_the_covariance_is_unbiased(self, situation):
        """Interpolation averages, which would leave 0.39 to 0.71 of the true variance."""
        probe, rows, _, _ = self.observe(situation, forwards=200, max_map_size=3)
        found = probe.compute()["covariance/train/0"].numpy()
        expected = np.cov(rows.T, bias=True)
        assert np.trace(found) == pytest.approx(np.trace(expected), rel=0.05)
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()

    @pytest.mark.parametrize("settings", [{}, {"max_map_size": None}, {"max_map_size": 13}])
    def test_all_of_fewer(self, situation, settings):
        probe, rows, _, _ = self.observe(situation, **settings)
        np.testing.assert_allclose(
            probe.compute()["covariance/train/0"].numpy(), np.cov(rows.T, bias=True), rtol=1e-5, atol=1e-8
        )
        assert int(probe["train", "0"].covariance.count) == len(rows)

    def test_fewer_if_rows_per_feature_says_so(self, situation):
        few, _, _, _ = self.observe(situation, max_map_size=3, rows_per_feature=2)
        width = few["train", "0"].covariance.num_features
        assert int(few["train", "0"].covariance.count) == 2 * width
        many, _, samples, spatial = self.observe(situation, max_map_size=3, rows_per_feature=50)
        assert int(many["train", "0"].covariance.count) == samples * 3 ** max(spatial, 2)

    def test_pooled_and_flattened_outputs_are_whole(self, situation):
        for how in ("mean", "max", "median"):
            probe, rows, samples, _ = self.observe(situation, max_map_size=3, feature_maps=how)
            each = torch.from_numpy(rows).reshape(samples, -1, rows.shape[1])
            pooled = {"mean": each.mean(1), "max": each.amax(1), "median": each.median(1).values}[how]
            np.testing.assert_allclose(
                probe.compute()["covariance/train/0"].numpy(),
                np.cov(pooled.numpy().T, bias=True),
                rtol=1e-4,
                atol=1e-7,
            )
        probe, rows, samples, _ = self.observe(situation, max_map_size=3, feature_maps="flatten")
        assert probe["train", "0"].covariance.num_features == rows.size // samples


def test_draws_are_one_of_each_arc_of_a_ring_that_a_seed_turns():
    cases = ((16, 8, 3), (1000, 7, 2**31), (12345, 4096, 0), (5, 4, 9), (700, 400, 2**40 + 1))
    for total, number, seed in cases:
        bounds = torch.arange(number + 1) * total // number
        chances = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        places = (chances * bounds.diff()).long() + bounds[:-1]
        expected = (places + zlib.crc32(seed.to_bytes(8, "big"))) % total
        rows = torch.arange(2 * total).view(total, 2)
        for values, dim in (
            (rows.double(), -1),
            (rows.bfloat16(), 1),
            (rows.view(1, total, 2).float(), -1),
            (rows.float().t().contiguous(), 0),
            (rows.double().repeat(1, 2)[:, :2], -1),
            (torch.complex(rows.double(), -rows.double()).conj().imag, -1),
        ):
            labels = torch.arange(total)
            for instructions in (None, compiled.instruction_set()):
                with compiled.using(instructions):
                    drawn = draw(sm.Observations(values, dim), number, seed)
                    labelled = draw(sm.Observations(values, dim, labels=labels), number, seed)
                assert torch.equal(drawn.rows(), rows[expected].to(values.dtype))
                assert torch.equal(labelled.rows(), drawn.rows())
                assert torch.equal(labelled.labels, expected)


def test_of_long_sequences_every_step_is_observed():
    rule = ObservationRule(max_map_size=4)
    for values in (noise(2, 30, 20), noise(60, 20)):
        batch = rule.batch(nn.Linear(20, 20), values)
        assert batch.limit(rule) is None
    assert rule.batch(nn.Conv1d(20, 20, 1), noise(2, 20, 30)).limit(rule) == 2 * 4**2
