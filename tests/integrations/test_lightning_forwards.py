"""Forwards that the Lightning callback observes, their stages, and values logged by several processes."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from spectralmetrics import EffectiveRankMetric, RootMeanSquareMetric
from spectralmetrics.integrations.lightning import LayerProbeCallback
from tests.integrations.lightning_module import Classifier, digits, make_trainer
from tests.integrations.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore")

TRAIN, VALIDATION, TEST = 320, 160, 80  # samples in each epoch of a `Classifier`


class Frozen(Classifier):
    """The first layer stays in eval mode while the rest trains; the last always stays in training mode."""

    def __init__(self):
        super().__init__(0.1)
        self.model[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.model[0].eval()

    def on_validation_model_eval(self):
        self.model.eval()
        self.model[2].train()

    on_test_model_eval = on_validation_model_eval


def rows(folder, layer, stage):
    with open(folder / "metrics.csv", newline="") as file:
        found = [row.get(f"rows/{stage}/{layer}") for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_frozen_layers_count_where_the_trainer_is(sanity, interval, tmp_path):
    callback = LayerProbeCallback({"rows": Rows()})
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=sanity, val_check_interval=interval)
    trainer.fit(Frozen())
    for layer in ("model.0", "model.2"):
        assert rows(tmp_path, layer, "train") == [TRAIN] * 2
        assert rows(tmp_path, layer, "eval") == [VALIDATION] * int(2 / interval)


def test_validate_and_test_around_a_fit(tmp_path):
    callback = LayerProbeCallback({"rows": Rows()})
    trainer = make_trainer(tmp_path, callback, limit_val_batches=2, accumulate_grad_batches=2)
    module = Frozen()
    for _ in range(2):
        (validated,) = trainer.validate(module)
        (tested,) = trainer.test(module)
        for layer in ("model.0", "model.2"):
            assert validated[f"rows/eval/{layer}"] == 80
            assert tested[f"rows/eval/{layer}"] == TEST
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(module)
        assert trainer.callback_metrics["rows/eval/model.0"] == 80
        assert trainer.callback_metrics["rows/train/model.0"] == TRAIN


class Elsewhere(Callback):
    """Runs the model between the trainer's batches, before or after the probe's callback."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.eval()
        with torch.no_grad():
            pl_module.model(torch.randn(3, 64))
        pl_module.train()

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.model(torch.randn(5, 64))


class Inside(Classifier):
    """Evaluates itself in the middle of a training step, as adversarial training does."""

    def training_step(self, batch, index):
        self.eval()
        with torch.no_grad():
            self.model(batch[0])
        self.train()
        return super().training_step(batch, index)


@pytest.mark.parametrize("first", [True, False])
def test_other_evaluations_during_a_fit_do_not_count(first, tmp_path):
    callback = LayerProbeCallback({"rows": Rows()})
    callbacks = [Elsewhere(), callback] if first else [callback, Elsewhere()]
    make_trainer(tmp_path, None, callbacks=callbacks).fit(Inside(0.0))
    assert rows(tmp_path, "model.0", "train") == [TRAIN] * 2
    assert rows(tmp_path, "model.0", "eval") == [VALIDATION] * 2


class Switching(Classifier):
    """Is in training mode in its training steps only, or from the first one on."""

    def __init__(self, after):
        super().__init__(0.0)
        self.eval()
        self.after = after

    def training_step(self, batch, index):
        self.train()
        loss = super().training_step(batch, index)
        self.train(self.after)
        return loss


@pytest.mark.parametrize("after", [False, True])
def test_a_module_that_is_in_eval_mode_when_a_batch_begins(after, tmp_path):
    make_trainer(tmp_path, LayerProbeCallback({"rows": Rows()})).fit(Switching(after))
    assert rows(tmp_path, "model.0", "train") == [TRAIN] * 2


class Sized(Classifier):
    def __init__(self):
        super().__init__(0.1)
        self.batch_size = 16

    def train_dataloader(self):
        return DataLoader(digits(0, TRAIN), self.batch_size)

    def val_dataloader(self):
        return DataLoader(digits(TRAIN, TRAIN + VALIDATION), self.batch_size)


class Validated(Callback):
    """Counts the samples of the last validation."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.samples = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.samples += len(batch[0])


@pytest.mark.parametrize("first", [True, False])
def test_trials_of_a_batch_size_do_not_count(first, tmp_path):
    callback, validation = LayerProbeCallback({"rows": Rows()}), Validated()
    finder = BatchSizeFinder(init_val=32, max_trials=2, steps_per_trial=2)
    callbacks = [callback, finder] if first else [finder, callback]
    trainer = make_trainer(
        tmp_path, None, callbacks=[*callbacks, validation], max_epochs=1, default_root_dir=tmp_path
    )
    module = Sized()
    trainer.fit(module)
    assert module.batch_size > 16
    assert rows(tmp_path, "model.0", "train") == [TRAIN]
    (validated,) = trainer.validate(module)
    assert validated["rows/eval/model.0"] == validation.samples


def test_a_fit_after_one_that_ran_out_of_memory_begins_anew(tmp_path):
    class Full(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if len(batch[0]) == 32 and batch_idx == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    module, callback = Classifier(0.1), LayerProbeCallback({"rows": Rows()})
    trainer = make_trainer(tmp_path, None, callbacks=[callback, Full()], max_epochs=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(module)
    assert not any(each._forward_hooks for each in module.modules())
    trainer.fit(module, DataLoader(digits(0, TRAIN), 16))
    assert rows(tmp_path, "model.0", "train") == [TRAIN]


class Generating(Classifier):
    """Generates with a model of transformers during training and validation."""

    def __init__(self):
        from tests.integrations.test_transformers_masks import sequence_to_sequence

        super().__init__(0.0)
        self.model = sequence_to_sequence("t5")

    def step(self):
        tokens = torch.ones(2, 5, dtype=torch.long)
        self.model.generate(tokens, max_new_tokens=3, min_new_tokens=3)
        return self.model(input_ids=tokens, labels=tokens).loss

    def training_step(self, batch, index):
        return self.step()

    def validation_step(self, batch, index):
        self.step()


@pytest.mark.parametrize("asked", [False, True])
def test_generation_is_observed_when_asked_for(asked, tmp_path):
    layers = ["model.encoder.*.q", "model.decoder.*.SelfAttention.q"]
    callback = LayerProbeCallback({"rows": Rows()}, generation=asked, layers=layers)
    module = Generating()
    trainer = make_trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(module)
    encoder, decoder = callback.probe.layers
    for stage in ("train", "eval"):
        assert rows(tmp_path, encoder, stage) == [20 if asked else 10]
        assert rows(tmp_path, decoder, stage) == [10 + 2 * 3 if asked else 10]
    assert "generate" not in vars(module.model)


def test_a_layer_called_mean_keeps_its_own_value(tmp_path):
    class Named(Classifier):
        def __init__(self):
            super().__init__(0.0)
            self.model, self.mean, self.other = None, nn.Linear(64, 5), nn.Linear(5, 3)

        def validation_step(self, batch, index):
            self.other(self.mean(batch[0]))

    module = Named()
    trainer = make_trainer(tmp_path, LayerProbeCallback(EffectiveRankMetric()))
    (found,) = trainer.validate(module)
    own, other = found["effective_rank/eval/mean (layer)"], found["effective_rank/eval/other"]
    assert own != other
    assert found["effective_rank/eval/mean"] == pytest.approx((own + other) / 2)


@pytest.mark.parametrize(("floor", "epochs"), [(0.5, 3), (100.0, 1)])
def test_training_stops_at_a_floor_of_the_effective_rank(floor, epochs, tmp_path):
    callback = LayerProbeCallback(EffectiveRankMetric())
    stopping = EarlyStopping("effective_rank/eval/model.0", mode="max", patience=9, divergence_threshold=floor)
    trainer = make_trainer(tmp_path, None, callbacks=[callback, stopping], max_epochs=3)
    trainer.fit(Classifier(0.0))
    assert trainer.current_epoch == epochs


def test_gradients_without_the_factor_of_the_loss(tmp_path):
    """The factor of a scaler, or of a DeepSpeed engine, which scales by itself; evaluations have none."""

    def fitted(folder, **arguments):
        callback = LayerProbeCallback(RootMeanSquareMetric(), observe="gradients", recorder=tmp_path / folder)
        trainer = make_trainer(tmp_path / f"{folder} log", callback, max_epochs=1, **arguments)
        trainer.fit(Classifier(0.0))
        return callback.probe, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("rms")}

    plain, expected = fitted("plain")
    assert set(expected) == {f"rms/train/{layer}" for layer in ("model.0", "model.2", "mean")}
    assert plain.gradient_scale == 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    probe, found = fitted("scaled", plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert probe.gradient_scale is scaler
    assert found == pytest.approx(expected, rel=0.02)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scale=0.5))
    strategy = SingleDeviceStrategy("cpu")
    strategy.deepspeed_engine = engine
    probe, found = fitted("engine", strategy=strategy)
    assert found == pytest.approx({name: 2 * value for name, value in expected.items()}, rel=1e-6)
    engine.optimizer.loss_scale = 8.0
    assert probe.gradient_scale.get_scale() == 8.0
