"""Gradients with respect to layers' outputs: equal to autograd's, with training as without a probe."""

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from spectralmetrics.findings import find, read_numbers
from spectralmetrics.layers import DEFAULT_LAYERS
from spectralmetrics.probing.sampling import is_observed
from spectralmetrics.recording.recompute import summarise_run
from spectralmetrics.recording.saved import SavedRun

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)


class Rows(Metric):
    """Keeps the rows that it is shown."""

    def __init__(self):
        super().__init__()
        self.add_state("kept", [])

    def update(self, rows):
        self.kept.append(rows.double().clone())

    def compute(self):
        return torch.cat(self.kept)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def made(new, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return new().to(dtype)


def given(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probing(model, **options):
    return LayerProbe(model, Rows(), observe="gradients", **options)


def rows_of(probe, layer, stage="train"):
    return torch.cat(probe[stage, layer]["Rows"].kept)


def captured(model, layers, run):
    """Gradients by autograd, for a network without in-place operations: layer -> one for each of its calls."""
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            output = output[0] if type(output) is tuple else output
            output = output.data if isinstance(output, PackedSequence) else output
            outputs.setdefault(name, []).append(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    loss = run(model)
    for handle in handles:
        handle.remove()
    flat = [(name, each) for name, calls in outputs.items() for each in calls]
    found = torch.autograd.grad(loss, [each for _, each in flat], allow_unused=True)
    gradients = {}
    for (name, _), gradient in zip(flat, found, strict=True):
        if gradient is not None:
            gradients.setdefault(name, []).append(gradient)
    return gradients


class Behind(nn.Module):
    """A layer followed by an activation that may work in place."""

    def __init__(self, layer, *, inplace):
        super().__init__()
        self.layer, self.relu = layer, nn.ReLU(inplace)

    def forward(self, *args):
        output = self.layer(*args)
        output = output[0] if type(output) is tuple else output
        output = output.data if isinstance(output, PackedSequence) else output
        return self.relu(output)


def sequences(first):
    return lambda gradient: (gradient if first else gradient.transpose(0, 1)).reshape(-1, gradient.shape[-1])


def maps(gradient):
    return gradient.movedim(1, -1).reshape(-1, gradient.shape[1])


def flat(gradient):
    return gradient.reshape(-1, gradient.shape[-1])


def packed():
    return pack_sequence([given(5, 4), given(3, 4), given(2, 4)])


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 6), lambda: [given(5, 4)], flat),
    "Linear of sequences": (lambda: nn.Linear(4, 6), lambda: [given(5, 3, 4)], flat),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: [given(5, 4, 9)], maps),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: [given(5, 4, 9, 7)], maps),
    "Conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), lambda: [given(4, 9, 7)], lambda g: maps(g[None])),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: [given(2, 4, 3, 4, 5)], maps),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: [given(5, 4, 9)], maps),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: [given(5, 4, 5, 4)], maps),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), lambda: [given(2, 4, 3, 4, 5)], maps),
    "LSTM": (lambda: nn.LSTM(4, 6), lambda: [given(5, 3, 4)], sequences(False)),
    "LSTM packed": (lambda: nn.LSTM(4, 6), lambda: [packed()], None),
    "GRU": (
        lambda: nn.GRU(4, 6, batch_first=True, bidirectional=True),
        lambda: [given(5, 3, 4)],
        sequences(True),
    ),
    "RNN": (lambda: nn.RNN(4, 6, batch_first=True), lambda: [given(5, 3, 4)], sequences(True)),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: [given(5, 3, 4)] * 3,
        sequences(True),
    ),
    "MultiheadAttention, time first": (
        lambda: nn.MultiheadAttention(4, 2),
        lambda: [given(5, 3, 4)] * 3,
        sequences(False),
    ),
}


def test_all_default_layers_are_here():
    assert {kind.__name__ for kind in DEFAULT_LAYERS} == {name.split()[0].strip(",") for name in LAYERS}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_autograd(name):
    new, inputs, rows = LAYERS[name]
    twin = made(lambda: Behind(new(), inplace=False))
    expected = captured(twin, ["layer"], lambda model: model(*inputs()).pow(3).mean())["layer"][0]
    for inplace in (False, True):
        model = made(lambda inplace=inplace: Behind(new(), inplace=inplace))
        probe = probing(model)
        model(*inputs()).pow(3).mean().backward()
        found = rows_of(probe, "layer")
        if rows is None:  # sorted by step, not by sequence
            found, expected = (each[each[:, 0].argsort()] for each in (found, expected))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        else:
            torch.testing.assert_close(found, rows(expected), rtol=1e-12, atol=1e-15)
        twin.zero_grad()
        twin(*inputs()).pow(3).mean().backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad)


class Net(nn.Module):
    """A layer used twice, one that gets no gradient, and in-place activations of views."""

    def __init__(self, *, inplace=True, reentrant=None):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 8), nn.Linear(8, 8)
        self.unused, self.head, self.reentrant = nn.Linear(8, 3), nn.Linear(8, 2), reentrant
        self.relu, self.dropout = nn.ReLU(inplace), nn.Dropout(0.2)

    def body(self, x):
        x = self.relu(self.conv(x)).flatten(2).mT  # (N, 6, H, W) -> (N, H * W, 6)
        return self.dropout(self.relu(self.b(self.relu(self.a(x)))))

    def forward(self, x):
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        x = self.b(x) + self.b(x + 1)
        self.unused(x.detach())
        return self.head(x)


def trained(model, run=None, steps=50, options=None):
    """Weights and gradients after some steps of training, and random numbers drawn afterwards."""
    run = model if run is None else run
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(0)
    for step in range(steps):
        x = given(4, 1, 3, 3, seed=step, dtype=next(model.parameters()).dtype).requires_grad_()
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
    return [*(each.detach() for each in model.parameters()), torch.rand(1)]


@pytest.mark.parametrize(
    ("backend", "reentrant"),
    [(None, None), (None, True), (None, False), ("eager", None), ("aot_eager", None), ("inductor", None)],
)
def test_training_stays_bit_identical_and_nothing_is_missed(backend, reentrant):
    steps = 50

    def run_of(model):
        torch.compiler.reset()
        return torch.compile(model, backend=backend, fullgraph=True) if backend else model

    plain = made(lambda: Net(reentrant=reentrant), dtype=torch.float32)
    expected = trained(plain, run_of(plain), steps)
    model = made(lambda: Net(reentrant=reentrant), dtype=torch.float32)
    probe = LayerProbe(model, sm.CovarianceMetric(center=False), observe="gradients")
    found = trained(model, run_of(model), steps)
    assert all(map(torch.equal, found, expected))
    counts = {layer: int(probe["train", layer]["covariance"].count) for layer in probe.layers}
    rows = steps * 4 * 9
    assert counts == {"conv": rows, "a": rows, "b": 3 * rows, "head": rows, "unused": 0}
    with pytest.warns(UserWarning, match="layers that saw nothing in train are left out: 'unused'"):
        probe.compute()


def expected_of(net, run, layers=("conv", "a", "b", "head")):
    """Rows by autograd, for a network without in-place operations, in order of the calls of each layer."""
    found = captured(net, layers, run)
    return {
        name: torch.cat([(maps if name == "conv" else flat)(each) for each in found[name]]) for name in layers
    }


def loss_of(net, x=None):
    return net(given(4, 1, 3, 3).requires_grad_() if x is None else x).pow(3).mean()


def assert_rows(probe, expected, stage="train"):
    """Compare each layer's rows, whatever the order of its calls in backward."""
    for layer, rows in expected.items():
        found = rows_of(probe, layer, stage)
        assert found.shape == rows.shape
        order = [(each @ given(each.shape[1])).argsort() for each in (found, rows)]
        torch.testing.assert_close(found[order[0]], rows[order[1]], rtol=1e-12, atol=1e-16)


WAYS = [(None, None), (None, True), (None, False), ("aot_eager", None), ("aot_eager", False)]  # eager first


@pytest.mark.parametrize(("backend", "reentrant"), WAYS)
def test_every_gradient_arrives_once(backend, reentrant):
    """Layers used twice, in place, checkpointed, compiled, and with several backwards through one graph."""
    twin = made(lambda: Net(inplace=False)).eval()
    expected = expected_of(twin, loss_of)
    model = made(lambda: Net(reentrant=reentrant)).eval()
    probe = probing(model)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    loss = loss_of(run)
    loss.backward(retain_graph=backend is None)
    assert_rows(probe, expected, "eval")
    if backend is None:
        loss.backward()  # through the same graph
        assert_rows(probe, {name: torch.cat([rows, rows]) for name, rows in expected.items()}, "eval")
    with torch.no_grad():
        run(given(4, 1, 3, 3).requires_grad_())
    assert int(probe["eval", "a"].Rows._update_count) == (1 if backend else 2)


def test_compiled_autograd_does_not_trace_the_hooks_of_eager_code():
    from torch._dynamo.compiled_autograd import _enable  # as torchtitan does, through torch._dynamo.utils

    layer = nn.Linear(3, 2).double()
    probe = LayerProbe(layer, sm.CovarianceMetric(), observe="gradients")
    inputs, gradients = given(4, 3), []
    for scale in (1, 2, 3):
        output = layer(scale * inputs)
        gradients.append(2 * output.detach())
        with _enable(torch.compile(backend="aot_eager")):
            output.square().sum().backward()
    found = probe["train", "Linear"]["covariance"]
    assert int(found.count) == 12
    torch.testing.assert_close(found.compute(), torch.cat(gradients).T.cov(correction=0), rtol=1e-12, atol=0)


class Table(nn.Module):
    """A layer that returns a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6).reshape(3, 2))

    def forward(self):
        return self.weight


class Sided(Net):
    """Net with further layers whose gradients no input needs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table, self.side = Table(), nn.Linear(2, 2)

    def forward(self, x):
        return super().forward(x) + self.side(self.table()).mean(0)


@pytest.mark.parametrize(
    ("new", "backend", "reentrant"),
    [(Sided, None, None), (Sided, None, False), (Net, "aot_eager", None), (Net, "aot_eager", False)],
)
def test_a_backward_in_two_parts_shows_each_gradient_once(new, backend, reentrant):
    """First for the inputs and then for the weights, as pipelines with zero bubbles do."""
    if not hasattr(pipelining, "ScheduleDualPipeV"):
        pytest.skip("torch 2.8 gives other gradients so, without a probe, too")
    layers = ["conv", "a", "b", "head"] + (["table", "side"] if new is Sided else [])
    twin = made(lambda: new(inplace=False)).eval()
    batches = [given(4, 1, 3, 3, seed=seed).requires_grad_() for seed in range(2)]
    each = [expected_of(twin, lambda net, x=x: loss_of(net, x), layers) for x in batches]
    expected = {name: torch.cat([rows[name] for rows in each]) for name in layers}
    sum(loss_of(twin, x) for x in batches).backward()
    model = made(lambda: new(reentrant=reentrant)).eval()
    probe = probing(model, layers=layers)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    weights, others = zip(*(pair for pair in pairs if pair[1].grad is not None), strict=True)
    with torch._functorch.config.patch(donated_buffer=False):  # else no graph can be kept for the second part
        losses = [loss_of(run, x) for x in batches]
        waiting = []
        for loss, x in zip(losses, batches, strict=True):
            waiting.append(stage_backward_input([loss], None, [x], weights)[1])
        before = {name: rows_of(probe, name, "eval") for name in ("a", "b")}
        for groups in waiting:
            stage_backward_weight(weights, groups)
    assert all(torch.equal(rows_of(probe, name, "eval"), rows) for name, rows in before.items())
    assert_rows(probe, expected, "eval")
    for own, other in zip(weights, others, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("backend", "reentrant"), WAYS)
def test_what_belongs_to_the_forward_is_that_of_the_forward(backend, reentrant):
    """Stage, mask, labels and sampling come from the forward, whatever is set during backward."""
    layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(True), nn.Linear(6, 2)).double()

    def body(x):
        return layers(x) if reentrant is None else checkpoint(layers, x, use_reentrant=reentrant)

    run = torch.compile(body, backend=backend, fullgraph=True) if backend else body
    metrics = [sm.CovarianceTraceMetric(center=False), sm.NeuralCollapseMetric(num_classes=2), Rows()]
    probe = LayerProbe(layers, metrics, observe="gradients")
    x = [given(4, 3, 4, seed=seed).requires_grad_() for seed in range(4)]
    masks = [given(4, 3, seed=9) > 0, given(4, 3, seed=10) > 0]
    settings = [
        lambda: probe.mask(masks[0]),
        lambda: probe.mask(masks[1]),
        probe.paused,
        contextlib.nullcontext,
    ]
    outputs = []
    for number, setting in enumerate(settings):
        layers.train(number < 3)
        with setting(), contextlib.ExitStack() as stack:
            if number == 0:
                stack.enter_context(probe.labels(torch.tensor([0, 1, 1, 0])))
            outputs.append(run(x[number]))
        if backend and reentrant is not None:  # of several open forwards, it is unknown which is run again
            outputs[-1].square().sum().backward()
    layers.train()
    order = (0, 1) if backend and reentrant is not None else (1, 0, 3, 2)
    for number in order if len(order) > 2 else ():
        outputs[number].square().sum().backward()
    with probe.paused():
        run(x[0]).sum().backward()
    twice = run(x[1])
    with probe.paused():
        twice.sum().backward()
    counts = {
        stage: {layer: int(probe[stage, layer]["covariance_trace"].count) for layer in ("0", "2")}
        for stage in ("train", "eval")
    }
    valid = int(masks[0].sum() + masks[1].sum())
    assert counts == {"train": {"0": valid, "2": valid}, "eval": {"0": 12, "2": 12}}
    assert int(probe["train", "2"]["neural_collapse"].sums[0].num_observations) == 4
    expected = torch.cat([(2 * outputs[number].detach())[masks[number]] for number in order[:2]])
    torch.testing.assert_close(rows_of(probe, "2"), expected, rtol=1e-12, atol=0)


def test_a_history_keeps_the_last_forwards_in_whatever_order_their_gradients_arrive():
    layer = made(lambda: nn.Linear(4, 3))
    probe = LayerProbe(layer, sm.HistoryMetric(steps=3), observe="gradients")
    for probe.step in range(2):
        sum(layer(given(5 + k, 4)).square().sum() for k in range(4)).backward()  # the last arrives first
    rows = probe.history("train").rows
    assert [(row.forward, row.step, row.observations) for row in rows] == [(5, 1, 6), (6, 1, 7), (7, 1, 8)]


class Cut(torch.autograd.Function):
    """Passes values on, but no gradient back."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


class Halves(nn.Linear):
    """Puts out two halves, made by one operation."""

    def forward(self, x):
        return super().forward(x).chunk(2, -1)


@pytest.mark.parametrize(
    ("new", "use"),
    [
        (lambda: Halves(4, 6), lambda output, step: output[step % 2]),
        (lambda: nn.Linear(4, 3), lambda output, step: Cut.apply(output) if step % 2 else output),
    ],
    ids=["another output of the operation", "a function without a gradient"],
)
def test_a_backward_without_a_gradient_for_a_layer_is_no_row(new, use):
    layer, last = made(new), made(lambda: nn.Linear(3, 2))
    probe = probing(layer)
    for step in range(4):
        last(use(layer(given(5, 4)), step)).square().sum().backward()
    assert len(rows_of(probe, type(layer).__name__)) == 10


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_mask_that_changes_in_place_is_that_of_the_forward(backend):
    layer = nn.Linear(4, 3).double()
    run = torch.compile(layer, backend=backend) if backend else layer
    probe = LayerProbe(layer, [Rows(), sm.NeuralCollapseMetric(num_classes=2)], observe="gradients")
    mask, labels = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64)
    masks = [given(2, 5, seed=seed) > 0 for seed in range(3)]
    losses = []
    with probe.mask(mask), probe.labels(labels):
        for each in masks:  # buffers that each micro-batch uses again
            mask.copy_(each)
            labels.copy_(~each[:, :1])
            losses.append(run(given(2, 5, 4)).square().sum())
    mask.fill_(False)
    labels.fill_(-1)
    sum(losses).backward()
    assert len(rows_of(probe, "Linear")) == sum(int(each.sum()) for each in masks)
    counts = probe["train", "Linear"]["neural_collapse"].sums[0].class_counts[0]
    first = sum(int(each[each[:, 0]].sum()) for each in masks)
    assert counts.tolist() == [first, sum(int(each.sum()) for each in masks) - first]


@pytest.mark.parametrize(("backend", "reentrant"), WAYS[:4])
def test_only_gradients_of_observed_forwards(backend, reentrant):
    model = made(lambda: Net(reentrant=reentrant))
    probe = probing(model, every_n_steps=3)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    seen = []
    for _ in range(6):
        before = probe["train", "head"].Rows._update_count
        loss_of(run).backward()
        seen.append(probe["train", "head"].Rows._update_count - before)
    assert seen == [is_observed(index, 3, (0, "train", 0)) for index in range(6)]
    assert probe["train", "b"].Rows._update_count == 3 * probe["train", "head"].Rows._update_count


def test_what_arrives_may_have_any_form():
    """Expanded, in half precision, or with a graph of its own."""
    linear = made(lambda: nn.Linear(4, 3))
    probe = probing(linear)
    linear(given(5, 4)).sum().backward()  # one number, expanded
    assert torch.equal(rows_of(probe, "Linear"), torch.ones(5, 3).double())
    probe.reset()
    output = linear(given(5, 4).requires_grad_())
    (slope,) = torch.autograd.grad(output.square().sum(), linear.weight, create_graph=True)
    assert torch.equal(rows_of(probe, "Linear"), 2 * output.detach())
    slope.square().sum().backward()  # a second derivative arrives there, too
    assert len(rows_of(probe, "Linear")) == 10
    assert rows_of(probe, "Linear").isfinite().all()
    half = made(lambda: nn.Linear(4, 3), dtype=torch.bfloat16)
    probe = probing(half)
    output = half(given(5, 4, dtype=torch.bfloat16))
    output.square().sum().backward()
    assert torch.equal(rows_of(probe, "Linear"), 2 * output.detach().double())


def test_the_factor_of_the_loss_is_taken_out():
    """A number, or a scaler with its scale when the gradient arrives; more digits than the gradient had."""
    twin = made(lambda: nn.Linear(4, 3), dtype=torch.float16)
    plain = 2e-6 * twin(given(5, 4, dtype=torch.float16)).double().detach()
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**12), 2.0**12):
        model = made(lambda: nn.Linear(4, 3), dtype=torch.float16)
        probe = probing(model)
        probe.gradient_scale = scaler
        assert probe.gradient_scale is scaler
        loss = 1e-6 * model(given(5, 4, dtype=torch.float16)).float().square().sum()
        (loss * scaler if isinstance(scaler, float) else scaler.scale(loss)).backward()
        torch.testing.assert_close(rows_of(probe, "Linear"), plain, rtol=1e-3, atol=1e-10)
    with pytest.raises(RuntimeError, match="expected a probe with observe='gradients', got one of 'outputs'"):
        LayerProbe(twin).gradient_scale = 2.0


def test_a_scaler_in_training():
    """Bit-identical; steps that overflow are left out without a warning."""

    def scaled(model, probe=None):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        if probe is not None:
            probe.gradient_scale = scaler
        for step in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(given(6, 4, seed=step, dtype=torch.float32)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [each.detach() for each in model.parameters()], scaler.get_scale()

    def new():
        return made(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(True), nn.Linear(8, 3)), dtype=torch.float32)

    model = new()
    probe = LayerProbe(model, [sm.RootMeanSquareMetric(), sm.MaxAbsMetric()], observe="gradients")
    weights, scale = scaled(model, probe)
    expected, expected_scale = scaled(new())
    assert scale == expected_scale < 2.0**24
    assert all(map(torch.equal, weights, expected))
    left_out = int(probe["train", "2"]["rms"].sums[0].num_left_out)
    assert left_out > 0
    assert left_out + int(probe["train", "2"]["rms"].count) == 120
    assert probe.compute("train")["max_abs/train/2"] < 1
    assert [each for each in probe.findings("train") if each.kind == "non_finite"] == []
    probe.gradient_scale = 1.0
    with pytest.warns(UserWarning, match="observations with NaN or infinite values were left out in train"):
        probe.compute()
    assert "non_finite" in {each.kind for each in probe.findings("train")}


class Views(nn.Module):
    """A layer that returns a view of its input, followed by an in-place operation."""

    def __init__(self, *, inplace):
        super().__init__()
        self.linear, self.flatten, self.relu = nn.Linear(4, 6), nn.Flatten(), nn.ReLU(inplace)

    def forward(self, x):
        x = self.linear(x)
        return x.sum() + self.relu(self.flatten(x)).square().sum()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_view_of_the_input_that_is_changed_in_place_is_left_out(backend):
    def run(model):
        return torch.compile(model, backend=backend, fullgraph=True) if backend else model

    twin, model = (made(lambda: Views(inplace=True)) for _ in range(2))
    run(twin)(given(5, 3, 4)).backward()
    torch.compiler.reset()
    probe = probing(model, layers=[nn.Linear, nn.Flatten])
    words = (
        "view of it, has no gradient of its own"
        if backend
        else "what comes behind the layer changes it in place"
    )
    with pytest.warns(UserWarning, match=f"layer 'flatten' is not observed any more in train: .*{words}"):
        run(model)(given(5, 3, 4)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert len(rows_of(probe, "linear")) == 15
    assert probe["train", "flatten"].Rows.kept == []
    if backend is None:
        model = made(lambda: Views(inplace=False))
        probe = probing(model, layers=nn.Flatten)
        model(given(5, 3, 4)).backward()
        expected = captured(made(lambda: Views(inplace=False)), ["flatten"], lambda net: net(given(5, 3, 4)))
        torch.testing.assert_close(rows_of(probe, "flatten"), expected["flatten"][0], rtol=1e-12, atol=0)


def test_nothing_that_happens_in_a_hook_ends_a_backward():
    class Broken(Rows):
        def update(self, rows):
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    probe = LayerProbe(model, Broken(), observe="gradients")
    with pytest.warns(UserWarning, match="not observed any more in train: RuntimeError: no") as told:
        model(torch.randn(5, 4)).sum().backward()
    assert len(told) == 2
    assert probe["train", "0"].Broken.kept == []
    assert all(each.grad is not None for each in model.parameters())


def test_a_probe_can_be_pickled_while_gradients_are_awaited():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    probe = LayerProbe(model, sm.RootMeanSquareMetric(), observe="gradients")
    rows = torch.randn(5, 4, requires_grad=True)
    loss = checkpoint(model, rows, use_reentrant=True).square().sum()
    pickle.dumps(probe)
    loss.backward()
    twin = pickle.loads(pickle.dumps(probe))
    assert twin.compute() == probe.compute() != {}


def test_the_graph_keeps_nothing_alive_and_shows_nothing_later():
    model = made(lambda: Net())
    probe = probing(model)
    loss = loss_of(model)
    watched = weakref.ref(probe)
    probe.remove()
    loss.backward(retain_graph=True)
    assert all(probe["train", layer].Rows.kept == [] for layer in probe.layers)
    del probe
    gc.collect()
    assert watched() is None
    loss.backward()
    probe = probing(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        loss_of(run).backward()
    losses = [loss_of(run), loss_of(run)]
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert [len(hook._pending) for hook in hooks] == [2, 2, 6, 0, 2]
    del losses
    gc.collect()
    assert [len(hook._pending) for hook in hooks] == [0] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model.a(given(5, 6)), io.BytesIO())  # an output with a hook
        assert copy.deepcopy(model).a._forward_hooks == {}
    assert len(rows_of(probe, "a")) == 3 * 36


def test_a_layer_that_returns_a_parameter_is_seen_once_a_backward():
    model = nn.Sequential(Table())
    probe = LayerProbe(model, Rows(), layers=Table, observe="gradients")
    for count in (3, 6, 9):
        model[0]().square().sum().backward()
        assert len(rows_of(probe, "0")) == count
    probe.remove()
    assert not model[0].weight._backward_hooks


def test_where_no_gradient_arrives():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    probe = LayerProbe(model, observe="gradients")
    model(torch.randn(5, 4))
    with pytest.warns(
        UserWarning, match="nothing was observed in train: the layers ran, but no gradient arrived"
    ):
        assert probe.compute("train") == {}
    model[0].requires_grad_(False)
    model(torch.randn(50, 4)).sum().backward()
    with pytest.warns(UserWarning, match="layers that saw nothing in train are left out: '0'"):
        assert list(probe.compute("train")) == ["saturation/train/1"]
    probe.reset()
    torch.func.grad(lambda x: model(x).sum())(torch.randn(5, 4))
    with pytest.warns(UserWarning, match="transforms of torch.func"):
        assert probe.compute("train") == {}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        outputs, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1]).square().mean() + outputs.pow(3).mean()


def test_what_a_function_selects_of_the_output():
    def hidden_of(net):
        kept = []
        handle = net.lstm.register_forward_hook(lambda module, args, output: kept.append(output[1][0]))
        loss = net(given(5, 3, 4))
        handle.remove()
        return torch.autograd.grad(loss, kept[0])[0]

    expected = hidden_of(made(Encoder))
    for select, rows in {
        (lambda out: out[1][0]): expected,
        (lambda out: out[1][0][-1]): expected[-1],
        (lambda out: out[1][0].transpose(0, 1)): expected.transpose(0, 1).reshape(-1, 6),
    }.items():
        model = made(Encoder)
        probe = probing(model, layers="lstm", select={"lstm": select})
        model(given(5, 3, 4)).backward()
        torch.testing.assert_close(rows_of(probe, "lstm"), rows.reshape(-1, 6), rtol=1e-12, atol=1e-15)
    model = made(Encoder)
    probe = probing(model, layers="lstm", select={"lstm": lambda out: 2 * out[0]})
    with pytest.warns(UserWarning, match="`select` returns a tensor that is no part of the layer's output"):
        model(given(5, 3, 4)).backward()
    assert probe["train", "lstm"].Rows.kept == []


def test_maps_are_drawn_and_never_interpolated():
    model = made(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(True), nn.AdaptiveMaxPool2d(1)))

    def run(net):
        return net(given(4, 1, 40, 40)).square().sum()

    twin = made(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)))
    gradient = captured(twin, ["0"], run)["0"][0]
    known = {tuple(row) for row in maps(gradient).tolist()}
    for options, rows in {
        (("max_map_size", 32),): None,
        (("max_map_size", None),): maps(gradient),
        (("feature_maps", "mean"),): gradient.mean((2, 3)),
        (("feature_maps", "max"),): gradient.amax((2, 3)),
        (("feature_maps", "flatten"),): gradient.flatten(1),
        (("max_samples", 3), ("max_map_size", None)): maps(gradient[:3]),
    }.items():
        probe = probing(model, **dict(options))
        for _ in range(2 if dict(options).get("max_samples") else 1):
            run(model).backward()
        found = rows_of(probe, "0")
        if rows is None:
            assert found.shape == (4 * 32 * 32, 3)
            assert {tuple(row) for row in found.tolist()} <= known
        else:
            torch.testing.assert_close(found, rows, rtol=1e-12, atol=0)
        probe.remove()


def test_folds_histories_and_budgets_go_by_the_forward():
    model = made(lambda: nn.Linear(4, 3))
    metrics = [sm.CovarianceTraceMetric(folds=2), sm.HistoryMetric(steps=10)]
    probe = LayerProbe(model, metrics, observe="gradients")
    losses = []
    for probe.step in range(4):
        losses.append(model(given(5, 4, seed=probe.step)).square().sum())
    for loss in reversed(losses):
        loss.backward()
    rows = probe.history("train").rows
    assert [(row.forward, row.step, row.observations) for row in rows] == [(n, n, 5) for n in range(4)]
    folds = probe["train", "Linear"]["covariance_trace"].sums[0].folds
    assert [int(fold.num_observations) for fold in folds] == [10, 10]
    probe = LayerProbe(model, observe="gradients", budget=0.9)
    for step in range(60):
        model(given(50, 4, seed=step)).square().sum().backward()
    spent = probe._steps.budget.spent("train")
    assert 0 < spent.observed < spent.forwards == 60
    assert 0 < int(probe["train", "Linear"]["saturation"].count) <= 50 * spent.observed


def test_findings_of_gradients_are_those_that_hold_of_them(tmp_path):
    """One direction, dead features and a large mean are normal for gradients of a small network."""

    def new():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(True), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 1)
        )

    kinds = {}
    for observe in ("outputs", "gradients"):
        model = new()
        with torch.no_grad():
            model[0].bias[:60] = -100  # dead, so no gradient reaches its outputs
        probe = LayerProbe(model, sm.SaturationMetric(), observe=observe)
        recorder = sm.Recorder(tmp_path / observe, probe, ["csv", "arrays"])
        for _ in range(10):
            model(torch.randn(100, 4)).sum().backward()
        model(torch.full((1, 4), torch.nan)).square().sum().backward()
        kinds[observe] = {each.kind for each in probe.findings("train")}
        words = probe.summary("train")
        with pytest.warns(UserWarning, match="left out in train"):
            recorder.record()
        recorder.close()
        saved = SavedRun(tmp_path / observe)
        assert {each.of_gradients for each in saved.facts.values()} == {observe == "gradients"}
        layers = list(saved.layers(saved.last_of(None, arrays=True), "train"))
        plain = [read_numbers(each.layer, each.spectrum(), None, 0.99) for each in layers]
        kinds[observe, "as outputs"] = {each.kind for each in find("train", plain)}
    assert {"collapsed", "non_finite", "at_ceiling"} <= kinds["outputs"]
    assert {"dead", "outliers", "non_finite"} <= kinds["gradients", "as outputs"]
    assert kinds["gradients"] == {"non_finite"}
    assert str(words).startswith("train, gradients")
    again = summarise_run(tmp_path / "gradients", stage="train")
    assert [row.stands_out for row in again.rows] == [row.stands_out for row in words.rows]


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (0, ValueError, "expected gradient_scale to be a positive number, got 0"),
        (float("nan"), ValueError, "expected gradient_scale to be a positive number, got nan"),
        ("2", TypeError, "expected gradient_scale to be a number or a GradScaler, got str"),
        (True, TypeError, "expected gradient_scale to be a number or a GradScaler, got bool"),
        (None, TypeError, "expected gradient_scale to be a number or a GradScaler, got NoneType"),
    ],
)
def test_a_factor_that_is_none(scale, error, words):
    probe = LayerProbe(nn.Linear(2, 2), observe="gradients")
    with pytest.raises(error, match=words):
        probe.gradient_scale = scale
    assert probe.gradient_scale == 1.0


def test_statistics_are_those_of_gradients_of_each_sample_by_torch_func():
    """With batches of different sizes, whose mean losses scale their gradients differently."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = given(24, 4) + 0.5, torch.arange(24) % 3

    def loss(shift, layer, row, label):
        hidden = model[0](row) + (shift if layer == 0 else 0)
        out = model[2](torch.tanh(hidden)) + (shift if layer == 2 else 0)
        return nn.functional.cross_entropy(out, label)

    expected, factors = {}, {}
    for layer, width in ((0, 8), (2, 3)):
        of_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0, 0))
        rows = of_sample(torch.zeros(width).double(), layer, x, y)
        expected[f"signal_to_noise/train/{layer}"] = (
            rows.mean(0).square().sum() / rows.var(0, correction=0).sum()
        )
        factors[str(layer)] = rows.T @ rows / 24
    into = LayerProbe(model, sm.CovarianceMetric(), observe="inputs")
    for metrics in (sm.SignalToNoiseMetric(), [sm.SignalToNoiseMetric(), sm.CovarianceTraceMetric()]):
        probe = LayerProbe(model, metrics, observe="gradients")
        for part in torch.arange(24).split([5, 3, 16]):
            probe.gradient_scale = 1 / len(part)
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        found = probe.compute()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=0)
        if len(probe.statistics) > 1:
            into.remove()
            found = probe.covariances("train", center=False)  # one factor of K-FAC, of the empirical Fisher
            inputs = into.covariances("train", center=False)  # and the other
            for layer, value in factors.items():
                torch.testing.assert_close(found[layer], value.detach(), rtol=1e-12, atol=1e-16)
            hidden = torch.tanh(model[0](x)).detach()
            torch.testing.assert_close(inputs["2"], hidden.T @ hidden / 24, rtol=1e-12, atol=0)
        probe.remove()


def test_a_layer_that_was_given_up_gets_no_gradients_any_more():
    class Fails(Metric):
        def __init__(self):
            super().__init__(sync_on_compute=False)
            self.calls = 0

        def update(self, rows):
            self.calls += 1
            if self.calls == 3:
                raise ArithmeticError("enough")

        def compute(self):
            return torch.tensor(float(self.calls))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    probe = LayerProbe(model, {"fails": Fails()}, observe="gradients")
    model(torch.randn(5, 4)).sum().backward()
    with pytest.warns(UserWarning, match="'layer' is not observed any more in train: ArithmeticError: enough"):
        model(torch.randn(5, 4)).sum().backward()
    model(torch.randn(5, 4)).sum().backward()
    assert probe["train", "layer"]["fails"].calls == 3
