"""SIGKILL at random moments: all earlier records are whole, and a resumed run continues."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spectralmetrics import Recorder
from tests import processes
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch

LAYERS = 3
ROWS = 2 * (LAYERS + 1) * 2 + 1


def record_for_ever(directory, writers, recorded, started):
    """Record one epoch after the other; set ``started`` once ``recorded`` of them are written."""
    torch.set_num_threads(1)
    model = make_model(LAYERS)
    probe = make_probe(model)
    recorder = Recorder(directory, probe, writers, mode="resume")
    for written in itertools.count():
        if written == recorded:
            started.set()
        epoch = recorder.next_epoch
        run_epoch(model, epoch, rows=4)
        recorder.add_scalar("accuracy", epoch, stage="eval")
        recorder.record()


@processes.needs_fork
@pytest.mark.parametrize(
    ("writers", "kills"),
    [
        (("csv", "arrays", "tensorboard"), 8),
        pytest.param(("csv", "arrays"), 12, marks=pytest.mark.long),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else f"{value} kills",
)
def test_killed_at_random_moments(writers, kills, tmp_path):
    context = processes.fresh()
    moments = random.Random(0)
    seen = 0
    interrupted = 0
    for kill in range(kills):
        started = context.Event()
        # One in three is killed near its first record, which also imports the writers.
        worker = context.Process(target=record_for_ever, args=(tmp_path, writers, kill % 3, started))
        worker.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0.0, 0.25))
        worker.kill()
        worker.join()
        interrupted += bool(list(tmp_path.rglob(".*.tmp")))

        rows = read_csv(tmp_path) if (tmp_path / "records.csv").exists() else []
        epochs = len(rows) // ROWS
        assert len(rows) == epochs * ROWS
        assert [int(row["epoch"]) for row in rows[::ROWS]] == list(range(epochs))
        assert [float(row["value"]) for row in rows[ROWS - 1 :: ROWS]] == list(range(epochs))
        assert epochs >= seen
        seen = epochs
        for epoch in range(epochs):
            with np.load(tmp_path / f"arrays/epoch-{epoch:06d}.npz", allow_pickle=False) as arrays:
                assert len(arrays.files) == 2 * LAYERS * 5  # eigenvalues beside the sums
                assert all(arrays[name] is not None for name in arrays.files)
    assert seen > kills / 2
    print(f"{seen} records, {interrupted} of {kills} kills fell into a write")

    model = make_model(LAYERS)
    with Recorder(tmp_path, make_probe(model), writers, mode="resume") as recorder:
        assert recorder.next_epoch == seen
        run_epoch(model, seen, rows=4)
        recorder.add_scalar("accuracy", seen, stage="eval")
        recorder.record()
    assert len(read_csv(tmp_path)) == (seen + 1) * ROWS
    if "tensorboard" in writers:
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        steps = [event.step for event in events.Scalars("saturation/train/0")]
        assert steps == list(range(seen + 1))
    assert not list(tmp_path.rglob(".*"))  # no incomplete files, no lock
