"""Bad input to the callbacks: refused as soon as they have the model, which is unchanged."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from spectralmetrics import SaturationMetric
from spectralmetrics.integrations import lightning, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the libraries

BAD = [
    ("metrics", "saturation", TypeError, "expected a metric, a sequence or dict of metrics, got str"),
    ("metrics", SaturationMetric, TypeError, "the class SaturationMetric; call it"),
    ("layers", "decoder", ValueError, "no layer matches 'decoder'"),
    ("every_n_steps", 0, ValueError, "expected every_n_steps to be a positive integer, got 0"),
    ("folds", "2", ValueError, "expected folds to be a positive integer, got '2'"),
    ("generation", "no", TypeError, "expected generation to be True or False, got 'no'"),
    ("each_layer", "rows", TypeError, "expected each_layer to be True or False, got 'rows'"),
    ("colour", 1, TypeError, "unexpected keyword argument 'colour'"),
]


def state(model):
    hooks = [
        (len(each._forward_hooks), len(each._forward_pre_hooks), sorted(vars(each))) for each in model.modules()
    ]
    return hooks, [value.clone() for value in model.state_dict().values()]


def assert_unchanged(model, before):
    after = state(model)
    assert after[0] == before[0]
    assert all(map(torch.equal, after[1], before[1]))


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def trainer(model, tmp_path):
    return Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


@pytest.mark.parametrize(("argument", "value", "error", "words"), BAD)
def test_of_lightning(argument, value, error, words, model):
    callback = lightning.LayerProbeCallback(**{argument: value})
    before = state(model)
    with pytest.raises(error, match=words):
        callback.on_fit_start(None, model)
    assert callback.probe is None
    assert_unchanged(model, before)


@pytest.mark.parametrize(("argument", "value", "error", "words"), BAD)
def test_of_transformers(argument, value, error, words, trainer):
    before = state(trainer.model)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(error, match=words):
        transformers.LayerProbeCallback(trainer, **{argument: value})
    assert trainer.callback_handler.callbacks == callbacks
    assert_unchanged(trainer.model, before)


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("value", [3, True, ""])
def test_names_of_masks(name, value, trainer):
    before = state(trainer.model)
    with pytest.raises(
        TypeError, match=f"expected {name} to be the name of an argument or None, got {value!r}"
    ):
        transformers.LayerProbeCallback(trainer, **{name: value})
    assert_unchanged(trainer.model, before)


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (nn.Linear(2, 2), "Linear")])
def test_what_is_no_trainer(value, kind):
    with pytest.raises(TypeError, match=f"expected trainer to be a Trainer, got {kind}"):
        transformers.LayerProbeCallback(value)
