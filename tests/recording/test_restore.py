"""A process killed between a record and its pictures: the resumed run draws them and cleans up."""

import os
import signal

import matplotlib
import pytest

from spectralmetrics import (
    CovarianceMetric,
    EigenspaceEmbeddingMetric,
    IntrinsicDimensionMetric,
    Recorder,
    SaturationMetric,
    SpectrumMetric,
    Writer,
)
from tests import processes
from tests.recording.runs import make_model, make_probe, run_epoch

matplotlib.use("Agg")
ALL = [
    SaturationMetric(threshold=0.9),
    IntrinsicDimensionMetric(),
    SpectrumMetric(),
    CovarianceMetric(),
    EigenspaceEmbeddingMetric(max_samples=8),
]


def record(directory, writers, epochs=2, metrics=ALL):
    model = make_model(layers=1)  # most pictures have a drawing for each layer, which takes long
    with make_probe(model, metrics) as probe, Recorder(directory, probe, writers, mode="resume") as recorder:
        for epoch in range(recorder.next_epoch, epochs):
            run_epoch(model, epoch)
            recorder.add_scalar("accuracy", 0.875, stage="eval")
            recorder.record()


def record_and_die(directory, writers, pictures):
    """Record until so many pictures of the last epoch exist and the next one is half written."""
    save, saved = os.replace, []

    def replace(source, target):
        if "plots" in str(target) and "000001" in str(target):
            if len(saved) == pictures:
                os.kill(os.getpid(), signal.SIGKILL)
            saved.append(target)
        save(source, target)

    os.replace = replace
    record(directory, writers)


def pictures(directory):
    return {path.name: path.read_bytes() for path in (directory / "plots").iterdir()}


@processes.needs_fork
@pytest.mark.parametrize(
    ("writers", "drawn"),
    [
        (["csv", "arrays", "plot"], 3),
        (["csv", "plot"], 0),
        pytest.param(["arrays", "plot"], 3, marks=pytest.mark.long),
    ],
)
def test_resume_draws_what_is_missing(writers, drawn, tmp_path):
    worker = processes.fresh().Process(target=record_and_die, args=(tmp_path / "killed", writers, drawn))
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    there = pictures(tmp_path / "killed")
    assert len([name for name in there if name.endswith("000001.png")]) == drawn
    assert len([name for name in there if name.endswith(".tmp")]) == 1

    record(tmp_path / "killed", writers)
    record(tmp_path / "whole", writers)
    after, whole = pictures(tmp_path / "killed"), pictures(tmp_path / "whole")
    of_numbers = {name for name in whole if name.startswith(("saturation", "intrinsic"))}
    expected = of_numbers | set(there) if "arrays" not in writers else set(whole)
    assert set(after) == {name for name in expected if not name.endswith(".tmp")}
    for name in after:
        # The titles show the accuracy, which only the table holds.
        if "csv" in writers or name not in of_numbers or name in there:
            assert after[name] == whole[name], name


def test_what_is_there_is_not_drawn_again(tmp_path):
    record(tmp_path, ["csv", "arrays", "plot"])
    (tmp_path / "plots" / "saturation-epoch-000001.png").write_bytes(b"mine")
    (tmp_path / "plots" / "saturation-epoch-000000.png").unlink()
    before = pictures(tmp_path)
    record(tmp_path, ["csv", "arrays", "plot"])
    assert pictures(tmp_path) == before


def test_what_cannot_be_shown_now_costs_no_record(tmp_path, caplog):
    spectrum = [SpectrumMetric()]
    record(tmp_path, ["csv", "arrays", "plot"], metrics=spectrum)
    (tmp_path / "arrays" / "epoch-000001.npz").write_bytes(b"broken")
    (tmp_path / "plots" / "spectrum-train-epoch-000001.png").unlink()
    record(tmp_path, ["csv", "arrays", "plot"], epochs=3, metrics=spectrum)
    assert any("cannot show epoch 1 now" in message for message in caplog.messages)
    assert (tmp_path / "arrays" / "epoch-000002.npz").exists()


def test_a_writer_of_ones_own_may_restore(tmp_path):
    class Own(Writer):
        def write(self, record):
            pass

        def restore(self, record):
            shown.append((record.epoch, {row.statistic for row in record.rows}, set(record.values)))

    shown = []
    record(tmp_path, ["csv", Own()], epochs=1)
    assert shown == []
    record(tmp_path, ["csv", Own()], epochs=1)
    assert shown == [(0, {"saturation", "intrinsic_dimension", "accuracy"}, set())]


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_leftovers_are_removed_and_files_of_others_are_not(mode, tmp_path):
    record(tmp_path, ["csv", "arrays", "plot"], metrics=[SaturationMetric()])
    ours = ["arrays/epoch-000002.npz", "plots/s-epoch-000002.png", "plots/s-eval-epochs.png", "records.csv"]
    for name in ours:
        path = tmp_path / name
        path.with_name(f".{path.name}.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    (tmp_path / "plots" / ".mine.png.tmp").touch()
    Recorder(tmp_path, mode=mode).close()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.tmp")}
    assert left == {".mine.tmp", "plots/.mine.png.tmp"}
