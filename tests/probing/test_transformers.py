"""Random-weight models of the transformers library, by block and by linear layer."""

import pytest
import torch
import transformers

from spectralmetrics import LayerProbe, SaturationMetric

pytestmark = pytest.mark.filterwarnings("ignore")  # of that library

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=12)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(50, (3, 9))}


def bert():
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **TINY)
    return transformers.BertModel(config), {"input_ids": torch.randint(50, (3, 9))}


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **TINY)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(3, 1, 8, 8)}


@pytest.mark.parametrize(
    ("make", "blocks", "tokens"),
    [(gpt2, "transformer.h.?", 27), (bert, "encoder.layer.?", 27), (vit, "*.?", 15)],
    ids=["gpt2", "bert", "vit"],
)
def test_by_block(make, blocks, tokens):
    model, inputs = make()
    probe = (
        LayerProbe(
            model, layers=lambda name, module: name.endswith((".0", ".1")) and "Layer" in type(module).__name__
        )
        if make is vit
        else LayerProbe(model, layers=blocks)
    )
    model(**inputs)
    values = probe.compute()
    assert len(values) == 2
    for name in probe.layers:
        metric = probe["train", name]["saturation"]
        assert (int(metric.count), metric.num_features) == (tokens, 16)


@pytest.mark.parametrize("make", [gpt2, bert, vit])
def test_by_linear_layer(make):
    model, inputs = make()
    kinds = [torch.nn.Linear, transformers.pytorch_utils.Conv1D] if make is gpt2 else [torch.nn.Linear]
    probe = LayerProbe(model, layers=kinds)
    model(**inputs)
    model.eval()
    with torch.no_grad():
        model(**inputs)
    values = probe.compute()
    # every layer that the model calls, in both stages; BERT's pooler among them
    assert {key.split("/", 2)[2] for key in values} == set(probe.layers)
    assert len(values) == 2 * len(probe.layers)


def test_padding_is_not_counted():
    model, inputs = bert()
    attention = torch.ones(3, 9, dtype=torch.int64)
    attention[1, 5:] = 0
    probe = LayerProbe(model, SaturationMetric(), layers="encoder.layer.?")
    with probe.mask(attention.bool()):
        model(**inputs, attention_mask=attention)
    assert int(probe["train", "encoder.layer.1"]["saturation"].count) == 23
