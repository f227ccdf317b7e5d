"""Probes on more than fifty architectures of transformers, with random weights.

    python checks/architectures.py [NAME …] [--compiled]

For each architecture:

- Every default layer: the probe counts each row once, and its covariance agrees with the outputs that a hook of
  this file kept, to a millionth of the largest entry.
- Two training steps with a probe of outputs, of gradients, and of every module without children: losses,
  parameters and the generator of random numbers are bit for bit the same as without a probe. With --compiled
  the steps run under `torch.compile` (backend "aot_eager"), and the probe has as many rows as in eager mode.

Ends with an error if anything differs. If the installed transformers builds or runs a model in another way, the
script prints its name and passes over it.
"""

import argparse
import logging
import sys
import warnings

import torch
import transformers as tf
from torch import nn

from spectralmetrics import CovarianceTraceMetric, LayerProbe, SaturationMetric

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TINY = {key: value for key, value in TEXT.items() if key != "vocab_size"}
SEQUENCES = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SPEECH = {
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    # The model would draw masked time steps from another generator.
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
AUDIO = {"upsampling_ratios": [4, 2], "codebook_size": 32, "num_residual_layers": 1, "sampling_rate": 8000}


def tokens(samples=2, length=12):
    return torch.randint(3, 50, (samples, length))


def images(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def video():
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def text():
    return {"input_ids": tokens()}


def pairs():
    return {"input_ids": tokens(), "labels": tokens()}


def speech():
    return {"input_values": torch.randn(2, 400)}


def audio():
    return {"input_values": torch.randn(2, 1, 800)}


def series():
    return {"past_values": torch.randn(4, 32, 3)}


def decisions():
    parts = {"states": 5, "actions": 2, "rewards": 1, "returns_to_go": 1}
    found = {name: torch.randn(2, 6, width) for name, width in parts.items()}
    return {**found, "timesteps": torch.arange(6).repeat(2, 1), "attention_mask": torch.ones(2, 6)}


VIDEO = {**TINY, "image_size": 16, "patch_size": 8, "num_frames": 4}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
CHANNELS = {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8}
STAGES = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2]}

# Model -> the settings of its configuration, and a function that makes inputs.
MODELS = {
    "AlbertModel": ({**TEXT, "embedding_size": 16}, text),
    "BartForConditionalGeneration": (SEQUENCES, pairs),
    "BigBirdModel": ({**TEXT, "attention_type": "original_full"}, text),
    "BitForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
        images,
    ),
    "BlipVisionModel": (VISION, images),
    "CLIPModel": (
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 24},
        lambda: text() | images(),
    ),
    "CanineModel": (
        {**TINY, "local_transformer_stride": 8, "num_hash_functions": 4},
        lambda: {"input_ids": tokens(length=32)},
    ),
    "ConvBertModel": ({**TEXT, "embedding_size": 32, "conv_kernel_size": 3}, text),
    "ConvNextForImageClassification": (STAGES, images),
    "ConvNextV2ForImageClassification": (STAGES, images),
    "DebertaV2Model": (
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "conv_kernel_size": 3,
        },
        text,
    ),
    "DecisionTransformerModel": (
        {"state_dim": 5, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        decisions,
    ),
    "DeepseekV3Model": (
        {
            **TEXT,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        text,
    ),
    "Dinov2Model": ({**TINY, "image_size": 28, "patch_size": 7}, lambda: images(28)),
    "EfficientNetForImageClassification": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        lambda: images(64),
    ),
    "FalconModel": (TEXT, text),
    "FocalNetModel": (
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        images,
    ),
    "FunnelModel": (
        {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        text,
    ),
    "GPT2Model": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, text),
    "GPTNeoXModel": (TEXT, text),
    "Gemma2Model": ({**TEXT, "num_key_value_heads": 2, "head_dim": 8}, text),
    "GptOssForCausalLM": (
        {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        text,
    ),
    "HieraModel": (
        {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "patch_stride": [4, 4],
        },
        lambda: images(64),
    ),
    "JambaModel": (
        {
            **TEXT,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
        },
        text,
    ),
    "LevitForImageClassification": (
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 4, 6],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        lambda: images(64),
    ),
    "LongformerModel": ({**TEXT, "attention_window": [4, 4]}, text),
    "Mamba2ForCausalLM": (
        {**TEXT, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        text,
    ),
    "MambaForCausalLM": ({**TEXT, "state_size": 8, "time_step_rank": 4}, text),
    "MimiModel": (
        {
            **{key: value for key, value in TINY.items() if key != "num_hidden_layers"},
            **AUDIO,
            "num_hidden_layers": 1,
            "num_filters": 4,
            "codebook_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_quantizers": 2,
            "num_semantic_quantizers": 1,
            "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 32,
        },
        audio,
    ),
    "MobileBertModel": (
        {**TEXT, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
        text,
    ),
    "MobileNetV2ForImageClassification": ({}, lambda: images(64)),
    "MobileViTForImageClassification": (
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        },
        lambda: images(64),
    ),
    "PatchTSMixerModel": ({**CHANNELS, "d_model": 16, "num_layers": 2}, series),
    "PatchTSTModel": ({**TINY, **CHANNELS, "d_model": 32, "ffn_dim": 48}, series),
    "PerceiverModel": (
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 16,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        lambda: {"inputs": torch.randn(2, 20, 16)},
    ),
    "PoolFormerForImageClassification": (
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]},
        lambda: images(64),
    ),
    "PvtV2Model": (
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
        lambda: images(64),
    ),
    "Qwen2Model": ({**TEXT, "num_key_value_heads": 2}, text),
    "RecurrentGemmaModel": (
        {
            **TEXT,
            "num_key_value_heads": 2,
            "lru_width": 32,
            "block_types": ("recurrent", "attention"),
            "attention_window_size": 8,
        },
        text,
    ),
    "RegNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        images,
    ),
    "RwkvForCausalLM": ({**TEXT, "context_length": 32}, text),
    "SamVisionModel": (
        {
            **TINY,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 16,
        },
        lambda: images(64),
    ),
    "SegformerForSemanticSegmentation": (
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 24,
        },
        images,
    ),
    "SqueezeBertModel": ({**TEXT, "embedding_size": 32}, text),
    "SwinForImageClassification": (WINDOWS, images),
    "Swinv2ForImageClassification": (WINDOWS, images),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pairs,
    ),
    "TimesformerModel": (VIDEO, video),
    "UnivNetModel": (
        {
            "model_in_channels": 8,
            "model_hidden_channels": 8,
            "num_mel_bins": 10,
            "kernel_predictor_hidden_channels": 8,
        },
        lambda: {"input_features": torch.randn(2, 12, 10), "noise_sequence": torch.randn(2, 12, 8)},
    ),
    "ViTMAEForPreTraining": (
        {
            **VISION,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        images,
    ),
    "VideoMAEModel": (VIDEO, video),
    "Wav2Vec2ForCTC": ({**TINY, **SPEECH}, speech),
    "WhisperForConditionalGeneration": (
        {
            **SEQUENCES,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        lambda: {"input_features": torch.randn(2, 16, 40), "labels": tokens()},
    ),
    "XLNetModel": ({"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, text),
    "YolosModel": ({**VISION, "image_size": [32, 32], "num_detection_tokens": 5}, images),
}


def made(name):
    """A model and its inputs; the same for each call."""
    torch.manual_seed(0)
    settings, inputs = MODELS[name]
    kind = getattr(tf, name)
    config = kind.config_class(**settings)
    config.use_cache = False
    return kind(config), inputs()


def first_tensor(nest):
    while isinstance(nest, (tuple, list)):
        nest = nest[0]
    return nest.detach().clone()


def differences(name):
    """Yield a message for each default layer whose rows or covariance differ from its outputs."""
    model, inputs = made(name)
    model.eval()
    probe = LayerProbe(model, [SaturationMetric(), CovarianceTraceMetric()], max_map_size=None)
    outputs = {layer: [] for layer in probe.layers}
    for layer in probe.layers:
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, output, kept=outputs[layer]: kept.append(first_tensor(output))
        )
    with torch.no_grad():
        model(**inputs)
    for layer, kept in outputs.items():
        module = model.get_submodule(layer)
        moments = next(iter(probe["eval", layer].values(copy_state=False))).moments
        if not kept:
            if moments is not None:
                yield f"{layer} never ran, but was observed"
            continue
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        rows = torch.cat([each.movedim(dim, -1).flatten(0, -2).double() for each in kept])
        covariance = torch.cov(rows.T, correction=0).reshape(rows.shape[1], -1)
        if moments is None or (int(moments.count), moments.num_features) != tuple(rows.shape):
            yield f"{layer} put out {tuple(rows.shape)}, and the probe has {moments}"
        elif (moments.covariance() - covariance).abs().max() > 1e-6 * covariance.abs().max():
            yield f"{layer} has another covariance"


def trained(name, compiled, **arguments):
    """Numbers after two steps of training, and rows of each layer of a probe with these arguments, if any."""
    torch.compiler.reset()
    model, inputs = made(name)
    model.train()
    probe = LayerProbe(model, CovarianceTraceMetric(), **arguments) if arguments else None
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    numbers = {}
    torch.manual_seed(1)
    for step in range(2):
        optimizer.zero_grad()
        output = forward(**inputs)
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is None:
            loss = sum(part.square().mean() for part in tensors(output))
        loss.backward()
        optimizer.step()
        numbers[f"loss {step}"] = loss.detach()
    numbers["random"] = torch.rand(1)
    numbers |= {key: value.detach() for key, value in model.state_dict().items()}
    rows = {}
    if probe is not None:
        metrics = {layer: next(iter(probe["train", layer].values(copy_state=False))) for layer in probe.layers}
        rows = {layer: int(metric.count) for layer, metric in metrics.items() if metric.moments is not None}
        probe.remove()
    return numbers, rows


def tensors(output):
    values = output.values() if hasattr(output, "values") else output
    return [each for each in values if isinstance(each, torch.Tensor) and each.requires_grad][:2]


def is_same(numbers, others):
    return all(torch.equal(value.nan_to_num(), others[key].nan_to_num()) for key, value in numbers.items())


def check(name, compiled):
    """Compare, print, and return the differences; None if the model fails or is not deterministic."""
    try:
        plain, again = trained(name, compiled)[0], trained(name, compiled)[0]
    except Exception as error:
        print(f"{name}: passed over, {type(error).__name__}: {str(error).splitlines()[0][:90]}", flush=True)
        return None
    if not is_same(plain, again):
        print(f"{name}: passed over, two trainings without a probe differ", flush=True)
        return None
    wrong = list(differences(name))
    every = [path for path, each in made(name)[0].named_modules() if path and not list(each.children())]
    probes = {
        "outputs": {"observe": "outputs"},
        "gradients": {"observe": "gradients"},
        "all modules": {"layers": every, "rows_per_feature": 2},
    }
    found = {}
    for what, arguments in probes.items():
        numbers, found[what] = trained(name, compiled, **arguments)
        if not is_same(plain, numbers):
            wrong.append(f"training differs with a probe of {what}")
        if (
            compiled
            and what != "all modules"
            and (eager := trained(name, False, **arguments)[1]) != found[what]
        ):
            more = {each for each in {*eager, *found[what]} if eager.get(each) != found[what].get(each)}
            wrong.append(f"other rows of {what} compiled: {sorted(more)[:3]}")
    layers = ", ".join(f"{len(rows)} {what}" for what, rows in found.items())
    print(f"{name}: {layers}; {'; '.join(wrong) or 'same'}", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the table; all if none is given")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {name: check(name, options.compiled) for name in options.names or MODELS}
    compared = [wrong for wrong in results.values() if wrong is not None]
    print(f"{len(compared)} of {len(results)} compared, {sum(not wrong for wrong in compared)} the same")
    sys.exit(any(compared))


if __name__ == "__main__":
    main()
