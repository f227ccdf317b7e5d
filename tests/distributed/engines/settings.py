"""Probes with other settings on one process, and functions that fail there first: a warning, and no waiting."""

import re
import time
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spectralmetrics as sm
from tests.distributed.engines.llama import mesh_of


def sharded(mesh, sample=None, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4 * mesh.size()), nn.Linear(4 * mesh.size(), 5)).double()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return model, sm.LayerProbe(model, arguments.pop("metrics", sm.SpectrumMetric()), **arguments)


def said(run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in told]


def rows(seed, number=12):
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(seed)).double()


def settings_that_differ_are_refused(rank, world):
    """Different numbers of rows would end the processes; different skipped forwards would make them wait."""
    mesh, last = mesh_of(world), world - 1
    for name, (mine, other) in {
        "rows_per_feature": (1.0, 0.5),
        "max_features": (3, 8192),
        "sketch_size": (2, 3),
        "every_n_steps": (1, 2),
        "seed": (0, 1),
        "budget": (None, 0.5),
        "metrics": (sm.SpectrumMetric(), [sm.SpectrumMetric(), sm.HistoryMetric(steps=4)]),
    }.items():
        model, probe = sharded(mesh, **{name: other if rank == last else mine})

        def run(model=model):
            for seed in range(4):
                model(rows(seed))

        told = said(run)
        shown = (
            f"{mine!r} on process 0 and {other!r} on process {last}" if name != "metrics" else "on process 0"
        )
        for layer in ("0", "1"):
            pattern = rf"layer '{layer}' is not observed any more in train: .*{name}=.*{re.escape(shown)}"
            assert [each for each in told if re.search(pattern, each)], (name, told)
        assert all(place.samples == 0 for place in probe._places.values())
        probe.remove()


def settings_that_may_differ_are_told(rank, world):
    mesh, last = mesh_of(world), world - 1
    model, probe = sharded(mesh, max_samples=12 if rank == last else None)
    told = said(lambda: [model(rows(seed)) for seed in range(3)])
    assert [
        each for each in told if f"differ in max_samples=None on process 0 and 12 on process {last}" in each
    ]
    with probe.merged():
        assert int(probe["train", "0"]["spectrum"].count) == 36 - 2 * 12 // world
    probe.remove()
    model, probe = sharded(mesh, budget=0.25 if rank == last else 0.5)
    told = said(lambda: model(rows(0)))
    assert [each for each in told if "budget=0.5 on process 0" in each and "plan of the first process" in each]
    probe.remove()


def settings_that_change_count_from_the_next_reading_on(rank, world):
    mesh, last = mesh_of(world), world - 1
    model, probe = sharded(mesh)
    model(rows(0))
    # Changed earlier on one process than on another, as where each has its own timer.
    if rank == last:
        probe.rows_per_feature, probe.every_n_steps, probe.seed = 0.25, 3, 7
    for seed in range(1, 4):
        model(rows(seed))
    counted = {}

    def read():
        probe.compute("train")
        with probe.merged():
            counted.update({name: int(probe["train", name]["spectrum"].count) for name in probe.layers})

    (words,) = said(read)
    assert "layers that processes share go on with earlier settings" in words
    assert f"rows_per_feature=None on process 0 and 0.25 on process {last}" in words
    assert set(counted.values()) == {48}
    model(rows(4))
    probe.rows_per_feature, probe.every_n_steps, probe.seed = 0.25, 1, 7
    assert said(read) == []
    assert set(counted.values()) == {60}
    model(rows(5))
    read()
    assert counted == {"0": 60 + world, "1": 60 + 2}
    # Refused before, and equal now.
    model, probe = sharded(mesh, rows_per_feature=0.5 if rank == last else 1.0)
    assert len(said(lambda: model(rows(0)))) == 2
    probe.rows_per_feature = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no observations
        read()
    probe.reset()
    model(rows(0))
    said(read)  # few observations
    assert counted == {"0": min(12, 4 * world), "1": 5}


def a_function_that_fails_in_the_first_forward_keeps_nobody_waiting(rank, world):
    mesh, last = mesh_of(world), world - 1
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).double()
    fails = rank == last

    def place(output):
        if fails:
            raise ValueError("not yet")
        shape = torch.Size((len(output), 4 * world))
        return DTensor.from_local(output, mesh, [Shard(1)], shape=shape, stride=(4 * world, 1))

    probe = sm.LayerProbe(model, sm.SpectrumMetric(), select={"0": place})
    start = time.monotonic()
    (words,) = said(lambda: model(rows(0)))
    assert time.monotonic() - start < 10
    assert "'0' is not observed any more" in words
    assert "not yet" in words
    assert rank == last or f"on process {last}" in words
    fails = False  # permanently: no process can know which others try again
    for seed in range(2):
        model(rows(seed))
    with pytest.warns(UserWarning, match="saw nothing in train"):
        assert list(probe.compute("train")) == ["spectrum/train/1"]
    probe.reset()
    assert len(said(lambda: model(rows(0)))) == 1


SCENARIOS = [
    settings_that_differ_are_refused,
    settings_that_may_differ_are_told,
    settings_that_change_count_from_the_next_reading_on,
    a_function_that_fails_in_the_first_forward_keeps_nobody_waiting,
]
