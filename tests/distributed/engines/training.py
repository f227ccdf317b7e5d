"""Probes beside training engines, which they do not change: gradients, sharded weights, context parallel."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spectralmetrics as sm
from tests.distributed.engines.llama import KINDS, llama, loss_of, mesh_of, plan, tokens, whole
from tests.distributed.spread import assert_holds


def gradients(batches, model=None, masks=None):
    """Layer -> (n, D) gradients of its outputs in one process, without a probe."""
    model, found = llama() if model is None else model, {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS):

            def keep(module, args, output, name=name):
                output.register_hook(
                    lambda gradient: found.setdefault(name, []).append(gradient.flatten(0, -2))
                )

            module.register_forward_hook(keep)
    for batch in batches:
        loss_of(model(batch)).backward()
    return {name: torch.cat(each) for name, each in found.items()}


def weights_of(model):
    with torch.no_grad():
        return [whole(each) for parameter in model.parameters() for each in (parameter, parameter.grad)]


def gradients_equal_one_process(rank, world):
    """Local and DTensor outputs, probes made before and after, one process paused; same training as without."""
    mesh = mesh_of(world)
    batches = [tokens(seed, 5, 2 * world) for seed in range(2)]
    expected = gradients(batches)
    for sequence, is_local, is_before in ((0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 0, 0)):
        ends = []
        for has_probe in (False, True):
            model = llama()
            new = lambda model=model: sm.LayerProbe(  # noqa: E731
                model, sm.SpectrumMetric(), layers=list(KINDS), observe="gradients"
            )
            probe = new() if has_probe and is_before else None
            parallelize_module(model, mesh, plan(is_local=is_local, sequence=sequence))
            probe = new() if has_probe and not is_before else probe
            for batch in batches:
                loss_of(model(batch)).backward()
            ends.append(weights_of(model))
        assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
        assert_holds(probe, "train", expected)
        probe.remove()
    # A process paused in a forward, paused in a backward, or full takes part and keeps nothing.
    model = llama()
    parallelize_module(model, mesh, plan())
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), observe="gradients", max_samples=15 if rank == 0 else 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_samples differs
        for number, batch in enumerate(batches * 2):
            if rank == 0 and number == 1:
                probe.pause()
            loss = loss_of(model(batch))
            if rank == 0 and number == 1:
                probe.resume()
            elif rank == 0 and number == 2:
                probe.pause()
            loss.backward()
        probe.resume()
    with probe.merged():
        counts = {int(probe["train", name]["spectrum"].count) for name in probe.layers}
    assert counts == {4 * 10 * world - 3 * 10}


def gradients_of_compiled_layers(rank, world):
    """Local outputs: one graph, and the same training as without a probe."""
    mesh = mesh_of(world)
    batches = [torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2)]

    def new():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()

    found = {"0": [], "2": []}
    model = new()
    for name in found:
        model[int(name)].register_forward_hook(
            lambda module, args, output, name=name: output.register_hook(found[name].append) and None
        )
    for batch in batches:
        model(batch).square().mean().backward()
    ends = []
    for has_probe in (False, True):
        torch.compiler.reset()
        model = new()
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if has_probe:
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), observe="gradients")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for batch in batches:
            compiled(batch).square().mean().backward()
        ends.append(weights_of(model))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert_holds(probe, "train", {name: torch.cat(each) for name, each in found.items()})
    # DTensor outputs are not observed, and a warning says so.
    torch.compiler.reset()
    model = new()
    parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="0", observe="gradients")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="'0' is not observed.*a compiled layer whose output is a DTensor"):
        compiled(batches[0]).square().mean().backward()


def trained(rank, spread, has_probe, is_before=False, compiles=False):
    """Weights, gradients and random state after two steps."""
    torch.compiler.reset()
    model, layers = llama(torch.float32), list(KINDS)
    new = lambda: sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers, rows_per_feature=1)  # noqa: E731
    probe = new() if has_probe and is_before else None
    spread(model)
    if compiles:
        for block in model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    probe = new() if has_probe and not is_before else probe
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(rank)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model(tokens(10 * rank + seed, 4, 8))).backward()
        optimizer.step()
    return [*weights_of(model), torch.random.get_rng_state()], probe


def sharded_weights(mesh):
    def spread(model):
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return spread


def assert_same_training(rank, spread, befores, **arguments):
    expected, _ = trained(rank, spread, has_probe=False, **arguments)
    for is_before in befores:
        found, probe = trained(rank, spread, has_probe=True, is_before=is_before, **arguments)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert len(probe.compute("train")) == len(probe.layers)
        probe.remove()


def training_with_sharded_weights_is_the_same_to_the_bit(rank, world):
    """FSDP2, eager and compiled; on four processes also replicated, and with tensor parallelism."""
    if world != 4:
        assert_same_training(rank, sharded_weights(mesh_of(world)), (True, False))
        return
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert_same_training(rank, sharded_weights(hybrid), (False,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def both(model):
        parallelize_module(model, mesh["tp"], plan())
        sharded_weights(mesh["dp"])(model)

    replica = mesh["dp"].get_local_rank()
    assert_same_training(replica, both, (True,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        assert_same_training(replica, both, (False,), compiles=True)


class Between(nn.Module):
    """Layers between attentions; PyTorch's attention for context parallelism runs on accelerators only."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(40, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.up(self.tokens(x)).relu())


def context_parallel_of_torch(rank, world):
    """Buffers are cut in place: positions of all processes add up, masks are buffers, wholes are refused."""
    mesh = mesh_of(world)
    torch.manual_seed(0)
    model = Between().double()
    steps, generator = 4 * world, torch.Generator().manual_seed(0)
    batches = [torch.randint(40, (3, steps), generator=generator) for _ in range(2)]
    masks = [torch.rand(3, steps, generator=generator) < 0.7 for _ in range(2)]
    kinds = [nn.Linear, nn.Embedding]
    expected = {}
    for name in ("tokens", "up", "down"):

        def keep(module, args, output, name=name):
            expected.setdefault(name, []).append(output.detach())

        model.get_submodule(name).register_forward_hook(keep)
    for batch in batches:
        model(batch)
    expected = {
        name: torch.cat([each[mask] for each, mask in zip(rows, masks, strict=True)])
        for name, rows in expected.items()
    }
    torch.manual_seed(0)
    model = Between().double()
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=kinds)
    for batch, mask in zip(batches, masks, strict=True):
        buffers = [batch.clone(), mask.clone()]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1]), probe.mask(buffers[1]):
            model(buffers[0]).sum().backward()
    assert_holds(probe, "train", expected)
    probe.remove()
    for sequences in ("last", "mean", "flatten"):
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="up", sequences=sequences)
        batch = batches[0].clone()
        words = rf"'up' is not observed.*sequences='{sequences}' needs whole samples.*context_parallel"
        with (
            context_parallel(mesh, buffers=[batch], buffer_seq_dims=[1]),
            pytest.warns(UserWarning, match=words),
        ):
            model(batch)
        probe.reset()
        model(batch)  # outside of the context samples are whole
        assert int(probe["train", "up"]["spectrum"].count) == 3
        probe.remove()
    probe = sm.LayerProbe(model, sm.LinearProbeMetric(2), layers="up")
    batch = batches[0].clone()
    words = r"labels of shape \(3,\) fit no output"
    cut = context_parallel(mesh, buffers=[batch], buffer_seq_dims=[1])
    with pytest.warns(UserWarning, match=words), cut, probe.labels(torch.arange(3) % 2):
        model(batch)
    assert int(probe["train", "up"]["linear_probe"].count) == 0
    cut = context_parallel(mesh, buffers=[batch], buffer_seq_dims=[1])
    words = r"'up' cannot be compared: each process has some positions of each sample"
    with sm.LayerSimilarity(model, layers="up"), cut, pytest.warns(UserWarning, match=words):
        model(batch)


ON_TWO = [gradients_equal_one_process, gradients_of_compiled_layers, context_parallel_of_torch]
