"""Sequences with time first, for layers whose type has no layout."""

import warnings

import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from tests.metrics.properties import assert_same, feed


def last_steps(model, layer, data, **settings):
    """Covariance of a layer's last steps by a probe, and the layer's output."""
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with LayerProbe(model, sm.CovarianceMetric(), layers=layer, sequences="last", **settings) as probe:
        model(data)
    handle.remove()
    return probe.compute()[f"covariance/train/{layer}"], outputs[0].detach()


def encoder(batch_first, layers=2):
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


DATA = torch.randn(7, 9, 6, generator=torch.Generator().manual_seed(0))  # T = 7, N = 9 where time is first


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", ["layers.1.linear1", "layers.0.norm2", "layers.0.self_attn", "layers.1"])
def test_a_part_of_a_transformer_goes_by_what_encloses_it(layer, batch_first):
    value, output = last_steps(encoder(batch_first), layer, DATA)
    rows = output[:, -1] if batch_first else output[-1]
    assert_same(value, feed(sm.CovarianceMetric(), rows).compute())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", ["1.0.layers.1.linear1", "1.0.layers.0.norm2", "1.0.layers.1"])
def test_also_where_that_is_not_the_model_itself(layer, batch_first):
    model = nn.Sequential(nn.Identity(), nn.Sequential(encoder(batch_first)))
    value, output = last_steps(model, layer, DATA)
    rows = output[:, -1] if batch_first else output[-1]
    assert_same(value, feed(sm.CovarianceMetric(), rows).compute())


@pytest.mark.parametrize("model", [nn.LSTM(6, 4), nn.MultiheadAttention(6, 2), encoder(False, 1)], ids=type)
def test_a_layer_itself_says_so(model):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = model

        def forward(self, x):
            return self.part(x, x, x) if isinstance(self.part, nn.MultiheadAttention) else self.part(x)

    value, output = last_steps(Around(), "part", DATA)
    assert_same(value, feed(sm.CovarianceMetric(), output[-1]).compute())


class Mixed(nn.Module):
    """A layer outside of the only part with a known layout."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Linear(6, 6), encoder(False, 1)

    def forward(self, x):
        return self.encoder(self.embed(x))


def test_where_nothing_tells_it_warns_once():
    model = Mixed()
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="embed", sequences="last")
    with pytest.warns(UserWarning, match=r"'embed' is taken as \(N, T, D\) = \(7, 9, 6\).*batch_first") as told:  # noqa: PT031
        model(DATA)
        model(DATA)
    assert len(told) == 1
    assert int(probe["train", "embed"]["covariance"].count) == 14


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"batch_first": False}, lambda output: output[-1]),
        ({"batch_first": True}, lambda output: output[:, -1]),
        ({"select": {"embed": lambda output: output.transpose(0, 1)}}, lambda output: output[-1]),
    ],
    ids=["time first", "batch first", "select"],
)
def test_the_user_says_so(settings, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, output = last_steps(Mixed(), "embed", DATA, **settings)
    assert_same(value, feed(sm.CovarianceMetric(), rows(output)).compute())


def test_steps_alone_need_no_layout():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Mixed()
        probe = LayerProbe(model, layers="embed")
        model(DATA)
    assert int(probe["train", "embed"]["saturation"].count) == 63


@pytest.mark.parametrize("batch_first", [True, False, None])
def test_samples_are_counted_where_they_are(batch_first):
    model = nn.Sequential(nn.Linear(6, 3))
    probe = LayerProbe(model, batch_first=batch_first, max_samples=2)
    model(DATA)
    assert int(probe["train", "0"]["saturation"].count) == 2 * (7 if batch_first is False else 9)
