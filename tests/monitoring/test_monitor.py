"""Monitors of real trainings: alarms, saved memory, and what stays unchanged."""

import copy
import errno
import gc
import os
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

from spectralmetrics import (
    DEFAULT_ALARMS,
    HistoryMetric,
    LayerProbe,
    MaxAbsMetric,
    Monitor,
    Recorder,
    SaturationMetric,
    describe_comparison,
    read_records,
)
from spectralmetrics.recording.manifest import read_alarms
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.sums import Sketch


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 8),
    )


def louder(model, step):
    if step == 70:
        with torch.no_grad():
            for parameter in model[2].parameters():
                parameter.mul_(30)


def dying(model, step):
    if step == 70:
        nn.init.constant_(model[2].bias, -1e3)


def train(model, monitor, steps, event=lambda model, step: None, start=0, rows=32):
    """Run training steps, each with its own batch; return the alarms."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    found = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        event(model, step)
        optimizer.zero_grad()
        model(torch.randn(rows, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        found += monitor.step() if monitor is not None else []
        if monitor is not None and monitor.should_stop:
            break
    return found


def silent(alarm):
    pass


def test_a_jump_is_told_with_its_layer_and_step():
    model = network()
    monitor = Monitor(LayerProbe(model), every=20, on_alarm=silent)
    (alarm,) = train(model, monitor, 100, louder)
    assert (alarm.step, alarm.finding.layer, alarm.finding.kind) == (71, "2", "scale")
    assert alarm.finding.value / alarm.before == pytest.approx(30, rel=0.3)
    assert monitor.raised == [alarm]


def test_a_full_disk_ends_no_training(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = network()
    with Recorder(tmp_path, mode="create") as recorder, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        monitor = Monitor(LayerProbe(model), every=20, on_alarm=silent, recorder=recorder)
        words = re.escape(f"[Errno 28] No space left on device: '{tmp_path / 'alarms.csv'}'")
        with pytest.warns(UserWarning, match=words):
            (alarm,) = train(model, monitor, 100, louder)
    assert (alarm.step, monitor.raised) == (71, [alarm])
    assert not read_alarms(tmp_path)


def test_a_layer_that_dies_is_told():
    model = network()
    probe = LayerProbe(model, layers=[nn.Linear, nn.ReLU])
    rules = [rule for rule in DEFAULT_ALARMS if rule.kind == "dead"]
    found = train(model, Monitor(probe, every=20, alarms=rules, on_alarm=silent), 160, dying)
    # Layers behind it output their changing biases. This is the first reading of dead features alone.
    assert [str(alarm) for alarm in found] == ["step 100: '3' in train: dead: 32 of 32 features"]


def test_a_layer_that_falls_to_zero_is_told_at_the_next_reading():
    model = network()

    def cut(model, step):
        if step == 65:
            for parameter in model[4].parameters():
                nn.init.zeros_(parameter).requires_grad_(False)

    found = train(model, Monitor(LayerProbe(model), every=20, on_alarm=silent), 100, cut)
    # The layer behind puts out its bias. All rows since the reading at step 80 are zeros.
    what = [(alarm.step, alarm.finding.layer, alarm.finding.kind, alarm.finding.value) for alarm in found]
    assert what == [(66, "4", "scale", 0), (100, "4", "dead", 1)]
    assert found[0].finding.message.startswith("the scale fell from 0.")


def fading(model, step):
    """A weight decay that is too strong for this layer."""
    if step >= 60:
        with torch.no_grad():
            for parameter in model[2].parameters():
                parameter.mul_(0.97)


@pytest.mark.parametrize("every", [1, 20, 100])
def test_a_layer_that_fades_is_told(every):
    model = network()
    probe = LayerProbe(model)
    rules = [rule for rule in DEFAULT_ALARMS if rule.kind == "scale"]
    (alarm,) = train(model, Monitor(probe, every=every, alarms=rules, on_alarm=silent), 520, fading)
    # 0.97 ** 227 = 0.001, against the gradients; the median lies 6 steps back, and there are two readings.
    assert 60 + 227 < alarm.step <= 60 + 227 + 30 + 2 * every
    assert (alarm.finding.layer, alarm.finding.kind) == ("2", "scale")
    assert alarm.finding.message.startswith("faded: the scale is 0.000")


@pytest.mark.parametrize(("observe", "every"), [("outputs", 10), ("gradients", 10), ("outputs", 1)])
def test_a_layer_dropped_at_random_raises_nothing(observe, every):
    """As stochastic depth by batches does, up to half of them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Sequential(nn.Linear(32, 32), Dropped(0.5)), nn.Linear(32, 8))
    monitor = Monitor(
        LayerProbe(model, layers=[nn.Linear, Dropped], observe=observe), every=every, on_alarm=silent
    )
    assert not train(model, monitor, 300, rows=256 if every == 1 else 32)


class Dropped(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x * (torch.rand(()) >= self.share)


def test_rows_that_are_not_finite():
    model = network()

    def break_(model, step):
        if step == 33:
            model[4].weight.data[0, 0] = float("nan")

    monitor = Monitor(LayerProbe(model), every=20, on_alarm=silent)
    found = train(model, monitor, 40, break_)
    assert [(alarm.step, alarm.finding.kind, alarm.finding.layer) for alarm in found][:1] == [
        (40, "non_finite", "0")
    ]


def test_a_row_that_is_not_finite_is_told_where_rows_are_drawn():
    model = network()
    monitor = Monitor(LayerProbe(model, rows_per_feature=0.1), every=20, on_alarm=silent)
    train(model, monitor, 10)
    batch = torch.randn(256, 8)
    batch[100] = torch.nan
    model(batch)
    alarms = train(model, monitor, 10)
    assert [(alarm.finding.layer, alarm.finding.value) for alarm in alarms] == [(n, 1) for n in "0246"]


def test_training_and_values_are_as_without(tmp_path):
    found = []
    for monitors in (False, True):
        model = network()
        probe = LayerProbe(model, [SaturationMetric(), HistoryMetric()])
        monitor = Monitor(probe, every=7, on_alarm=silent) if monitors else None
        with Recorder(tmp_path / str(monitors), probe, ["csv"]) as recorder:
            for epoch in range(3):
                train(model, monitor, 23, start=23 * epoch)
                recorder.record()
        parameters = torch.cat([each.flatten() for each in model.parameters()])
        rows = [row | {"step": None} for row in read_records(tmp_path / str(monitors))]
        found.append((parameters, rows))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_warns_or_stops():
    model = network()
    monitor = Monitor(LayerProbe(model), every=20)
    with pytest.warns(UserWarning, match="step 71: '2' in train: the scale changed by a factor of"):
        train(model, monitor, 100, louder)
    assert not monitor.should_stop
    model = network()
    monitor = Monitor(LayerProbe(model), every=20, on_alarm="stop")
    with pytest.warns(UserWarning, match="step 71"):
        train(model, monitor, 100, louder)
    assert monitor.should_stop
    assert monitor.probe.step == 80


def test_the_history_joins_and_is_there_once():
    probe = LayerProbe(network())
    Monitor(probe, every=200)
    assert probe.statistics["history"].steps == 400
    assert list(LayerProbe(network()).statistics) == ["saturation"]
    mine = LayerProbe(network(), [HistoryMetric(steps=50)])
    Monitor(mine)
    assert list(mine.statistics) == ["history"]
    rules = [rule for rule in DEFAULT_ALARMS if rule.kind == "dead"]
    without = LayerProbe(network())
    Monitor(without, alarms=rules)
    assert list(without.statistics) == ["saturation"]
    model = network()
    late = LayerProbe(model)
    model(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="make the Monitor before the model runs"):
        Monitor(late)
    late.reset()
    Monitor(late)
    model = network()
    wide = LayerProbe(model, max_features=10, sketch_size=6)
    model(torch.randn(40, 8))
    wide.reset()
    Monitor(wide)
    model(torch.randn(40, 8))
    assert [type(each) for each in wide.sums("train", "0")[:1]] == [Sketch]  # no covariance, whatever the width


def test_values_of_a_state_that_was_saved_without_a_monitor_are_there():
    model = network()
    before = LayerProbe(model)
    before.persistent()
    model(torch.cat([torch.randn(300, 8), torch.full((1, 8), torch.nan)]))
    with pytest.warns(UserWarning, match="1 of '0'"):
        expected = before.compute("train")
    after = LayerProbe(model, [MaxAbsMetric(), SaturationMetric()])
    Monitor(after)
    after.persistent()
    after.load_state_dict(before.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert after.compute("train") == expected
    words = " ".join(str(each.message) for each in caught)
    assert "1 of '0'" in words
    assert "'max_abs' of '0' (it saw nothing)" in words


def test_steps_that_the_user_tells_count():
    model = network()
    probe = LayerProbe(model)
    monitor = Monitor(probe, every=20, on_alarm=silent)
    found = []
    for step in range(1000, 1100):
        probe.step = step
        louder(model, step - 1000)
        model(torch.randn(32, 8))
        found += monitor.step()
    assert [alarm.step for alarm in found] == [1071]


def test_monitors_of_both_stages_keep_each_others_alarms(tmp_path):
    model = network()
    probe = LayerProbe(model)
    with Recorder(tmp_path, probe) as recorder:
        monitors = [
            Monitor(probe, every=1, stage=stage, on_alarm=silent, recorder=recorder)
            for stage in ("train", "eval")
        ]
        for monitor in monitors:
            model.train(monitor.stage == "train")(torch.full((8, 8), torch.nan))
        found = [alarm for monitor in monitors for alarm in monitor.step()]
        assert {(alarm.finding.stage, alarm.step) for alarm in found} == {("train", 1), ("eval", 1)}
        assert read_alarms(tmp_path) == found


@pytest.mark.parametrize("begin", [None, 1000])
def test_monitors_of_both_stages_count_the_same_steps(begin):
    model = network()
    probe = LayerProbe(model)
    monitors = [Monitor(probe, every=20, stage=stage, on_alarm=silent) for stage in ("train", "eval")]
    found = []
    for step in range(100):
        if begin is not None:
            probe.step = begin + step
        louder(model, step)
        for monitor in monitors:
            model.train(monitor.stage == "train")(torch.randn(32, 8))
        for monitor in monitors if step % 3 else monitors[::-1]:
            found += monitor.step()
    assert {(alarm.finding.stage, alarm.step) for alarm in found} == {
        (stage, (begin or 0) + 71) for stage in ("train", "eval")
    }
    assert probe.step == (begin or 0) + 100


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_saved_and_resumed_it_says_the_same(tmp_path, how):
    whole = network()
    expected = train(whole, Monitor(LayerProbe(whole), every=20, on_alarm=silent), 120, louder)
    run = tmp_path / "run"
    first = network()
    probe = LayerProbe(first)
    probe.persistent()
    recorder = Recorder(run, probe)
    monitor = Monitor(probe, every=20, on_alarm=silent, recorder=recorder)
    train(first, monitor, 50, louder)
    states = copy.deepcopy((first.state_dict(), (probe if how == "whole" else probe.sharded()).state_dict()))
    train(first, monitor, 50, louder, start=50)  # killed after this
    recorder.close()
    assert read_alarms(run) == expected
    second = network()
    again = LayerProbe(second)
    again.persistent()
    with Recorder(run, again, mode="resume") as recorder:
        resumed = Monitor(again, every=20, on_alarm=silent, recorder=recorder)
        second.load_state_dict(states[0])
        (again if how == "whole" else again.sharded()).load_state_dict(states[1])
        train(second, resumed, 1, start=50)
        assert not read_alarms(run)  # superseded
        assert train(second, resumed, 69, louder, start=51) == expected
    assert read_alarms(run) == SavedRun(run).alarms == expected


def test_recorded_alarms_are_shown_by_compare(tmp_path):
    for name, event in (("fine", lambda model, step: None), ("louder", louder)):
        model = network()
        probe = LayerProbe(model)
        with Recorder(tmp_path / name, probe, ["csv", "arrays"]) as recorder:
            train(model, Monitor(probe, every=20, on_alarm=silent, recorder=recorder), 100, event)
            recorder.record()
    text = describe_comparison(tmp_path / "fine", tmp_path / "louder", stage="train")
    assert "alarm on the right: step 71: '2' in train: the scale changed by a factor of" in text
    assert "on the left: step" not in text
    same = describe_comparison(tmp_path / "louder", epochs=(0, 0), stage="train")
    assert same.count("alarm of this run: step 71") == 1
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "louder")
    Recorder(tmp_path / "louder", mode="overwrite").close()
    assert not (tmp_path / "louder" / "alarms.csv").exists()


def test_a_file_of_alarms_that_is_none(tmp_path):
    (tmp_path / "alarms.csv").write_text("step,stage\n")
    with pytest.raises(ValueError, match=r"expected .*alarms.csv to begin with step,stage,layer"):
        read_alarms(tmp_path)


def test_a_probe_that_sees_nothing_says_nothing():
    model = network()
    probe = LayerProbe(model)
    monitor = Monitor(probe, every=10, on_alarm=silent)
    with probe.paused(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not train(model, monitor, 40)


def test_closed_it_leaves_the_probe_alone():
    model = network()
    probe = LayerProbe(model)
    monitor = Monitor(probe, every=10, on_alarm=silent)
    train(model, monitor, 25)
    monitor.close()
    model(torch.randn(32, 8))
    assert probe["train", "0"]["saturation"].count == 26 * 32
    assert not any(place.before_update for place in probe._places.values())


def test_closed_it_holds_no_recorder_and_the_other_stage_counts_on(tmp_path):
    probe = LayerProbe(network())
    recorder = Recorder(tmp_path, probe)
    closing = Monitor(probe, recorder=recorder)
    other = Monitor(probe, stage="eval")
    steps = []
    for monitor in (closing, other, closing):
        monitor.step()
        steps.append(probe.step)
    closing.close()
    recorder.close()
    recorder = weakref.ref(recorder)
    del closing, monitor
    gc.collect()
    assert recorder() is None
    for _ in range(2):
        other.step()
        steps.append(probe.step)
    assert steps == [1, 1, 2, 2, 3]


def test_compiled_and_in_evaluation():
    model = network()
    probe = LayerProbe(model)
    monitor = Monitor(probe, every=20, stage="eval", on_alarm=silent)
    compiled = torch.compile(model, backend="eager")
    found = []
    model.eval()
    for step in range(100):
        louder(model, step)
        with torch.inference_mode():
            compiled(torch.randn(32, 8))
        found += monitor.step()
    assert [(alarm.step, alarm.finding.layer, alarm.finding.stage) for alarm in found] == [(71, "2", "eval")]
