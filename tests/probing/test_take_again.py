"""Outputs like the previous one of their layer take a shorter path, with the same result."""

import copy

import pytest
import torch
from torch import nn

from spectralmetrics import (
    CovarianceMetric,
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    HistoryMetric,
    LayerProbe,
    LinearProbeMetric,
    SaturationMetric,
)
from spectralmetrics.probing.routing import Router
from spectralmetrics.sums.intake import DenseIntake
from spectralmetrics.sums.reservoir import SampleIntake


class Network(nn.Module):
    """Rows, maps, sequences, and a layer that is also called directly."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, images):
        maps = self.conv(images)
        steps = self.linear(maps.flatten(2).mT)  # (N, T, 5)
        return self.last(steps.mean(1))


def images(number=4, size=6, seed=0):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def train(model, probe):
    """Forwards of all kinds; most resemble the one before."""
    for seed in range(6):
        model(images(seed=seed))
    for seed in range(3):  # another shape, and back, and no sample at all
        model(images(number=2, size=5 + seed % 2, seed=seed))
    model(images(number=0))
    broken = images()
    broken[1] = torch.nan
    model(broken)
    model.last(
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    )  # with another number of dimensions
    model.eval()
    model(images())
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
        model(images())
    with torch.inference_mode():
        model(images())
    with probe.paused():
        model(images())
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    model.linear(nested)
    model.linear(torch.ones(4, 16, 6))
    torch.func.vmap(model.linear)(torch.ones(2, 4, 16, 6))
    with probe.mask(torch.arange(16).expand(4, 16) < 9):
        model(images())
    model(images())
    copy.deepcopy(model)(images())
    probe.max_samples = 60
    model(images())
    probe.max_samples = None
    probe.rows_per_feature = 0.5
    for seed in range(3):
        model(images(seed=seed))
    probe.every_n_steps = 3
    for seed in range(4):
        model(images(seed=seed))
        model.linear(torch.full((4, 16, 6), float(seed)))  # called directly
    probe.every_n_steps = 1
    probe.reset("eval")
    model.eval()
    for seed in range(3):
        model(images(seed=seed))
    probe.max_features = 5
    model(images())


KINDS = {
    "one": ({}, True),
    "two": ({"metrics": [SaturationMetric(), EffectiveRankMetric()]}, True),
    "sampled": ({"rows_per_feature": 2}, True),
    "drawn positions": ({"max_map_size": 2}, True),
    "pooled": ({"feature_maps": "mean", "sequences": "last"}, True),
    "folds": ({"folds": 2}, False),
    "history": ({"metrics": [HistoryMetric(steps=9), SaturationMetric()]}, False),
    "labels": ({"metrics": [LinearProbeMetric(num_classes=2), SaturationMetric()]}, False),
    "inputs": ({"observe": "inputs"}, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_short_way_is_the_long_one(kind, monkeypatch):
    arguments, is_short = KINDS[kind]
    taken = []
    take_again = Router.take_again
    monkeypatch.setattr(Router, "take_again", lambda *each: taken.append(take_again(*each)) or taken[-1])
    states = []
    for way in ("short", "long"):
        torch.manual_seed(0)
        model = Network()
        probe = LayerProbe(model, **copy.deepcopy(arguments))
        probe.persistent()
        if way == "long":
            monkeypatch.setattr(Router, "take_again", lambda *each: False)
        train(model, probe)
        counted = ("forwards", "ran", "samples", "given_up")
        counts = [getattr(place, name) for place in probe._places.values() for name in counted]
        states.append((probe.state_dict(), counts))
    (short, counts), (long, expected) = states
    assert counts == expected
    assert short.keys() == long.keys()
    for name, value in short.items():
        torch.testing.assert_close(value, long[name], rtol=0, atol=0, equal_nan=True)
    assert any(taken) == is_short


def test_only_sums_that_keep_no_rows_get_them_with_their_graph(monkeypatch):
    # Detaching takes as long as copying a small batch, so only rows that are kept are detached.
    given = {}
    for kind in (DenseIntake, SampleIntake):

        def add(self, sums, observations, batch, kind=kind, own=kind.add):
            given.setdefault(kind, []).append(observations.values.requires_grad)
            own(self, sums, observations, batch)

        monkeypatch.setattr(kind, "add", add)
    for metric in (CovarianceMetric(), EigenspaceEmbeddingMetric()):
        layer = nn.Linear(3, 2)
        probe = LayerProbe(layer, metric)
        for _ in range(3):
            layer(torch.randn(4, 3))
        assert int(next(iter(probe["train", "Linear"].values())).count) == 12
    assert given[SampleIntake] == 3 * [False]
    assert given[DenseIntake][-3:] == 3 * [False]  # with a sample beside the sums
    assert given[DenseIntake][1:3] == 2 * [True]
