"""Receptive fields, compared with the reach of a NaN in the input."""

import math

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


def seen(model, layer, channels, size, axes):
    """Extent of the input, along its last axis, on which the middle position of a layer's output depends."""
    reached = []

    def hook(module, args, output):
        position = [extent // 2 for extent in output.shape[2:]]
        reached.append(bool(output[(slice(None), slice(None), *position)].isnan().any()))

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        for column in range(size):
            example = torch.zeros(1, channels, *([size] * axes))
            example[..., column] = math.nan
            model.eval()(example)
    handle.remove()
    columns = [column for column, flag in enumerate(reached) if flag]
    return columns[-1] - columns[0] + 1


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
    "slices": [nn.Conv2d(2, 2, 3, 1, 1), Option(), nn.Conv2d(2, 2, 3), Take(), nn.Conv2d(2, 2, 3)],
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_largest_field_is_what_a_position_depends_on(name):
    size = 32 if name in ("adaptive", "shuffled") else 60
    model = nn.Sequential(*SEQUENTIAL[name])
    fields = receptive_fields(model, torch.zeros(1, 2, size, size), nn.Conv2d)
    assert fields
    for layer, field in fields.items():
        # After a pixel shuffle the positions see different parts; the field bounds them.
        tolerance = 3 if name == "shuffled" else 0
        depends_on = seen(model, layer, 2, size, 2)
        assert field.largest[-1] - tolerance <= depends_on <= field.largest[-1], layer


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
        assert field.largest[0] - 1.5 <= seen(model, layer, 1, 16, 1) <= math.ceil(field.largest[0])


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


def test_errors_quote_what_came():
    with pytest.raises(ValueError, match=r"\(N, C, \*spatial\).*got \(2, 3\)"):
        receptive_fields(nn.Linear(3, 2), torch.zeros(2, 3))
    fields = {"conv": ReceptiveField((3, 3), (3, 3))}
    with pytest.raises(ValueError, match="got 'middle'"):
        border_layer(fields, 8, paths="middle")
    with pytest.raises(ValueError, match=r"2 axes, got \(8, 8, 8\)"):
        border_layer(fields, (8, 8, 8))
