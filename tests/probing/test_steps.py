"""Steps are forwards of the model: in an observed step all calls of its layers count, in others none."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from spectralmetrics.probing.sampling import is_observed
from spectralmetrics.probing.windows import memory, take_over


def count(probe, layer="0", stage="train"):
    return int(next(iter(probe[stage, layer].values())).count)


class Recurring(nn.Module):
    """Calls one layer several times in each forward, with features of different sizes."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.calls = nn.Identity(), calls

    def forward(self, x):
        for call in range(self.calls):
            x = self.layer(x * 10.0**call)
        return x


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_one_step_of_each_block_is_observed(every):
    observed = [step for step in range(40 * every) if is_observed(step, every, "seed")]
    assert [step // every for step in observed] == list(range(40))
    assert observed[0] == 0
    places = [step % every for step in observed[1:]]
    if every > 1:
        assert set(places) == set(range(every))  # no fixed rhythm


@pytest.mark.parametrize("calls", [2, 8])
@pytest.mark.parametrize("every", [2, 3])
def test_all_calls_of_an_observed_step_are_seen(calls, every):
    model = Recurring(calls)
    seen = []
    probe = LayerProbe(model, sm.CovarianceTraceMetric(), layers="layer", every_n_steps=every)
    for _ in range(12):
        before = count(probe, "layer")
        model(torch.randn(5, 3))
        seen.append(count(probe, "layer") - before)
    assert set(seen) == {0, 5 * calls}
    assert [bool(each) for each in seen] == [is_observed(step, every, (0, "train", 0)) for step in range(12)]
    assert sum(map(bool, seen)) == 12 // every


class Tree(nn.Module):
    """Calls itself; the innermost call raises ``stops`` if it is set."""

    def __init__(self):
        super().__init__()
        self.layer, self.stops = nn.Linear(3, 3), None

    def forward(self, x, depth=2):
        if depth:
            x = self(x, depth - 1)
        elif self.stops is not None:
            raise self.stops
        return self.layer(x)


@pytest.mark.parametrize("stops", [ValueError, KeyboardInterrupt])
def test_a_model_that_calls_itself_makes_one_step(stops):
    torch.manual_seed(0)
    model = Tree()
    probe = LayerProbe(model, [sm.SaturationMetric(), sm.HistoryMetric(steps=99)], every_n_steps=3)
    for _ in range(6):
        model(torch.randn(5, 3))
    model.stops = stops
    with pytest.raises(stops):
        model(torch.randn(5, 3))
    model.stops = None
    for _ in range(2):
        model(torch.randn(5, 3))
    assert int(probe["train", "layer"]["saturation"].count) == 3 * 15
    assert probe["train", "layer"]["history"].compute()[:, 3].tolist() == [15] * 3


@pytest.mark.parametrize("calls", [2, 8])
def test_it_is_unbiased_for_a_model_that_is_called_several_times_per_step(calls):
    """A discriminator sees real and generated data in turn: a fixed rhythm would show one kind only."""
    model = nn.Sequential(nn.Identity())
    metric = sm.CovarianceTraceMetric(center=False)
    probe = LayerProbe(model, metric, layers="0", every_n_steps=calls)
    everything = LayerProbe(model, metric, layers="0")
    rows = torch.ones(1, 4)
    for _ in range(400):
        for call in range(calls):
            model(rows * 2.0**call)
    sampled, exact = (float(each.compute()["covariance_trace/train/0"]) for each in (probe, everything))
    assert count(probe) == 400
    # Each call has the same chance. Tolerance: standard errors of the mean over 400 draws.
    traces = 4 * 4.0 ** torch.arange(calls, dtype=torch.float64)
    assert exact == pytest.approx(float(traces.mean()))
    assert abs(sampled - exact) < 4 * float(traces.std(correction=0)) / 400**0.5


def test_stages_and_resets_count_apart():
    model = nn.Sequential(nn.Linear(3, 3))
    probe = LayerProbe(model, every_n_steps=4)
    patterns = []
    for _ in range(3):
        pattern = []
        for step in range(40):
            model.train()
            before = count(probe)
            model(torch.randn(2, 3))
            pattern.append(count(probe) > before)
            if step % 4 == 0:
                model.eval()
                model(torch.randn(2, 3))
        assert sum(pattern) == 10
        assert count(probe, stage="eval") in (2 * 2, 2 * 3)  # of ten forwards, not of fifty
        patterns.append(pattern)
        probe.reset()
    assert patterns[0] != patterns[1]  # with other draws


def test_a_layer_outside_the_forward_of_its_model_counts_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    probe = LayerProbe(model, every_n_steps=2)
    for _ in range(20):
        model[0](torch.randn(5, 3))
    assert count(probe) == 10 * 5
    assert count(probe, "1") == 0
    model(torch.randn(7, 3))  # the first step of the model
    assert (count(probe), count(probe, "1")) == (10 * 5 + 7, 7)


def test_a_failed_forward_is_left_again():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, fail):
            x = self.layer(x)
            if fail:
                raise ArithmeticError("the model's own")
            return x

    model = Failing()
    probe = LayerProbe(model, every_n_steps=3)
    for step in range(30):
        if step % 2:
            with pytest.raises(ArithmeticError):
                model(torch.randn(2, 3), True)
        else:
            model(torch.randn(2, 3), False)
    assert count(probe, "layer") == 10 * 2
    assert probe._steps.thread.here.current is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models(reentrant):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    probe = LayerProbe(model, every_n_steps=2)
    for _ in range(20):
        rows = torch.randn(5, 3, requires_grad=True)
        checkpoint(model, rows, use_reentrant=reentrant).sum().backward()
    assert (count(probe), count(probe, "2")) == (50, 50)
    assert probe._steps.counts["train"] == 20


@pytest.mark.parametrize("interrupted_after", [1, 5, 11])
def test_it_goes_on_where_it_was(interrupted_after):
    def new():
        model = Recurring(2)
        probe = LayerProbe(model, sm.CovarianceTraceMetric(), layers="layer", every_n_steps=3)
        probe.persistent()
        return model, probe

    def run(model, probe, steps):
        found = []
        for _ in steps:
            before = count(probe, "layer")
            model(torch.randn(4, 3))
            found.append(count(probe, "layer") > before)
        return found

    model, probe = new()
    probe.reset()  # the draws of the second epoch
    expected = run(model, probe, range(24))
    model, probe = new()
    probe.reset()
    began = run(model, probe, range(interrupted_after))
    state = copy.deepcopy(probe.state_dict())
    model, probe = new()
    probe.load_state_dict(state)
    assert began + run(model, probe, range(24 - interrupted_after)) == expected
    assert pickle.loads(pickle.dumps(probe)).compute() == probe.compute()


def test_compiled_models():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 3))
    probe = LayerProbe(model, every_n_steps=2)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(20):
        run(torch.randn(5, 3))
    assert count(probe) == 50
    torch.compiler.reset()


def test_what_readers_of_windows_remember_is_taken_over():
    steps = LayerProbe(nn.Linear(3, 2))._steps
    steps.step = 17
    saved = json.loads(json.dumps(memory({"one": {"a": 1}, "gone": {"b": 2}}, steps)))
    steps.step = None
    mine = {"one": {"a": 5, "c": 6}, "unsaid": {"d": 7}}
    own = dict(mine)
    take_over(saved, mine, steps)
    assert steps.step == 17
    assert mine == {"one": {"a": 1}, "unsaid": {}, "gone": {"b": 2}}
    assert all(mine[name] is each for name, each in own.items())  # readers hold these very dicts
