"""Forwards without data, models with a copy in TorchScript, and arguments in the caller's order."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spectralmetrics import CovarianceMetric, LayerProbe

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")


def count(probe, layer, metric="saturation"):
    return int(probe["train", layer][metric].count)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM])
def test_a_forward_on_the_meta_device_is_no_end(kind):
    model = nn.Sequential(kind(6, 4))
    probe = LayerProbe(model, every_n_steps=1)
    model.to("meta")
    model(torch.empty(3, 6, device="meta"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model(torch.randn(9, 6))
    assert count(probe, "0") == 9


def test_a_forward_on_fake_tensors_is_no_end():
    model = nn.Sequential(nn.Linear(6, 4))
    probe = LayerProbe(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(3, 6))
    model(torch.randn(9, 6))
    assert count(probe, "0") == 9


@pytest.mark.parametrize("observe", ["outputs", "inputs"])
def test_scripting_a_probed_model_says_what_is_in_the_way(observe):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    probe = LayerProbe(model, observe=observe)
    with pytest.raises(
        AttributeError, match=r"torch.jit.script cannot compile a model with the hooks of a LayerP"
    ):
        torch.jit.script(model)
    probe.remove()
    torch.jit.script(model)


@pytest.mark.parametrize(
    "freeze",
    [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 4))],
    ids=["script", "trace"],
)
def test_a_scripted_model_is_refused_by_name(freeze):
    model = freeze(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    for layers in (None, "0", nn.Module):
        with pytest.raises(RuntimeError, match="neither scripted nor traced"):
            LayerProbe(model, layers=layers)


class Sum(nn.Module):
    def forward(self, ids, first, second=None):
        return first + (0 if second is None else second)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_inputs_go_by_the_signature(is_compiled):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = Sum()
            self.reverse = False

        def forward(self, a, b):
            ids = a.long()
            if self.reverse:
                return self.sum(second=b, first=a, ids=ids)
            return self.sum(ids, first=a, second=b)

    torch.manual_seed(0)
    model = Calls()
    probe = LayerProbe(model, CovarianceMetric(), layers="sum", observe="inputs")
    run = torch.compile(model, backend="eager", fullgraph=True) if is_compiled else model
    batches = [(torch.randn(20, 3), 100 * torch.randn(20, 3)) for _ in range(2)]
    for batch, model.reverse in zip(batches, (False, True), strict=True):
        run(*batch)
    firsts = torch.cat([a for a, _ in batches]).double()
    torch.testing.assert_close(probe.compute()["covariance/train/sum"], firsts.T.cov(correction=0))


def test_a_forward_that_has_no_signature_is_observed_in_the_order_of_the_call():
    class Odd(nn.Module):
        def forward(self, first, second):
            return first + second

    Odd.forward.__signature__ = "none"  # as some wrappers set it: inspect raises a TypeError
    model = Odd()
    probe = LayerProbe(model, CovarianceMetric(), layers=[Odd], observe="inputs")
    batch = torch.randn(20, 3)
    model(second=batch, first=torch.zeros(20, 3))
    (value,) = probe.compute().values()
    torch.testing.assert_close(value, batch.double().T.cov(correction=0))
