"""Padding of texts in models that see as many tokens of an image, and of sounds."""

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


SPEECH = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
FRAMES, FRAMES_VALID = N * 10, 7 + 5 + 10  # of sounds of 80, 60 and 110 samples


def sounds():
    mask = torch.arange(110) < torch.tensor([[80], [60], [110]])
    return {"input_values": torch.randn(N, 110) * mask, "attention_mask": mask.long()}


def of_sounds(name):
    """The model makes a mask of frames for its transformer; those before it count whole, with a warning."""
    return FRAMES if "feature_projection" in name else FRAMES_VALID


def wav2vec2(kind=tf.Wav2Vec2ForCTC):
    return kind(kind.config_class(**SIZES, **SPEECH, vocab_size=32, layerdrop=0.0)), sounds()


def hubert():
    return wav2vec2(tf.HubertForCTC)


def transcription():
    """A text decoder, which has its own mask, looks at the frames; a layer between them changes their width."""
    text = tf.BertConfig(**TEXT | {"hidden_size": 32})
    config = tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(wav2vec2()[0].config, text)
    model = tf.SpeechEncoderDecoderModel(config)
    text = batch()
    return model, sounds() | {f"decoder_{key}": text[key] for key in ("input_ids", "attention_mask")}


def of_transcription(name):
    is_cross = "crossattention" in name and name.endswith(("key", "value"))
    return of_sounds(name) if name.startswith("enc") or is_cross else VALID


def speecht5():
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24), ("layerdrop", 0.0))
    }
    text = batch()
    config = tf.SpeechT5Config(vocab_size=64, hidden_size=16, **sizes, **SPEECH)
    inputs = sounds() | {f"decoder_{key}": text[key] for key in ("input_ids", "attention_mask")}
    return tf.SpeechT5ForSpeechToText(config), inputs


def of_speecht5(name):
    is_cross = "encoder_attn" in name and name.endswith(("k_proj", "v_proj"))
    return of_sounds(name) if ".encoder." in name or is_cross else VALID


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (clip, of_clip),
        (blip, of_blip),
        (questions, of_questions),
        (git, of_git),
        (blip2, of_blip2),
        (idefics3, of_idefics3),
        (wav2vec2, of_sounds),
        (hubert, of_sounds),
        (transcription, of_transcription),
        (speecht5, of_speecht5),
    ],
)
def test_a_mask_leaves_out_padding_and_nothing_else(make, expected, tmp_path):
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


def test_a_scripted_part_which_takes_no_hooks_stops_no_forward(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Embedding(64, 4), nn.Linear(24, 4)
            self.scripted = torch.jit.script(nn.ReLU())

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.scripted(self.text(input_ids).mean() + self.image(pixel_values).mean())

    callback = LayerProbeCallback(make_trainer(tmp_path, model := Pair()), SaturationMetric())
    model(**batch())
    assert int(callback.probe["train", "image"]["saturation"].count) == N * 3 * 24
