"""Private names of PyTorch: each use does what it says, and has a fallback where the name is missing."""

import copy
import functools
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo
import torch.distributed.tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spectralmetrics import LayerProbe, PCAProjection, torch_private
from spectralmetrics.probing import hooks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")


def count(probe, layer, stage="train"):
    return int(probe[stage, layer]["saturation"].count)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_backward_is_told_from_forward():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch_private.in_backward())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch_private.in_backward())
            return gradient

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [False, True]
    assert not torch_private.in_backward()
    seen.clear()
    checkpoint(Look.apply, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert seen[:2] == [False, True]  # recomputation


@pytest.mark.parametrize("threads", [False, True])
def test_the_parts_of_a_stages_backward_are_told(threads):
    """Also in a thread without any of these frames, such as autograd's own for a GPU."""
    model, x = nn.Linear(2, 3), torch.ones(4, 2, requires_grad=True)
    seen = []

    def look(gradient):
        if threads:
            asked = threading.Thread(target=lambda: seen.append(torch_private.part_of_backward()))
            asked.start()
            asked.join()
        else:
            seen.append(torch_private.part_of_backward())

    def loss():
        output = model(x)
        output.register_hook(look)
        return output.sum()

    _, groups = stage_backward_input([loss()], None, [x], model.parameters())
    stage_backward_weight(model.parameters(), groups)
    loss().backward()
    assert seen == ["inputs", "weights", None]


def test_modes_are_seen_and_put_aside():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    assert not torch_private.num_modes()
    with Count():
        assert torch_private.num_modes()
        with torch_private.without_modes():
            torch.ones(2)
        assert Count.calls == 0
        torch.ones(2)
        assert Count.calls > 0


def test_autocast_is_noticed_on_any_device():
    assert not torch_private.is_autocast_anywhere()
    with torch.autocast("cpu"):
        assert torch_private.is_autocast_anywhere()


def test_the_switch_of_gradients():
    with torch.enable_grad():
        torch_private.set_grad_enabled(False)
        assert not torch.is_grad_enabled()


def test_fake_tensors_are_told():
    with FakeTensorMode():
        assert torch_private.is_fake(torch.ones(2))
    assert torch_private.is_fake(torch.ones(2, device="meta"))
    assert not torch_private.is_fake(torch.ones(2))
    assert not torch_private.is_fake(nn.Parameter(torch.ones(2)))


def test_transforms_are_told_and_put_aside():
    def look(x):
        assert torch_private.is_transformed(x)
        with torch_private.outside_transforms():
            assert torch_private.untransformed(x, 0)[0].shape == (3, 2)
        return x

    torch.func.vmap(look)(torch.ones(3, 2))
    assert not torch_private.is_transformed(torch.ones(2))


def test_tracing_is_told():
    seen = []

    def look(x):
        seen.append(torch_private.is_tracing())
        return x + 1

    torch.jit.trace(look, torch.ones(2))
    assert seen[0]
    assert not torch_private.is_tracing()


def test_exporting_is_told_inside_dynamo():
    class Tells(nn.Module):
        def forward(self, x):
            return x + 1 if torch_private.is_exporting() else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(Tells(), backend="eager", fullgraph=True)(x), x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Tells(), (x,), strict=strict).module()(x), x + 1)


@pytest.mark.parametrize("decorate", [torch_private.untraced, None])
def test_what_is_untraced_runs_and_dynamo_does_not_look_in(decorate, monkeypatch):
    if decorate is None:  # as in a release without it
        monkeypatch.setattr(torch_private, "_frames", None)
        decorate = torch_private.untraced
    seen = []

    def inner(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    @decorate
    def outer(x):
        return inner(x)

    run = torch.compile(lambda x: outer(x * 2) * 3, backend="eager")
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 9.0))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 9.0))
    assert seen == [False, False]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: outer(x) + 1, backend="eager", fullgraph=True)(torch.ones(2))


def test_skipped_frames_are_looked_into_by_code_that_is_traced():
    def inner(x):
        return x + 1

    assert torch_private.skip_frames(inner.__code__)
    run = torch.compile(lambda x: inner(x) * 2, backend="eager", fullgraph=True)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 4.0))


def test_numbers_of_hooks_are_small_and_free():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    order = []

    def hook(name):
        return lambda module, args, output: order.append(name)

    user = first.register_forward_hook(hook("user"))
    handles = [
        module.register_forward_hook(hook(name), always_call=True, with_kwargs=False)
        for module, name in ((first, "a"), (second, "b"), (first, "c"))
    ]
    for handle in handles:
        torch_private.renumber(handle)
    assert [handle.id for handle in handles] == [-1, -1, -2]
    assert list(first._forward_hooks) == [user.id, -1, -2]
    assert set(first._forward_hooks_always_called) == {-1, -2}
    first(torch.ones(1, 2))
    assert order == ["user", "a", "c"]
    handles[0].remove()
    again = first.register_forward_hook(hook("d"))
    torch_private.renumber(again)
    assert again.id == -1
    for handle in (*handles, again):
        handle.remove()
    assert list(first._forward_hooks) == [user.id]
    assert not first._forward_hooks_always_called


def test_a_jagged_tensor_is_put_together_again(monkeypatch):
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
    for lengths in (None, torch.tensor([1, 1])):
        parts = torch_private.jagged(x.values(), x.offsets(), lengths, torch_private.jagged_dim(x)).unbind()
        assert [len(part) for part in parts] == ([2, 1] if lengths is None else [1, 1])
    assert torch_private.is_known(x)
    monkeypatch.setattr(torch_private, "_find", lambda path, default=None, root=None: default)
    assert len(torch_private.jagged(x.values(), x.offsets(), None, 1).unbind()) == 2


def test_summands_of_an_embedding_have_no_words_of_others():
    class Masked:
        reduce_op = "sum"

        def __init__(self, mask):
            self.mask_buffer = type("Buffer", (), {"data": mask})()

    mask = torch.tensor([True, False])
    local = torch.ones(2, 3)
    parts, placements = torch_private.masked_parts(local, [Masked(mask)])
    assert parts.tolist() == [[0.0] * 3, [1.0] * 3]
    assert list(placements) == [torch.distributed.tensor.Partial("sum")]
    assert local.sum() == 6  # the layer's own values
    other = torch.distributed.tensor.Replicate()
    assert torch_private.masked_parts(local, [other]) == (local, [other])


def test_a_tensor_whose_collective_runs_is_waited_for(tmp_path):
    from torch.distributed._functional_collectives import all_reduce

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        group = torch.distributed.group.WORLD
        running = all_reduce(torch.ones(3), "sum", group)
        assert type(running) is not torch.Tensor
        assert type(torch_private.waited(running)) is torch.Tensor
        plain = torch.ones(3)
        assert torch_private.waited(plain) is plain
        assert torch_private.group_named(group.group_name) is group
    finally:
        torch.distributed.destroy_process_group()


def test_a_bare_copy_shares_weights_and_has_no_hooks():
    model, calls = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
    for module in model.modules():
        module.register_forward_hook(lambda *arguments: calls.append(1))
        module.register_forward_pre_hook(lambda *arguments: calls.append(1))
    model[0].forward = lambda x: x  # what parallel styles do
    model.compile(backend="eager")
    copy = torch_private.bare_copy(model, lambda parameter: parameter)
    rows = torch.randn(3, 2)
    assert torch.equal(copy(rows), nn.functional.linear(rows, model[0].weight, model[0].bias).relu())
    assert not calls
    assert copy[0].weight is model[0].weight
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_weight_that_a_hook_will_make(norm):
    layer = norm(nn.Linear(4, 3)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2 + torch.rand(3, *[1] * (parameter.ndim - 1)))
    made = torch_private.weight_of_hook(layer, "weight")
    assert not torch.equal(made, layer.weight)
    layer(torch.ones(1, 4))
    assert torch.equal(made, layer.weight)
    assert torch_private.weight_of_hook(layer, "bias") is None
    assert torch_private.weight_of_hook(nn.Linear(4, 3), "weight") is None


def test_children_and_compiled_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_module("nothing", None)
    assert torch_private.children_of(model) == {"0": model[0], "nothing": None}
    assert torch_private.wrapped_in(torch.compile(model)) is model
    assert torch_private.wrapped_in(model) is None


GONE = {
    "num_modes": lambda: 0,
    "is_autocast_anywhere": lambda: True,
    "_task": lambda: 0 if torch_private._TRACKER.is_bw else -1,
    "is_tracing": torch.jit.is_tracing,
    "set_grad_enabled": torch.set_grad_enabled,
    "is_transformed": lambda values: False,
    "_functorch": None,
    "_HAS_EXPORTING_FLAG": False,
    "_frames": None,
    "_CALL": None,
    "_KNOWN": (torch.Tensor, nn.Parameter),
}


@pytest.mark.parametrize("name", [*GONE, "_find"])
def test_eager_models_are_observed_whatever_is_missing(name, monkeypatch):
    if name == "_find":
        monkeypatch.setattr(torch_private, "_find", lambda path, default=None, root=None: default)
    else:
        monkeypatch.setattr(torch_private, name, GONE[name])
        if hasattr(hooks, name):
            monkeypatch.setattr(hooks, name, GONE[name])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), PCAProjection(2))
    probe = LayerProbe(model, layers=["0", "1"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(5, 3)).sum().backward()
    copy.deepcopy(model)(torch.randn(5, 3))
    checkpoint(model, torch.randn(5, 3), use_reentrant=False).sum().backward()
    assert (count(probe, "0"), count(probe, "1")) == (10, 10)
    probe.remove()


def test_dynamo_without_its_caches_forgets_everything(monkeypatch):
    forgotten = []
    monkeypatch.delattr(torch._dynamo, "reset_code_caches")
    monkeypatch.delattr(torch._dynamo.convert_frame, "input_codes")
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        torch_private.heed_hooks()
        assert not torch._dynamo.config.skip_nnmodule_hook_guards
    assert forgotten
    monkeypatch.undo()


def in_a_process(*lines):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


in_a_process = functools.cache(in_a_process)


def test_dynamo_is_not_imported_by_what_does_not_compile():
    """Nor is sympy, which takes as long to import."""
    dynamo, sympy, seconds, probed = in_a_process(
        "import sys, time, torch, torchmetrics",
        "start = time.process_time()",
        "import spectralmetrics",
        "seconds = time.process_time() - start",
        "print('torch._dynamo' in sys.modules, 'sympy' in sys.modules, seconds)",
        "model = torch.nn.Sequential(torch.nn.Linear(3, 3), spectralmetrics.PCAProjection(3))",
        "probe = spectralmetrics.LayerProbe(model)",
        "model(torch.randn(9, 3)).sum().backward()",
        "probe.compute(); probe.remove()",
        "print('torch._dynamo' in sys.modules)",
    )
    assert (dynamo, sympy, probed) == ("False", "False", "False")
    assert float(seconds) < 1.0  # 0.15 s on an idle machine; Dynamo alone takes longer than the limit


def test_a_probe_that_is_older_than_dynamo_has_hooks_heeded():
    """The setting is made when Dynamo is imported, and that import is otherwise unchanged."""
    heeded, counted, loader, left = in_a_process(
        "import sys, torch, spectralmetrics",
        "first, second = (torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))",
        "probe = spectralmetrics.LayerProbe(second)",
        "assert 'torch._dynamo' not in sys.modules",
        "torch.compile(first, backend='eager')(torch.randn(2, 3))",
        "torch.compile(second, backend='eager')(torch.randn(2, 3))",
        "print(not torch._dynamo.config.skip_nnmodule_hook_guards)",
        "print(int(probe['train', '0']['saturation'].count))",
        "print(type(torch._dynamo.__spec__.loader).__name__)",
        "print(sum(type(each).__name__ == '_WhenImported' for each in sys.meta_path))",
    )
    assert (heeded, counted, loader, left) == ("True", "2", "SourceFileLoader", "0")


def test_views_and_changes_in_place_are_told():
    base = torch.zeros(4, 3)
    view = base[1:]
    assert torch_private.base_of_view(view.view(-1)) is base
    assert torch_private.base_of_view(base) is None
    version = torch_private.Version(view)
    assert version._twin.untyped_storage().nbytes() == 0  # takes no memory
    assert not version.has_changed()
    base[0, 0] = 1.0
    assert version.has_changed()

    class WithoutBase:
        pass

    assert torch_private.base_of_view(WithoutBase()) is None


def test_without_the_functions_no_thread_is_limited(monkeypatch):
    monkeypatch.setattr(torch_private.ctypes, "CDLL", lambda path: object())
    assert torch_private._find_one_thread() is None


@pytest.mark.skipif(torch_private.use_one_thread is None, reason="no function of the library limits a thread")
@pytest.mark.usefixtures("two_threads")
def test_only_the_thread_that_asks_is_limited():
    found = []

    def limit():
        found.append(torch.get_num_threads())
        torch_private.use_one_thread()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=limit)
    thread.start()
    thread.join()
    assert found == [2, 1]
    assert torch.get_num_threads() == 2
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found[-1] == 2
