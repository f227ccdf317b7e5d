"""Forwards that the callback for the Hugging Face trainer observes, and their stages."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spectralmetrics import EffectiveRankMetric, RootMeanSquareMetric, SaturationMetric
from spectralmetrics.integrations.transformers import LayerProbeCallback
from tests.integrations.rows import Rows
from tests.integrations.test_transformers_masks import pairs, sequence_to_sequence

pytestmark = pytest.mark.filterwarnings("ignore")

TRAIN, EVALUATION = 48, 20


class Net(nn.Module):
    """A frozen first layer in eval mode, and a second one that stays in training mode."""

    def __init__(self, largest=math.inf):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.backbone.requires_grad_(False)
        self.largest = largest

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        self.head.train()
        return self

    def forward(self, x, labels=None):
        hidden = self.backbone(x)
        if self.training and len(x) > self.largest:
            raise RuntimeError("CUDA out of memory.")
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def samples(count):
    generator = torch.Generator().manual_seed(count)
    return [{"x": torch.randn(6, generator=generator), "labels": k % 2} for k in range(count)]


def make_trainer(folder, model, kind=Trainer, **arguments):
    keys = {"eval_dataset", "compute_metrics"}
    own = {key: arguments.pop(key) for key in keys & set(arguments)}
    training = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        | arguments
    )
    data = {"train_dataset": samples(TRAIN), "eval_dataset": samples(EVALUATION)}
    return kind(model, training, **data | own)


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"eval_on_start": True}])
def test_frozen_layers_count_where_the_trainer_is(arguments, tmp_path):
    trainer = make_trainer(tmp_path, Net(), **arguments)
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    trainer.train()
    for layer in ("backbone", "head"):
        assert logged(trainer, f"rows/{layer}") == [TRAIN] * 2
        assert logged(trainer, f"eval_rows/{layer}") == [EVALUATION] * (
            3 if arguments.get("eval_on_start") else 2
        )
    assert trainer.evaluate(metric_key_prefix="last")["last_rows/backbone"] == EVALUATION
    assert trainer.predict(samples(7)).metrics["test_rows/head"] == 7


def test_sets_apart_and_evaluations_at_steps(tmp_path):
    sets = {"a": samples(5), "b": samples(9)}
    trainer = make_trainer(tmp_path, Net(), eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    trainer.train()
    for name, count in (("a", 5), ("b", 9)):
        for layer in ("backbone", "head"):
            assert logged(trainer, f"eval_{name}_rows/{layer}") == [count] * 3


def test_what_ran_before_an_evaluation_is_no_part_of_it(tmp_path):
    model = Net()
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    trainer.model.eval()
    model(torch.randn(3, 6), torch.tensor([0, 1, 0]))
    handle = model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    handle.remove()
    assert trainer.evaluate()["eval_rows/backbone"] == EVALUATION


def test_an_evaluation_inside_an_evaluation_or_a_training_step(tmp_path):
    class Distilling(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                model.eval()
                model.training = False
                model(**inputs)
                model.train()
            return super().compute_loss(model, inputs, *args, **kwargs)

    found = []

    def compute_metrics(prediction):
        if not found:
            found.append(None)
            found[0] = trainer.predict(samples(3)).metrics
        return {}

    trainer = make_trainer(tmp_path, Net(), Distilling, compute_metrics=compute_metrics)
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    trainer.train()
    for layer in ("backbone", "head"):
        assert logged(trainer, f"rows/{layer}") == [TRAIN] * 2
        assert logged(trainer, f"eval_rows/{layer}") == [EVALUATION] * 2
    assert not any("rows" in key for key in found[0])


@pytest.mark.long
def test_an_attempt_that_ran_out_of_memory_does_not_count(tmp_path):
    trainer = make_trainer(tmp_path, Net(largest=13), auto_find_batch_size=True, num_train_epochs=1)
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    trainer.train()
    assert trainer._train_batch_size == 12
    for layer in ("backbone", "head"):
        assert logged(trainer, f"rows/{layer}") == [TRAIN]


def test_a_callback_that_is_added_late(tmp_path):
    class Adding(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == 1:
                trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))

    trainer = make_trainer(tmp_path, Net())
    trainer.add_callback(Adding())
    trainer.train()
    assert logged(trainer, "rows/backbone") == [TRAIN]
    assert logged(trainer, "eval_rows/backbone") == [EVALUATION]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_callbacks_go_in_any_order_and_leave_nothing(order, tmp_path):
    trainer = make_trainer(tmp_path, Net())
    before = dict(vars(trainer))
    callbacks = [LayerProbeCallback(trainer, {name: Rows()}) for name in ("one", "two")]
    for each in callbacks:
        trainer.add_callback(each)
    found = trainer.evaluate()
    assert found["eval_one/backbone"] == found["eval_two/backbone"] == EVALUATION
    for number in order:
        trainer.remove_callback(callbacks[number])
        callbacks[number].remove()
        found = trainer.evaluate()
    assert not any("/backbone" in key for key in found)
    assert not any(each._forward_hooks for each in trainer.model.modules())
    if order == (1, 0):
        assert set(vars(trainer)) - {"model_preparation_time"} == set(before) - {"model_preparation_time"}


class Sometimes(Rows):
    """NaN for layers of two features."""

    def update(self, rows):
        self.count += math.nan if rows.shape[1] == 2 else len(rows)


def test_the_mean_over_layers_is_of_those_with_a_value(tmp_path):
    trainer = make_trainer(tmp_path, Net())
    trainer.add_callback(LayerProbeCallback(trainer, {"sometimes": Sometimes()}))
    found = trainer.evaluate()
    assert math.isnan(found["eval_sometimes/head"])
    assert found["eval_sometimes/mean"] == found["eval_sometimes/backbone"] > 0


def test_a_layer_called_mean_keeps_its_own_value(tmp_path):
    model = Net()
    model.mean, model.backbone = model.backbone, nn.Identity()
    model.forward = lambda x, labels=None: Net.forward(model, model.mean(x), labels)
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(LayerProbeCallback(trainer, SaturationMetric()))
    found = trainer.evaluate()
    own, head = found["eval_saturation/mean (layer)"], found["eval_saturation/head"]
    assert own != head
    assert found["eval_saturation/mean"] == (own + head) / 2


class Writing(Seq2SeqTrainer):
    """Generates in training, as reinforcement learning does."""

    def training_step(self, model, inputs, *args):
        model.generate(inputs["input_ids"], max_new_tokens=2, min_new_tokens=2)
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize("asked", [False, True])
def test_generation_is_observed_when_asked_for(asked, tmp_path):
    training = Seq2SeqTrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        generation_max_length=4,
    )
    model = sequence_to_sequence("t5")
    model.generation_config.min_new_tokens = 3
    data = pairs(8, "labels")
    trainer = Writing(model, training, train_dataset=data, eval_dataset=data, compute_metrics=lambda _: {})
    layers = ["encoder.*.q", "decoder.*.SelfAttention.q"]
    callback = LayerProbeCallback(
        trainer, {"rows": Rows()}, layers=layers, attention_mask=None, generation=asked
    )
    trainer.add_callback(callback)
    trainer.train()
    encoder, decoder = callback.probe.layers
    length = len(data[0]["labels"])
    for prefix, generated in (("", 2), ("eval_", 3)):
        assert logged(trainer, f"{prefix}rows/{encoder}") == [8 * length * (2 if asked else 1)]
        assert logged(trainer, f"{prefix}rows/{decoder}") == [8 * (length + (generated if asked else 0))]
    assert "generate" not in vars(model)
    assert "generate" not in vars(copy.deepcopy(model))


def test_a_generation_that_fails_leaves_the_model_as_it_was(tmp_path):
    model = sequence_to_sequence("t5")
    model.generate = lambda *args, **kwargs: 1 / 0
    own = model.generate

    class Failing(Trainer):
        def prediction_step(self, model, *args, **kwargs):
            return model.generate()

    trainer = Failing(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    callback = LayerProbeCallback(trainer, {"rows": Rows()})
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(pairs(2, "labels"))
    assert model.generate is own
    assert not callback.probe._router.paused


def test_an_evaluation_that_only_generates_says_so(tmp_path):
    class Generating(Trainer):
        def prediction_step(self, model, inputs, *args, **kwargs):
            model.generate(inputs["input_ids"], max_new_tokens=2)
            return None, None, None

    model = sequence_to_sequence("t5")
    trainer = Generating(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True))
    trainer.add_callback(LayerProbeCallback(trainer, {"rows": Rows()}))
    with pytest.warns(UserWarning, match=r"generate\(\), which is observed with generation=True only"):
        trainer.evaluate(pairs(2, "labels"))


@pytest.mark.parametrize(("floor", "epochs"), [(0.5, 3), (100.0, 1)])
def test_training_stops_at_a_floor_of_the_effective_rank(floor, epochs, tmp_path):
    class Floor(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if metrics["eval_effective_rank/backbone"] < floor:
                control.should_training_stop = True

    trainer = make_trainer(tmp_path, Net(), num_train_epochs=3)
    trainer.add_callback(LayerProbeCallback(trainer, EffectiveRankMetric()))
    trainer.add_callback(Floor())
    trainer.train()
    assert trainer.state.epoch == epochs


class WithEngine(TrainerCallback):
    """Gives an accelerator an imitation of a DeepSpeed engine."""

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def on_train_begin(self, *args, **kwargs):
        engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scale=0.25))
        self.accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=engine)


@pytest.mark.parametrize("of_engine", [False, True])
def test_gradients_without_the_factor_of_the_loss(of_engine, tmp_path):
    """The factor of accelerate's scaler, or of a DeepSpeed engine, which scales itself; none in evaluation."""

    def trained(scaled):
        trainer = make_trainer(tmp_path, Net(), learning_rate=0.0)
        callback = LayerProbeCallback(trainer, RootMeanSquareMetric(), observe="gradients")
        trainer.add_callback(callback)
        if scaled and of_engine:
            trainer.add_callback(WithEngine(trainer.accelerator))
        elif scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer.train()
        assert logged(trainer, "eval_rms/mean") == []
        callback.remove()
        return logged(trainer, "rms/head")[-1]

    assert trained(scaled=True) == pytest.approx(trained(scaled=False) * (4 if of_engine else 1), rel=1e-6)
