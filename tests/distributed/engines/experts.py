"""Experts whose weights are stacked in one parameter, spread by hand in the way of transformers."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import spectralmetrics as sm
from tests.distributed.engines.llama import mesh_of
from tests.distributed.spread import assert_holds

WIDTH, INNER, NUMBER = 6, 8, 4


def put_out(states, up, down):
    """Output of one expert, from its weights."""
    gate, value = (states @ up.T).chunk(2, -1)
    return ((nn.functional.silu(gate) * value) @ down.T).detach()


class Experts(nn.Module):
    """Experts as in transformers."""

    def __init__(self):
        super().__init__()
        self.num_experts = NUMBER
        self.gate_up_proj = nn.Parameter(torch.randn(NUMBER, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(NUMBER, WIDTH, INNER))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        found = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            token, place = torch.where(top_k_index == number)
            gate, value = (hidden_states[token] @ self.gate_up_proj[number].T).chunk(2, -1)
            rows = (nn.functional.silu(gate) * value) @ self.down_proj[number].T
            found.index_add_(0, token, rows * top_k_weights[token, place, None])
        return found


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x, index):
        return self.experts(self.before(x), index, torch.full(index.shape, 0.5, dtype=x.dtype))


def inputs(seed, number=11):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, WIDTH, generator=generator).double()
    return x, torch.stack([torch.randperm(NUMBER, generator=generator)[:2] for _ in range(number)])


def rows(batches, masks=None):
    model, found = Mixture().double(), {}
    for place, (x, index) in enumerate(batches):
        states = model.before(x).detach()
        for number, weights in enumerate(zip(model.experts.gate_up_proj, model.experts.down_proj, strict=True)):
            is_chosen = (index == number).any(1)
            chosen = states[is_chosen if masks is None else is_chosen & masks[place][:, 0]]
            found.setdefault(f"experts.{number}", []).append((chosen, put_out(chosen, *weights)))
    return {name: tuple(map(torch.cat, zip(*each, strict=True))) for name, each in found.items()}


def place(experts, mesh, how):
    """Give a process some inner features of each expert, or some experts, and a forward that uses them."""
    original = experts.forward

    def shard(name, dim, values):
        experts._parameters[name] = nn.Parameter(distribute_tensor(values.detach(), mesh, [Shard(dim)]))

    if how == "tensor":
        half = INNER // mesh.size()
        # Each process has the same features of the gate and of the value.
        gate, value = experts.gate_up_proj.detach().chunk(2, 1)
        parts = zip(gate.split(half, 1), value.split(half, 1), strict=True)
        shard("gate_up_proj", 1, torch.cat([each for pair in parts for each in pair], 1))
        shard("down_proj", 2, experts.down_proj)
    else:
        experts.num_experts = NUMBER // mesh.size()
        shard("gate_up_proj", 0, experts.gate_up_proj)
        shard("down_proj", 0, experts.down_proj)
    first = mesh.get_local_rank() * experts.num_experts if how != "tensor" else 0

    def everywhere(values):
        parts = [torch.empty_like(values) for _ in range(mesh.size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def forward(hidden_states, top_k_index, top_k_weights):
        number, travels = len(hidden_states), how == "travelling"
        if travels:
            arguments = (hidden_states, top_k_index, top_k_weights)
            hidden_states, top_k_index, top_k_weights = map(everywhere, arguments)
        kept = dict(experts._parameters)
        experts._parameters.update({name: each.to_local() for name, each in kept.items()})
        try:
            found = original(hidden_states, top_k_index - first, top_k_weights)
        finally:
            experts._parameters.update(kept)
        dist.all_reduce(found)
        return found[number * mesh.get_local_rank() :][:number] if travels else found

    experts.forward = forward


def spread_mixture(mesh, how):
    model = Mixture().double()
    if how == "copies":
        parallelize_module(model, mesh, {"before": ColwiseParallel(output_layouts=Replicate())})
    else:
        place(model.experts, mesh, how)
    return model


def experts_that_are_spread_equal_one_process(rank, world):
    """Each expert's rows count once and whole: cut experts, some experts, the same ones on all processes."""
    mesh, batches = mesh_of(world), [inputs(seed) for seed in range(2)]
    expected = rows(batches)
    for how in ("tensor", "experts", "copies"):
        for observe in ("outputs", "inputs"):
            model = spread_mixture(mesh, how)
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="experts", observe=observe)
            assert len(probe.layers) == (NUMBER // world if how == "experts" else NUMBER)
            with torch.no_grad():
                for x, index in batches:
                    model(x, index)
            assert_holds(probe, "train", {n: each[observe == "outputs"] for n, each in expected.items()})
            probe.remove()
    # FSDP2; each process has tokens of its own.
    model, own = Mixture().double(), [inputs(10 + seed) for seed in range(world)]
    fully_shard(model.experts, mesh=mesh)
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="experts")
    fully_shard(model, mesh=mesh)
    model(*own[rank]).sum().backward()
    assert_holds(probe, "train", {name: found for name, (_, found) in rows(own).items()})
    probe.remove()
    # Rows are drawn before the experts run, and a paused process takes part.
    for how in ("tensor", "copies"):
        model = spread_mixture(mesh, how)
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="experts", rows_per_feature=0.5)
        with torch.no_grad():
            for number, (x, index) in enumerate(batches):
                if rank == world - 1 and number == 1:
                    probe.pause()
                model(x, index)
        probe.resume()
        with probe.merged():
            counts = [int(probe["train", name]["spectrum"].count) for name in probe.layers]
        per_forward = [min(3, int((index == 0).sum())) for _, index in batches]
        assert len(counts) == NUMBER
        assert sum(per_forward) - per_forward[1] // world - 1 <= counts[0] < sum(per_forward)
        probe.remove()


def tokens_that_travel_to_experts_of_other_processes_are_seen(rank, world):
    """Each process has its own tokens and some experts; processes may probe different experts."""
    mesh, batches = mesh_of(world), [inputs(seed, 6) for seed in range(2 * world)]
    expected = rows(batches)
    masks = [torch.rand(6, 1, generator=torch.Generator().manual_seed(seed)) < 0.7 for seed in range(2 * world)]
    masked = rows(batches, masks)
    for layers, observe, has_mask, most in (
        ("experts", "outputs", True, None),
        ("experts", "inputs", False, None),
        (["experts.0", "experts.3", "before"], "outputs", False, None),
        ("experts", "outputs", False, 0.5),
    ):
        model = Mixture().double()
        place(model.experts, mesh, "travelling")
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers, observe=observe, rows_per_feature=most)
        for number in range(2):
            seed = rank + number * world
            with probe.mask(masks[seed]) if has_mask else contextlib.nullcontext(), torch.no_grad():
                model(*batches[seed])
        found = {name: each[observe == "outputs"] for name, each in (masked if has_mask else expected).items()}
        if most is not None:
            with probe.merged():
                counts = [int(probe["train", name]["spectrum"].count) for name in probe.layers]
            assert len(counts) == NUMBER
            assert 0 < max(counts) <= 2 * 3
        elif layers != "experts":
            chosen = {name: found[name] for name in ("experts.0", "experts.3")}
            with torch.no_grad():
                before = torch.cat([Mixture().double().before(x) for x, _ in batches])
            assert_holds(probe, "train", {"before": before, **chosen})
        else:
            assert_holds(probe, "train", found)
        probe.remove()


def a_history_leaves_what_experts_draw(rank, world):
    mesh = mesh_of(world)
    for how in ("tensor", "copies", "travelling"):
        found = []
        for joins in ([], [sm.HistoryMetric(steps=8)]):
            model = spread_mixture(mesh, how).eval()
            metrics = [sm.CovarianceTraceMetric(), sm.MaxAbsMetric(), *joins]
            probe = sm.LayerProbe(model, metrics, layers="experts", rows_per_feature=0.5)
            own = [inputs(seed + (rank if how == "travelling" else 0)) for seed in range(0, 3 * world, world)]
            with torch.no_grad():
                for x, index in own:
                    model(x, index)
            found.append(probe.compute("eval"))
        assert len(found[0]) == 2 * NUMBER
        for key, value in found[0].items():
            assert torch.equal(found[1][key], value), (how, key)
        several = world if how == "travelling" else 1
        number = [
            sum(int((inputs(seed + each)[1] == 0).sum()) for each in range(several))
            for seed in range(0, 3 * world, world)
        ]
        assert [row.observations for row in probe.history("eval") if row.layer == "experts.0"] == number, how


def experts_that_each_process_makes_are_merged_by_name(rank, world):
    batches = [inputs(seed) for seed in range(2)]
    expected = {}
    for each in range(world):
        for name, (_, found) in rows(batches).items():
            expected[f"of{each}.{name.rpartition('.')[2]}"] = found * (each + 1)
    model = Mixture().double()
    with torch.no_grad():
        model.experts.down_proj.mul_(rank + 1)
    holder = nn.ModuleDict({f"of{rank}": model.experts})
    probe = sm.LayerProbe(holder, sm.SpectrumMetric(), layers="of*")
    for x, index in batches:
        model(x, index)
    assert_holds(probe, "train", expected)


def experts_that_count_from_zero_on_each_process_are_told(rank, world):
    model = Mixture().double()
    torch.manual_seed(rank)
    nn.init.normal_(model.experts.gate_up_proj)
    probe = sm.LayerProbe(model, sm.CovarianceTraceMetric(), layers="experts")
    model(*inputs(0))
    with pytest.warns(UserWarning, match=r"'experts.0' means different layers on different processes"):
        probe.compute("train")


ON_TWO = [
    a_history_leaves_what_experts_draw,
    experts_that_each_process_makes_are_merged_by_name,
    experts_that_count_from_zero_on_each_process_are_told,
]
