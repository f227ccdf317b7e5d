import contextlib
import csv
import errno
import os
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric

from spectralmetrics import (
    CovarianceMetric,
    EigenspaceEmbeddingMetric,
    HistoryMetric,
    LayerProbe,
    PowerLawExponentMetric,
    Recorder,
    SaturationMetric,
    SpectrumMetric,
    Writer,
)
from spectralmetrics.recording.writers import make_writers
from spectralmetrics.recording.writers.history_file import HistoryWriter
from tests import processes
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch

ALL = ["csv", "arrays", "console", "tensorboard", "plot"]


def record(directory, epochs=2, writers=("csv",), mode="create", **options):
    model = make_model()
    with make_probe(model, **options) as probe, Recorder(directory, probe, writers, mode=mode) as recorder:
        values = []
        for epoch in range(recorder.next_epoch, epochs):
            run_epoch(model, epoch)
            recorder.add_scalar("accuracy", 0.5 + 0.01 * epoch, stage="eval")
            values.append(recorder.record())
    return values


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Keeper(Writer):
    """A writer as a user might write it."""

    def __init__(self):
        self.records = []
        self.calls = []

    def open(self, directory, last_epoch):
        self.calls.append(("open", directory, last_epoch))

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.calls.append(("close",))


class TestRecord:
    def test_the_table(self, tmp_path):
        values = record(tmp_path / "nested" / "run", epochs=3)
        rows = read_csv(tmp_path / "nested" / "run")
        assert list(rows[0]) == ["epoch", "stage", "layer", "statistic", "value", "low", "high", "step"]
        expected = []
        for epoch in range(3):
            for stage in ("train", "eval"):
                for layer in ("0", "1", "2"):
                    expected += [(epoch, stage, layer, s) for s in ("saturation", "intrinsic_dimension")]
                expected += [(epoch, stage, "mean", s) for s in ("saturation", "intrinsic_dimension")]
            expected.append((epoch, "eval", "", "accuracy"))
        assert [(int(r["epoch"]), r["stage"], r["layer"], r["statistic"]) for r in rows] == expected
        for row in rows:
            name = "/".join(part for part in (row["statistic"], row["stage"], row["layer"]) if part)
            value = values[int(row["epoch"])][name]
            assert float(row["value"]) == float(value)
            if row["statistic"] == "intrinsic_dimension" and row["layer"] != "mean":
                assert row["value"].isdecimal()
        by_layer = [float(r["value"]) for r in rows[:6:2]]
        assert float(rows[6]["value"]) == pytest.approx(np.mean(by_layer), rel=1e-15)

    def test_the_values_are_those_of_the_probe_and_then_it_is_reset(self, tmp_path):
        model = make_model()
        probe, other = make_probe(model), make_probe(model)
        recorder = Recorder(tmp_path, probe)
        run_epoch(model, 0)
        expected = other.compute()
        values = recorder.record()
        assert {k: v for k, v in values.items() if not k.endswith("/mean")} == expected
        with pytest.warns(UserWarning, match="nothing was observed"):
            assert probe.compute() == {}

    def test_without_reset_it_goes_on_accumulating(self, tmp_path):
        model = make_model()
        probe = make_probe(model)
        recorder = Recorder(tmp_path, probe)
        run_epoch(model, 0)
        recorder.record(reset=False)
        run_epoch(model, 1)
        recorder.record(reset=False)
        assert int(probe["train", "0"]["saturation"].count) == 80

    def test_epoch_numbers(self, tmp_path):
        with Recorder(tmp_path) as recorder:
            assert recorder.next_epoch == 0
            for epoch in (None, 5, None):
                recorder.add_scalar("loss", 1.0)
                recorder.record(epoch)
            assert recorder.next_epoch == 7
            recorder.add_scalar("loss", 2.0)
            with pytest.raises(ValueError, match="above the last recorded one, 6, got 6"):
                recorder.record(6)
            for wrong in (-1, 1.5, True, "7"):
                with pytest.raises(ValueError, match=f"got {wrong!r}"):
                    recorder.record(wrong)
            recorder.record()
        assert [(row["epoch"], row["value"]) for row in read_csv(tmp_path)] == [
            ("0", "1.0"),
            ("5", "1.0"),
            ("6", "1.0"),
            ("7", "2.0"),
        ]

    def test_scalars(self, tmp_path):
        recorder = Recorder(tmp_path)
        recorder.add_scalar("loss", torch.tensor([0.1]))
        recorder.add_scalar("loss", 0.25)
        recorder.add_scalar("rank", 3, stage="eval", layer="head")
        assert recorder.record() == {"loss": torch.tensor(0.25), "rank/eval/head": torch.tensor(3.0)}
        with pytest.warns(UserWarning, match="nothing to record"):
            assert recorder.record() == {}
        assert recorder.next_epoch == 1
        with pytest.raises(TypeError, match="expected 'loss' to be a number, got 'high'"):
            recorder.add_scalar("loss", "high")
        with pytest.raises(TypeError, match="expected 'loss' to be a number"):
            recorder.add_scalar("loss", torch.ones(2))
        with pytest.raises(ValueError, match="got ''"):
            recorder.add_scalar("", 1.0)
        recorder.add_scalar("late", 1.0)
        with pytest.warns(UserWarning, match="not kept: 'late'"):
            recorder.close()
        recorder.close()
        with pytest.raises(RuntimeError, match="is closed"):
            recorder.record()

    def test_a_scalar_may_not_take_a_metrics_name(self, tmp_path):
        recorder = Recorder(tmp_path, make_probe(make_model()))
        with pytest.raises(ValueError, match="'saturation'"):
            recorder.add_scalar("saturation", 1.0)

    def test_values_that_are_not_finite_survive(self, tmp_path):
        with Recorder(tmp_path) as recorder:
            for name, value in (("a", float("nan")), ("b", float("-inf")), ("c", 0.1 + 0.2)):
                recorder.add_scalar(name, value)
            recorder.record()
        assert [row["value"] for row in read_csv(tmp_path)] == ["nan", "-inf", "0.30000000000000004"]

    def test_names_with_commas_and_lines(self, tmp_path):
        with Recorder(tmp_path) as recorder:
            recorder.add_scalar('a,"b"\nc', 1.0)
            recorder.record()
        with Recorder(tmp_path, mode="resume") as recorder:
            assert recorder.next_epoch == 1
        assert read_csv(tmp_path)[0]["statistic"] == 'a,"b"\nc'

    def test_metrics_of_other_libraries_and_names_of_ones_own(self, tmp_path):
        model = make_model()
        probe = LayerProbe(model, {"s90": SaturationMetric(threshold=0.9), "average": MeanMetric()})
        with Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            run_epoch(model, 0)
            recorder.record()
        names = {row["statistic"] for row in read_csv(tmp_path)}
        assert names == {"s90", "average"}

    def test_what_is_no_number_is_left_out_of_the_table(self, tmp_path):
        metrics = [SpectrumMetric(), CovarianceMetric(), EigenspaceEmbeddingMetric(), PowerLawExponentMetric()]
        values = record(tmp_path, 1, metrics=metrics)
        assert values[0]["spectrum/train/0"].shape == (6,)
        assert {row["statistic"] for row in read_csv(tmp_path)} == {"power_law_exponent", "accuracy"}


class TestWriters:
    def test_all_at_once(self, tmp_path, capsys):
        record(tmp_path, 2, ALL)
        assert len(read_csv(tmp_path)) == 2 * (2 * 4 * 2 + 1)
        assert [path.name for path in sorted((tmp_path / "arrays").iterdir())] == [
            "epoch-000000.npz",
            "epoch-000001.npz",
        ]
        assert len(list((tmp_path / "plots").glob("*.png"))) == 4
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1
        assert "Epoch 1" in capsys.readouterr().out

    def test_of_ones_own(self, tmp_path):
        keeper = Keeper()
        values = record(tmp_path, 2, ["csv", keeper])
        assert keeper.calls == [("open", tmp_path, None), ("close",)]
        assert [each.epoch for each in keeper.records] == [0, 1]
        assert keeper.records[1].values == values[1]
        assert len(keeper.records[0].rows) == 17
        assert keeper.records[0].moments["eval", "2"].num_features == 6
        assert keeper.records[0].statistics["saturation"]["threshold"] == 0.99

    @pytest.mark.parametrize(
        ("writers", "error", "message"),
        [
            (["csvs"], ValueError, "got 'csvs'; did you mean 'csv'"),
            (["csv", "csv"], ValueError, r"\['csv'\] more than once"),
            ([Keeper], TypeError, "the class Keeper; call it"),
            ([3], TypeError, "got int"),
        ],
    )
    def test_wrong_ones(self, writers, error, message, tmp_path):
        with pytest.raises(error, match=message):
            Recorder(tmp_path / "run", None, writers)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("writer", "package"),
        [("console", "rich"), ("tensorboard", "tensorboard"), ("plot", "matplotlib")],
    )
    def test_without_its_extra_it_is_named_and_nothing_is_touched(self, writer, package, monkeypatch, tmp_path):
        record(tmp_path, 1)
        before = contents(tmp_path)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"spectralmetrics\[{writer}\]"):
            Recorder(tmp_path, None, [writer], mode="overwrite")
        assert contents(tmp_path) == before

    def test_one_that_only_shows_and_fails_costs_no_record(self, tmp_path):
        class Failing(Writer):
            def write(self, record):
                if record.epoch == 1:
                    raise KeyError("broken")

        model = make_model()
        recorder = Recorder(tmp_path, make_probe(model), ["csv", Failing()])
        for epoch in range(3):
            run_epoch(model, epoch)
            if epoch == 1:
                with pytest.raises(
                    RuntimeError, match="epoch 1 is kept, but the writer 'Failing' failed: 'broken'"
                ):
                    recorder.record()
            else:
                recorder.record()
        assert [row["epoch"] for row in read_csv(tmp_path)[::16]] == ["0", "1", "2"]


class TestModes:
    def test_create_refuses_records_and_changes_no_byte(self, tmp_path):
        record(tmp_path, 2, ["csv", "arrays"])
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match=r"already holds records \(csv, arrays\); mode='resume'"):
            record(tmp_path, 2)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("writer", ["arrays", "tensorboard", "plot"])
    def test_create_refuses_records_of_any_writer(self, writer, tmp_path):
        record(tmp_path, 1, [writer])
        with pytest.raises(FileExistsError, match=writer):
            Recorder(tmp_path)

    def test_create_takes_a_directory_with_other_files(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        Recorder(tmp_path).close()
        record(tmp_path, 1)  # nothing has been recorded
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_resume_goes_on(self, tmp_path):
        writers = ["csv", "arrays"]
        record(tmp_path / "parts", 2, writers)
        record(tmp_path / "parts", 3, writers, mode="resume")
        record(tmp_path / "parts", 3, writers, mode="resume")
        record(tmp_path / "whole", 3, writers)
        assert (tmp_path / "parts/records.csv").read_bytes() == (tmp_path / "whole/records.csv").read_bytes()
        for epoch in range(3):
            name = f"arrays/epoch-{epoch:06d}.npz"
            left, right = np.load(tmp_path / "parts" / name), np.load(tmp_path / "whole" / name)
            assert left.files == right.files
            assert all(np.array_equal(left[key], right[key]) for key in left.files)

    def test_resume_begins_where_nothing_is(self, tmp_path):
        record(tmp_path / "run", 2, mode="resume")
        assert read_csv(tmp_path / "run")[-1]["epoch"] == "1"

    def test_resume_takes_back_a_record_that_not_all_have(self, tmp_path):
        writers = ["csv", "arrays", "plot"]
        record(tmp_path, 3, writers)
        table = (tmp_path / "records.csv").read_text().splitlines(keepends=True)
        (tmp_path / "records.csv").write_text("".join(table[: 1 + 2 * 17]))  # killed before it was replaced
        manifest = (tmp_path / "recording.json").read_text()
        (tmp_path / "recording.json").write_text(manifest.replace('"last_epoch": 2', '"last_epoch": 1'))
        with Recorder(tmp_path, None, writers, mode="resume") as recorder:
            assert recorder.next_epoch == 2
        assert not (tmp_path / "arrays/epoch-000002.npz").exists()
        assert not list((tmp_path / "plots").glob("*000002.png"))
        assert (tmp_path / "arrays/epoch-000001.npz").exists()

    def test_resume_refuses_to_take_back_more_than_a_kill_can_cost(self, tmp_path):
        record(tmp_path, 3, ["csv", "arrays"])
        (tmp_path / "records.csv").unlink()
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="the writer 'csv' up to epoch 2, got none"):
            Recorder(tmp_path, None, ["csv", "arrays"], mode="resume")
        assert contents(tmp_path) == before

    def test_resume_without_a_writer_whose_files_were_removed(self, tmp_path):
        record(tmp_path, 2, ["csv", "arrays"])
        shutil.rmtree(tmp_path / "arrays")
        record(tmp_path, 3, ["csv"], mode="resume")
        assert read_csv(tmp_path)[-1]["epoch"] == "2"

    def test_resume_where_no_value_is_a_number(self, tmp_path):
        model = make_model()
        for epoch in range(3):
            probe = LayerProbe(model, SpectrumMetric())
            with probe, Recorder(tmp_path, probe, ["csv", "arrays"], mode="resume") as recorder:
                assert recorder.next_epoch == epoch
                run_epoch(model, epoch)
                recorder.record()

    def test_a_change_of_directory_does_not_split_the_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        with Recorder("run") as recorder:
            for where in (tmp_path, tmp_path / "other"):
                monkeypatch.chdir(where)
                recorder.add_scalar("loss", 1.0)
                recorder.record()
        assert len(read_csv(tmp_path / "run")) == 2

    def test_writers_may_join_and_pause(self, tmp_path):
        record(tmp_path, 2, ["csv"])
        record(tmp_path, 4, ["csv", "arrays"], mode="resume")
        record(tmp_path, 6, ["csv"], mode="resume")
        record(tmp_path, 8, ["csv", "arrays"], mode="resume")
        assert list(dict.fromkeys(row["epoch"] for row in read_csv(tmp_path))) == [str(k) for k in range(8)]
        saved = sorted(path.name for path in (tmp_path / "arrays").iterdir())
        assert [int(name[6:12]) for name in saved] == [2, 3, 6, 7]

    @pytest.mark.parametrize(
        ("before", "after"), [(["csv"], ["csv", "arrays"]), (["csv", "plot"], ["csv"]), (["arrays"], ["csv"])]
    )
    def test_resume_without_a_manifest_goes_by_what_is_there(self, before, after, tmp_path):
        record(tmp_path, 3, before)
        (tmp_path / "recording.json").unlink()
        kept = {
            name: text for name, text in contents(tmp_path).items() if text and name.suffix in (".csv", ".npz")
        }
        assert kept
        with Recorder(tmp_path, None, after, mode="resume") as recorder:
            assert recorder.next_epoch == 3
        assert kept.items() <= contents(tmp_path).items()

    @pytest.mark.parametrize("writers", [["tensorboard"], ["plot"], []])
    def test_resume_without_a_writer_that_keeps_records(self, writers, tmp_path):
        record(tmp_path, 2, writers)
        with Recorder(tmp_path, None, writers, mode="resume") as recorder:
            assert recorder.next_epoch == 2

    def test_resume_refuses_other_settings(self, tmp_path):
        record(tmp_path, 1, metrics=[SaturationMetric(threshold=0.99)])
        with pytest.raises(ValueError, match=r"with threshold=0\.99, got threshold=0\.9"):
            record(tmp_path, 2, metrics=[SaturationMetric(threshold=0.9)], mode="resume")

    def test_overwrite_removes_records_and_nothing_else(self, tmp_path, caplog):
        record(tmp_path, 3, ALL)
        (tmp_path / "plots" / "mine.png").write_text("mine")
        (tmp_path / "checkpoint.pt").write_text("mine")
        record(tmp_path, 1, mode="overwrite")
        assert caplog.messages == [f"removing the records of {tmp_path}, up to epoch 2"]
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {"records.csv", "recording.json", "plots/mine.png", "checkpoint.pt"}
        assert {row["epoch"] for row in read_csv(tmp_path)} == {"0"}

    @pytest.mark.parametrize("mode", ["create", "resume", "overwrite"])
    def test_nothing_is_said_where_no_record_was(self, mode, tmp_path, caplog):
        record(tmp_path, 1, ALL, mode=mode)
        assert caplog.messages == []

    def test_wrong_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="got 'append'"):
            Recorder(tmp_path / "run", mode="append")
        with pytest.raises(TypeError, match="got Linear"):
            Recorder(tmp_path / "run", nn.Linear(2, 2))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("text", ["not a table\n", "epoch,stage,layer,statistic,value\n1,2\n"])
    def test_resume_of_a_table_that_is_none(self, text, tmp_path):
        (tmp_path / "records.csv").write_text(text)
        with pytest.raises(ValueError, match=r"records\.csv"):
            Recorder(tmp_path, mode="resume")
        with pytest.raises(FileExistsError):
            Recorder(tmp_path)
        assert (tmp_path / "records.csv").read_text() == text

    def test_resume_of_a_manifest_that_is_none(self, tmp_path):
        (tmp_path / "recording.json").write_text("{")
        with pytest.raises(ValueError, match=r"recording\.json"):
            Recorder(tmp_path, mode="resume")


class TestRepeated:
    """A failed record is kept by no writer, and the same epoch can be recorded again."""

    @pytest.mark.parametrize("broken", ["csv", "arrays"])
    def test_after_a_writer_that_keeps_records_fails(self, broken, tmp_path, monkeypatch):
        model = make_model()
        writers = make_writers(["csv", "arrays", "tensorboard"])
        recorder = Recorder(tmp_path, make_probe(model), writers)
        run_epoch(model, 0)
        recorder.record()
        run_epoch(model, 1)
        (writer,) = [each for each in writers if each.name == broken]
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write", lambda record: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="cannot record epoch 1"):
                recorder.record()
        assert not (tmp_path / "arrays/epoch-000001.npz").exists()
        assert {row["epoch"] for row in read_csv(tmp_path)} == {"0"}
        run_epoch(model, 2)  # training continues
        values = recorder.record()
        recorder.close()
        rows = read_csv(tmp_path)
        assert len(rows) == 2 * 16
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        for row in rows[16:]:
            tag = f"{row['statistic']}/{row['stage']}/{row['layer']}"
            curve = events.Scalars(tag)
            assert [event.step for event in curve] == [0, 1]
            assert curve[1].value == pytest.approx(float(values[tag]))

    @pytest.mark.parametrize("failing", [0, 1])
    @pytest.mark.parametrize("method", ["write", "flush"])
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
    def test_after_tensorboard_could_not_write(self, method, failing, tmp_path, monkeypatch):
        model = make_model()
        recorder = Recorder(tmp_path, make_probe(model), ["csv", "tensorboard"])
        values, threads = [], {*threading.enumerate()}
        for epoch in range(3):
            run_epoch(model, epoch)
            if epoch == failing:
                with monkeypatch.context() as patch:
                    patch.setattr(RecordWriter, method, no_space)
                    for again in range(2):
                        with pytest.raises(OSError, match=f"cannot record epoch {epoch}, .*No space left"):
                            recorder.record()
                        # If TensorBoard cannot make a file, it leaves a thread that cannot be ended.
                        assert again or not failing or {*threading.enumerate()} <= threads
            values.append(recorder.record())
        recorder.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        curve = events.Scalars("saturation/train/0")
        assert [event.step for event in curve] == [0, 1, 2]
        expected = [float(each["saturation/train/0"]) for each in values]
        assert [event.value for event in curve] == pytest.approx(expected)

    @pytest.mark.parametrize("is_full", [False, True], ids=["one file", "the disk"])
    @pytest.mark.parametrize("failing", [0, 1])
    def test_what_others_wrote_of_it_is_taken_back(self, failing, is_full, tmp_path, monkeypatch):
        """At once or, if that fails too, before the next record."""
        model = make_model()
        writers = make_writers(["history", "csv"])
        with Recorder(tmp_path, make_probe(model, HistoryMetric()), writers) as recorder:
            for epoch in range(3):
                run_epoch(model, epoch)
                recorder.add_scalar("loss", epoch)
                if epoch == failing:
                    with monkeypatch.context() as patch:
                        patch.setattr(writers[1], "write", no_space)
                        if is_full:
                            patch.setattr(HistoryWriter, "discard", no_space)
                        with pytest.raises(OSError, match=f"cannot record epoch {2 * epoch}, .*No space"):
                            recorder.record(2 * epoch)
                recorder.record(2 * epoch + 1)  # not the number that failed
        rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
        assert [int(row["epoch"]) for row in rows] == [1] * 12 + [3] * 12 + [5] * 12
        assert [row["epoch"] for row in read_csv(tmp_path)] == ["1", "3", "5"]

    @pytest.mark.parametrize(
        ("table", "edit"),
        [
            ("records.csv", lambda text: text.replace(b"\n", b"\r\n")),
            ("records.csv", lambda text: text[:-1]),
            ("history.csv", lambda text: text.replace(b"train", b'"train"')),
        ],
    )
    def test_after_an_editor_saved_a_table(self, table, edit, tmp_path):
        """With other ends of lines or with quotes: no byte of an earlier record gets lost."""
        model, tables = make_model(), []
        for edits in (False, True):
            folder = tmp_path / str(edits)
            with Recorder(folder, make_probe(model, HistoryMetric()), ["history", "csv"]) as recorder:
                for epoch in range(3):
                    run_epoch(model, epoch)
                    recorder.add_scalar("loss", epoch)
                    if edits and epoch == 2:
                        (folder / table).write_bytes(edit((folder / table).read_bytes()))
                    recorder.record()
            tables.append(
                [
                    list(csv.reader((folder / table).read_text().splitlines()))
                    for table in ("records.csv", "history.csv")
                ]
            )
        assert tables[0] == tables[1]

    def test_after_the_table_was_damaged(self, tmp_path):
        with Recorder(tmp_path) as recorder:
            recorder.add_scalar("loss", 0.5)
            recorder.record()
            table = tmp_path / "records.csv"
            table.write_bytes(table.read_bytes()[:-9])
            before = table.read_bytes()
            recorder.add_scalar("loss", 0.5)
            with pytest.raises(ValueError, match=r"expected a record in line 2 of .*records.csv, got '0,,,los"):
                recorder.record()
            assert table.read_bytes() == before
            table.unlink()
            recorder.record()
        assert [row["epoch"] for row in read_csv(tmp_path)] == ["1"]

    def test_after_the_manifest_could_not_be_written(self, tmp_path):
        recorder = Recorder(tmp_path)
        (tmp_path / ".recording.json.tmp").mkdir()
        for epoch in range(2):
            recorder.add_scalar("loss", epoch)
            recorder.record()
        recorder.close()
        (tmp_path / ".recording.json.tmp").rmdir()
        assert [row["epoch"] for row in read_csv(tmp_path)] == ["0", "1"]
        with Recorder(tmp_path, mode="resume") as recorder:
            assert recorder.next_epoch == 2

    def test_after_an_interrupt_while_showing(self, tmp_path):
        class Slow(Writer):
            def write(self, record):
                if record.epoch == 0:
                    raise KeyboardInterrupt

        model = make_model()
        probe = make_probe(model)
        recorder = Recorder(tmp_path, probe, ["csv", Slow()])
        for epoch in range(2):
            run_epoch(model, epoch)
            with pytest.raises(KeyboardInterrupt) if epoch == 0 else contextlib.nullcontext():
                recorder.record()
        assert [row["epoch"] for row in read_csv(tmp_path)[::16]] == ["0", "1"]
        assert len(read_csv(tmp_path)) == 32

    def test_after_an_interrupt_while_keeping(self, tmp_path, monkeypatch):
        recorder = Recorder(tmp_path, None, ["csv", "arrays"])
        recorder.add_scalar("loss", 0.0)
        replace = os.replace

        def interrupted(source, target):
            replace(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                recorder.record()
        recorder.record()
        assert len(read_csv(tmp_path)) == 1


def test_a_statistic_that_fails_costs_neither_the_others_nor_the_arrays(tmp_path):
    model = make_model()
    probe = make_probe(model, [CovarianceMetric(unbiased=True), SaturationMetric()])
    recorder = Recorder(tmp_path, probe, ["csv", "arrays"])
    model(torch.randn(1, 6))
    with pytest.warns(UserWarning, match="'covariance' of '0' .*at least 2 observations"):
        values = recorder.record()
    assert set(values) == {f"saturation/train/{layer}" for layer in ("0", "1", "2", "mean")}
    with np.load(tmp_path / "arrays/epoch-000000.npz", allow_pickle=False) as arrays:
        assert int(arrays["train/2/count"]) == 1


def test_only_failing_statistics_still_leave_arrays(tmp_path):
    model = make_model()
    recorder = Recorder(tmp_path, make_probe(model, [CovarianceMetric(unbiased=True)]), ["csv", "arrays"])
    model(torch.randn(1, 6))
    with pytest.warns(UserWarning, match="at least 2 observations"):
        assert recorder.record() == {}
    assert recorder.next_epoch == 1


def test_several_numbers_of_one_metric(tmp_path):
    model = make_model()
    probe = LayerProbe(model, {"range": MinMaxMetric(MeanMetric())})
    recorder = Recorder(tmp_path, probe)
    run_epoch(model, 0)
    recorder.record()
    assert {row["statistic"] for row in read_csv(tmp_path)} == {"range_raw", "range_min", "range_max"}


def test_names_that_would_be_misread(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"without '.' and '/', no attribute .* got 'val/SaturationMetric'"):
        LayerProbe(model, MetricCollection([SaturationMetric()], prefix="val/"))
    with pytest.raises(ValueError, match="got 'mean'"):
        Recorder(tmp_path).add_scalar("loss", 1.0, layer="mean")


def test_a_loss_that_has_a_gradient(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.add_scalar("loss", torch.ones((), requires_grad=True) * 0.5)
    assert recorder.record(np.int64(3)) == {"loss": torch.tensor(0.5)}
    assert recorder.next_epoch == 4


def test_all_writers_are_closed_also_if_one_fails(tmp_path):
    class Failing(Writer):
        def close(self):
            raise KeyError("broken")

    keeper = Keeper()
    recorder = Recorder(tmp_path, None, [Failing(), keeper])
    with pytest.raises(KeyError):
        recorder.close()
    assert keeper.calls[-1] == ("close",)


class TestDisk:
    @pytest.mark.parametrize("writers", [["csv"], ["arrays", "csv"]])
    def test_a_failed_write_loses_nothing_and_can_be_repeated(self, writers, tmp_path, monkeypatch):
        model = make_model()
        probe = make_probe(model)
        recorder = Recorder(tmp_path, probe, writers)
        run_epoch(model, 0)
        recorder.record()
        before = contents(tmp_path)
        run_epoch(model, 1)
        recorder.add_scalar("accuracy", 0.5)

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                OSError, match="cannot record epoch 1, earlier records are intact: No space left"
            ):
                recorder.record()
        assert contents(tmp_path) == before
        values = recorder.record()
        assert values["accuracy"] == 0.5
        assert int(probe["train", "0"]["saturation"].count) == 0
        rows = read_csv(tmp_path)
        record(tmp_path / "other", 2)
        expected = read_csv(tmp_path / "other")
        assert [r for r in rows if r["layer"]] == [r for r in expected if r["layer"]]

    def test_a_full_disk(self, tmp_path):
        """The operating system refuses to write beyond a limit."""
        pytest.importorskip("resource", reason="Windows has no limit on the size of a file")
        worker = processes.fresh().Process(target=_record_until_the_disk_is_full, args=(tmp_path,))
        worker.start()
        worker.join(120)
        assert worker.exitcode == 0
        rows = read_csv(tmp_path)
        last = int(rows[-1]["epoch"])
        assert last > 0
        assert len(rows) == 17 * (last + 1)
        record(tmp_path, last + 3, mode="resume")
        assert len(read_csv(tmp_path)) == 17 * (last + 3)

    def test_the_file_is_named_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=re.escape(f"left on device: '{tmp_path / 'recording.json'}'")):
            Recorder(tmp_path)
        monkeypatch.undo()
        with Recorder(tmp_path, None, ["csv", "report"]) as recorder:
            recorder.add_scalar("loss", 1.0)
            recorder.record()
            monkeypatch.setattr(os, "fsync", no_space)  # and leaving the context raises nothing
            recorder.add_scalar("loss", 2.0)
            with pytest.raises(OSError, match=re.escape(f"left on device: '{tmp_path / 'records.csv'}'")):
                recorder.record()
            recorder._scalars.clear()
        assert (tmp_path / "report.html").exists()

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            Recorder(tmp_path / "file" / "run")

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows protects files, not directories")
    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_is_read_only(self, tmp_path):
        record(tmp_path, 1)
        before = contents(tmp_path)
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError):
                record(tmp_path, 2, mode="resume")
        finally:
            tmp_path.chmod(0o700)
        assert contents(tmp_path) == before


def _record_until_the_disk_is_full(directory):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        record(directory, 1000)
    except OSError as error:
        os._exit(0 if "earlier records are intact" in str(error) else 2)
    os._exit(1)


def test_a_resumed_run_s_event_file_comes_after_all_others(tmp_path):
    """TensorBoard reads files in order of their names; within a second, process numbers decide that order."""
    model = make_model(2)
    for epoch in range(3):
        with Recorder(tmp_path, make_probe(model), ["tensorboard"], mode="resume") as recorder:
            run_epoch(model, epoch, rows=4)
            recorder.record()
        (events,) = (tmp_path / "tensorboard").glob(f"events.*.{os.getpid()}.*")
        events.rename(str(events).replace(f".{os.getpid()}.", f".{10**9 - epoch}."))
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("saturation/train/0")] == [0, 1, 2]
