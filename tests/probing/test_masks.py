"""Steps that count where tokens do not come as (N, T, D), and warnings where no mask fits."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from spectralmetrics.probing.rules import ObservationRule

N, T, D = 3, 20, 8
VALID = torch.arange(T) < torch.tensor([[20], [5], [11]])


class Around(nn.Module):
    """A layer whose tokens come in another shape."""

    def __init__(self, shape, layer, **others):
        super().__init__()
        self.inner, self.layer, self.shape = nn.Linear(D, D), layer, shape
        for name, module in others.items():
            self.add_module(name, module)

    def forward(self, tokens):
        return self.layer(self.shape(self.inner(tokens)))


def seen(model, valid=VALID, tokens=None, **settings):
    """Covariance and count of `layer` by a probe, and the layer's output."""
    outputs = []
    handle = model.layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    tokens = torch.randn(N, T, D, generator=torch.Generator().manual_seed(0)) if tokens is None else tokens
    with LayerProbe(model, sm.CovarianceMetric(), layers=["inner", "layer"], **settings) as probe:
        with probe.mask(valid):
            model(tokens)
        value = probe.compute()["covariance/train/layer"]
    handle.remove()
    assert int(probe["train", "inner"].covariance.count) == (N if settings else int(valid.sum()))
    return value.numpy(), int(probe["train", "layer"].covariance.count), outputs[0]


def covariance(rows):
    return np.cov(rows.double().numpy().T, bias=True)


FITTING = {
    "a router": (lambda x: x.flatten(0, 1), nn.Linear(D, 4), lambda out: out.unflatten(0, (N, T))[VALID]),
    "heads": (
        lambda x: x.unflatten(2, (2, 4)).transpose(1, 2),
        nn.LayerNorm(4),
        lambda out: out.transpose(1, 2)[VALID].flatten(0, 1),
    ),
    "heads last": (lambda x: x.unflatten(2, (2, 4)), nn.LayerNorm(4), lambda out: out[VALID].flatten(0, 1)),
    "a convolution": (lambda x: x.mT, nn.Conv1d(D, 4, 3, padding=1), lambda out: out.mT[VALID]),
    "behind a convolution": (
        lambda x: x.mT,
        nn.Sequential(nn.Conv1d(D, 4, 3, padding=1), nn.ReLU()),
        lambda out: out.mT[VALID],
    ),
}


@pytest.mark.parametrize("situation", FITTING)
def test_padding_is_left_out_in_other_shapes(situation):
    shape, layer, rows = FITTING[situation]
    value, count, output = seen(Around(shape, layer))
    np.testing.assert_allclose(value, covariance(rows(output)), rtol=1e-5, atol=1e-8)
    assert count == len(rows(output))


@pytest.mark.parametrize("how", ["last", "mean", "flatten"])
def test_flattened_tokens_are_sequences_again(how):
    model = Around(lambda x: x.flatten(0, 1), nn.Linear(D, 2))
    value, count, output = seen(model, sequences=how)
    steps = output.unflatten(0, (N, T))
    rows = {
        "last": lambda: torch.stack([x[valid][-1] for x, valid in zip(steps, VALID, strict=True)]),
        "mean": lambda: torch.stack([x[valid].mean(0) for x, valid in zip(steps, VALID, strict=True)]),
        "flatten": lambda: torch.where(VALID[..., None], steps, 0).flatten(1),
    }[how]()
    np.testing.assert_allclose(value, covariance(rows), rtol=1e-4, atol=1e-7)
    assert count == N


class TimeFirst(nn.Module):
    """As in fairseq: (T, N, D) inside, flattened for a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 1)
        self.router = nn.Linear(D, 4)

    def forward(self, tokens):
        steps = tokens.transpose(0, 1)
        return self.router(self.attention(steps, steps, steps)[0].flatten(0, 1))


class Enclosed(nn.TransformerEncoderLayer):
    """The module around the router has time first."""

    def __init__(self):
        super().__init__(D, 1, 16)
        self.router = nn.Linear(D, 4)

    def forward(self, tokens):
        return self.router(tokens.transpose(0, 1).flatten(0, 1))


@pytest.mark.parametrize(("new", "settings"), [(TimeFirst, {"batch_first": False}), (Enclosed, {})])
def test_flattened_tokens_with_time_first(new, settings):
    model = new()
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="router", **settings)
    with probe.mask(VALID):
        output = model(torch.randn(N, T, D)).detach()
    (value,) = probe.compute().values()
    rows = output.unflatten(0, (T, N)).transpose(0, 1)[VALID]
    np.testing.assert_allclose(value.numpy(), covariance(rows), rtol=1e-5, atol=1e-8)


def test_where_nothing_tells_their_order_a_word_is_said():
    model = TimeFirst()
    probe = LayerProbe(model, layers="router")
    said = r"'router' is taken as \(N, T\) = \(3, 20\), flattened, but parts .* batch_first"
    with pytest.warns(UserWarning, match=said), probe.mask(VALID):
        model(torch.randn(N, T, D))
    with probe.mask(VALID):
        model(torch.randn(N, T, D))  # already warned


MISSED = {
    "windows": (lambda x: x.unflatten(1, (5, 4)).flatten(0, 1), nn.Linear(D, 4), (15, 4, 4)),
    "heads with the samples": (
        lambda x: x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1),
        nn.Linear(4, 4),
        (6, 20, 4),
    ),
    "some tokens": (lambda x: x.flatten(0, 1)[:7], nn.Linear(D, 4), (7, 4)),
    "blocks": (lambda x: x.unflatten(1, (5, 4)), nn.Linear(D, 4), (3, 4, 5, 4)),  # features second
    "a strided convolution": (lambda x: x.mT, nn.Conv1d(D, 4, 2, stride=2), (3, 4, 10)),
}


@pytest.mark.parametrize("situation", MISSED)
def test_each_layer_that_a_mask_missed_is_named_once(situation):
    shape, layer, of_output = MISSED[situation]
    model = Around(shape, layer)
    probe = LayerProbe(model, sm.CovarianceMetric(), layers=["inner", "layer"])
    said = (
        "the mask of shape (3, 20) fits no sequence that some layers have put out: all steps, padding too, were"
        f" counted of 'layer' {of_output};"
    )
    with pytest.warns(UserWarning, match=re.escape(said)) as told, probe.mask(VALID):
        model(torch.randn(N, T, D))
    assert len(told) == 1
    with probe.mask(VALID):
        model(torch.randn(N, T, D))  # already warned
    assert int(probe["train", "inner"].covariance.count) == 2 * int(VALID.sum())


def test_what_has_no_steps_is_missed_by_no_mask():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.pooled, self.head = nn.Conv2d(1, 4, 3), nn.Linear(D, 4), nn.Linear(4, 2)

        def forward(self, image, tokens):
            self.head(self.pooled(tokens).mean(1))
            return self.image(image)

    model = Both()
    probe = LayerProbe(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with probe.mask(VALID):
            model(torch.randn(N, 1, T + 2, 9), torch.randn(N, T, D))
    counts = {name: int(probe["train", name].saturation.count) for name in probe.layers}
    assert counts == {"pooled": int(VALID.sum()), "head": N, "image": N * T * 7}


def test_masks_nest_and_each_says_its_own():
    model = Around(lambda x: x, nn.Linear(D, 4))
    probe = LayerProbe(model, layers="layer")
    with probe.mask(VALID):
        model(torch.randn(N, T, D))
        with pytest.warns(UserWarning, match=r"\(3, 19\)"), probe.mask(VALID[:, 1:]):
            model(torch.randn(N, T, D))
        model(torch.randn(N, T, D))
    assert int(probe["train", "layer"].saturation.count) == 2 * int(VALID.sum()) + N * T


@pytest.mark.parametrize("how", ["mean", "max", "median", "flatten"])
def test_pooled_series_leave_padding_out(how):
    series = torch.randn(N, 4, T)
    series[1, 2, 3] = torch.nan
    rule = ObservationRule(feature_maps=how)
    valid = VALID.clone()
    valid[2] = False
    found = rule.batch(nn.Conv1d(4, 4, 1), series, valid).observations(rule)
    rows = found.rows()[found.valid]
    kept = [series[n][:, valid[n]] for n in (0, 1)]
    expected = {
        "mean": lambda: torch.stack([each.mean(1) for each in kept]),
        "max": lambda: torch.stack([each.amax(1) for each in kept]),
        "median": lambda: torch.stack([each.median(1).values for each in kept]),
        "flatten": lambda: torch.where(valid[:, None], series, 0).flatten(1)[:2],
    }[how]()
    torch.testing.assert_close(rows, expected, equal_nan=True)


def test_a_limit_of_samples_is_one_of_sequences_where_tokens_are_flattened():
    model = Around(lambda x: x.flatten(0, 1), nn.Linear(D, 4))
    probe = LayerProbe(model, max_samples=2)
    with probe.mask(VALID):
        model(torch.randn(N, T, D))
    assert {int(probe["train", name].saturation.count) for name in probe.layers} == {25}
