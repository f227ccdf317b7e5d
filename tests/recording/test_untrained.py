"""Runs judge a small variance as the probe did: a note while weights are as initialised, later a problem."""

import json

import pytest
import torch
from torch import nn

from spectralmetrics import (
    LayerProbe,
    Recorder,
    SaturationMetric,
    SpreadMetric,
    Writer,
    summarise_run,
)
from spectralmetrics.parameters import is_untrained
from spectralmetrics.probing import routing
from spectralmetrics.recording.compare_text import describe_comparison
from spectralmetrics.recording.record import RecordKey
from spectralmetrics.recording.report.collect import collect
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writers.arrays import ArraysWriter

LAYERS = 12


def deep_model():
    """A network deep enough that its biases outweigh the inputs from the beginning."""
    torch.manual_seed(0)
    return nn.Sequential(*(each for _ in range(LAYERS) for each in (nn.Linear(24, 24), nn.Tanh()))).eval()


def probe_of(model, metrics=None):
    return LayerProbe(model, metrics or [SaturationMetric()], layers=[nn.Linear, nn.Tanh])


def observe(model, rows=600):
    with torch.no_grad():
        model(torch.rand(rows, 24, generator=torch.Generator().manual_seed(0)))


def train(layer):
    with torch.no_grad():
        layer.weight.add_(0.01 * layer.weight.sign())


def severities(findings):
    return {each.layer: each.severity for each in findings if each.kind == "collapsed"}


def of_report(directory):
    """Epoch -> the layers whose variance is small, and how serious the page says that it is."""
    (run,) = collect({"run": SavedRun(directory)}, lambda name, total: None)["runs"]
    layers = list(dict.fromkeys(layer for _, layer in SavedRun(directory).where))
    found = {}
    for place, epoch in enumerate(run["epochs"]):
        texts = [{*run["stands_out"][0, index, :, place]} for index in range(len(layers))]
        small = {
            layer: "problem" if any("the mean holds" in run["problems"][each] for each in own) else "note"
            for layer, own in zip(layers, texts, strict=True)
            if any("the mean holds" in run["words"][each] for each in own)
        }
        found[epoch] = small
    return found


def of_run(directory, epoch):
    return severities(summarise_run(directory, epoch=epoch).findings)


def of_text(text):
    """Layer -> severity, from the lines of a summary."""
    lines = [
        line for line in text.splitlines() if "the mean holds" in line and "problem" not in line.split()[0]
    ]
    return {line.split()[0]: "problem" if "collapsed: the mean" in line else "note" for line in lines}


def problems_in(text, side):
    heads = [line for line in text.splitlines() if line.startswith(f"problem on the {side}")]
    return {line.split(": ")[1] for line in heads}


def record(recorder, probe, model, **options):
    observe(model)
    expected = severities(probe.findings("eval"))
    recorder.record(**options)
    return expected


def test_runs_say_what_the_probe_said_at_each_record(tmp_path, capsys):
    """Untrained at first; then one layer is trained, then all."""
    model = deep_model()
    expected, shown = [], []
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays", "console"]) as recorder:
        for trained in ([], [model[20]], model[::2], []):
            for layer in trained:
                train(layer)
            expected.append(record(recorder, probe, model))
            shown.append(of_text(capsys.readouterr().out))
    assert set(expected[0].values()) == {"note"}
    assert set(expected[1].values()) == {"note", "problem"}
    assert set(expected[2].values()) == {"problem"}
    assert len(expected[0]) >= 8
    assert shown == expected
    assert [of_run(tmp_path, epoch) for epoch in range(4)] == expected
    assert of_report(tmp_path) == dict(enumerate(expected))
    for epochs in ((0, 1), (2, 3)):
        text = describe_comparison(tmp_path, epochs=epochs)
        for side, epoch in zip(("left", "right"), epochs, strict=True):
            assert problems_in(text, side) == {k for k, v in expected[epoch].items() if v == "problem"}


def test_a_resumed_run_keeps_what_it_knew(tmp_path):
    """Also if the record that found a layer trained was lost."""
    model = deep_model()
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        expected = [record(recorder, probe, model) for _ in range(2)]
        for layer in model[::2]:
            train(layer)
        record(recorder, probe, model)
    lost = tmp_path / "arrays" / "epoch-000002.npz"
    lost.unlink()  # the record of epoch 2 is not whole any more
    table = tmp_path / "records.csv"
    table.write_text(
        "".join(line for line in table.read_text().splitlines(keepends=True) if not line.startswith("2,"))
    )
    manifest = json.loads((tmp_path / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps(manifest | {"last_epoch": 1}))
    model = deep_model()
    with (
        probe_of(model) as probe,
        Recorder(tmp_path, probe, ["csv", "arrays"], mode="resume") as recorder,
    ):
        assert recorder.next_epoch == 2
        expected.append(record(recorder, probe, model))
        for layer in model[::2]:
            train(layer)
        expected.append(record(recorder, probe, model))
    assert [*map(set, map(dict.values, expected))] == [{"note"}] * 3 + [{"problem"}]
    assert [of_run(tmp_path, epoch) for epoch in range(4)] == expected
    assert of_report(tmp_path) == dict(enumerate(expected))


def test_records_at_steps_are_judged_by_the_weights_of_the_step(tmp_path):
    model, expected = deep_model(), {}
    with probe_of(model) as probe, Recorder(tmp_path, probe, [ArraysWriter(every_step=True)]) as recorder:
        for step in (5, 10, 15):
            if step == 10:
                train(model[20])
            expected[step] = record(recorder, probe, model, step=step)
    assert [len({*each.values()}) for each in expected.values()] == [1, 2, 2]
    assert of_report(tmp_path) == expected


def test_a_run_read_while_it_is_written_is_judged_by_its_weights(tmp_path):
    model, found = deep_model(), []

    class Reader(Writer):
        """Reads a record whose arrays are there, but whose table is not."""

        keeps_records = True

        def write(self, record):
            found.append(severities(summarise_run(tmp_path).findings))

    with probe_of(model) as probe, Recorder(tmp_path, probe, ["arrays", Reader(), "csv"]) as recorder:
        expected = [record(recorder, probe, model)]
        train(model[20])
        expected.append(record(recorder, probe, model))
    assert found == expected


def test_a_record_that_failed_changes_nothing_about_others(tmp_path):
    """It may come again with an earlier number."""
    model, fails = deep_model(), []

    class Failing(Writer):
        keeps_records = True

        def write(self, record):
            if fails:
                raise OSError(fails.pop())

    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays", Failing()]) as recorder:
        expected = [record(recorder, probe, model)]
        train(model[20])
        fails.append("disk")
        with pytest.raises(OSError, match="cannot record epoch 7"):
            record(recorder, probe, model, epoch=7)
        probe.reset()
        assert of_report(tmp_path) == dict(enumerate(expected))
        expected.append(record(recorder, probe, model, epoch=1))
    assert {*expected[0].values()} == {"note"}
    assert {*expected[1].values()} == {"note", "problem"}
    assert of_report(tmp_path) == dict(enumerate(expected))


def test_a_run_of_an_earlier_release_is_judged_as_before(tmp_path):
    model = deep_model()
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        expected = record(recorder, probe, model)
    manifest = json.loads((tmp_path / "recording.json").read_text())
    manifest.pop("trained")
    (tmp_path / "recording.json").write_text(json.dumps(manifest))
    assert of_run(tmp_path, 0) == dict.fromkeys(expected, "problem")


@pytest.mark.parametrize("entry", [[0], {"0": "x"}, {"0": [1, 2, 3]}])
def test_a_damaged_entry_is_an_error_in_words(tmp_path, entry):
    model = deep_model()
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        record(recorder, probe, model)
    manifest = json.loads((tmp_path / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps(manifest | {"trained": entry}))
    with pytest.raises(ValueError, match=r"recording\.json to be a recorder's"):
        summarise_run(tmp_path)


def test_weights_are_read_only_where_a_finding_depends_on_them(tmp_path, monkeypatch):
    """And not again once they were found trained, also in a resumed run."""
    tested = []
    monkeypatch.setattr(routing, "is_untrained", lambda module: tested.append(module) or is_untrained(module))

    def tests_of(recorder, model):
        tested.clear()
        observe(model)
        recorder.record()
        return [each for each in tested if isinstance(each, nn.Linear)]

    model = deep_model()
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv"]) as recorder:
        assert tests_of(recorder, model) == list(model[::2])
        train(model[4])
        assert tests_of(recorder, model) == list(model[::2])
        left = [each for each in model[::2] if each is not model[4]]
        assert tests_of(recorder, model) == left
    with probe_of(model) as probe, Recorder(tmp_path, probe, ["csv"], mode="resume") as recorder:
        assert tests_of(recorder, model) == left
    for layer in model[::2]:
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    with probe_of(model) as probe, Recorder(tmp_path / "wide", probe, ["csv"]) as recorder:
        assert tests_of(recorder, model) == []
    assert "trained" not in json.loads((tmp_path / "wide" / "recording.json").read_text())


def test_no_eigenvalues_are_read_for_it(tmp_path, monkeypatch):
    model = deep_model()
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *_: pytest.fail("a covariance was decomposed"))
    with probe_of(model, [SpreadMetric()]) as probe, Recorder(tmp_path, probe, ["csv"]) as recorder:
        observe(model)
        recorder.record()
    assert SavedRun(tmp_path).untrained(RecordKey(0), ["0", "1"]) == {"0": True}
