"""The callback for the Hugging Face trainer, with the real trainer and a small BERT of random weights."""

import json

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

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
        return {key: float(value) for key, value in probe.compute(stage).items() if value.numel() == 1}


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
    json.dumps(trainer.state.log_history)  # as the trainer itself saves it
    callback.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    different = expected(model, 0, 96, "train", True) != expected(model, 0, 96, "train", False)
    assert different  # padding matters in these data


def test_an_evaluation_without_training_and_a_model_made_later(tmp_path):
    trainer = make_trainer(tmp_path, make_model())
    callback = LayerProbeCallback(trainer, metrics())
    trainer.add_callback(callback)
    trainer.evaluate()
    assert any("saturation/eval/classifier" in row for row in trainer.state.log_history)
    callback.remove()

    trainer = make_trainer(tmp_path, make_model)
    callback = LayerProbeCallback(trainer, metrics(), layers="*.intermediate.dense")
    trainer.add_callback(callback)
    trainer.train()
    assert callback.probe.layers == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    keys = {key for row in trainer.state.log_history for key in row if key.startswith("saturation/")}
    assert keys == {
        f"saturation/{stage}/{layer}" for stage in ("train", "eval") for layer in callback.probe.layers
    }


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
    assert any(tag.endswith("saturation/eval/classifier") for tag in tags), tags


def test_a_failed_forward_does_not_leave_its_mask(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    callback = LayerProbeCallback(trainer, metrics())
    items = dataset(0, 4)
    mask = torch.stack([item["attention_mask"] for item in items])
    with pytest.raises(Exception, match="input_ids"):
        model(attention_mask=mask)
    assert callback.probe._mask is None
