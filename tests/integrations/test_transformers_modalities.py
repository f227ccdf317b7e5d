"""Padding of texts in models that see images, too, with as many tokens of an image as of a text."""

import pytest
import torch
import transformers as tf
from torch import nn

from spectralmetrics import SaturationMetric
from spectralmetrics.integrations.transformers import LayerProbeCallback
from tests.integrations.test_transformers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32}
VISION = {**SIZES, "image_size": 24, "patch_size": 8}
N, T, VALID = 3, 10, 7 + 6 + 9  # 10 tokens of an image are 9 patches and one for their class


def batch(length=T):
    valid = torch.arange(length) < torch.tensor([[7], [6], [9]])
    tokens = torch.randint(5, 50, (N, length))
    return {
        "input_ids": tokens,
        "attention_mask": valid.long(),
        "pixel_values": torch.randn(N, 3, 24, 24),
    }


def clip():
    config = tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    return tf.CLIPModel(config), batch()


def of_clip(name):
    return N if "projection" in name else N * T if name.startswith("vision_model") else VALID


def of_blip(name):
    is_cross = "crossattention" in name and name.endswith(("key", "value"))
    return N * T if name.startswith("vision_model") or is_cross else VALID


def blip(kind=tf.BlipForConditionalGeneration):
    config = tf.BlipConfig(
        text_config=TEXT | {"encoder_hidden_size": 16, "pad_token_id": 0}, vision_config=VISION
    )
    return kind(config), batch()


ANSWER = 4 + 2 + 3


def questions():
    """Questions about images, and answers of the same length with other padding."""
    model, inputs = blip(tf.BlipForQuestionAnswering)
    mask = torch.arange(T) < torch.tensor([[4], [2], [3]])
    answer = torch.randint(5, 50, (N, T))
    return model, inputs | {
        "decoder_input_ids": answer,
        "decoder_attention_mask": mask.long(),
        "labels": answer,
    }


def of_questions(name):
    if not name.startswith("text_decoder"):
        return of_blip(name)
    # It looks at the question, whose tokens have seen the image.
    return VALID if "crossattention" in name and name.endswith(("key", "value")) else ANSWER


def git():
    return tf.GitModel(tf.GitConfig(**TEXT, vision_config=VISION)), batch()


def of_git(name):
    return N * 2 * T if name.startswith("encoder") else N * T  # its encoder sees image and text in one sequence


def blip2():
    """The queries of an image, which are parameters, and the tokens of a text pass through the same layers."""
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config=TEXT | {"encoder_hidden_size": 16, "use_qformer_text_input": True},
        text_config=tf.OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=24, num_attention_heads=2).to_dict(),
        num_query_tokens=T,
        image_text_hidden_size=8,
    )
    config.image_token_index = None
    return tf.Blip2ForImageTextRetrieval(config), batch()


def of_blip2(name):
    if "itm" in name or "text_projection" in name:
        return 0 if "itm" in name else N
    is_of_image = name.startswith("vision") or any(part in name for part in ("crossattention", "_query."))
    if is_of_image or not name.startswith("qformer"):
        return N * T
    return N * T + VALID if "attention" in name else VALID


def idefics3():
    """It takes the images that are there out of all, so that its vision model gets a copy of them."""
    text = tf.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = tf.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=60, scale_factor=3)
    inputs = batch(9)
    inputs["input_ids"][:, 0] = 60
    return tf.Idefics3ForConditionalGeneration(config), inputs | {
        "pixel_values": inputs["pixel_values"][:, None]
    }


def of_idefics3(name):
    return N * 9 if "vision_model" in name else N if "connector" in name else VALID


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (clip, of_clip),
        (blip, of_blip),
        (questions, of_questions),
        (git, of_git),
        (blip2, of_blip2),
        (idefics3, of_idefics3),
    ],
)
def test_the_mask_of_a_text_leaves_out_no_token_of_an_image(make, expected, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    chosen = lambda name, module: isinstance(module, nn.Linear)  # noqa: E731
    callback = LayerProbeCallback(make_trainer(tmp_path, model), SaturationMetric(), layers=chosen)
    for step in (1, 2):
        model(**inputs)
        counts = {
            name: int(callback.probe["train", name]["saturation"].count) for name in callback.probe.layers
        }
        assert counts == {name: step * expected(name) for name in counts}
    callback.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
