import warnings

import pytest
import torch
from torch import nn

from spectralmetrics import EffectiveRankMetric, LayerProbe, insert_projections, set_projection_threshold
from spectralmetrics.probing import select_layers
from tests.probing.models import ResNet, Transformer


def test_default_layers_by_type():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "lazy": nn.LazyLinear(2),
            "conv": nn.Conv1d(2, 2, 1),
            "lazyconv": nn.LazyConv2d(2, 1),
            "up": nn.ConvTranspose3d(2, 2, 1),
            "lstm": nn.LSTM(2, 2),
            "gru": nn.GRU(2, 2),
            "rnn": nn.RNN(2, 2),
            "attention": nn.MultiheadAttention(2, 1),
            "norm": nn.BatchNorm1d(2),
            "act": nn.ReLU(),
            "embedding": nn.Embedding(3, 2),
        }
    )
    assert list(select_layers(model)) == [
        *("linear", "lazy", "conv", "lazyconv", "up", "lstm", "gru", "rnn", "attention")
    ]


def test_patterns_types_callables_and_exclusion():
    model = ResNet()
    assert list(select_layers(model, "*.conv1")) == ["layer1.0.conv1", "layer1.2.conv1"]
    assert list(select_layers(model, ["head", nn.BatchNorm2d], exclude="layer1.2.*")) == [
        *("layer1.0.bn1", "layer1.0.bn2", "head")
    ]
    assert list(select_layers(model, lambda name, module: name.endswith("conv2"))) == [
        *("layer1.0.conv2", "layer1.2.conv2")
    ]
    assert "layer1.0" in select_layers(model, "layer1.*")  # modules of any type, blocks included
    assert list(select_layers(model, exclude=nn.Conv2d)) == ["head"]


def test_the_projection_inside_attention_is_left_out():
    model = Transformer()
    chosen = select_layers(model)
    assert "encoder.layers.0.self_attn" in chosen
    assert not [name for name in chosen if "out_proj" in name]
    assert not [name for name in select_layers(model, nn.Linear) if "out_proj" in name]
    assert not [name for name in select_layers(model, "*") if "out_proj" in name]
    exact = "encoder.layers.0.self_attn.out_proj"
    assert list(select_layers(model, exact)) == [exact]


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = self.encoder
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.decoder(torch.relu(self.encoder(x))))


class TestSharedModules:
    """Any of its names selects it; it counts once, under the first selected name."""

    @pytest.mark.parametrize(
        ("selectors", "names"),
        [
            ({}, ["encoder", "head"]),
            ({"layers": "decoder"}, ["decoder"]),
            ({"layers": "encoder"}, ["encoder"]),
            ({"layers": ["decoder", "encoder"]}, ["encoder"]),
            ({"layers": ["head", "dec*"]}, ["decoder", "head"]),
            ({"exclude": "decoder"}, ["head"]),
            ({"exclude": "encoder"}, ["head"]),
            ({"layers": "*coder", "exclude": "head"}, ["encoder"]),
        ],
        ids=str,
    )
    def test_names(self, selectors, names):
        model = Tied()
        assert list(select_layers(model, **selectors)) == names
        probe = LayerProbe(model, **selectors)
        assert probe.layers == names
        model(torch.randn(5, 4))
        values = probe.compute()
        assert list(values) == [f"saturation/train/{name}" for name in names]
        if names[0] != "head":
            assert int(probe["train", names[0]]["saturation"].count) == 10  # both runs

    @pytest.mark.parametrize("chosen", ["encoder", "decoder"])
    @pytest.mark.parametrize("pattern", ["encoder", "decoder", "dec*"])
    def test_select(self, pattern, chosen):
        model = Tied()
        probe = LayerProbe(model, layers=chosen, select={pattern: lambda output: output[:, :3]})
        model(torch.randn(5, 4))
        assert probe["train", chosen]["saturation"].num_features == 3

    def test_nothing_is_left_if_all_names_are_taken_away(self):
        with pytest.raises(ValueError, match="no layer of Tied is left"):
            select_layers(Tied(), "encoder", exclude="decoder")


def test_wrappers_are_looked_through():
    model = ResNet()
    names = list(select_layers(model))
    assert list(select_layers(nn.DataParallel(model))) == names
    assert list(select_layers(torch.compile(model, backend="eager"))) == names
    model.layer1 = torch.compile(model.layer1, backend="eager")
    assert list(select_layers(model)) == names


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("layer1.0.conv3", r"'layer1\.0\.conv3'; close names: .*'layer1\.0\.conv1'"),
        ("zzz", "no layer matches 'zzz'; names are"),
        (nn.LSTM, "no layer matches LSTM; the model has .*Conv2d"),
        (lambda name, module: False, "the callable"),
    ],
)
@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_a_selector_that_matches_nothing(argument, selector, message):
    with pytest.raises(ValueError, match=message):
        select_layers(ResNet(), **{argument: selector})


def test_other_mistakes():
    with pytest.raises(TypeError, match="got 3"):
        select_layers(ResNet(), 3)
    with pytest.raises(ValueError, match="2 of them taken away"):
        select_layers(ResNet(), "*.conv1", exclude="*conv1")
    with pytest.raises(ValueError, match="no layer of Sequential is left"):
        select_layers(nn.Sequential(nn.ReLU()))


def test_the_inner_projection_of_an_attention_is_left_out_wherever_the_attention_is():
    attention = nn.MultiheadAttention(8, 2)
    assert list(select_layers(attention)) == ["MultiheadAttention"]
    assert list(select_layers(nn.ModuleDict({"a": attention}))) == ["a"]
    assert list(select_layers(attention, layers="out_proj")) == ["out_proj"]


class Twice(nn.Linear):
    """A layer that holds an attribute with the name of its type."""

    def __init__(self):
        super().__init__(4, 4)
        self.Twice = nn.Linear(4, 3)

    def forward(self, x):
        return self.Twice(super().forward(x))


def test_a_model_and_a_child_that_has_the_name_of_its_type_are_two_layers():
    model = Twice()
    assert select_layers(model) == {"Twice (model)": model, "Twice": model.Twice}
    assert select_layers(model, "Twice") == {"Twice": model.Twice}
    probe = LayerProbe(model, EffectiveRankMetric())
    model(torch.randn(50, 4))
    assert list(probe.compute()) == ["effective_rank/train/Twice", "effective_rank/train/Twice (model)"]
    projections = insert_projections(model, threshold=1.0)
    model(torch.randn(50, 4))
    assert {row.name for row in set_projection_threshold(model, 1.0)} == set(projections.layers)
    model.Twice = None
    assert select_layers(model, "Twice") == {"Twice": model}


class Experts(nn.Module):
    """Weights of several experts in one tensor, as in transformers."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, width, width))
        self.bias = nn.Parameter(torch.zeros(1000))

    def forward(self, x):
        return x


def unseen_in(model, **arguments):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with LayerProbe(model, **arguments):
            pass
    return [str(each.message) for each in told]


def test_a_probe_says_which_modules_hold_parameters_that_it_does_not_see():
    def model(width, number=1):
        experts = {f"experts{each}": Experts(width) for each in range(number)}
        return nn.ModuleDict({"seen": nn.Linear(100, 100, bias=False), **experts})

    # 676 of 11,676 weights; the 1,000 weights of a vector are not named.
    (words,) = unseen_in(model(13))
    assert words.startswith(
        "6 % of the model's parameters lie in layers that are not probed by default: 'experts0'"
    )
    assert "`layers` chooses any module by name or type" in words
    assert unseen_in(model(12)) == []  # 576 of 11,576 are 4.98 %
    (words,) = unseen_in(model(50, 7))
    assert words.startswith("80 % of")  # 70,000 of 87,000
    assert "'experts4' and 2 more; " in words
    # Names without wrappers, also for modules deep inside.
    (words,) = unseen_in(torch.compile(nn.Sequential(model(50), nn.ReLU()), backend="eager"))
    assert "by default: '0.experts0'; " in words


def test_nothing_is_said_of_parameters_that_are_seen_or_left_out_on_purpose():
    experts = nn.ModuleDict({"seen": nn.Linear(100, 100), "experts": Experts(50)})
    assert unseen_in(experts, layers=["seen"]) == []
    assert unseen_in(experts, layers=["seen", "experts"]) == []
    embedded = nn.ModuleDict(
        {"seen": nn.Linear(8, 8), "tokens": nn.Embedding(1000, 8), "norm": nn.LayerNorm(900)}
    )
    assert unseen_in(embedded) == []
    # Weights that a module holds beside probed layers inside it, and a weight shared with a probed layer.
    attention = nn.MultiheadAttention(16, 2)
    assert unseen_in(nn.ModuleDict({"attention": attention, "out": nn.Linear(16, 16)})) == []

    class Tied(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    layer = nn.Linear(30, 30)
    assert unseen_in(nn.ModuleDict({"layer": layer, "tied": Tied(layer.weight)})) == []
    # A layer of a default type that is left out was left out on purpose.
    assert unseen_in(nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(90, 90)}), exclude="b") == []
