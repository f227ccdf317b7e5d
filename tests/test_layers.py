"""One table of layer types: probes and projections use the same feature dimension for every layer."""

import gc
import importlib.util
import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe, insert_projections, register_layer
from spectralmetrics.layers import default_layers, kind_of
from spectralmetrics.probing.outputs import first_tensor

MODULES = {
    name: each
    for name, each in vars(nn).items()
    if inspect.isclass(each) and issubclass(each, nn.Module) and each.__name__ == name
}
# Modules without features in their outputs, and why.
EXEMPT = {
    **dict.fromkeys((name for name in MODULES if name.endswith(("Loss", "Loss2d"))), "puts out a loss"),
    **dict.fromkeys(("CosineSimilarity", "PairwiseDistance"), "puts out one number for each pair"),
    **dict.fromkeys(("ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), "is not called"),
    **dict.fromkeys(("Module", "Container", "RNNBase", "RNNCellBase"), "has no forward"),
    "DataParallel": "is looked through",
}
SERIES, TOKENS, IMAGES, VOLUMES = (5, 6, 9), (5, 9, 6), (5, 6, 7, 8), (3, 6, 4, 5, 7)
MAPS = {1: SERIES, 2: IMAGES, 3: VOLUMES}
# Modules whose input decides where the features are.
ELEMENTWISE = [name for name, each in MODULES.items() if each.__module__ == "torch.nn.modules.activation"]
ELEMENTWISE = sorted(
    {*ELEMENTWISE, "Dropout", "AlphaDropout", "Identity"} - {"MultiheadAttention", "GLU", "Softmax2d"}
)
ARGUMENTS = {"Threshold": (-0.1, 0.0), "Softmax": (-1,), "Softmin": (-1,), "LogSoftmax": (-1,)}
# Name without rank -> arguments of a layer that takes (N, 6, *spatial).
BY_RANK = {
    "Conv": (6, 4, 1),
    "LazyConv": (4, 1),
    "ConvTranspose": (6, 4, 1),
    "LazyConvTranspose": (4, 1),
    "MaxPool": (2,),
    "AvgPool": (2,),
    "AdaptiveAvgPool": (3,),
    "AdaptiveMaxPool": (3,),
    "LPPool": (2, 2),
    "InstanceNorm": (6,),
    "LazyInstanceNorm": (),
    "ZeroPad": (1,),
    "ReflectionPad": (1,),
    "ReplicationPad": (1,),
    "ConstantPad": (1, 0.5),
    "CircularPad": (1,),
}
WITHOUT_BATCH = set(BY_RANK) - {"LazyInstanceNorm"}


def tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def cases():
    """(name of a module, the module, its arguments, dimension of the features) for each case."""
    for name, arguments in BY_RANK.items():
        for rank, shape in MAPS.items():
            if hasattr(nn, f"{name}{rank}d"):
                kind = getattr(nn, f"{name}{rank}d")
                yield f"{name}{rank}d", kind(*arguments), (tensor(*shape),), 1
                if name in WITHOUT_BATCH:
                    yield f"{name}{rank}d", kind(*arguments), (tensor(*shape[1:]),), 0
    for rank, shape in MAPS.items():
        yield f"BatchNorm{rank}d", getattr(nn, f"BatchNorm{rank}d")(6), (tensor(*shape),), 1
        yield f"LazyBatchNorm{rank}d", getattr(nn, f"LazyBatchNorm{rank}d")(), (tensor(*shape),), 1
        yield f"Dropout{rank}d", getattr(nn, f"Dropout{rank}d")(), (tensor(*shape),), 1
        yield "SyncBatchNorm", nn.SyncBatchNorm(6), (tensor(*shape),), 1
        yield "GroupNorm", nn.GroupNorm(2, 6), (tensor(*shape),), 1
        yield "Upsample", nn.Upsample(scale_factor=2), (tensor(*shape),), 1
        yield "ChannelShuffle", nn.ChannelShuffle(2), (tensor(*shape),), 1
        yield "PReLU", nn.PReLU(6), (tensor(*shape),), 1
        yield "LocalResponseNorm", nn.LocalResponseNorm(2), (tensor(*shape),), 1
        if rank > 1:
            yield (
                f"FractionalMaxPool{rank}d",
                getattr(nn, f"FractionalMaxPool{rank}d")(1, 3),
                (tensor(*shape),),
                1,
            )
        values = tensor(5, 6, *(8, 8, 8)[:rank])
        pooled = getattr(nn.functional, f"max_pool{rank}d")(values, 2, return_indices=True)
        yield f"MaxUnpool{rank}d", getattr(nn, f"MaxUnpool{rank}d")(2), pooled, 1
    yield "BatchNorm1d", nn.BatchNorm1d(6), (tensor(40, 6),), 1
    yield "Dropout1d", nn.Dropout1d(), (tensor(6, 9),), 0
    yield "Dropout3d", nn.Dropout3d(), (tensor(*VOLUMES[1:]),), 0
    yield "FeatureAlphaDropout", nn.FeatureAlphaDropout(), (tensor(*SERIES),), 1
    yield "CrossMapLRN2d", nn.CrossMapLRN2d(2), (tensor(*IMAGES),), 1
    yield "Softmax2d", nn.Softmax2d(), (tensor(*IMAGES),), 1
    yield "Softmax2d", nn.Softmax2d(), (tensor(*IMAGES[1:]),), 0
    yield "UpsamplingNearest2d", nn.UpsamplingNearest2d(scale_factor=2), (tensor(*IMAGES),), 1
    yield "UpsamplingBilinear2d", nn.UpsamplingBilinear2d(scale_factor=2), (tensor(*IMAGES),), 1
    yield "PixelShuffle", nn.PixelShuffle(2), (tensor(5, 12, 7, 8),), 1
    yield "PixelShuffle", nn.PixelShuffle(2), (tensor(12, 7, 8),), 0
    yield "PixelUnshuffle", nn.PixelUnshuffle(2), (tensor(5, 3, 6, 8),), 1
    yield "Fold", nn.Fold((4, 5), (2, 2)), (tensor(5, 12, 12),), 1
    yield "Fold", nn.Fold((4, 5), (2, 2)), (tensor(12, 12),), 0
    yield "Unfold", nn.Unfold((2, 2)), (tensor(*IMAGES),), 1
    yield "Unfold", nn.Unfold((2, 2)), (tensor(*IMAGES[1:]),), 0
    for shape in ((40, 6), TOKENS, (5, 7, 8, 6)):
        last = len(shape) - 1
        for layer in (nn.Linear(6, 4), nn.LazyLinear(4), nn.LayerNorm(6), nn.RMSNorm(6), nn.GLU()):
            yield type(layer).__name__, layer, (tensor(*shape),), last
        yield "Bilinear", nn.Bilinear(6, 6, 4), (tensor(*shape), tensor(*shape)), last
        yield (
            "Embedding",
            nn.Embedding(30, 6),
            (torch.arange(30).reshape(*([5, 6], [2, 3, 5])[last > 2]),),
            (2, 3)[last > 2],
        )
    yield "Linear", nn.Linear(6, 4), (tensor(6),), 0
    yield "GLU", nn.GLU(1), (tensor(*SERIES),), 1
    yield "EmbeddingBag", nn.EmbeddingBag(30, 6), (torch.arange(30).reshape(10, 3),), 1
    for name in ("RNN", "LSTM", "GRU"):
        for batch_first in (True, False):
            yield name, getattr(nn, name)(6, 4, batch_first=batch_first), (tensor(*TOKENS),), 2
        yield name, getattr(nn, name)(6, 4), (tensor(9, 6),), 1
        yield f"{name}Cell", getattr(nn, f"{name}Cell")(6, 4), (tensor(40, 6),), 1
    for batch_first in (True, False):
        for shape in (TOKENS, (9, 6)):
            attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
            yield "MultiheadAttention", attention, (tensor(*shape),) * 3, len(shape) - 1
            encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)
            decoder = nn.TransformerDecoderLayer(6, 2, 8, batch_first=batch_first)
            whole = nn.Transformer(6, 2, 1, 1, 8, batch_first=batch_first)
            stack = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
            for layer in (encoder, stack):
                yield type(layer).__name__, layer, (tensor(*shape),), len(shape) - 1
            for layer in (decoder, nn.TransformerDecoder(decoder, 1), whole):
                yield type(layer).__name__, layer, (tensor(*shape),) * 2, len(shape) - 1
    yield "Sequential", nn.Sequential(nn.Conv1d(6, 4, 1), nn.ReLU()), (tensor(*SERIES),), 1
    yield "Sequential", nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (tensor(*TOKENS),), 2
    yield "Flatten", nn.Flatten(), (tensor(40, 2, 3),), 1
    for name in ELEMENTWISE:
        yield name, getattr(nn, name)(*ARGUMENTS.get(name, ())), (tensor(40, 6),), 1


class After(nn.Module):
    """A layer after another, called in a forward that is not Sequential's."""

    def __init__(self, first, layer):
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, *args):
        return self.layer(self.first(*args))


def cases_behind_others():
    """Modules whose type does not decide the dimension; the layer before them does."""
    for around in (After, nn.Sequential):
        for name in ELEMENTWISE:
            for first, shape, dim in (
                (nn.Conv1d(6, 4, 3), SERIES, 1),
                (nn.Conv2d(6, 4, 3), IMAGES, 1),
                (nn.ConvTranspose1d(6, 4, 3), SERIES, 1),
                (nn.BatchNorm1d(6), SERIES, 1),
                (nn.Linear(6, 4), TOKENS, 2),
                (nn.Linear(6, 4), (5, 7, 8, 6), 3),
                (nn.LayerNorm(6), TOKENS, 2),
            ):
                yield name, around(first, getattr(nn, name)(*ARGUMENTS.get(name, ()))), (tensor(*shape),), dim
        yield "Flatten", around(nn.Conv2d(6, 4, 3), nn.Flatten(2)), (tensor(*IMAGES),), 1
        yield "Flatten", around(nn.Linear(6, 4), nn.Flatten(1, 2)), (tensor(5, 7, 8, 6),), 2
        yield "Unflatten", around(nn.Conv1d(6, 4, 1), nn.Unflatten(2, (3, 3))), (tensor(*SERIES),), 1


def taken(model, name, args):
    """Covariances of one layer by a probe and by a projection, and the layer's output."""
    outputs = []
    layer = model.get_submodule(name)
    with torch.no_grad():
        model.eval()(*args)  # gives a lazy layer its weights
        with insert_projections(model, layers=name or type(model).__name__) as (projection,):
            layer.register_forward_hook(lambda module, args, output: outputs.append(first_tensor(output)))
            with (
                LayerProbe(model, sm.CovarianceMetric(), layers=name or type(model).__name__) as probe,
                projection.collect(),
            ):
                model(*args)
            (value,) = probe.compute("eval").values()
            return value, projection.covariance.compute(), outputs[0]


def check(model, name, args, dim):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "in eval there are fewer observations")
        warnings.filterwarnings("ignore", ".*Lazy modules are a new feature")
        warnings.filterwarnings("ignore", "dropout2d: Received a 3-D")
        by_probe, by_projection, output = taken(model, name, args)
    rows = output.movedim(dim, -1).reshape(-1, output.shape[dim]).double().numpy()
    expected = np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])
    np.testing.assert_allclose(by_probe.numpy(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(by_projection.numpy(), expected, rtol=1e-6, atol=1e-9)


def identify(value):
    return value if isinstance(value, str) else None


def made(generator):
    """List all cases; making layers must not change the random state of other tests."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(generator)


ALONE, BEHIND = made(cases()), made(cases_behind_others())


@pytest.mark.parametrize(
    ("name", "layer", "args", "dim"), ALONE, ids=[f"{c[0]}-{'x'.join(map(str, c[2][0].shape))}" for c in ALONE]
)
def test_the_features_of_a_layer(name, layer, args, dim):
    assert type(layer).__name__ == name
    check(layer, "", args, dim)


@pytest.mark.parametrize(
    ("name", "model", "args", "dim"),
    BEHIND,
    ids=[f"{c[0]} behind {type(next(c[1].children())).__name__} in {type(c[1]).__name__}" for c in BEHIND],
)
def test_the_features_of_a_layer_behind_another(name, model, args, dim):
    (last, layer) = list(model.named_children())[-1]
    assert type(layer).__name__ == name
    check(model, last, args, dim)


def test_every_module_of_torch_is_tested_or_puts_out_no_features():
    tested = {case[0] for case in [*ALONE, *BEHIND]}
    assert tested | set(EXEMPT) == set(MODULES)
    assert not tested & set(EXEMPT)


def test_the_guide_has_the_table():
    path = Path(__file__).parents[1] / "docs" / "draw_layers.py"
    spec = importlib.util.spec_from_file_location("draw_layers", path)
    draw_layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_layers)
    assert draw_layers.drawn() == draw_layers.draw(), "run `python docs/draw_layers.py --write`"


class Snake(nn.Module):
    """A user's own activation, as in audio models."""

    def forward(self, x):
        return x + x.sin().square()


class Halves(nn.Module):
    """One half of the features, with time first or last."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.chunk(2, self.dim)[0]


class Steps(nn.Module):
    """A model as users write it: functions between layers, in its own forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def residual(m, x):
    return m.act(m.norm(m.conv(x)) + x)


SURROUNDINGS = {
    "a residual block": (
        lambda: Steps(residual, act=Snake(), conv=nn.Conv1d(6, 6, 3, padding=1), norm=nn.BatchNorm1d(6)),
        SERIES,
        1,
    ),
    "a transposed convolution": (
        lambda: Steps(
            lambda m, x: m.head(m.act(m.conv(x).transpose(1, 2))),
            conv=nn.Conv1d(6, 4, 3),
            act=nn.GELU(),
            head=nn.Linear(4, 2),
        ),
        SERIES,
        2,
    ),
    "a norm of features last between convolutions": (
        lambda: Steps(
            lambda m, x: m.act(m.norm(m.conv(x).transpose(1, 2)).transpose(1, 2)),
            conv=nn.Conv1d(6, 4, 3),
            norm=nn.LayerNorm(4),
            act=nn.GELU(),
        ),
        SERIES,
        1,
    ),
    "an activation of several layers": (
        lambda: Steps(
            lambda m, x: m.act(m.second(m.first(x).relu())),
            act=nn.ReLU(),
            first=nn.Conv1d(6, 9, 1),
            second=nn.Conv1d(9, 4, 1),
        ),
        SERIES,
        1,
    ),
    "a block of a block": (
        lambda: Steps(
            lambda m, x: m.block(x),
            block=nn.Sequential(Steps(lambda m, x: m.act(m.conv(x)), conv=nn.Conv1d(6, 4, 3), act=Snake())),
        ),
        SERIES,
        1,
    ),
    "as many positions as channels": (
        lambda: Steps(lambda m, x: m.act(m.conv(x)), conv=nn.Conv1d(6, 9, 1), act=Snake()),
        SERIES,
        1,
    ),
    "channels last in memory, as wide as maps": (
        lambda: Steps(
            lambda m, x: m.act(m.conv(x.contiguous(memory_format=torch.channels_last))),
            conv=nn.Conv2d(6, 8, 1),
            act=nn.ReLU(),
            head=nn.Linear(512, 3),
        ),
        (5, 6, 8, 8),
        1,
    ),
    "half of the channels": (
        lambda: Steps(lambda m, x: m.act(m.conv(x)), conv=nn.Conv1d(6, 4, 1), act=Halves()),
        SERIES,
        1,
    ),
    "before a convolution": (
        lambda: Steps(lambda m, x: m.conv(m.act(x)), act=nn.Dropout(), conv=nn.Conv1d(6, 4, 1)),
        SERIES,
        1,
    ),
    "a block that is a convolution": (
        lambda: Steps(
            lambda m, x: m.act(x),
            act=Steps(lambda m, x: m.two(m.one(x)), one=nn.Conv1d(6, 3, 1), two=nn.Conv1d(3, 4, 1)),
        ),
        SERIES,
        1,
    ),
    "tokens behind a convolution": (
        lambda: Steps(
            lambda m, x: m.block(m.conv(x).transpose(1, 2)),
            conv=nn.Conv1d(6, 4, 1),
            block=Steps(lambda m, x: m.act(m.up(x)), up=nn.Linear(4, 16), act=nn.GELU()),
        ),
        SERIES,
        2,
    ),
    "maps with channels last": (
        lambda: Steps(lambda m, x: m.act(m.up(x)), up=nn.Linear(6, 4), act=nn.GELU()),
        (5, 7, 8, 6),
        3,
    ),
    "a norm of users that puts channels first": (
        lambda: Steps(
            lambda m, x: m.act(m.conv(x)),
            conv=nn.Conv2d(6, 4, 1),
            act=type(
                "LayerNorm2d",
                (nn.LayerNorm,),
                {"forward": lambda s, x: nn.LayerNorm.forward(s, x.movedim(1, -1)).movedim(-1, 1)},
            )(4),
        ),
        IMAGES,
        1,
    ),
}


@pytest.mark.parametrize("situation", SURROUNDINGS)
def test_a_layer_whose_type_does_not_tell_goes_by_its_surroundings(situation):
    make, shape, dim = SURROUNDINGS[situation]
    model = make()
    name = next(name for name, module in model.named_modules() if name.split(".")[-1] == "act")
    check(model, name, (tensor(*shape),), dim)


def test_also_of_what_it_takes():
    model = nn.Sequential(nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3)).eval()
    probe = LayerProbe(model, layers="*", observe="inputs")
    with torch.no_grad():
        model(tensor(*SERIES))
    widths = {name: probe["eval", name].saturation.num_features for name in probe.layers}
    assert widths == {"Sequential": 6, "0": 6, "1": 4, "2": 4}


def doubtful():
    """As many positions as channels, and a function between that could have moved either to the end."""
    return Steps(
        lambda m, x: m.head(m.act(m.conv(x).transpose(1, 2).contiguous())),
        conv=nn.Conv1d(6, 9, 1),
        act=nn.GELU(),
        head=nn.Linear(9, 2),
    )


def test_a_guess_is_told_once_with_the_way_out():
    model = doubtful()
    probe = LayerProbe(model, layers="act")
    with pytest.warns(UserWarning, match=r"'act' is unknown: dimension 1 of 3.*register_layer.*select"):
        model(tensor(*SERIES))
    model(tensor(*SERIES))  # already warned
    probe.remove()
    with insert_projections(model.eval(), layers="act") as projections, projections.collect():
        with pytest.warns(UserWarning, match="feature dimension of 'act' is unknown: .*Give `dim`"):
            model(tensor(*SERIES))
        model(tensor(*SERIES))


def test_a_transposed_tensor_shows_in_memory():
    model = doubtful()
    model._forward = lambda m, x: m.head(m.act(m.conv(x).transpose(1, 2)))
    probe = LayerProbe(model, layers="act")
    with pytest.warns(UserWarning, match="feature dimension of 'act' is unknown: dimension 2 of 3"):
        model(tensor(*SERIES))
    assert int(probe["train", "act"].saturation.count) == 45


def test_what_was_sure_once_decides_where_it_is_not():
    model = doubtful().eval()
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="act")
    longer = tensor(5, 6, 20)
    with torch.no_grad():
        model(longer)  # (5, 20, 9) after the convolution
        model(tensor(*SERIES))
        outputs = [model.act(model.conv(x).transpose(1, 2)).reshape(-1, 9) for x in (longer, tensor(*SERIES))]
    probe.remove()
    expected = np.cov(torch.cat(outputs[:2]).double().numpy().T, bias=True)
    # The two direct calls were observed, too.
    np.testing.assert_allclose(probe.compute()["covariance/eval/act"].numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"batch_first": True}, {"select": {"act": lambda output: output}}],
    ids=["batch_first", "select"],
)
def test_the_ways_out_are_quiet(settings):
    model = doubtful().eval()
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="act", **settings)
    with torch.no_grad():
        model(tensor(*SERIES))
        rows = nn.functional.gelu(model.conv(tensor(*SERIES))).transpose(1, 2).reshape(-1, 9)
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(probe.compute()["covariance/eval/act"].numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiled_models_go_by_their_surroundings_too(mode):
    torch.compiler.reset()
    model = SURROUNDINGS["a residual block"][0]().eval()
    probe = LayerProbe(model, sm.CovarianceMetric(), layers="act")
    with torch.no_grad():
        output = torch.compile(model, backend=mode, fullgraph=True)(tensor(*SERIES))
    rows = output.movedim(1, -1).reshape(-1, 6).double().numpy()
    value = probe.compute()["covariance/eval/act"]
    np.testing.assert_allclose(value.numpy(), np.cov(rows.T, bias=True), rtol=1e-5, atol=1e-8)


class TestRegister:
    def new(self):
        return type("Own", (Halves,), {})

    @pytest.mark.parametrize(
        ("dim", "shape", "axis"), [(1, SERIES, 1), (-1, TOKENS, 2), (2, IMAGES, 2), (-1, IMAGES, 3)]
    )
    def test_the_dimension_of_the_features(self, dim, shape, axis):
        own = self.new()
        register_layer(own, dim=dim)
        check(own(axis), "", (tensor(*shape),), axis)
        check(type("Sub", (own,), {})(axis), "", (tensor(*shape),), axis)

    def test_a_layer_that_leaves_dimensions_where_they_are(self):
        own = type("Own", (Snake,), {})
        register_layer(own, dim="input")
        for first, shape, dim in ((nn.Conv1d(6, 9, 1), SERIES, 1), (nn.Linear(6, 9), TOKENS, 2)):
            check(nn.Sequential(first, own()), "1", (tensor(*shape),), dim)

    def test_those_beside_it_go_by_it(self):
        own = self.new()
        register_layer(own, dim=1)
        check(After(own(), nn.ReLU()), "layer", (tensor(*SERIES),), 1)
        register_layer(own, dim=-1, out_features=lambda layer: 3)
        check(After(own(2), nn.ReLU()), "layer", (tensor(*TOKENS),), 2)

    def test_probed_by_default_with_a_ceiling_and_time_first(self):
        own = self.new()
        model = nn.Sequential(own(2), nn.ReLU())
        assert own not in default_layers()
        register_layer(own, dim=-1, batch_first=False, ceiling=lambda layer: 2, default=True)
        assert own in default_layers()
        probe = LayerProbe(model, sm.CovarianceMetric(), sequences="last")
        output = model.eval()(tensor(*TOKENS))
        assert probe.layers == ["0"]
        assert probe.facts["0"].ceiling == 2
        expected = np.cov(tensor(*TOKENS)[-1, :, :3].double().numpy().T, bias=True)
        np.testing.assert_allclose(probe.compute()["covariance/eval/0"].numpy(), expected, rtol=1e-6)
        assert output.shape == (5, 9, 3)

    def test_a_type_is_what_it_was_registered_as_last(self):
        own = self.new()
        for dim in (1, -1, 1):
            register_layer(own, dim=dim)
            assert kind_of(own())[0].dim == dim

    def test_a_type_is_forgotten_with_its_last_use(self):
        gc.collect()
        before = len(default_layers())
        register_layer(self.new(), dim=1, default=True)
        gc.collect()
        assert len(default_layers()) == before
