"""Copies and files of a probed model have no hooks, and a removed probe leaves nothing on its modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spectralmetrics import LayerProbe
from tests.probing.models import ResNet, Transformer


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"spectralmetrics" not in buffer.getvalue()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_a_file,
    "average": lambda model: AveragedModel(model).module,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
ALL_HOOKS = [
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
]


def remains(model):
    """Everything a probe has put on a model's modules."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{each}" for each in ALL_HOOKS if getattr(module, each)]
        found += [f"{name}.{each}" for each in vars(module) if each.startswith("__")]
    return found


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def graph():
    return torch.fx.symbolic_trace(convolutional())


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # scripting
@pytest.mark.filterwarnings("ignore:The TorchScript type system")
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("make", [convolutional, graph])
@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_has_no_hook_and_can_be_scripted(copier, make, removed):
    model = make()
    probes = [LayerProbe(model), LayerProbe(model, layers=["0", "Sequential"], every_n_steps=2)]
    data = torch.randn(2, 3, 8, 8)
    expected = model(data)
    if removed:
        probes[0].remove()
        assert remains(model)  # hooks of the other probe
    twin = COPIERS[copier](model)
    assert not remains(twin)
    assert torch.equal(twin(data), expected)
    assert torch.equal(torch.jit.script(twin)(data), expected)
    assert int(probes[1]["train", "0"]["saturation"].count) == 2 * 36  # the model only, not its copies
    assert len(model.get_submodule("0")._forward_hooks) == (1 if removed else 2)
    model(data)
    for probe in probes:
        probe.remove()
    assert not remains(model)


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_left_once_the_last_probe_is_removed(first):
    model = ResNet()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    probes = [LayerProbe(model, every_n_steps=2), LayerProbe(model, layers="*")]
    model(torch.randn(2, 3, 8, 8))
    probes[first].remove()
    assert not remains(copy.deepcopy(model))
    probes[1 - first].remove()
    assert not remains(model)
    for name, module in model.named_modules():
        assert set(vars(module)) == set(before[name])


def test_a_shallow_copy_of_a_layer():
    layer = nn.Linear(4, 3)
    probe = LayerProbe(layer)
    twin = copy.copy(layer)
    assert not remains(twin)
    twin(torch.randn(5, 4))
    layer(torch.randn(7, 4))
    assert int(probe["train", "Linear"]["saturation"].count) == 7
    assert twin.weight is layer.weight


def test_hooks_of_others_are_copied():
    layer = nn.Linear(4, 3)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("hook"), always_call=True)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    LayerProbe(layer)
    probe = LayerProbe(layer)
    copy.copy(layer)(torch.randn(5, 4))
    assert seen == ["before", "hook"]
    twin = copy.copy(layer)
    assert (len(twin._forward_hooks), len(twin._forward_hooks_always_called)) == (1, 1)
    del probe


def test_a_module_that_copies_itself():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            twin = Own(self.in_features, self.out_features)
            twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
            return twin

    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    own, single = Own(4, 3), Single(4, 3)
    probes = [LayerProbe(own), LayerProbe(single)]
    assert not remains(copy.deepcopy(own))
    assert copy.deepcopy(single) is single
    single(torch.randn(5, 4))
    assert int(probes[1]["train", "Single"]["saturation"].count) == 5
    probes[0].remove()
    assert not remains(own)
    assert type(copy.deepcopy(own)) is Own


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_of_a_transformer_takes_its_fused_path(copier, monkeypatch):
    fused = []
    original = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a, **k: fused.append(1) or original(*a, **k)
    )
    model = Transformer().eval()
    probe = LayerProbe(model)
    twin = COPIERS[copier](model).eval()
    with torch.no_grad():
        model(torch.randn(2, 4, 8))
        assert not fused  # with hooks it is not fused
        twin(torch.randn(2, 4, 8))
        assert len(fused) == 2
        probe.remove()
        model(torch.randn(2, 4, 8))
        assert len(fused) == 4
