"""Receptive fields, compared with the reach of a NaN in the input."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from spectralmetrics import ReceptiveField, border_layer, receptive_fields


class Residual(nn.Module):
    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, maps):
        return functional.relu(self.conv2(functional.relu(self.conv1(maps))) + self.shortcut(maps))


class Branches(nn.Module):
    """A squeeze-and-excitation, a concatenation and an operation in channels-last layout."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 5, padding=2)
        self.squeeze = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.out = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, maps):
        maps = torch.cat([self.narrow(maps), self.wide(maps)], 1)
        maps = self.last(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps = self.out(maps)
        return maps * self.squeeze(torch.cat([maps, maps], 1).mean((2, 3)))[:, :2, None, None]


class Option(nn.Module):
    """The residual block of a CIFAR network whose shortcut takes every second position, without weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, 2, 1)
        self.out = nn.Conv2d(4, 2, 3, 1, 1)

    def forward(self, maps):
        return self.out(self.conv(maps) + functional.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


class Take(nn.Module):
    def forward(self, maps):
        return maps[:, :1, 1:, ::3].expand(-1, 2, -1, -1)


class Focus(nn.Module):
    """The first layer of YOLO: the four positions of each square, as channels."""

    def forward(self, maps):
        squares = [maps[..., ::2, ::2], maps[..., 1::2, ::2], maps[..., ::2, 1::2], maps[..., 1::2, 1::2]]
        return torch.cat(squares, 1).mean(1, keepdim=True).expand(-1, 2, -1, -1)


class Merging(nn.Module):
    """Patches of Swin, joined in channels-last layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(2, 2, 2, 2), nn.Linear(4, 2), nn.LayerNorm(2)

    def forward(self, maps):
        last = self.conv(maps).permute(0, 2, 3, 1)
        last = torch.cat([last[:, 0::2, 0::2], last[:, 1::2, 1::2]], -1)
        return self.norm(self.linear(last)).permute(0, 3, 1, 2)


class Shuffled(nn.Module):
    """ShuffleNet's order of channels, by a view in five dimensions."""

    def forward(self, maps):
        count, _, height, width = maps.shape
        return maps.view(count, 2, 1, height, width).transpose(1, 2).reshape(count, -1, height, width)


class Written(nn.Module):
    """A result that is written into a new tensor, part by part."""

    def forward(self, maps):
        result = torch.zeros_like(maps)
        result[:, :1] = functional.avg_pool2d(maps[:, :1], 3, 1, 1)
        result[:, 1:] = maps[:, 1:]
        return result


def seen(model, layer, channels, size, axes):
    """The extent of the input, along its last axis, that the position that sees most of it depends on.

    Positions that see the border may see less than others; they are left out.
    """
    reached = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: reached.append(output)
    )
    examples = torch.zeros(size, channels, *([size] * axes))
    examples[range(size), ..., range(size)] = math.nan
    with torch.no_grad():
        model.eval()(examples)
    handle.remove()
    flags_of = reached[0].isnan().any(1)[(slice(None),) + (reached[0].shape[2] // 2,) * (axes - 1)]
    extents = []
    for flags in flags_of.T.tolist():
        columns = [column for column, flag in enumerate(flags) if flag]
        if columns and columns[0] > 0 and columns[-1] < size - 1:
            extents.append(columns[-1] - columns[0] + 1)
    return max(extents)


SEQUENTIAL = {
    "strides": [nn.Conv2d(2, 2, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)],
    "dilation": [nn.Conv2d(2, 2, 3, dilation=3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, (1, 4), (1, 3))],
    "pools": [
        nn.AvgPool2d(3, 2),
        nn.Conv2d(2, 2, 1),
        nn.MaxPool2d(2, dilation=2, stride=1),
        nn.Conv2d(2, 2, 2),
    ],
    "default stride": [nn.AvgPool2d(3), nn.MaxPool2d(2), nn.LPPool2d(1, 2), nn.Conv2d(2, 2, 2)],
    "same padding": [nn.Conv2d(2, 2, 5, padding="same"), nn.Conv2d(2, 2, 3, padding="same", dilation=2)],
    "adaptive": [nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(8), nn.Conv2d(2, 2, 3)],
    "shuffled": [nn.PixelUnshuffle(2), nn.Conv2d(8, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3)],
    "residual": [nn.Conv2d(2, 2, 3, 2, 1), Residual(2), Residual(2, 2), Residual(2)],
    "branches": [Branches()],
    "focus": [nn.Conv2d(2, 2, 3, 1, 1), Focus(), nn.Conv2d(2, 2, 3, 1, 1), Focus(), nn.Conv2d(2, 2, 2)],
    "merging": [Merging(), nn.Conv2d(2, 2, 3)],
    "order of channels": [nn.Conv2d(2, 2, 3), Shuffled(), nn.Conv2d(2, 2, 3)],
    "written": [nn.Conv2d(2, 2, 3), Written(), nn.Conv2d(2, 2, 3)],
    "slices": [nn.Conv2d(2, 2, 3, 1, 1), Option(), nn.Conv2d(2, 2, 3), Take(), nn.Conv2d(2, 2, 3)],
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_largest_field_is_what_a_position_depends_on(name):
    size = 32 if name in ("adaptive", "shuffled") else 60
    model = nn.Sequential(*SEQUENTIAL[name])
    fields = receptive_fields(model, torch.zeros(1, 2, size, size), nn.Conv2d)
    assert fields
    for layer, field in fields.items():
        assert field.largest[-1] == seen(model, layer, 2, size, 2), layer


@pytest.mark.parametrize(("axes", "conv"), [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_other_numbers_of_axes(axes, conv):
    model = nn.Sequential(conv(2, 3, 3, 2), nn.ReLU(), conv(3, 2, 4))
    size = 21
    fields = receptive_fields(model, torch.zeros(1, 2, *([size] * axes)))
    for layer, field in fields.items():
        assert field.largest == (seen(model, layer, 2, size, axes),) * axes


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 2), (3, 1)])
def test_a_transposed_convolution(kernel, stride):
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.ConvTranspose1d(1, 1, kernel, stride), nn.Conv1d(1, 1, 3))
    fields = receptive_fields(model, torch.zeros(1, 1, 16))
    # Positions of an upsampled signal see different numbers of inputs; the field is the largest of them.
    for layer, field in fields.items():
        assert field.largest[0] == seen(model, layer, 1, 16, 1)


def test_many_phases_are_taken_for_alike():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Upsample(size=4999), nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    fields = receptive_fields(model, torch.zeros(1, 1, 4002), nn.Conv1d)
    # Neighbouring positions of the interpolated signal lie 4000 / 4999 apart.
    assert [float(field.largest[0]) for field in fields.values()] == pytest.approx([3, 4.6, 6.2], abs=0.01)


class Slice(nn.Module):
    def __init__(self, start, step):
        super().__init__()
        self.start, self.step = start, step

    def forward(self, signal):
        return signal[..., self.start :: self.step]


class Together(nn.Module):
    """Two paths, added or concatenated where both have positions."""

    def __init__(self, *paths, concatenate):
        super().__init__()
        self.paths, self.concatenate = nn.ModuleList(paths), concatenate

    def forward(self, signal):
        one, two = (path(signal) for path in self.paths)
        size = min(one.shape[-1], two.shape[-1])
        one, two = (signal[..., (signal.shape[-1] - size) // 2 :][..., :size] for signal in (one, two))
        return torch.cat([one, two], 1).mean(1, keepdim=True) if self.concatenate else one + two


def random_network(draw):
    def same_rate():
        kernel, dilation = draw.randint(1, 4), draw.randint(1, 2)
        padding = draw.choice([0, 1, 2, "same"] if kernel % 2 else [0, 1, 2])
        pool = nn.MaxPool1d(3, 1, draw.randint(0, 1), dilation)
        conv = nn.Conv1d(1, 1, kernel, padding=padding, dilation=dilation)
        pad = nn.ConstantPad1d((draw.randint(-2, 2), draw.randint(-2, 2)), 0.0)
        return draw.choice([conv, pool, pad, Slice(draw.randint(0, 3), 1), nn.AvgPool1d(2, 1, 1)])

    def other_rate():
        factor, kernel = draw.randint(1, 3), draw.randint(1, 4)
        up = nn.Upsample(scale_factor=draw.choice([1.5, 2, 3]), mode=draw.choice(["nearest", "linear"]))
        back = nn.ConvTranspose1d(1, 1, kernel, factor, 0, 0, dilation=draw.randint(1, 2))
        conv = nn.Conv1d(1, 1, kernel, factor, draw.randint(0, 1))
        return draw.choice([up, back, conv, Slice(draw.randint(0, 2), factor), nn.LPPool1d(1, factor)])

    def joined():
        factor = draw.randint(2, 3)
        there = nn.Conv1d(1, 1, draw.randint(1, 4), factor)
        back = draw.choice(
            [nn.ConvTranspose1d(1, 1, draw.randint(1, 4), factor), nn.Upsample(scale_factor=factor)]
        )
        paths = (
            nn.Sequential(same_rate(), *draw.choice([[], [there, back]])),
            draw.choice([nn.Identity, same_rate])(),
        )
        return Together(*paths, concatenate=draw.random() < 0.5)

    return nn.Sequential(
        *(draw.choice([same_rate, other_rate, joined, joined])() for _ in range(4)), nn.Conv1d(1, 1, 2)
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed):
    model = random_network(random.Random(seed))
    fields = receptive_fields(model, torch.zeros(1, 1, 150), nn.Conv1d)
    for layer, field in fields.items():
        assert field.largest[0] == seen(model, layer, 1, 150, 1), model


def test_skip_connections_leave_the_smallest_field_behind():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Residual(2), Residual(2))
    fields = receptive_fields(model, torch.zeros(1, 1, 16, 16))
    assert fields["1.conv2"] == ReceptiveField((7, 7), (7, 7))
    assert fields["2.conv1"] == ReceptiveField((5, 5), (9, 9))  # around the first block, or through it
    assert fields["2.conv2"] == ReceptiveField((7, 7), (11, 11))
    assert border_layer(fields, 8) == "2.conv1"
    assert border_layer(fields, 6, paths="smallest") == "1.conv2"
    assert border_layer(fields, 8, paths="smallest") is None


def test_what_mixes_positions_sees_everything():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3, padding=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.rnn = nn.GRU(4, 4, batch_first=True)
            self.feature = nn.Linear(4, 4)
            self.token = nn.Linear(8, 8)
            self.head = nn.Linear(32, 2)

        def forward(self, signal):
            steps = self.feature(self.conv(signal).transpose(1, 2))
            self.rnn(steps)
            self.attention(steps, steps, steps)
            return self.head(steps.flatten(1))

    fields = receptive_fields(Mixer(), torch.zeros(1, 2, 8))
    everything = ReceptiveField((math.inf,), (math.inf,))
    local = ReceptiveField((3,), (3,))
    assert fields == {
        "conv": local,
        "feature": local,
        "rnn": everything,
        "attention": everything,
        "head": everything,
    }


def test_a_linear_layer_over_positions_sees_all_of_them():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(18, 10), nn.Conv1d(3, 1, 3))
    fields = receptive_fields(model, torch.zeros(1, 2, 20))
    assert [field.largest for field in fields.values()] == [(3,), (math.inf,), (math.inf,)]
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Linear(18, 10))
    assert receptive_fields(model, torch.zeros(1, 2, 20, 20))["1"].largest == (3, math.inf)


class Last(nn.Module):
    """Linear layers on features that are moved to the last dimension."""

    def __init__(self, there, back):
        super().__init__()
        self.conv, self.linear, self.out = nn.Conv2d(2, 4, 3), nn.Linear(4, 1), nn.Conv2d(1, 1, 3)
        self.there, self.back = there, back

    def forward(self, maps):
        return self.out(self.back(self.linear(self.there(self.conv(maps)))))


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (lambda maps: maps.permute(0, 2, 3, 1), lambda maps: maps.permute((0, 3, 1, 2))),
        (lambda maps: torch.movedim(maps, 1, -1), lambda maps: maps.movedim(-1, 1)),
        (lambda maps: maps.transpose(1, 3), lambda maps: torch.swapaxes(maps, 3, 1)),
    ],
)
def test_a_linear_layer_on_features_sees_one_position(there, back):
    fields = receptive_fields(Last(there, back), torch.zeros(1, 2, 20, 20))
    assert {name: field.largest for name, field in fields.items()} == {
        "conv": (3, 3),
        "linear": (3, 3),
        "out": (5, 5),
    }


def test_a_global_pool_and_a_scale_per_channel():
    fields = receptive_fields(
        nn.Sequential(Branches(), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
        torch.zeros(1, 2, 9, 9),
    )
    assert fields["0.out"] == ReceptiveField((3, 3), (7, 7))
    assert fields["1"] == ReceptiveField((3, 3), (math.inf, math.inf))
    assert fields["4"].smallest == (math.inf, math.inf)


class Collapsing(nn.Module):
    """Two convolutions with a mean over one axis between them."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        self.first, self.second = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 1)

    def forward(self, maps):
        return self.second(self.first(maps).mean(self.axis, keepdim=True))


@pytest.mark.parametrize("extent", [1, 2, 3, 7])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_mean_over_an_axis_sees_all_of_it(axis, extent):
    shape = [1, 1, 6, 6]
    shape[axis] = extent + 1  # the first convolution shortens it to `extent`
    field = receptive_fields(Collapsing(axis), torch.zeros(shape))["second"]
    expected = [2, 2]
    if extent > 1:
        expected[axis - 2] = math.inf
    assert field == ReceptiveField(tuple(expected), tuple(expected))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Conv2d(2, 2, 3))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    receptive_fields(model, torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model)
    with pytest.raises(RuntimeError, match="expected input"):
        receptive_fields(model, torch.zeros(1, 3, 8, 8))
    assert [module.training for module in model] == [True, False, True, True]


class Unusual(nn.Module):
    """Calls that are rare: arguments by name, empty maps, views of bits."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 2)

    def forward(self, maps):
        maps = functional.conv2d(input=maps, weight=self.conv.weight)
        features = functional.linear(input=maps.permute(0, 2, 3, 1), weight=torch.eye(2, device=maps.device))
        assert not torch.relu(maps[:, :, :0]).numel()
        return self.out(features.permute(0, 3, 1, 2) * (maps.view(torch.int32)[:, :, :1, :1] != 0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unusual_calls(device):
    model, example = Unusual().to(device), torch.zeros(1, 1, 9, 9, device=device)
    fields = receptive_fields(nn.Sequential(model, nn.Conv2d(1, 1, 1, device=device)), example, nn.Conv2d)
    assert fields["1"].smallest == (4, 4)
    model = nn.Sequential(nn.Conv2d(1, 1, 3), Take(), nn.Conv2d(2, 1, 2)).to(device)
    assert receptive_fields(model, example)["2"].largest == (4, 6)


def test_errors_quote_what_came():
    with pytest.raises(ValueError, match=r"\(N, C, \*spatial\).*got \(2, 3\)"):
        receptive_fields(nn.Linear(3, 2), torch.zeros(2, 3))
    fields = {"conv": ReceptiveField((3, 3), (3, 3))}
    with pytest.raises(ValueError, match="got 'middle'"):
        border_layer(fields, 8, paths="middle")
    with pytest.raises(ValueError, match=r"2 axes, got \(8, 8, 8\)"):
        border_layer(fields, (8, 8, 8))
