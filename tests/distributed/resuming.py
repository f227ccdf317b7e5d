"""State of a probe over all processes, and processes that continue from it."""

import torch
import torch.distributed as dist
from torch import nn

import spectralmetrics as sm
from spectralmetrics.probing.whole_state import load_whole_state, whole_state
from tests.integrations.rows import Rows


class Apart(nn.ModuleDict):
    def forward(self, rows):
        for name, layer in self.items():
            layer(rows[name])


def probe_of(*names, **arguments):
    """A probe of layers that return their input, and a reader of windows."""
    metrics = {
        "rows": Rows(),  # kept per process, not merged
        "spectrum": sm.SpectrumMetric(),
        "saturation": sm.SaturationMetric(),
        "history": sm.HistoryMetric(steps=16),
        "max_abs": sm.MaxAbsMetric(),
    }
    model = Apart({name: nn.Identity() for name in names})
    how = {"folds": 2, "rows_per_feature": 2, "every_n_steps": 2} | arguments
    probe = sm.LayerProbe(model, metrics, layers=list(names), **how)
    probe.persistent()
    probe._windows.open("reader", "train")
    return model, probe


def forwards(rank, number, *names):
    """Inputs of the named layers in each forward of a process."""
    generator = torch.Generator().manual_seed(rank)
    return [{name: torch.randn(24 + rank, 5, generator=generator) for name in names} for _ in range(number)]


def read(probe):
    """Values of the rows that the reader has not read yet, and of all rows."""
    with probe._only("reader", "train"):
        window = probe.compute("train")
    return [window, probe.compute("train")]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-9, atol=1e-12)


def processes_go_on_as_if_nothing_had_been_put_away(rank, world):
    """Each process has its own layer beside a shared one; the next draws are those without an interruption."""
    for how, sums in (({}, "moment"), ({"max_features": 4, "sketch_size": 16}, "sketch_image")):
        goes_on(rank, how, sums)


def goes_on(rank, how, sums):
    names = ("shared", f"own{rank}")
    rows = forwards(rank, 9 + rank, *names)
    values, saved = [], None
    for puts_away in (False, True):
        model, probe = probe_of(*names, **how)
        for number, each in enumerate(rows):
            if number == 5 and puts_away:
                saved = whole_state(probe)
                assert (saved is None) == (rank > 0)
                model, probe = probe_of(*names, **how)
                load_whole_state(probe, saved)
            if number == 5:
                early = read(probe)
            model(each)
            if number == 2:
                probe._windows.advance("reader", "train")
        values.append([*early, *read(probe)])
    assert_same(values[1], values[0])
    if rank == 0:  # other processes keep only the progress of the shared layer
        kept = [
            [key for key in state if "shared" in key and key.startswith("metrics.train") and sums in key]
            for state in (saved["probe"], *saved["others"])
        ]
        assert kept[0]
        assert not any(kept[1:])


def other_processes_hold_what_was_saved(rank, world):
    """More or fewer processes than saved it, or processes with the layers of others."""
    how = {"every_n_steps": 1, "rows_per_feature": None}
    names = ("shared", f"own{rank}")
    model, probe = probe_of(*names, **how)
    for each in forwards(rank, 4 + rank, *names):
        model(each)
    expected, saved = read(probe), whole_state(probe)

    def assert_goes_on(state, own):
        _, probe = probe_of("shared", own, **how)
        load_whole_state(probe, state)
        assert_same(read(probe), expected)
        told = [None] * world
        dist.all_gather_object(told, (probe._places["train", "shared"].forwards, dict(probe._steps.counts)))
        return set(map(repr, told))

    assert len(assert_goes_on(saved, f"own{rank}")) == world
    progress = assert_goes_on(more(saved), f"own{rank}")
    assert len(progress) == 1  # that of the furthest
    assert assert_goes_on(saved, f"own{(rank + 1) % world}") == progress or world == 1


def more(saved):
    """State with one process more, all of whose observations are in the sums of others."""
    if saved is None:
        return None

    def added(states):
        last = [states["probe"], *states["others"]][-1]
        is_progress = lambda key: not key.startswith("metrics.") or key.endswith(("draws", "deals"))  # noqa: E731
        return {**states, "others": [*states["others"], {k: v for k, v in last.items() if is_progress(k)}]}

    windows = {
        reader: {stage: added(each) for stage, each in of_it.items()}
        for reader, of_it in saved["windows"].items()
    }
    return {**added(saved), "layers": [*saved["layers"], saved["layers"][-1]], "windows": windows}


SCENARIOS = [processes_go_on_as_if_nothing_had_been_put_away, other_processes_hold_what_was_saved]
