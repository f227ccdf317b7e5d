"""Settings that may be changed on a probe take effect and are checked; others refuse."""

import inspect

import pytest
import torch
from torch import nn

from spectralmetrics import LayerProbe

SETTABLE = {
    "every_n_steps": 0,
    "budget": 2.0,
    "max_samples": -3,
    "rows_per_feature": 0,
    "max_features": 0,
    "sketch_size": 0,
    "seed": -1,
}
ARGUMENTS = [name for name in inspect.signature(LayerProbe).parameters if name not in ("model", "metrics")]


def made(**arguments):
    return LayerProbe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), **arguments)


def run(model, forwards=100, rows=10):
    for _ in range(forwards):
        model(torch.randn(rows, 4))


def count(probe, layer="0"):
    return int(probe["train", layer]["saturation"].count)


@pytest.mark.parametrize("name", SETTABLE)
def test_what_the_constructor_refuses_is_refused_later(name):
    probe = made()
    before = getattr(probe, name)
    with pytest.raises((TypeError, ValueError), match=name) as later:
        setattr(probe, name, SETTABLE[name])
    with pytest.raises((TypeError, ValueError)) as first:
        made(**{name: SETTABLE[name]})
    assert str(later.value) == str(first.value)
    assert getattr(probe, name) == before


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in SETTABLE])
def test_the_rest_cannot_change(name):
    probe = made()
    with pytest.raises(AttributeError, match=f"'{name}' is chosen when a LayerProbe is made"):
        setattr(probe, name, None)
    assert (
        name in ("select", "exclude", "folds", "batch_first")
        or not hasattr(probe, name)
        or getattr(probe, name)
    )


@pytest.mark.parametrize("is_compiled", [False, True])
def test_every_n_steps(is_compiled):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    probe = LayerProbe(model)
    forward = torch.compile(model, backend="eager", fullgraph=True) if is_compiled else model
    run(forward)
    probe.every_n_steps = 10
    assert probe.every_n_steps == 10
    assert count(probe) == 1000
    run(forward)
    assert (count(probe), count(probe, "1")) == (1100, 1100)
    probe.every_n_steps = 1
    run(forward)
    assert count(probe) == 2100
    probe.remove()
    probe.every_n_steps = 5  # does not hook again
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_the_draws_are_those_of_a_probe_that_was_made_so():
    seen = []
    for later in (False, True):
        model = nn.Linear(4, 4)
        probe = LayerProbe(model) if later else LayerProbe(model, every_n_steps=4, seed=7)
        if later:
            probe.every_n_steps, probe.seed = 4, 7
        counts = []
        for _ in range(40):
            model(torch.randn(1, 4))
            counts.append(count(probe, "Linear"))
        seen.append(counts)
    assert seen[0] == seen[1]


def test_budget():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    probe = LayerProbe(model)
    probe.budget = 0.01
    assert probe.budget == 0.01
    run(model, 300)
    assert count(probe) < 3000
    probe.reset()
    probe.budget = None
    run(model)
    assert count(probe) == 1000


def test_max_samples():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    probe = LayerProbe(model)
    run(model)
    probe.reset()
    probe.max_samples = 30
    run(model)
    assert count(probe) == 30
