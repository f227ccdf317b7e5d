"""Claims of the recipes; test_docs.py runs them."""

import pytest
import torch
from torch import nn

from tests.test_docs import DOCS, python_blocks

CONVOLUTION = {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"}


@pytest.fixture(scope="module")
def make_thin():
    namespace = {"__name__": "recipe"}
    exec(python_blocks(DOCS / "guide" / "recipes" / "low_rank.md")[0], namespace)
    return namespace["make_thin"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda bias: nn.Linear(40, 32, bias=bias), (40,)),
        (lambda bias: nn.Conv2d(6, 24, bias=bias, **CONVOLUTION), (6, 9, 9)),
        (lambda bias: nn.Conv2d(6, 24, (1, 5), dilation=(1, 2), bias=bias), (6, 5, 12)),
    ],
)
def test_thin_layers_leave_out_the_variance_that_they_may(make_thin, layer, shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(layer(bias)).double()
    # A mean that is not zero, and few directions.
    inputs = 5 + torch.randn(300, 4, dtype=torch.float64) @ torch.randn(4, torch.Size(shape).numel()).double()
    inputs = (inputs + 0.3 * torch.randn_like(inputs)).reshape(300, *shape)
    with torch.no_grad():
        before = model(inputs)
        ((name, width, rank),) = make_thin(model, inputs.split(100), 0.9)
        after = model(inputs)
    dims = [0, *range(2, before.ndim)]
    centred = before - before.mean(dims, keepdim=True)
    lost = float((after - before).square().sum() / centred.square().sum())
    assert (name, width, model[0][0].weight.shape[0]) == ("0", before.shape[1], rank)
    assert 0 < lost <= 0.1
    torch.testing.assert_close(after.mean(dims), before.mean(dims))


def test_layers_that_would_not_shrink_or_that_are_kept_stay(make_thin):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 30)]
    model, inputs = nn.Sequential(*layers), torch.randn(200, 4, 3, 3)
    assert make_thin(model, [inputs], 1.0, keep=["4"]) == []
    assert list(model) == layers
    assert [name for name, *_ in make_thin(model, [inputs], 0.9)][-1:] == ["4"]
    assert make_thin(nn.Sequential(nn.LSTM(8, 8)), [torch.randn(5, 4, 8)]) == []
