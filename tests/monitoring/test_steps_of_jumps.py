"""Jumps of the scale where a step has several forwards, or where some steps are not observed."""

import pytest
import torch
from torch import nn

from spectralmetrics import HistoryMetric, LayerProbe, Monitor, SaturationMetric
from tests.monitoring.test_monitor import louder, network, silent, train


def accumulating(probe, model, run, batches=8, steps=90):
    """A training of several forwards a step, in which a layer is louder for the steps 65 to 69."""
    monitor = Monitor(probe, every=60, on_alarm=silent)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(steps):
        if step in (64, 69):
            with torch.no_grad():
                model[2].weight.mul_(30 if step == 64 else 1 / 30)
        for _ in range(batches):
            run(torch.randn(32, 8)).square().mean().div(batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    return train(model, monitor, 40)


@pytest.mark.parametrize("is_by_layers", [False, True])
def test_accumulated_gradients_hide_no_jump(is_by_layers):
    model = network()
    probe = LayerProbe(model, layers=nn.Linear)
    layers = list(model)

    def run(values):
        for layer in layers:
            values = layer(values)
        return values

    (alarm,) = accumulating(probe, model, run if is_by_layers else model)
    assert (alarm.step, alarm.finding.layer, alarm.finding.kind) == (65, "2", "scale")
    with torch.no_grad():
        model.eval()(torch.randn(4, 8)), model(torch.randn(4, 8))
    assert len(probe.history("eval").forwards) == 2
    rows = [row for row in probe.history() if row.layer == "0"]
    assert [row.step for row in rows] == list(range(len(rows)))
    assert {row.observations for row in rows} == {8 * 32, 32}


def test_a_history_of_the_user_s_keeps_forwards_apart():
    model = network()
    probe = LayerProbe(model, [HistoryMetric(steps=100), SaturationMetric()])
    accumulating(probe, model, model, steps=10)
    assert {row.observations for row in probe.history()} == {32}


def test_a_jump_between_observed_steps_says_how_many_they_are():
    model = network()
    monitor = Monitor(LayerProbe(model, every_n_steps=4), every=20, on_alarm=silent)
    (alarm,) = train(model, monitor, 160, louder)
    assert 71 <= alarm.step <= 78
    forwards = [row.step for row in monitor.probe.history() if row.layer == "2"]
    gap = alarm.step - 1 - max(step for step in forwards if step < alarm.step - 1)
    assert gap > 1
    assert f"in {gap} steps" in alarm.finding.message
