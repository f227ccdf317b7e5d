"""Runs written by callbacks: records, windows within an epoch, and the observations left in the probe."""

import csv
import errno
import os
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from spectralmetrics import (
    CovarianceTraceMetric,
    HistoryMetric,
    LayerProbe,
    Recorder,
    SaturationMetric,
    Writer,
    read_records,
    summarise_run,
    write_report,
)
from spectralmetrics.integrations import lightning, transformers
from spectralmetrics.recording.writers import ReportWriter
from tests.integrations import test_transformers_forwards as hf
from tests.integrations.lightning_module import Classifier, digits, make_trainer
from tests.integrations.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(folder, stage, statistic, layer):
    return {
        row["epoch"]: row["value"]
        for row in read_records(folder)
        if (row["stage"], row["statistic"], row["layer"], row["step"]) == (stage, statistic, layer, None)
    }


def column(folder, key):
    with open(folder / "metrics.csv", newline="") as file:
        found = [row.get(key) for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


def test_a_fit_of_lightning_is_kept(tmp_path):
    run, module = tmp_path / "run", Classifier(0.0)
    callback = lightning.LayerProbeCallback(
        {"rows": Rows(), "saturation": SaturationMetric()}, folds=2, recorder=run
    )
    trainer = make_trainer(tmp_path / "log", callback, check_val_every_n_epoch=2, max_epochs=3)
    trainer.fit(module)
    assert rows(run, "train", "rows", "model.0") == {0: 320, 1: 320, 2: 320}
    assert rows(run, "eval", "rows", "model.0") == {1: 160}  # no other epoch repeats this validation
    saturations = [
        row
        for row in read_records(run)
        if (row["layer"], row["statistic"], row["step"]) == ("model.0", "saturation", None)
    ]
    assert all(row["low"] <= row["value"] <= row["high"] for row in saturations)
    assert "model.0" in str(callback.probe.summary("eval"))
    assert callback.probe.intervals("train")
    assert "model.2" in str(summarise_run(run, stage="train"))
    assert write_report(run, tmp_path / "report.html").stat().st_size > 10_000
    assert not any(each._forward_hooks for each in module.modules())
    with pytest.raises(FileExistsError):  # a new fit is another run
        make_trainer(tmp_path / "log", lightning.LayerProbeCallback(recorder=run)).fit(module)
    (found,) = trainer.validate(module)  # one record more
    assert rows(run, "eval", "rows", "model.0") == {1: 160, 3: found["rows/eval/model.0"]}
    assert len(rows(run, "train", "rows", "model.0")) == 3


class Crash(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, 4):
            raise KeyError("a crash")


def test_a_fit_of_lightning_goes_on_with_its_records(tmp_path):
    values = []
    for crashes in (False, True):
        folder = tmp_path / str(crashes)
        run = folder / "run"
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callback = lightning.LayerProbeCallback(
            {"rows": Rows(), "variance": CovarianceTraceMetric()}, recorder=run
        )
        others = [Crash()] if crashes else []
        trainer = make_trainer(
            folder, None, callbacks=[callback, checkpoints, *others], max_epochs=4, enable_checkpointing=True
        )
        if crashes:
            with pytest.raises(KeyError):
                trainer.fit(Classifier(0.1))
            # The second epoch was recorded, but its checkpoint is missing.
            assert list(rows(run, "train", "rows", "model.0")) == [0, 1]
            callback = lightning.LayerProbeCallback(
                {"rows": Rows(), "variance": CovarianceTraceMetric()}, recorder=run
            )
            trainer = make_trainer(folder, callback, max_epochs=4)
            trainer.fit(Classifier(0.1), ckpt_path=folder / "epoch=0.ckpt", weights_only=False)
        else:
            trainer.fit(Classifier(0.1))
        values.append({stage: rows(run, stage, "variance", "model.2") for stage in ("train", "eval")})
    for stage in ("train", "eval"):
        assert list(values[1][stage]) == [0, 1, 2, 3]
        assert values[1][stage] == pytest.approx(values[0][stage], rel=1e-9)


def test_an_epoch_of_lightning_is_the_same_with_windows(tmp_path):
    """Means of windows are logged at steps; the values of an epoch cover all of it."""
    module = Classifier(0.0)
    callback = lightning.LayerProbeCallback(
        {"rows": Rows(), "variance": CovarianceTraceMetric()}, layers="model.0", every_n_steps=2
    )
    make_trainer(tmp_path, callback, log_every_n_steps=4, max_epochs=1, accumulate_grad_batches=1).fit(module)
    # Ten batches of 32, every second one observed; windows end after the fourth and the eighth.
    assert column(tmp_path, "rows/train/mean") == [64, 64, 160]
    assert column(tmp_path, "rows/train/model.0") == [160]
    plain = lightning.LayerProbeCallback(
        {"rows": Rows(), "variance": CovarianceTraceMetric()}, layers="model.0", every_n_steps=2
    )
    make_trainer(tmp_path / "plain", plain, log_every_n_steps=100, max_epochs=1).fit(module)
    epoch = column(tmp_path, "variance/train/model.0")
    assert epoch == pytest.approx(column(tmp_path / "plain", "variance/train/model.0"), rel=1e-12)


def test_each_layer_at_steps_when_asked_for(tmp_path):
    callback = lightning.LayerProbeCallback({"rows": Rows()}, each_layer=True)
    make_trainer(tmp_path, callback, log_every_n_steps=5, max_epochs=1).fit(Classifier(0.0))
    assert column(tmp_path, "rows/train/model.2") == [160, 160, 320]


def steps(callback, stage, layer):
    found = callback.probe.history(stage).rows
    return [(row.step, row.observations) for row in found if row.layer == layer]


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_history_of_lightning_has_the_trainer_s_steps(every, tmp_path):
    callback = lightning.LayerProbeCallback(HistoryMetric())
    arguments = {"accumulate_grad_batches": 2, "log_every_n_steps": every, "max_epochs": 2}
    make_trainer(tmp_path, callback, **arguments).fit(Classifier(0.1))
    # Ten batches of 32 an epoch, two per step; the probe holds the last epoch.
    assert steps(callback, "train", "model.2") == [(step, 32) for step in range(5, 10) for _ in range(2)]


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_history_of_transformers_has_the_trainer_s_steps(every, tmp_path):
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "logging_steps": every}
    trainer = hf.make_trainer(tmp_path, hf.Net(), **arguments)
    callback = transformers.LayerProbeCallback(trainer, HistoryMetric())
    trainer.add_callback(callback)
    trainer.train()
    # Twelve batches of 4 an epoch, two per step.
    assert steps(callback, "train", "head") == [(step, 4) for step in range(6, 12) for _ in range(2)]


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_each_loader_has_values_of_its_own(run, tmp_path):
    class Several(Classifier):
        def val_dataloader(self):
            return [DataLoader(digits(0, count), 40) for count in (100, 30, 70)]

        test_dataloader = val_dataloader

        def validation_step(self, batch, index, dataloader_idx):
            self.model(batch[0])

        test_step = validation_step

    callback = lightning.LayerProbeCallback({"rows": Rows(), "variance": CovarianceTraceMetric()})
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    module = Several(0.0)
    getattr(trainer, run)(module)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert found["rows/eval/model.0"] == 200
    for number, count in enumerate((100, 30, 70)):
        assert found[f"rows/eval/model.0/dataloader_idx_{number}"] == count
        assert found[f"rows/eval/mean/dataloader_idx_{number}"] == count
    with LayerProbe(module, {"variance": CovarianceTraceMetric()}) as probe, torch.no_grad():
        module.eval()
        for count in (100, 30, 70):
            module.model(digits(0, count).tensors[0])
        whole = float(probe.compute("eval")["variance/eval/model.2"])
    assert found["variance/eval/model.2"] == pytest.approx(whole, rel=1e-9)


def test_a_checkpoint_leaves_windows_alone(tmp_path):
    class Saving(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    callback = lightning.LayerProbeCallback(
        {"rows": Rows(), "variance": CovarianceTraceMetric()}, layers="model.0"
    )
    make_trainer(tmp_path, None, callbacks=[callback, Saving()], log_every_n_steps=3, max_epochs=1).fit(
        Classifier(0.0)
    )
    assert column(tmp_path, "rows/train/mean") == [96, 96, 96, 320]
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=False)["callbacks"]
    (state,) = (each["probe"] for each in saved.values() if "probe" in each)
    with LayerProbe(
        Classifier(0.0), {"rows": Rows(), "variance": CovarianceTraceMetric()}, layers="model.0"
    ) as probe:
        probe.persistent()
        probe.load_state_dict(state)
        assert probe.compute("train")["rows/train/model.0"] == 5 * 32


def test_a_training_of_transformers_is_kept(tmp_path):
    run = tmp_path / "run"
    trainer = hf.make_trainer(tmp_path, hf.Net(), logging_steps=2)
    metrics = {"rows": Rows(), "variance": CovarianceTraceMetric()}
    callback = transformers.LayerProbeCallback(trainer, metrics, folds=2, recorder=run)
    trainer.add_callback(callback)
    trainer.train()
    assert rows(run, "train", "rows", "backbone") == {0: hf.TRAIN, 1: hf.TRAIN}
    assert rows(run, "eval", "rows", "backbone") == {0: hf.EVALUATION, 1: hf.EVALUATION}
    # Windows of two batches of 16; the last window of an epoch ends with it.
    assert hf.logged(trainer, "rows/mean") == [32, 48, 16, 32, 48]
    assert hf.logged(trainer, "rows/backbone") == [48, 48]
    assert "head" in str(callback.probe.summary("eval"))
    assert np.isfinite(list(rows(run, "eval", "variance", "mean").values())).all()
    trainer.evaluate()
    assert list(rows(run, "eval", "rows", "backbone")) == [0, 1, 2]
    assert write_report(run, tmp_path / "report.html").exists()
    again = hf.make_trainer(tmp_path, hf.Net())
    again.add_callback(transformers.LayerProbeCallback(again, metrics, recorder=run))
    with pytest.raises(FileExistsError):
        again.train()


def test_a_training_of_transformers_goes_on_with_its_records(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyError("a crash")

    values = []
    for crashes in (False, True):
        folder = tmp_path / str(crashes)

        def train(crashes, folder=folder, **how):
            torch.manual_seed(0)
            trainer = hf.make_trainer(
                folder, hf.Net(), num_train_epochs=4, save_strategy="epoch", save_only_model=False
            )
            callback = transformers.LayerProbeCallback(
                trainer, {"variance": CovarianceTraceMetric()}, recorder=folder / "run"
            )
            trainer.add_callback(callback)
            if crashes:
                trainer.add_callback(Failing())
            trainer.train(**how)

        if crashes:
            with pytest.raises(KeyError):
                train(True)
            train(False, resume_from_checkpoint=str(folder / "checkpoint-3"))  # trains an epoch again
        else:
            train(False)
        values.append({stage: rows(folder / "run", stage, "variance", "head") for stage in ("train", "eval")})
    for stage in ("train", "eval"):
        assert list(values[1][stage]) == [0, 1, 2, 3]
        assert values[1][stage] == pytest.approx(values[0][stage], rel=1e-5)


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_a_recorder_of_one_s_own(kind, tmp_path):
    def make(probe):
        return Recorder(tmp_path / "run", probe, ["csv", "console"], mode="resume")

    if kind == "lightning":
        trainer = make_trainer(tmp_path, lightning.LayerProbeCallback({"rows": Rows()}, recorder=make))
        trainer.validate(Classifier(0.0))
        trainer.fit(Classifier(0.0))
        expected = {0: 160, 1: 160, 2: 160}
        layer = "model.0"
    else:
        trainer = hf.make_trainer(tmp_path, hf.Net())
        trainer.add_callback(transformers.LayerProbeCallback(trainer, {"rows": Rows()}, recorder=make))
        trainer.evaluate()
        trainer.train()
        expected = {0: 20, 1: 20, 2: 20}
        layer = "head"
    assert rows(tmp_path / "run", "eval", "rows", layer) == expected
    assert not (tmp_path / "run" / "arrays").exists()


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_a_recorder_that_overwrites(kind, tmp_path):
    """One recorder for a training and the evaluations around it; a new training gets the next one."""
    run, made = tmp_path / "run", []

    def make(probe):
        made.append(Recorder(run, probe, ["csv", ReportWriter(refresh=9)], mode="overwrite"))
        return made[-1]

    if kind == "lightning":
        callback = lightning.LayerProbeCallback({"rows": Rows()}, recorder=make)
        each = {"save_top_k": -1, "save_on_train_epoch_end": True, "enable_version_counter": False}
        saving = ModelCheckpoint(tmp_path, "{epoch}", **each)

        def trainer():
            return make_trainer(tmp_path, None, callbacks=[callback, saving], enable_checkpointing=True)

        def evaluate():
            trainer().validate(Classifier(0.0))

        def train(checkpoint=None):
            trainer().fit(Classifier(0.0), ckpt_path=checkpoint, weights_only=False)

        layer, checkpoint = "model.0", tmp_path / "epoch=0.ckpt"
    else:
        trainer = hf.make_trainer(tmp_path, hf.Net(), save_strategy="epoch")
        trainer.add_callback(transformers.LayerProbeCallback(trainer, {"rows": Rows()}, recorder=make))
        evaluate, train, layer = trainer.evaluate, trainer.train, "head"
        checkpoint = str(tmp_path / "checkpoint-3")

    def epochs():
        assert 'data-refresh=""' in (run / "report.html").read_text()  # the page does not wait for more
        return tuple(list(rows(run, stage, "rows", layer)) for stage in ("train", "eval"))

    evaluate()
    train()
    evaluate()
    assert epochs() == ([1, 2], [0, 1, 2, 3])
    assert len(made) == 1
    train()
    assert epochs() == ([0, 1], [0, 1])
    made[-1].add_scalar("mine", 3.0)  # the next evaluations and trainings use it, too
    evaluate()
    train(checkpoint)
    evaluate()
    assert epochs() == ([0, 1], [0, 1, 2, 3])
    assert {row["epoch"] for row in read_records(run) if row["statistic"] == "mine"} == {2}
    assert len(made) == 2


def test_what_is_no_recorder(tmp_path):
    words = "expected recorder to be a directory, a function from the probe to a Recorder, or None, got 3"
    with pytest.raises(TypeError, match=words):
        lightning.LayerProbeCallback(recorder=3)
    trainer = hf.make_trainer(tmp_path, hf.Net())
    with pytest.raises(TypeError, match=words):
        transformers.LayerProbeCallback(trainer, recorder=3)
    trainer.add_callback(transformers.LayerProbeCallback(trainer, recorder=lambda probe: "run"))
    with pytest.raises(TypeError, match="expected recorder to return a Recorder of the probe, got 'run'"):
        trainer.train()


def test_processes_that_a_strategy_starts_go_on_in_the_directory(tmp_path):
    callback = lightning.LayerProbeCallback(SaturationMetric(), recorder=tmp_path / "run")
    module = Classifier(0.0)
    make_trainer(tmp_path, callback, logger=False, strategy="ddp_spawn", devices=1).fit(module)
    make_trainer(tmp_path, callback, logger=False, strategy="ddp_spawn", devices=1).validate(module)
    assert list(rows(tmp_path / "run", "train", "saturation", "model.0")) == [0, 1]
    assert list(rows(tmp_path / "run", "eval", "saturation", "model.0")) == [0, 1, 2]
    with pytest.raises(FileExistsError, match="already holds records"):  # by another program
        make_trainer(tmp_path, lightning.LayerProbeCallback(recorder=tmp_path / "run")).fit(module)


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_a_full_disk_ends_no_training(kind, tmp_path, monkeypatch):
    """The first of three epochs is recorded, and so is the last; the second and its steps are left out."""
    run, is_full = tmp_path / "run", []
    sync = os.fsync

    def fsync(descriptor):
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    def fill(epoch):
        is_full[:] = [True] if epoch == 1 else []

    monkeypatch.setattr(os, "fsync", fsync)
    if kind == "lightning":

        class Filling(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                fill(trainer.current_epoch)

        callback = lightning.LayerProbeCallback({"rows": Rows()}, recorder=run)
        trainer = make_trainer(tmp_path / "log", None, callbacks=[Filling(), callback], max_epochs=3)
        train, layer, expected = lambda: trainer.fit(Classifier(0.0)), "model.0", 320
    else:

        class Filling(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                fill(round(state.epoch))

        trainer = hf.make_trainer(tmp_path, hf.Net(), num_train_epochs=3, logging_steps=2)
        callback = transformers.LayerProbeCallback(trainer, {"rows": Rows()}, recorder=run)
        trainer.add_callback(Filling())
        trainer.add_callback(callback)
        train, layer, expected = trainer.train, "backbone", hf.TRAIN
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    # One warning, not one for each step.
    (told,) = [str(each.message) for each in caught if "cannot record" in str(each.message)]
    assert "cannot record epoch 1, step" in told
    assert f"No space left on device: '{run / 'records.csv'}'" in told
    assert rows(run, "train", "rows", layer) == {0: expected, 2: expected}
    assert {row["epoch"] for row in read_records(run)} == {0, 2}
    assert {path.name for path in run.rglob("epoch-*.npz")} == {"epoch-000000.npz", "epoch-000002.npz"}


def test_a_writer_that_fails_ends_no_training(tmp_path):
    class Showing(Writer):
        def write(self, record):
            if record.epoch == 0:
                raise ArithmeticError("no picture")

    class Editing(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                with open(tmp_path / "run" / "records.csv", "a") as file:
                    file.write("a note")

    writers = ["csv", Showing()]
    callback = lightning.LayerProbeCallback(
        {"rows": Rows()}, recorder=lambda probe: Recorder(tmp_path / "run", probe, writers)
    )
    trainer = make_trainer(
        tmp_path / "log", None, callbacks=[Editing(), callback], max_epochs=3, log_every_n_steps=50
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(0.0))
    first, second = [str(each.message) for each in caught if "The training goes on" in str(each.message)]
    assert first.startswith("the record of epoch 0 is kept, but the writer 'Showing' failed: no picture.")
    assert second.startswith(
        f"expected a record in line 14 of {tmp_path / 'run' / 'records.csv'}, got 'a note'"
    )


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_a_training_after_one_that_was_cut_off_keeps_its_own_steps(kind, tmp_path):
    run, crashes = tmp_path / "run", [True]
    if kind == "lightning":

        class Failing(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if crashes and trainer.global_step == 13:
                    raise KeyError("a crash")

        callback = lightning.LayerProbeCallback({"rows": Rows()}, recorder=run)

        def train():
            callbacks = [callback, Failing()]
            make_trainer(tmp_path, None, callbacks=callbacks).fit(Classifier(0.0))

        each, last = 10, 13
    else:

        class Failing(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if crashes and state.global_step == 5:
                    raise KeyError("a crash")

        trainer = hf.make_trainer(tmp_path, hf.Net(), logging_steps=1)
        trainer.add_callback(transformers.LayerProbeCallback(trainer, {"rows": Rows()}, recorder=run))
        trainer.add_callback(Failing())
        train, each, last = trainer.train, 3, 5
    with pytest.raises(KeyError):
        train()
    crashes.clear()
    train()
    steps = {}
    for row in read_records(run):
        if row["step"] is not None and row["layer"] == "mean":
            steps.setdefault(row["epoch"], []).append(row["step"])
    first, second = list(range(1, each + 1)), list(range(each + 1, 2 * each + 1))
    assert steps == {0: first, 1: list(range(each + 1, last + 1)), 2: first, 3: second}
