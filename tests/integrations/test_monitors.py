"""Runs of both trainers from end to end: steps in records, monitors, stops, crashes, resumption, loggers."""

import copy
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from spectralmetrics import (
    CovarianceTraceMetric,
    Monitor,
    Recorder,
    SaturationMetric,
    read_records,
    write_report,
)
from spectralmetrics.integrations import lightning, transformers
from spectralmetrics.recording.saved import SavedRun
from tests.integrations import test_transformers_forwards as hf
from tests.integrations.lightning_module import Classifier, digits, make_trainer
from tests.integrations.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore")


def records(folder, stage, statistic, layer):
    return [
        (row["epoch"], row["step"], row["value"])
        for row in read_records(folder)
        if (row["stage"], row["statistic"], row["layer"]) == (stage, statistic, layer)
    ]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B without a network; it writes only into the test's folder."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # left by another test
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()  # else it would stay with this folder


class Louder(Classifier):
    """Forty batches an epoch; one layer is scaled by 30 at step ``at``."""

    def __init__(self, at=None, rate=0.01):
        super().__init__(rate)
        self.at = at

    def train_dataloader(self):
        return DataLoader(digits(0, 1280), 32)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == self.at:
            with torch.no_grad():
                for parameter in self.model[0].parameters():
                    parameter.mul_(30)


def monitor_of(probe, **how):
    return Monitor(probe, every=20, **how)


def metrics():
    return {"rows": Rows(), "variance": CovarianceTraceMetric(), "saturation": SaturationMetric()}


def test_a_fit_of_lightning_end_to_end(tmp_path, offline):
    run = tmp_path / "run"
    callback = lightning.LayerProbeCallback(
        metrics(),
        recorder=lambda probe: Recorder(run, probe, ["csv", "arrays", "report"]),
        monitor=lambda probe: monitor_of(probe, on_alarm=lambda alarm: None),
    )
    loggers = [
        TensorBoardLogger(tmp_path / "board"),
        WandbLogger(project="layers", save_dir=str(tmp_path), offline=True),
    ]
    trainer = make_trainer(
        tmp_path, callback, logger=loggers, log_every_n_steps=50, max_epochs=5, check_val_every_n_epoch=5
    )
    trainer.fit(Louder(at=110))
    loggers[1].experiment.finish()
    # 200 steps; values of the last 50 steps every 50 steps, and at the ends of epochs of 40 steps.
    found = records(run, "train", "rows", "model.0")
    steps = [(epoch, step, value) for epoch, step, value in found if step is not None]
    assert steps == [(1, 50, 320), (2, 100, 640), (3, 150, 960), (4, 200, 1280)]
    assert [value for _, step, value in found if step is None] == [1280] * 5
    assert [alarm.step for alarm in SavedRun(run).alarms] == [111]
    assert SavedRun(run).alarms[0].finding.layer == "model.0"
    assert callback.monitor.raised == SavedRun(run).alarms
    assert "step 111" not in (run / "report.html").read_text()  # the page is compressed
    assert 'data-refresh=""' in (run / "report.html").read_text()
    assert list((tmp_path / "board").rglob("events.*"))
    assert list(tmp_path.rglob("*.wandb"))
    assert callback.probe.findings("train") is not None


def test_lightning_stops(tmp_path):
    run = tmp_path / "run"
    callback = lightning.LayerProbeCallback(
        metrics(), recorder=run, monitor=lambda probe: monitor_of(probe, on_alarm="stop")
    )
    trainer = make_trainer(tmp_path, callback, max_epochs=5, log_every_n_steps=1000)
    trainer.fit(Louder(at=50))
    assert trainer.global_step == 60
    assert callback.monitor.should_stop
    assert [alarm.step for alarm in SavedRun(run).alarms] == [51]
    assert {epoch for epoch, *_ in records(run, "train", "rows", "model.0")} == {0, 1}


class Crash(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 105:
            raise KeyError("a crash")


def test_a_fit_of_lightning_goes_on_with_its_monitor(tmp_path):
    found = []
    for crashes in (False, True):
        folder = tmp_path / str(crashes)
        run = folder / "run"

        def callback(run=run):
            return lightning.LayerProbeCallback(
                metrics(), recorder=run, monitor=lambda probe: monitor_of(probe, on_alarm=lambda alarm: None)
            )

        how = {"max_epochs": 3, "log_every_n_steps": 25, "check_val_every_n_epoch": 3}
        checkpoints = ModelCheckpoint(
            folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
        )
        others = [checkpoints, *([Crash()] if crashes else [])]
        trainer = make_trainer(folder, None, callbacks=[callback(), *others], enable_checkpointing=True, **how)
        if crashes:
            with pytest.raises(KeyError):
                trainer.fit(Louder(at=83))
            assert [alarm.step for alarm in SavedRun(run).alarms] == [84]
            trainer = make_trainer(folder, callback(), **how)
            trainer.fit(Louder(at=83), ckpt_path=folder / "epoch=1.ckpt", weights_only=False)
        else:
            trainer.fit(Louder(at=83))
        found.append(
            (
                [alarm[:1] + alarm.finding[:3] for alarm in SavedRun(run).alarms],
                records(run, "train", "variance", "model.0"),
            )
        )
    assert found[0][0] == found[1][0] == [(84, "train", "model.0", "scale")]
    ends = [[(epoch, value) for epoch, step, value in rows if step is None] for _, rows in found]
    assert [epoch for epoch, _ in ends[1]] == [0, 1, 2]
    for (_, first), (_, second) in zip(*ends, strict=True):
        assert second == pytest.approx(first, rel=1e-6)


class Scaled(TrainerCallback):
    def __init__(self, model, at):
        self.model, self.at = model, at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(30)


def tokens(count):
    """Sequences of several lengths, padded."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = 3 + number % 6
        mask = torch.arange(8) < length
        words = torch.randint(5, 40, (8,), generator=generator) * mask
        rows.append({"input_ids": words, "attention_mask": mask.long(), "labels": number % 2})
    return rows


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    return BertForSequenceClassification(config)


def test_a_training_of_transformers_end_to_end(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run, data = tmp_path / "run", tokens(320)
    trainer = hf.make_trainer(
        tmp_path,
        bert(),
        eval_dataset=tokens(12),
        logging_steps=50,
        per_device_train_batch_size=8,
        num_train_epochs=5,
        report_to=["tensorboard", "wandb"],
        save_strategy="steps",
        save_steps=100,
    )
    trainer.train_dataset = data
    callback = transformers.LayerProbeCallback(
        trainer,
        metrics(),
        layers="*.output.dense",
        recorder=run,
        monitor=lambda probe: monitor_of(probe, on_alarm=lambda alarm: None),
    )
    trainer.add_callback(callback)
    layer = "bert.encoder.layer.0.output.dense"
    trainer.add_callback(Scaled(trainer.model.bert.encoder.layer[0].output.dense, 110))
    trainer.train()
    sys.modules["wandb"].finish()
    assert trainer.state.global_step == 200
    valid = sum(int(row["attention_mask"].sum()) for row in data)
    found = records(run, "train", "rows", layer)
    assert [value for _, step, value in found if step is None] == [valid] * 5
    assert [step for _, step, _ in found if step is not None] == [50, 100, 150, 200]
    assert sum(value for _, step, value in found if step is not None) < 5 * valid
    assert len(records(run, "eval", "rows", layer)) == 5
    assert [(alarm.step, alarm.finding.layer) for alarm in SavedRun(run).alarms] == [(111, layer)]
    assert write_report(run, tmp_path / "report.html").exists()
    assert list(tmp_path.rglob("events.*"))
    assert list(tmp_path.rglob("*.wandb"))
    # The training resumes from a checkpoint, with alarms after it.
    again = hf.make_trainer(
        tmp_path,
        bert(),
        eval_dataset=tokens(12),
        logging_steps=50,
        per_device_train_batch_size=8,
        num_train_epochs=6,
        save_strategy="no",
    )
    again.train_dataset = data
    again.add_callback(
        transformers.LayerProbeCallback(again, metrics(), layers="*.output.dense", recorder=run, monitor=True)
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-100"))
    assert not SavedRun(run).alarms  # superseded: nothing was scaled this time
    assert [epoch for epoch, step, _ in records(run, "eval", "rows", layer)] == [0, 1, 2, 3, 4, 5]


class FirstStep(TrainerCallback):
    """Memory of a monitor when a training begins or resumes."""

    def __init__(self, of):
        self.of, self.past = of, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.past is None:
            self.past = copy.deepcopy(self.of.monitor._past)


def test_a_training_of_transformers_goes_on_with_its_monitor(tmp_path):
    told, pasts, saves = [], [], {"save_strategy": "steps", "save_steps": 60}
    for folder in (None, str(tmp_path / "checkpoint-60")):
        trainer = hf.make_trainer(
            tmp_path, hf.Net(), per_device_train_batch_size=8, num_train_epochs=15, **saves
        )
        alarms = []
        callback = transformers.LayerProbeCallback(
            trainer,
            monitor=lambda probe, alarms=alarms: monitor_of(probe, on_alarm=alarms.append),
            layers="head",
        )
        trainer.add_callback(callback)
        trainer.add_callback(Scaled(trainer.model.head, 50))
        trainer.add_callback(first := FirstStep(callback))
        trainer.train(resume_from_checkpoint=folder)
        told.append([alarm.step for alarm in alarms])
        pasts.append(first.past)
    assert told == [[51], []]  # no second alarm
    assert not pasts[0]
    assert pasts[1]["step"] == 60
    assert pasts[1]["layers"]["head"]


def test_transformers_stop(tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.Net(), per_device_train_batch_size=8, num_train_epochs=15)
    callback = transformers.LayerProbeCallback(
        trainer, monitor=lambda probe: monitor_of(probe, on_alarm="stop"), layers="head"
    )
    trainer.add_callback(callback)
    trainer.add_callback(Scaled(trainer.model.head, 50))
    trainer.train()
    assert trainer.state.global_step == 60
    assert [alarm.step for alarm in callback.monitor.raised] == [51]
    trainer.train()  # a new training starts with an empty memory
    assert trainer.state.global_step == 60


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_what_is_no_monitor(kind, tmp_path):
    def make(monitor):
        if kind == "lightning":
            return lightning.LayerProbeCallback(monitor=monitor)
        return transformers.LayerProbeCallback(hf.make_trainer(tmp_path, hf.Net()), monitor=monitor)

    words = "expected monitor to be True, False or a function from the probe to a Monitor, got "
    for wrong in (3, None, "stop"):
        with pytest.raises(TypeError, match=words + repr(wrong)):
            make(wrong)
    returned = "expected monitor to return a Monitor of the probe, got LayerProbe"
    if kind == "lightning":
        trainer = make_trainer(tmp_path, make(lambda probe: probe))
        with pytest.raises(TypeError, match=returned):
            trainer.fit(Classifier(0.0))
    else:
        with pytest.raises(TypeError, match=returned):
            make(lambda probe: probe)
    assert make(False).monitor is None
