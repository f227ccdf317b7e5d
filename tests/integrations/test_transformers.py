"""The callback for the Hugging Face trainer, with the real trainer and a small BERT of random weights."""

import json

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from spectralmetrics import EffectiveRankMetric, LayerProbe, SaturationMetric, SpectrumMetric
from spectralmetrics.integrations.transformers import LayerProbeCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def dataset(start, stop):
    """Digits as sequences of grey levels; those after the last ink are padding."""
    data = load_digits()
    items = []
    for pixels, target in zip(data.data[start:stop], data.target[start:stop], strict=True):
        tokens = torch.tensor(pixels[::2]).long()
        length = int(tokens.nonzero().max()) + 1
        mask = (torch.arange(len(tokens)) < length).long()
        items.append({"input_ids": tokens, "attention_mask": mask, "labels": int(target)})
    return items


def make_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def make_trainer(folder, model, rate=0.0, **arguments):
    training = TrainingArguments(
        **{
            "output_dir": str(folder),
            "learning_rate": rate,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | arguments
    )
    model = {"model_init": model} if callable(model) and not isinstance(model, nn.Module) else {"model": model}
    return Trainer(**model, args=training, train_dataset=dataset(0, 96), eval_dataset=dataset(96, 144))


def metrics():
    return [SaturationMetric(threshold=0.9), EffectiveRankMetric(), SpectrumMetric()]


def expected(model, start, stop, stage, masked=True):
    items = dataset(start, stop)
    tokens, mask = (torch.stack([item[key] for item in items]) for key in ("input_ids", "attention_mask"))
    with LayerProbe(model, metrics()) as probe, torch.no_grad():
        model.train(stage == "train")
        with probe.mask(mask.bool() if masked else torch.ones_like(mask).bool()):
            model(input_ids=tokens, attention_mask=mask)
        prefix = "eval_" if stage == "eval" else ""
        return {
            prefix + key.replace(f"/{stage}/", "/"): float(value)
            for key, value in probe.compute(stage).items()
            if value.numel() == 1
        }


@pytest.mark.parametrize("masked", [True, False])
def test_epochs_and_evaluations_are_logged_without_padding(masked, tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    callback = LayerProbeCallback(trainer, metrics(), attention_mask="attention_mask" if masked else None)
    trainer.add_callback(callback)
    trainer.train()
    for stage, start, stop in (("train", 0, 96), ("eval", 96, 144)):
        for key, value in expected(model, start, stop, stage, masked).items():
            logged = [row[key] for row in trainer.state.log_history if key in row]
            assert logged == pytest.approx([value] * 2, rel=1e-4), key
    json.dumps(trainer.state.log_history)  # as the trainer saves it
    callback.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    different = expected(model, 0, 96, "train", True) != expected(model, 0, 96, "train", False)
    assert different  # padding matters in these data


def test_an_evaluation_without_training_and_a_model_made_later(tmp_path):
    trainer = make_trainer(tmp_path, make_model())
    callback = LayerProbeCallback(trainer, metrics())
    trainer.add_callback(callback)
    trainer.evaluate()
    assert any("eval_saturation/classifier" in row for row in trainer.state.log_history)
    callback.remove()

    trainer = make_trainer(tmp_path, make_model)
    callback = LayerProbeCallback(trainer, metrics(), layers="*.intermediate.dense")
    trainer.add_callback(callback)
    trainer.train()
    assert callback.probe.layers == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    keys = {key for row in trainer.state.log_history for key in row if "saturation/" in key}
    layers = (*callback.probe.layers, "mean")
    assert keys == {f"{prefix}saturation/{layer}" for prefix in ("", "eval_") for layer in layers}


def test_training_is_bit_identical(tmp_path):
    weights = []
    for probed in (False, True):
        model = make_model()
        trainer = make_trainer(tmp_path / str(probed), model, rate=1e-2)
        if probed:
            trainer.add_callback(LayerProbeCallback(trainer, metrics(), rows_per_feature=1))
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_curves_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path / "run", make_model(), report_to="tensorboard", num_train_epochs=1)
    trainer.add_callback(LayerProbeCallback(trainer, SaturationMetric()))
    trainer.train()
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    tags = set()
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags.update(events.Tags()["scalars"])
    # Each tag has its stage once, where the trainer puts it.
    assert {tag for tag in tags if tag.endswith("/classifier")} == {
        "train/saturation/classifier",
        "eval/saturation/classifier",
    }


def test_a_failed_forward_does_not_leave_its_mask(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    callback = LayerProbeCallback(trainer, metrics())
    items = dataset(0, 4)
    mask = torch.stack([item["attention_mask"] for item in items])
    with pytest.raises(Exception, match="input_ids"):
        model(attention_mask=mask)
    assert callback.probe._router.masks.value is None


def test_an_evaluation_s_values_are_among_its_metrics(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(LayerProbeCallback(trainer, metrics()))
    values = {key: pytest.approx(value, rel=1e-4) for key, value in expected(model, 96, 144, "eval").items()}
    found = trainer.evaluate()
    assert {key: found[key] for key in values} == values
    saturations = [float(found[key]) for key in values if key.startswith("eval_saturation/")]
    assert found["eval_saturation/mean"] == pytest.approx(sum(saturations) / len(saturations))
    sets = trainer.evaluate({"one": dataset(96, 144), "two": dataset(0, 16)})
    assert sets["eval_one_saturation/classifier"] == values["eval_saturation/classifier"]
    assert "eval_two_effective_rank/mean" in sets
    tested = trainer.predict(dataset(96, 144)).metrics
    assert tested["test_saturation/classifier"] == values["eval_saturation/classifier"]
    found = trainer.evaluate()  # the prediction is not part of it
    assert {key: found[key] for key in values} == values
    json.dumps(found)


@pytest.mark.parametrize("given", [True, False])
def test_early_stopping_and_the_best_model_go_by_them(given, tmp_path):
    """The stopping callback is added before or after the probe's."""
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(
        tmp_path,
        make_model(),
        num_train_epochs=9,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="saturation/mean",
        greater_is_better=True,
    )
    if given:
        trainer.add_callback(stopping)
    callback = LayerProbeCallback(trainer, metrics())
    trainer.add_callback(callback)
    if not given:
        trainer.add_callback(stopping)
    others = [type(each) for each in trainer.callback_handler.callbacks if each is not callback]
    trainer.train()  # a rate of zero: nothing is learnt
    assert trainer.state.epoch == 3
    assert trainer.state.best_metric == trainer.evaluate()["eval_saturation/mean"]
    after = [type(each) for each in trainer.callback_handler.callbacks if each is not callback]
    assert after == others
    assert callback in trainer.callback_handler.callbacks


@pytest.mark.parametrize("bar", [True, False])
def test_the_screen_shows_means_alone(bar, tmp_path, capsys):
    trainer = make_trainer(tmp_path, make_model(), num_train_epochs=1, disable_tqdm=not bar)
    trainer.add_callback(LayerProbeCallback(trainer, metrics()))
    trainer.train()
    shown = "".join(capsys.readouterr())
    for key in ("saturation/mean", "eval_saturation/mean", "effective_rank/mean"):
        assert f"'{key}'" in shown
    assert "classifier" not in shown
    assert max(map(len, shown.splitlines())) < 300
    assert any("saturation/classifier" in row for row in trainer.state.log_history)
