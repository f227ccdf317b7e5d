"""Situations in which tools of this kind were reported to fail; docs/reported_situations.md lists them all."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import spectralmetrics as sm

pytestmark = pytest.mark.filterwarnings("ignore:in (train|eval) there are fewer observations")


def stable_rank(weight):
    values = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return float(values.square().sum() / values[0] ** 2)


def count(probe, layer="0", stage="train"):
    return int(probe[stage, layer]["saturation"].count)


def test_reading_changes_no_weight_that_is_made_when_it_is_read():
    # Each look at the weight of a spectral norm in training mode is one more power iteration.
    model = nn.Sequential(nn.Linear(6, 8), parametrizations.spectral_norm(nn.Linear(8, 8)))
    nn.init.constant_(model[1].bias, 1e4)  # so that its small spread makes findings ask for its weights
    probe = sm.LayerProbe(model)
    model(torch.randn(400, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [each.kind for each in probe.findings("train") if each.layer == "1"] == ["collapsed"]
    probe.summary("train")
    sm.weight_spectra(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
