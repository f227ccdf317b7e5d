"""Padding masks that the Hugging Face callback takes from the arguments of a model."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

from spectralmetrics import SaturationMetric
from spectralmetrics.integrations.transformers import LayerProbeCallback
from tests.integrations.test_transformers import make_model, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, SOURCE, TARGET = 12, 3, 7


def sequence_to_sequence(kind):
    torch.manual_seed(0)
    small = {"d_model": 16, "decoder_start_token_id": 0, "vocab_size": 50, "pad_token_id": 0}
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(d_kv=8, d_ff=32, num_layers=1, num_heads=2, **small))
    if kind == "bart":
        sizes = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
        }
        return BartForConditionalGeneration(BartConfig(max_position_embeddings=32, **sizes, **small))
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    configs = [BertConfig(hidden_size=size, **config) for size in (24, 16)]
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs))
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


def pairs(count, given):
    """Source and target of one length, whose first tokens are valid."""
    source, target = torch.arange(LENGTH) < SOURCE, torch.arange(LENGTH) < TARGET
    item = {"input_ids": 5 * source.long(), "attention_mask": source.long()}
    item["labels"] = torch.where(target, 7, -100)
    item["labels"][1] = -100  # ignored by the loss, but not padding
    if given == "mask":
        item["decoder_attention_mask"] = target.long()
        item["labels"] = torch.full((LENGTH,), 7)
    return [item] * count


def sees_the_source(name):
    is_key_or_value = name.endswith((".k", ".v", ".k_proj", ".v_proj", ".key", ".value"))
    is_cross = any(part in name for part in ("EncDecAttention", "encoder_attn", "crossattention"))
    return name.startswith(("encoder", "model.encoder", "enc_to_dec")) or (is_cross and is_key_or_value)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert2bert"])
@pytest.mark.parametrize("given", ["mask", "labels", "none"])
def test_each_layer_of_an_encoder_decoder_model_has_its_sequence_s_mask(kind, given, tmp_path):
    counts = {}

    class Counting(LayerProbeCallback):
        def _log(self, stage, *rest):
            if stage == "train":
                for name in self.probe.layers:
                    counts[name] = int(self.probe["train", name]["saturation"].count)
            return super()._log(stage, *rest)

    trainer = make_trainer(tmp_path, sequence_to_sequence(kind), num_train_epochs=1, eval_strategy="no")
    trainer.train_dataset = pairs(16, given)
    masks = {"decoder_attention_mask": None} if given == "none" else {}
    chosen = lambda name, module: isinstance(module, nn.Linear) and "pooler" not in name  # noqa: E731
    callback = Counting(trainer, SaturationMetric(), layers=chosen, **masks)
    trainer.add_callback(callback)
    trainer.train()
    target = LENGTH if given == "none" else TARGET
    assert counts == {name: 16 * (SOURCE if sees_the_source(name) else target) for name in counts}
    assert {sees_the_source(name) for name in counts} == {True, False}
    assert sum("decoder" in name and sees_the_source(name) for name in counts) == 2
    callback.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


@pytest.mark.parametrize("own_loss", [False, True])
def test_labels_that_the_trainer_keeps_from_the_model_mask_the_target(own_loss, tmp_path):
    model = sequence_to_sequence("t5")
    trainer = make_trainer(tmp_path, model, num_train_epochs=1, label_smoothing_factor=0.0 if own_loss else 0.1)
    data = pairs(16, "labels")
    for item in data:  # as DataCollatorForSeq2Seq
        item["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(item["labels"][None])[0]
    trainer.train_dataset = trainer.eval_dataset = data
    if own_loss:
        trainer.compute_loss_func = lambda outputs, *_, **__: outputs.logits.square().mean()
    callback = LayerProbeCallback(trainer, SaturationMetric())
    trainer.add_callback(callback)
    trainer.train()
    for stage in ("train", "eval"):
        for name in callback.probe.layers:
            count = int(callback.probe[stage, name]["saturation"].count)
            assert count == 16 * (SOURCE if sees_the_source(name) else TARGET), (stage, name)


def test_the_choices_of_a_sample_have_their_own_padding(tmp_path):
    model = BertForMultipleChoice(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    trainer = make_trainer(tmp_path, model, num_train_epochs=1, eval_strategy="no")
    mask = (torch.arange(LENGTH) < torch.tensor([[3], [5]])).long()
    trainer.train_dataset = [{"input_ids": 7 * mask, "attention_mask": mask, "labels": 1}] * 16
    callback = LayerProbeCallback(trainer, SaturationMetric(), layers="*.output.dense")
    trainer.add_callback(callback)
    trainer.train()
    assert {int(callback.probe["train", name]["saturation"].count) for name in callback.probe.layers} == {
        16 * 8
    }


def test_a_mask_that_does_not_say_which_tokens_are_padding_is_named_once(tmp_path):
    callback = LayerProbeCallback(make_trainer(tmp_path, model := make_model()), SaturationMetric())
    tokens, mask = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 1, 6, 6)
    with pytest.warns(UserWarning, match=r"attention_mask of shape \(2, 1, 6, 6\) does not say") as caught:
        [model(input_ids=tokens, attention_mask=mask) for _ in range(2)]
    assert len(caught) == 1
    assert int(callback.probe["train", "classifier"]["saturation"].count) == 4


def test_generation_leaves_out_the_source_s_padding(tmp_path):
    model = sequence_to_sequence("t5").eval()
    trainer = make_trainer(tmp_path, model)
    callback = LayerProbeCallback(trainer, SaturationMetric())
    (item,) = pairs(1, "labels")
    model.generate(item["input_ids"][None], attention_mask=item["attention_mask"][None], max_new_tokens=4)
    counts = {name: int(callback.probe["eval", name]["saturation"].count) for name in callback.probe.layers}
    assert {count for name, count in counts.items() if sees_the_source(name)} == {SOURCE}
    assert {count for name, count in counts.items() if not sees_the_source(name)} == {4}


def test_a_failed_forward_of_a_decoder_leaves_no_mask(tmp_path):
    model = sequence_to_sequence("t5")
    trainer = make_trainer(tmp_path, model)
    callback = LayerProbeCallback(trainer, SaturationMetric())
    batch = {key: torch.stack([item[key] for item in pairs(2, "labels")]) for key in pairs(1, "labels")[0]}
    handle = model.decoder.block[0].layer[1].EncDecAttention.k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    model(**batch)
    counts = {name: int(callback.probe["train", name]["saturation"].count) for name in callback.probe.layers}
    assert counts["decoder.block.0.layer.1.EncDecAttention.k"] == 2 * SOURCE
    assert counts["decoder.block.0.layer.1.EncDecAttention.o"] == 2 * TARGET
    callback.probe.reset()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo(
            torch.zeros(2, LENGTH, 32)
        )  # a direct call, without a mask
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert int(callback.probe["train", name]["saturation"].count) == 2 * LENGTH
