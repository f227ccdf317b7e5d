"""Folds with the same inputs cause a warning; others do not, however alike their rows."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.sums.repeats import Repeats
from tests.metrics.properties import feed

TOLD = "the same inputs came in several folds"


def draws(seed):
    return torch.Generator().manual_seed(seed)


INPUTS = {
    "gaussian": lambda g: torch.randn(400, 32, generator=g),
    "one feature": lambda g: torch.randn(2000, 1, generator=g),
    "maps": lambda g: torch.randn(300, 8, 6, 6, generator=g),
    "sequences": lambda g: torch.randn(300, 12, 20, generator=g),
    "volumes": lambda g: torch.randn(300, 3, 4, 4, 4, generator=g),
    "channels last": lambda g: torch.randn(300, 8, 6, 6, generator=g).to(memory_format=torch.channels_last),
    "half precision": lambda g: torch.randn(400, 32, generator=g).to(torch.bfloat16),
    "double precision": lambda g: torch.randn(400, 32, generator=g, dtype=torch.float64),
    "fewer than a buffer": lambda g: torch.randn(70, 32, generator=g),
}
# Data in which many rows are equal by nature.
ALIKE = {
    "classes": lambda g: torch.eye(20)[torch.randint(20, (800,), generator=g)],
    "binary": lambda g: (torch.rand(600, 8, generator=g) > 0.5).float(),
    "dead features": lambda g: torch.randn(400, 32, generator=g) * (torch.rand(400, 1, generator=g) > 0.3),
    "constant": lambda g: torch.ones(400, 5),
}


def told(inputs, *, passes, batch=23, folds=8, shuffled=False):
    repeats, turn = Repeats(folds), itertools.count()
    for number in range(passes):
        order = torch.randperm(len(inputs), generator=draws(number)) if shuffled else torch.arange(len(inputs))
        for part in inputs[order].split(batch):
            repeats.add(part, next(turn) % folds)
    return repeats.found()


@pytest.mark.parametrize("batch", [1, 23, 300])
@pytest.mark.parametrize("kind", [*INPUTS, *ALIKE])
def test_inputs_that_come_once_are_left_in_peace(kind, batch):
    make = (INPUTS | ALIKE)[kind]
    assert not any(told(make(draws(seed)), passes=1, batch=batch) for seed in range(10))


@pytest.mark.parametrize(("shuffled", "batch"), [(True, 23), (False, 23), (True, 1)])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_come_again_are_told(kind, shuffled, batch):
    found = [told(INPUTS[kind](draws(seed)), passes=2, batch=batch, shuffled=shuffled) for seed in range(10)]
    assert sum(found) >= 9


def test_a_pass_whose_batches_go_to_the_same_folds_again_is_harmless():
    assert not told(torch.randn(400, 32, generator=draws(0)), passes=3, batch=50)


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_inputs_that_come_again_at_once_are_told(distance):
    repeats = Repeats(8)
    for number, each in enumerate(torch.randn(400, 32, generator=draws(0)).split(distance)):
        for turn, row in enumerate([*each, *each]):
            repeats.add(row[None], (2 * distance * number + turn) % 7)
    assert repeats.found()


def test_other_digits_of_the_last_place_are_the_same_input():
    inputs = torch.randn(300, 32, generator=draws(0))
    repeats = Repeats(2)
    repeats.add(inputs, 0)
    repeats.add(inputs * (1 + 1e-7), 1)
    assert repeats.found()


def once(**options):
    rows = torch.randn(240, 12, generator=draws(0))
    return rows, feed(sm.EffectiveRankMetric(folds=8, **options), rows, 11)


def test_a_metric_says_so_with_its_interval():
    rows, metric = once()
    metric.interval()
    feed(metric, rows, 11)
    with pytest.warns(UserWarning, match=f"EffectiveRankMetric: {TOLD}"):
        metric.interval()
    metric.compute()  # the value itself is correct
    metric.reset()
    feed(metric, rows, 11)
    metric.interval()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda metric: metric], ids=["copied", "itself"])
def test_merged_metrics_that_saw_the_same(copied):
    rows, metric = once()
    other = sm.EffectiveRankMetric(folds=8)
    for part in rows[torch.randperm(240, generator=draws(1))].split(10):
        other.update(part)
    other.interval()
    metric = copied(metric)
    metric.merge_state(other)
    with pytest.warns(UserWarning, match=TOLD):
        metric.interval()


def test_forward_notes_what_it_adds():
    metric = sm.EffectiveRankMetric(folds=8)
    rows = torch.randn(240, 12, generator=draws(0))
    for part in (*rows.split(11), *rows.split(11)):
        metric(part)
    with pytest.warns(UserWarning, match=TOLD):
        metric.interval()


def run(model, inputs, passes, batch=10):
    for number in range(passes):
        for part in inputs[torch.randperm(len(inputs), generator=draws(number))].split(batch):
            model(part)


@pytest.mark.parametrize("options", [{}, {"rows_per_feature": 1}, {"every_n_steps": 2}], ids=str)
def test_a_probe_names_the_layers(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 9)).eval()
    images = torch.randn(170, 3, 8, 8)
    probe = sm.LayerProbe(model, sm.EffectiveRankMetric(), folds=8, **options)
    with torch.no_grad():
        run(model, images, 1)
        probe.intervals("eval")
        assert "same inputs" not in probe.summary("eval").title
        run(model, images, 5)
    with pytest.warns(UserWarning, match=f"in eval of '0', '3': {TOLD}"):
        probe.intervals()
    assert "the same inputs in several folds" in probe.summary("eval").title
    probe.reset()
    with torch.no_grad():
        run(model, images, 1)
    probe.intervals()


def test_inputs_of_a_training_are_others_once_the_weights_have_changed():
    model = nn.Sequential(nn.Linear(12, 9))
    probe = sm.LayerProbe(model, sm.EffectiveRankMetric(), folds=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = torch.randn(100, 12)
    for _ in range(3):
        for part in rows.split(10):
            model(part).square().mean().backward()
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.intervals()  # this cannot be detected, as the docs say


def test_inference_mode():
    model = nn.Sequential(nn.Linear(12, 9)).eval()
    probe = sm.LayerProbe(model, sm.EffectiveRankMetric(), folds=8)
    rows = torch.randn(300, 12)
    with torch.inference_mode():
        run(model, rows, 1)
        probe.intervals()
    run(model, rows, 2)
    with pytest.warns(UserWarning, match=TOLD):
        probe.intervals()
