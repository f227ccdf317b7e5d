"""State of a probe over all processes: a probe that continues from it equals one without interruption."""

import io

import pytest
import torch
from torch import nn

from spectralmetrics import CovarianceTraceMetric, HistoryMetric, LayerProbe
from spectralmetrics.probing.whole_state import load_whole_state, whole_state
from tests.integrations.rows import Rows
from tests.monitoring.test_windows import METRICS, batches, network, same

READERS = ("a", "b")


def probe_of(model, kind, folds):
    metrics = METRICS[kind]()
    named = metrics if isinstance(metrics, dict) else {each.short_name: each for each in metrics}
    probe = LayerProbe(model, {"history": HistoryMetric(steps=8), **named}, folds=folds, every_n_steps=2)
    probe.persistent()
    for reader in READERS:
        probe._windows.open(reader, "train")
    return probe


def written(saved):
    """The state as read from a file without code, and the file's size."""
    file = io.BytesIO()
    torch.save(saved, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize("kind", METRICS)
def test_what_comes_next_is_as_if_nothing_had_been_put_away(kind, folds):
    if folds and kind == "sketches":
        pytest.skip("sketches have no folds")
    found = []
    for puts_away in (False, True):
        model = network()
        probe, values = probe_of(model, kind, folds), []
        for number, batch in enumerate(batches(), 1):
            if number == 12 and puts_away:  # one reader has five batches left to read, the other none
                saved, _ = written(whole_state(probe))
                probe.remove()
                model = network()
                probe = probe_of(model, kind, folds)
                load_whole_state(probe, saved)
            model(batch)
            for reader, every in zip(READERS, (6, 11), strict=True):
                if number % every == 0:
                    with probe._only(reader, "train"):
                        values.append(probe.compute())
                    probe._windows.advance(reader, "train")
        found.append([*values, probe.compute()])
        probe.reset()
        model(batches()[0])
        found[-1].append(probe.compute())
    for first, second in zip(*found, strict=True):
        same(first, second, 1e-6 if kind == "others" else 1e-12)  # a float32 sum keeps fewer


def test_a_reader_that_has_yet_to_read_everything_takes_no_room():
    sizes = []
    for reads in (False, True):
        model = nn.Sequential(nn.Linear(6, 64))
        probe = LayerProbe(model)
        probe.persistent()
        if reads:
            probe._windows.open("a", "train")
        model(torch.randn(100, 6))
        sizes.append(written(whole_state(probe))[1])
    assert sizes[1] - sizes[0] < 64 * 64 * 8  # the smallest matrix of the state


class Apart(nn.ModuleDict):
    """Layers that return their input, each its own."""

    def forward(self, rows):
        for name, layer in self.items():
            layer(rows[name])


def layered(*names):
    model = Apart({name: nn.Identity() for name in names})
    probe = LayerProbe(model, {"rows": Rows(), "trace": CovarianceTraceMetric()}, layers=list(names), folds=2)
    probe.persistent()
    return model, probe


def test_other_layers_than_those_that_were_saved():
    """For example, two processes with one layer each; one process takes over both, with a new layer."""
    rows = {name: torch.randn(30, 5) for name in "ab"}
    states = []
    for name, each in rows.items():
        model, probe = layered(name)
        for part in each.split(10 if name == "a" else 6):
            model({name: part})
        states.append(whole_state(probe)["probe"])
    saved = {"probe": states[0], "others": states[1:], "layers": [["a"], ["b"]], "windows": {}}
    model, probe = layered("b", "c", "a")
    load_whole_state(probe, saved)
    assert probe.layers == ["a", "b", "c"]
    assert [probe._places["train", name].forwards for name in "abc"] == [3, 5, 0]
    with pytest.warns(UserWarning, match="saw nothing in train are left out: 'c'"):
        values = probe.compute("train")
    for name, each in rows.items():
        assert values[f"rows/train/{name}"] == 30
        assert float(values[f"trace/train/{name}"]) == pytest.approx(float(each.var(0, correction=0).sum()))
    model, probe = layered("a")
    with pytest.raises(ValueError, match="layers that this probe has on some process, got a state of 'b'"):
        load_whole_state(probe, saved)


def test_the_furthest_of_processes_with_the_same_layer_counts():
    """Observations that each process keeps for itself, as for metrics of other libraries, are added up."""
    states = []
    for count in (3, 5):
        model, probe = layered("a")
        for _ in range(count):
            model({"a": torch.ones(4, 5)})
        states.append(whole_state(probe)["probe"])
    own = {
        key: value
        for key, value in states[1].items()
        if ".trace." not in key or key.endswith(("draws", "deals"))
    }
    model, probe = layered("a")
    load_whole_state(probe, {"probe": states[0], "others": [own], "layers": [["a"], ["a"]], "windows": {}})
    place = probe._places["train", "a"]
    assert (place.forwards, place.samples) == (5, 12 + 20)
    assert probe._steps.counts["train"] == 5
    assert probe["train", "a"]["trace"].state_dict()["deals"] == 5
    assert probe["train", "a"]["trace"].count == 12
    assert probe.compute("train")["rows/train/a"] == 12 + 20
