"""Compiled models: every forward counts once, and the graph is the user's with one operation more."""

import copy
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectralmetrics as sm
from spectralmetrics import LayerProbe, torch_private
from spectralmetrics.probing import hooks
from tests.probing.test_probe import assert_nothing, same

# A warning inside the compiler, whose inputs are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def made(seed=0):
    torch.manual_seed(seed)
    return Net()


def count(probe, layer="head", stage="train"):
    return int(probe[stage, layer]["saturation"].count)


def steps(model, run, sizes=(4, 4, 6, 5)):
    """Outputs and gradients of some training steps."""
    seen = []
    for number, size in enumerate(sizes):
        x = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        y = run(x)
        y.square().sum().backward()
        seen += [y.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    return seen


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize(
    ("training", "backend"),
    [
        (True, "eager"),
        (True, "aot_eager"),
        (True, "inductor"),
        (False, "aot_eager"),
        pytest.param(False, "eager", marks=pytest.mark.long),
        pytest.param(False, "inductor", marks=pytest.mark.long),
    ],
)
def test_fullgraph_is_the_users_own_graph(training, backend):
    model = made().train(training)
    twin = copy.deepcopy(model)
    probe = LayerProbe(model)
    probed = steps(model, torch.compile(model, backend=backend, fullgraph=True))
    torch.compiler.reset()  # otherwise the twin would start with dynamic batch sizes, in other kernels
    plain = steps(twin, torch.compile(twin, backend=backend, fullgraph=True))
    assert same(probed, plain)
    stage = "train" if training else "eval"
    assert count(probe, "head", stage) == 19
    assert count(probe, "conv", stage) == 19 * 64


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("when", ["probe first", "compile first", "after a run", "after a sibling's run"])
def test_whenever_the_probe_is_made(when, in_place):
    model = made()

    def compiled(net):
        if in_place:
            net.compile(backend="eager", fullgraph=True)
            return net
        return torch.compile(net, backend="eager", fullgraph=True)

    if when == "after a sibling's run":
        compiled(made(1))(torch.randn(4, 3, 8, 8))
    if when == "probe first":
        probe = LayerProbe(model)
    run = compiled(model)
    if when == "after a run":
        run(torch.randn(4, 3, 8, 8))
    if when != "probe first":
        probe = LayerProbe(run)
    for _ in range(3):
        run(torch.randn(2, 3, 8, 8))
    model.eval()
    run(torch.randn(2, 3, 8, 8))
    assert (count(probe), count(probe, stage="eval")) == (6, 2)
    probe.remove()
    run(torch.randn(2, 3, 8, 8))
    assert (count(probe), count(probe, stage="eval")) == (6, 2)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


PROBES = {
    "plain": {},
    "steps": {"every_n_steps": 2},
    "inputs": {"observe": "inputs"},
    "select": {"select": {"*": lambda output: output[:, :4]}},
}


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", PROBES)
def test_blocks_compiled_alike_share_their_graph(kind):
    """Regional compilation: a hundred blocks share one code, and each layer is counted separately."""
    graphs = []
    for is_probed in (False, True):
        torch.compiler.reset()
        model = nn.Sequential(*(Residual() for _ in range(100)))
        for block in model:
            block.compile(backend="eager", fullgraph=True)
        if is_probed:
            probe = LayerProbe(model, layers="*.linear", **PROBES[kind])
        before = num_graphs()
        model(torch.randn(4, 8))
        graphs.append(num_graphs() - before)
    assert graphs[0] == graphs[1]
    model(torch.randn(4, 8))
    for number, block in enumerate(model[:10]):
        for _ in range(number):  # called separately, a block's layer counts its own forwards
            block(torch.randn(4, 8))
    assert num_graphs() - before == graphs[1]
    if kind != "steps":
        seen = [count(probe, f"{number}.linear") for number in range(12)]
        assert seen == [8 + 4 * number for number in range(10)] + [8, 8]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # inside the compiler
def test_blocks_compiled_alike_train_as_without_the_probe(backend):
    def trained(is_probed):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Residual() for _ in range(10)))
        for block in model:
            block.compile(backend=backend, fullgraph=True)
        probe = LayerProbe(model) if is_probed else None
        for number in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
        return [p.grad for p in model.parameters()], probe

    plain, _ = trained(False)
    probed, probe = trained(True)
    assert same(probed, plain)
    assert {count(probe, name) for name in probe.layers} == {12}


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_probe_for_every_evaluation_shares_its_graph(kind, in_place):
    model = Pair()
    if in_place:
        model.compile(backend="eager", fullgraph=True)
        run = model
    else:
        run = torch.compile(model, backend="eager", fullgraph=True)
    before = num_graphs()
    for number in range(100):
        model.train(number % 2 == 0)
        with LayerProbe(model, **PROBES[kind]) as probe:
            run(torch.randn(4, 8))
            run(torch.randn(4, 8))
        seen = {count(probe, layer, "eval" if number % 2 else "train") for layer in ("first", "second")}
        assert seen == ({4} if kind == "steps" else {8})
        run(torch.randn(4, 8))
    # With and without hooks, in training and in evaluation, where the model itself distinguishes these.
    assert num_graphs() - before <= 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_inference_mode(backend):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    probes = [
        LayerProbe(model, [sm.SaturationMetric(), sm.HistoryMetric()]),
        LayerProbe(model, observe="inputs"),
    ]
    gradients = LayerProbe(model, observe="gradients")
    run = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (3, 4, 5):
        with torch.inference_mode(rows != 4):
            run(torch.randn(rows, 8)).square().sum()
    assert [count(probe, "2", "eval") for probe in probes] == [12, 12]
    assert not gradients.sums("eval", "2")


def test_the_layers_own_flag_is_read_at_every_run():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    probe = LayerProbe(model)
    run = torch.compile(model, backend="eager", fullgraph=True)
    model[0].eval()
    run(torch.randn(4, 8))
    model[0].train()
    model[1].eval()
    run(torch.randn(5, 8))
    assert [count(probe, "0", stage) for stage in ("train", "eval")] == [5, 4]
    assert [count(probe, "1", stage) for stage in ("train", "eval")] == [4, 5]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("skips", [True, False])
def test_recurrent_layers_of_a_compiled_model(kind, skips, monkeypatch):
    """Dynamo breaks its graph there, and compiles what the hook calls unless it is marked to be skipped."""
    if not skips:

        class Unskipped(hooks.Observer):
            def __call__(self, module, args, output):
                if torch.compiler.is_compiling():
                    parts, how = hooks.take_apart(output)
                    hooks.see(parts, hooks.TICKET, self._number, how)
                else:
                    self._observe(module, output, module.training, self._select)

        monkeypatch.setattr(hooks, "Observer", Unskipped)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = kind(4, 6, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    torch.manual_seed(0)
    model = Tagger()
    probe = LayerProbe(model, sm.CovarianceMetric())
    run = torch.compile(model, backend="eager")
    batches = [torch.randn(5, 7, 4) for _ in range(3)]
    for x in batches:
        run(x)
    assert int(probe["train", "recurrent"]["covariance"].count) == 105
    with LayerProbe(model, sm.CovarianceMetric()) as eager:
        for x in batches:
            model(x)
    values = probe.compute("train")
    for key, value in eager.compute("train").items():
        torch.testing.assert_close(values[key], value)


def test_siblings_are_apart():
    """Models of one class, such as folds of a cross-validation: Dynamo keeps graphs by class."""
    first, second, third = made(1), made(2), made(3)
    run_first = torch.compile(first, backend="eager")
    run_first(torch.randn(5, 3, 8, 8))
    probe = LayerProbe(second)
    run_second = torch.compile(second, backend="eager")
    run_second(torch.randn(6, 3, 8, 8))
    run_first(torch.randn(5, 3, 8, 8))
    with LayerProbe(third) as other:
        run_third = torch.compile(third, backend="eager")
        run_third(torch.randn(7, 3, 8, 8))
        run_second(torch.randn(6, 3, 8, 8))
    assert (count(probe), count(other)) == (12, 7)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)
def test_a_model_compiled_before_hooks_were_heeded():
    """Dynamo's default ignores hooks: what was compiled so must be compiled again after the first probe."""
    model = made()
    step = torch.compile(lambda x: model(x).sum(), backend="eager")  # the model is part of a function
    step(torch.randn(4, 3, 8, 8))
    probe = LayerProbe(model)
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    step(torch.randn(4, 3, 8, 8))
    assert count(probe) == 4


def test_who_has_hooks_ignored_again_is_told():
    probe = LayerProbe(made(1))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        assert torch_private.ignores_hooks()
        assert_nothing(probe, "skip_nnmodule_hook_guards")
    assert not torch_private.ignores_hooks()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpoints_inside_count_once(backend):
    # The operation changes its ticket under another backend; the checkpoints here are not affected.
    other = nn.Sequential(nn.Linear(6, 6))
    LayerProbe(other)
    torch.compile(other, backend="aot_eager")(torch.randn(9, 6))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.outer(checkpoint(lambda y: torch.tanh(self.inner(y)), x, use_reentrant=False))

    model = Checkpointed()
    probe = LayerProbe(model)
    run = torch.compile(model, backend=backend)
    for _ in range(3):
        run(torch.randn(9, 6)).sum().backward()
    assert (count(probe, "inner"), count(probe, "outer")) == (27, 27)


@pytest.mark.filterwarnings("ignore:.*fewer observations than twice")
def test_values_are_those_of_the_eager_model():
    model = made()
    metrics = [sm.SaturationMetric(), sm.CovarianceMetric()]
    compiled_probe = LayerProbe(
        model, metrics, select={"conv": lambda maps: maps.mean((2, 3))}, every_n_steps=2
    )
    steps(model, torch.compile(model, backend="eager", fullgraph=True))
    values = compiled_probe.compute()
    compiled_probe.remove()
    model.zero_grad()
    eager = made()
    eager_probe = LayerProbe(eager, metrics, select={"conv": lambda maps: maps.mean((2, 3))}, every_n_steps=2)
    steps(eager, eager)
    for key, value in eager_probe.compute().items():
        torch.testing.assert_close(values[key], value, rtol=1e-9, atol=1e-12)


def test_outputs_in_nests():
    class Nest(nn.Module):
        def forward(self, x):
            return {"ids": x.long(), "hidden": (x * 2, x)}

    model = nn.Sequential(nn.Linear(3, 4), Nest())
    probe = LayerProbe(model, layers=["0", "1"])
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(5, 3))
    assert (count(probe, "0"), count(probe, "1")) == (5, 5)


def test_masks_and_pauses_act_at_every_run():
    model = nn.Sequential(nn.Linear(3, 4))
    probe = LayerProbe(model)
    run = torch.compile(model, backend="eager", fullgraph=True)
    tokens, mask = torch.randn(2, 5, 3), torch.arange(5).expand(2, 5) < 3
    with probe.mask(mask):
        run(tokens)
    with probe.paused():
        run(tokens)
    run(tokens)
    assert count(probe, "0") == 6 + 10


def test_exported_programs_hold_no_operation_of_the_probe():
    model = made().eval()
    LayerProbe(model)
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    assert "spectralmetrics" not in str(program.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases deprecate it
        program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), strict=True)
    assert "spectralmetrics" not in str(program.graph)


def test_transforms_inside_a_compiled_function():
    model = nn.Sequential(nn.Linear(3, 4))
    probe = LayerProbe(model)
    run = torch.compile(lambda x: torch.vmap(model)(x), backend="eager")
    expected = model(torch.ones(5, 3))
    probe.reset()
    torch.testing.assert_close(run(torch.ones(5, 3)), expected)
    assert_nothing(probe, "")
