"""What is observed of outputs with many positions: feature maps are interpolated, all else is drawn from."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from spectralmetrics.probing.sampling import draw

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
    """Values of which neighbours differ, so that what averages them is seen."""
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
        """Interpolated it would be that of averages: 0.39 to 0.71 of the truth where this was found."""
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
    for total, number, seed in ((16, 8, 3), (1000, 7, 2**31), (12345, 4096, 0), (5, 4, 9)):
        rows = torch.arange(total, dtype=torch.float64)[:, None]
        bounds = torch.arange(number + 1) * total // number
        chances = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        places = (chances * bounds.diff()).long() + bounds[:-1]
        expected = (places + zlib.crc32(seed.to_bytes(8, "big"))) % total
        assert draw(sm.Observations(rows), number, seed).values[:, 0].tolist() == expected.tolist()


def test_draws_leave_the_random_state_alone_and_come_from_the_seed():
    values = []
    for seed in (0, 0, 1):
        model = nn.Linear(6, 6, bias=False)
        nn.init.eye_(model.weight)
        probe = LayerProbe(model, sm.CovarianceMetric(), max_map_size=3, seed=seed)
        before = torch.get_rng_state()
        model(noise(3, 10, 9, 6) + 1)
        assert torch.equal(torch.get_rng_state(), before)
        values += list(probe.compute().values())
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    assert not torch.allclose(values[0], values[2], rtol=1e-3)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 4, 1), nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU()), nn.BatchNorm2d(6)]
)
def test_feature_maps_are_interpolated(layer):
    model = nn.Sequential(layer)
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="0", max_map_size=5)
    output = model(noise(3, 6, 9, 11)).detach()
    small = nn.functional.interpolate(output, (5, 5), mode="bilinear")
    expected = np.cov(rows_of(small, 1).double().numpy().T, bias=True)
    np.testing.assert_allclose(probe.compute()["covariance/train/0"].numpy(), expected, rtol=1e-5, atol=1e-8)


def test_maps_of_more_than_three_spatial_dimensions_are_drawn_from():
    class Blocks(nn.Module):
        def forward(self, x):
            return x

    sm.register_layer(Blocks, dim=1)
    model = Blocks()
    probe = LayerProbe(model, layers="Blocks", max_map_size=2)
    model(noise(2, 4, 3, 3, 3, 3))
    assert int(probe["train", "Blocks"].saturation.count) == 2 * 2**4


def test_labels_are_those_of_whole_outputs():
    model = nn.Conv1d(6, 4, 3)
    probe = LayerProbe(model, [sm.SaturationMetric(), sm.LinearProbeMetric(2)], max_map_size=3)
    series, labels = noise(20, 6, 90), torch.arange(20) % 2
    with probe.labels(labels):
        output = model(series).detach()
    metric = sm.LinearProbeMetric(2)
    metric.update(output.mean(2), labels)
    assert float(probe.compute()["linear_probe/train/Conv1d"]) == pytest.approx(
        float(metric.compute()), rel=1e-4
    )
