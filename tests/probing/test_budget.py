"""A probe with a budget stays within it, whatever observing costs, and observes all layers equally."""

import contextlib
import copy
import itertools
import types

import pytest
import torch
from torch import nn

from spectralmetrics import CovarianceTraceMetric, LayerProbe, SaturationMetric
from spectralmetrics.probing.budget import Budget, Plan
from tests.accelerator.device import emulated_device


class Clock:
    """Clock of a simulated training."""

    now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def simulate(
    clock, share, steps, step_seconds, fixed, each_row, start=0.0, stages=("train",), rows=1000.0, seed=0
):
    """A training; an observed forward costs ``fixed`` seconds and ``each_row`` for each row per feature."""
    budget = Budget(share, seed, clock)
    observed, own = [], 0.0
    for index in range(steps):
        stage = stages[index % len(stages)]
        clock.now += next(step_seconds) if hasattr(step_seconds, "__next__") else step_seconds
        seen = budget.begins(stage)
        observed.append(seen)
        if not seen:
            budget.passes(stage)
        else:
            with budget.measuring(stage, torch.zeros(1)):
                drawn = budget.rows_per_feature(stage)
                cost = fixed + each_row * (rows if drawn is None else min(drawn, rows))
                cost += 0.0 if any(observed[:-1]) else start
                clock.now += cost
                own += cost
    return budget, observed, own


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("fixed", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("each_row", [0.0, 1e-6, 1e-4])
def test_the_share_is_kept(clock, share, fixed, each_row):
    steps = 2000
    budget, observed, own = simulate(clock, share, steps, 0.01, fixed, each_row)
    # The price of one forward may be spent in advance.
    assert own <= share * 0.01 * steps + fixed + 1000 * each_row
    assert budget.spent("train").share == pytest.approx(own / (0.01 * (steps - 1)), rel=0.05)
    assert budget.spent("train").observed == sum(observed)
    assert sum(observed) >= 3


def test_what_is_cheap_is_observed_whole(clock):
    budget, observed, _ = simulate(clock, 0.03, 400, 0.01, 1e-6, 1e-8)
    assert budget.rows_per_feature("train") is None
    assert all(observed[200:])


def test_rows_are_left_out_before_forwards(clock):
    budget, observed, own = simulate(clock, 0.03, 5000, 0.01, 2e-4, 1e-3)
    # With all rows, the budget would pay for one forward in 4,000.
    assert sum(observed) > 5000 / 16
    assert budget.rows_per_feature("train") < 10
    assert own > 0.4 * 0.03 * 50  # and much of it is spent


def test_a_dear_beginning_is_paid_off(clock):
    _, observed, own = simulate(clock, 0.03, 5000, 0.01, 1e-4, 0.0, start=0.5)
    assert own <= 0.03 * 50 + 0.5
    assert sum(observed[:1000]) <= 3
    assert sum(observed[3000:]) > 500


def test_a_break_between_forwards_is_nothing_to_spend(clock):
    pauses = itertools.chain([0.01] * 100, [3600.0], itertools.repeat(0.01))
    _, observed, _ = simulate(clock, 0.03, 1000, pauses, 1e-2, 0.0)
    # A pause of 3,600 s would pay for 10,000 forwards.
    assert sum(observed[100:300]) <= 20


# Seconds to the next forward, repeated.
STEPS = {
    "a fake batch, then a real one": [5e-5, 3e-3],
    "two fake batches, then a real one": [1e-3, 5e-5, 3e-3],
    "gradient accumulation over 4": [1e-3, 1e-3, 1e-3, 2e-2],
    "gradient accumulation over 8": 7 * [1e-3] + [2e-2],
    "five layers that are run by themselves": 4 * [1e-5] + [5e-3],
}


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize("step", STEPS)
def test_forwards_are_observed_whatever_pause_came_before(clock, step, share):
    """Each kind of forward in a step has the same chance, and the same number of rows when observed."""
    kinds = len(STEPS[step])
    seen = torch.zeros(kinds)
    for seed in range(8):
        pauses = itertools.cycle(STEPS[step])
        _, observed, _ = simulate(clock, share, 6000, pauses, 3e-4, 2e-5, seed=seed)
        for kind in range(kinds):
            seen[kind] += sum(observed[kind::kinds])
    expected = float(seen.sum()) / kinds
    assert expected > 40
    # The draws of one block exclude each other, so their variance is at most the one of independent draws.
    assert float((seen - expected).abs().max()) < 4 * expected**0.5


def test_rows_do_not_depend_on_the_pause_before(clock):
    budget, share = Budget(0.02, 0, clock), {0: [], 1: []}
    for number in range(20000):
        clock.now += 3e-3 if number % 2 else 5e-5
        if budget.begins("train"):
            with budget.measuring("train", torch.zeros(1)):
                rows = budget.rows_per_feature("train")
                clock.now += 1e-4 + 3e-5 * rows
                share[number % 2].append(rows)
        budget.passes("train")
    kinds = [torch.tensor(share[kind][5:]) for kind in (0, 1)]
    assert min(map(len, kinds)) > 100
    assert float(kinds[0].mean() / kinds[1].mean()) == pytest.approx(1, abs=0.1)


def test_a_gan_step_seen_with_a_budget_has_the_trace_of_all():
    """Real batches have a trace of 1; fake ones, which a long pause follows, have a trace of 100."""
    clock = Clock()
    layer = nn.Linear(32, 32)
    probe, everything = (LayerProbe(layer, CovarianceTraceMetric(), budget=budget) for budget in (0.03, None))
    probe._steps.budget = budget = Budget(0.03, 0, clock)
    torch.manual_seed(0)
    seen = {1.0: 0, 10.0: 0}
    for _ in range(1000):
        for scale, pause in ((1.0, 3e-3), (10.0, 5e-5)):
            clock.now += pause
            before = int(probe["train", "Linear"]["covariance_trace"].count)
            with monkeypatched_measuring(budget, clock, 2e-4):
                layer(scale * torch.randn(16, 32))
            seen[scale] += int(probe["train", "Linear"]["covariance_trace"].count) > before
    real, fake = seen.values()
    assert min(real, fake) > 50
    assert abs(real - fake) < 3 * (real + fake) ** 0.5
    found, expected = (float(next(iter(each.compute().values()))) for each in (probe, everything))
    assert found == pytest.approx(expected, rel=0.25)


@contextlib.contextmanager
def monkeypatched_measuring(budget, clock, seconds):
    """Inside the context, each observed forward takes ``seconds`` of a simulated clock."""
    own = budget.rows_per_feature

    def rows_per_feature(stage):
        clock.now += seconds  # called in each observed forward, where its rows are drawn
        return own(stage)

    budget.rows_per_feature = rows_per_feature
    try:
        yield
    finally:
        del budget.rows_per_feature


def test_epochs_shorter_than_a_block_are_seen_in_turn(clock):
    budget, seen = Budget(0.01, 0, clock), []
    for _ in range(300):
        observed = 0
        for _ in range(10):
            clock.now += 0.01
            if budget.begins("eval"):
                with budget.measuring("eval", torch.zeros(1)):
                    clock.now += 1e-3
                observed += 1
            budget.passes("eval")
        seen.append(observed)
        budget.reset("eval")
    assert 60 < sum(seen) < 200  # one forward in 20 pays half of the budget
    assert max(seen[20:]) == 1


def test_whoever_follows_a_plan_observes_the_same_forwards(clock):
    """At any speed: this is how processes that share layers agree."""
    leader, follower = Budget(0.03, 7, clock), Budget(0.03, 7, Clock())
    agreed = []
    for number in range(3000):
        clock.now += 0.01
        if number % 100 == 0:  # where the processes exchange their plan
            plan = leader._stages["train"].plan
            for budget in (leader, follower):
                budget.follow("train", plan)
        decisions = []
        for budget in (leader, follower):
            decisions.append(budget.begins("train"))
            budget.passes("train")
        assert decisions[0] == decisions[1] == plan.observes(number, (7, "train"))
        agreed.append(decisions[0])
    assert 300 < sum(agreed) < 1500  # one in four, as long as nothing has cost anything


@pytest.mark.parametrize("every", [1, 2, 3, 8, 61])
def test_a_plan_draws_one_forward_of_each_block(every):
    plan = Plan(start=5, every=every)
    observed = [number for number in range(5, 5 + 600 * every) if plan.observes(number, 0)]
    assert [(number - 5) // every for number in observed] == list(range(600))
    counts = torch.tensor([(number - 5) % every for number in observed]).bincount(minlength=every)
    assert float((counts - 600 / every).abs().max()) < 5 * (600 / every) ** 0.5


def test_a_short_run_stays_below_its_budget(clock):
    """Even with an expensive beginning, as long as that is within the budget."""
    for seed in range(20):
        for share in (0.01, 0.03, 0.1):
            _, observed, own = simulate(clock, share, 600, 0.01, 2e-3, 1e-3, start=2e-2, seed=seed, rows=4)
            assert own <= share * 6.0
            assert sum(observed) >= 2


def test_stages_are_paid_apart(clock):
    budget, observed, _ = simulate(clock, 0.05, 4000, 0.01, 1e-3, 0.0, stages=("train", "eval"))
    assert min(sum(observed[::2]), sum(observed[1::2])) > 200
    assert budget.spent("train").forwards == 2000


def network():
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model, steps=60):
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(256, 20)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


def test_training_is_bit_identical():
    model = network()
    twin = copy.deepcopy(model)
    with LayerProbe(model, SaturationMetric(), budget=0.2) as probe:
        probed = train(model)
    assert all(map(torch.equal, probed, train(twin)))
    assert int(probe["train", "0"].saturation.count) > 0


def test_the_time_of_a_forward_is_the_mean_of_those_so_far(clock):
    budget = Budget(0.1, 0, clock)
    for passed, mean in ((0.0, 0.0), (4.0, 4.0), (2.0, 3.0), (6.0, 4.0)):
        clock.advance(passed)
        budget.begins("train")
        budget.passes("train")
        assert budget._stages["train"]._mean_time == mean


def test_layers_get_rows_by_their_width(monkeypatch):
    monkeypatch.setattr(Budget, "begins", lambda self, stage: True)
    monkeypatch.setattr(Budget, "rows_per_feature", lambda self, stage: 1.5)
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.1)
    train(model, 10)
    assert {name: int(probe["train", name].saturation.count) for name in probe.layers} == {
        "0": 10 * 72,
        "2": 10 * 24,
        "4": 10 * 6,
    }


def test_what_was_not_paid_for_is_told(monkeypatch):
    monkeypatch.setattr(Budget, "begins", lambda self, stage: False)
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.01)
    train(model, 3)
    with pytest.warns(UserWarning, match="the budget of 1 % has paid for no forward yet"):
        assert probe.compute() == {}


def test_the_summary_says_what_it_took(clock):
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.25)
    probe._steps.budget = Budget(0.25, 0, clock)
    model.register_forward_pre_hook(lambda module, args: clock.advance(0.01))
    train(model)
    title = probe.summary("train").title
    assert "of 60 forwards" in title
    assert "(budget 25 %)" in title
    probe.reset()
    train(model, 40)
    assert "of 40 forwards" in probe.summary("train").title


def test_a_paused_probe_takes_nothing():
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.25)
    with probe.paused():
        train(model)
    train(model, 30)
    assert int(probe["train", "0"].saturation.count) > 0


def test_a_layer_that_is_run_by_itself():
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.25)
    for _ in range(20):
        model[0](torch.randn(3000, 20))
    assert int(probe["train", "0"].saturation.count) > 0


@pytest.mark.filterwarnings("ignore:in train there are fewer")
def test_a_copy_measures_for_itself():
    model = network()
    probe = LayerProbe(model, SaturationMetric(), budget=0.25)
    train(model, 20)
    twin = copy.deepcopy(probe)
    assert twin.budget == 0.25
    assert twin.compute().keys() == probe.compute().keys()


@pytest.mark.parametrize("budget", [0, 1, -0.1, 3, float("nan")])
def test_a_budget_is_a_share(budget):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {budget}"):
        LayerProbe(network(), budget=budget)


class Event:
    """Events of a device on which everything takes 50 ms more than on the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    records = 0

    def record(self):
        self.records += 1

    def query(self):
        return self.is_over

    def elapsed_time(self, later):
        assert self.records == later.records == 1
        return 50.0


def test_the_time_of_a_device_is_paid_for_once_it_is_known(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: types.SimpleNamespace(Event=Event))
    monkeypatch.setattr(Event, "is_over", False, raising=False)
    budget = Budget(0.1, 0)
    output = torch.randn(3, 2).to(emulated_device())
    for _ in range(2):
        budget.begins("train")
        with budget.measuring("train", (output,)):  # the first tensor in it has the device
            pass
    assert budget._stages["train"].cost < 0.04
    Event.is_over = True
    budget.begins("train")
    assert 0.09 < budget._stages["train"].cost < 0.11
    with budget.measuring("train", torch.randn(3, 2)):
        pass
    budget.begins("train")
    assert budget._stages["train"].cost < 0.11
