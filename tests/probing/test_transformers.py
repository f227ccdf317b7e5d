"""Models of the transformers library with random weights, by block and by linear layer."""

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, LinearProbeMetric, SaturationMetric

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of transformers

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
    probe = LayerProbe(model)  # GPT-2's Conv1D is among the layers by default
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


def test_the_linear_layers_of_gpt2_are_all_there():
    model, _ = gpt2()
    found = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    assert {name.split(".", 3)[3] for name in found} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert set(LayerProbe(model).layers) == found | {"lm_head"}


def test_what_goes_into_and_comes_out_of_conv1d():
    layer = Conv1D(5, 7)  # 5 outputs of 7 inputs
    torch.nn.init.normal_(layer.bias)
    tokens = torch.randn(4, 30, 7)
    outputs = tokens.double() @ layer.weight.detach().double() + layer.bias.detach().double()
    for observe, expected in (("inputs", tokens), ("outputs", outputs)):
        probe = LayerProbe(layer, observe=observe)
        layer(tokens)
        (covariance,) = probe.covariances("train").values()
        rows = expected.double().flatten(0, 1)
        torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 12), (12, 3)])
def test_the_ceiling_of_conv1d_is_the_rank_of_its_weight(inputs, outputs):
    layer = Conv1D(outputs, inputs)
    probe = LayerProbe(layer, IntrinsicDimensionMetric(threshold=1 - 1e-9))
    layer(torch.randn(8, 50, inputs))
    (row,) = probe.summary("train").rows
    assert (row.kind, row.width, row.ceiling) == ("Conv1D", outputs, 3)
    assert int(*probe.compute().values()) == 3  # the ceiling is reached


def test_a_label_for_each_token():
    model, _ = gpt2()
    model.eval()
    tokens = torch.randint(50, (40, 9))
    attention = torch.arange(9) < torch.randint(2, 10, (40, 1))
    labels = torch.where(attention, tokens % 2, -100)  # as transformers marks tokens without a label
    probe = LayerProbe(model, LinearProbeMetric(2), layers=["transformer.h.?.attn.c_attn", "lm_head"])
    with torch.no_grad(), probe.labels(labels):
        model(input_ids=tokens, attention_mask=attention.long())
    values = probe.compute("eval")
    probe.remove()
    rows = []
    layer = model.transformer.h[0].attn.c_attn
    handle = layer.register_forward_hook(lambda module, args, output: rows.append(output[attention]))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=attention.long())
    handle.remove()
    metric = LinearProbeMetric(2)
    metric.update(*rows, labels[attention])
    found = float(values["linear_probe/eval/transformer.h.0.attn.c_attn"])
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)
    assert int(probe["eval", "lm_head"].linear_probe.count) == int(attention.sum())


def test_a_new_model_has_no_problem():
    """transformers draws weights from a normal distribution; PyTorch, without it, from a uniform one."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIZES.items()}
    config = transformers.WhisperConfig(
        d_model=64, vocab_size=99, num_mel_bins=8, max_source_positions=25, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with LayerProbe(model) as probe:
        for _ in range(4):
            model(torch.randn(8, 8, 50), decoder_input_ids=torch.randint(3, 99, (8, 20)))
        found = probe.findings("eval")
    assert {each.severity for each in found if each.kind == "collapsed"} == {"note"}
    assert not [each for each in found if each.severity == "problem"]


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
