"""Scenarios that a group of processes runs: models spread by PyTorch, and the same model in one process."""

import contextlib
import copy
import itertools
import os
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchmetrics import Metric

import spectralmetrics as sm
from spectralmetrics.probing import rendezvous
from spectralmetrics.probing.parts import part_of
from spectralmetrics.probing.placement import bring, place
from spectralmetrics.probing.rules import ObservationRule
from tests.distributed.engines import experts, settings, training
from tests.distributed.engines.llama import (
    KINDS,
    VOCABULARY,
    llama,
    loss_of,
    mesh_of,
    outputs,
    plan,
    rows,
    tokens,
    whole,
)
from tests.distributed.spread import assert_holds, every_linear
from tests.metrics.properties import assert_same

LINEAR = (nn.Linear,)


def probed(
    mesh,
    metrics=None,
    *,
    is_before=False,
    layers=LINEAR,
    is_local=True,
    sequence=False,
    blocks=1,
    **arguments,
):
    """A parallelised Llama and its probe, which is made before or after parallelising."""
    model = llama(blocks=blocks)
    metrics = sm.SpectrumMetric() if metrics is None else metrics
    if is_before:
        probe = sm.LayerProbe(
            model, metrics, layers=layers if isinstance(layers, list) else list(layers), **arguments
        )
    parallelize_module(model, mesh, plan(is_local=is_local, sequence=sequence, blocks=blocks))
    if not is_before:
        probe = sm.LayerProbe(
            model, metrics, layers=layers if isinstance(layers, list) else list(layers), **arguments
        )
    return model, probe


def alone(metrics, run, *, layers=LINEAR, **arguments):
    """A probe of the whole model that merges with no other process, after ``run``."""
    for metric in metrics:
        metric.sync_on_compute = False
    model = llama()
    probe = sm.LayerProbe(
        model, metrics, layers=layers if isinstance(layers, list) else list(layers), **arguments
    )
    run(model, probe)
    return probe


class Rows(Metric):
    """Keeps the rows that it gets in this process."""

    def __init__(self):
        super().__init__(sync_on_compute=False)
        self.rows = []

    def update(self, rows):
        self.rows.append(rows.clone())

    def compute(self):
        return torch.cat(self.rows) if self.rows else torch.zeros(0, 1)


def gathered(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def tensor_parallel_equals_one_process(rank, world):
    """Two blocks; local and DTensor outputs; probes made before and after; samples that do not divide."""
    mesh = mesh_of(world)
    for is_local, is_before in itertools.product((True, False), repeat=2):
        for samples, steps in ((5, 6), (1, 7)):
            batches = [tokens(seed, samples, steps) for seed in range(2)]
            model, probe = probed(mesh, is_local=is_local, is_before=is_before, blocks=2)
            for batch in batches:
                loss_of(model(batch)).backward()
            assert_holds(probe, "train", rows(batches, LINEAR, llama(blocks=2)))


def sequence_parallel_equals_one_process(rank, world):
    """Also norms and a row-parallel embedding; the probe leaves the mask to the embedding's own reduction."""
    mesh = mesh_of(world)
    for is_local, is_before in itertools.product((True, False), repeat=2):
        for samples, steps in ((5, 2 * world),) if is_local else ((5, 2 * world), (1, 2 * world + 1)):
            batches = [tokens(seed, samples, steps) for seed in range(2)]
            model, probe = probed(mesh, is_local=is_local, is_before=is_before, sequence=True, layers=KINDS)
            for batch in batches:
                loss_of(model(batch)).backward()
            assert_holds(probe, "train", rows(batches))


def training_is_the_same_to_the_bit(rank, world):
    mesh = mesh_of(world)
    for is_local, sequence in ((True, False), (False, False), (True, True), (False, True)):
        ends = []
        for has_probe in (False, True):
            model = llama(torch.float32)
            parallelize_module(model, mesh, plan(is_local=is_local, sequence=sequence))
            if has_probe:
                probe = sm.LayerProbe(model, sm.SaturationMetric(), layers=list(KINDS), rows_per_feature=1)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            for seed in range(3):
                optimizer.zero_grad()
                loss_of(model(tokens(seed, 4, 2 * world))).backward()
                optimizer.step()
            with torch.no_grad():
                ends.append(
                    [whole(each) for parameter in model.parameters() for each in (parameter, parameter.grad)]
                )
            ends[-1].append(torch.random.get_rng_state())
        assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
        assert len(probe.compute("train")) == len(probe.layers)


def masks_and_labels(rank, world):
    """Masks and labels are given for the whole batch, however the batch is divided."""
    mesh = mesh_of(world)
    steps = 2 * world
    batches = [tokens(seed, 5, steps) for seed in range(3)]
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(5, steps, generator=generator) < 0.7 for _ in batches]
    of_steps = [torch.randint(-1, 3, (5, steps), generator=generator) for _ in batches]
    of_samples = [torch.arange(5) % 3 for _ in batches]

    for labels, sequence in itertools.product((of_steps, of_samples), (False, True)):
        metrics = lambda: [sm.SpectrumMetric(), sm.LinearProbeMetric(3), sm.MaxAbsMetric()]  # noqa: E731

        def run(model, probe, labels=labels):
            for batch, mask, own in zip(batches, masks, labels, strict=True):
                with probe.mask(mask), probe.labels(own), torch.no_grad():
                    model(batch)

        model, probe = probed(mesh, metrics(), sequence=sequence, is_local=not sequence, layers=KINDS)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run(model, probe)
            found, whole_one = probe.compute("train"), alone(metrics(), run, layers=KINDS)
            expected = whole_one.compute()
        assert any("labels of shape (5,)" in str(each.message) for each in told) == (
            sequence and labels is of_samples
        )
        if sequence and labels is of_samples:  # outputs with sharded time have no mean per sample here
            divided = {key for key in expected if "linear_probe" in key and "norm" in key}
            assert set(expected) - set(found) == divided
            assert divided
        else:
            assert list(found) == list(expected)
        for key, value in found.items():
            assert_same(value, expected[key], 1e-9)
        covariances = probe.covariances("train")
        for name, covariance in whole_one.covariances("train").items():
            assert (covariances[name] - covariance).norm() < 1e-12 * covariance.norm()
        with probe.merged():
            counts = {int(probe["train", name]["spectrum"].count) for name in probe.layers}
        assert counts == {sum(int(mask.sum()) for mask in masks)}


def observations_of_whole_sequences(rank, world):
    """The last step, means and flattened sequences of sharded features; refused where time is sharded."""
    mesh = mesh_of(world)
    steps = 2 * world
    batches = [tokens(seed, 9, steps) for seed in range(4)]
    masks = [torch.rand(9, steps, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in range(4)]
    for sequences, has_mask, size in (
        ("last", False, None),
        ("mean", True, None),
        ("last", True, 3),
        ("flatten", False, None),
        ("flatten", True, None),
    ):

        def run(model, probe, has_mask=has_mask):
            for batch, mask in zip(batches, masks, strict=True):
                with probe.mask(mask) if has_mask else contextlib.nullcontext(), torch.no_grad():
                    model(batch)

        arguments = {"sequences": sequences, "max_samples": size}
        model, probe = probed(mesh, is_local=sequences == "last", **arguments)
        run(model, probe)
        expected = alone([sm.SpectrumMetric()], run, **arguments).covariances("train")
        found = probe.covariances("train")
        assert list(found) == list(expected)
        for name, covariance in expected.items():
            assert (found[name] - covariance).norm() <= 1e-12 * covariance.norm(), (sequences, name)
    for sequences in ("last", "mean", "flatten"):
        model, probe = probed(mesh, sequence=True, sequences=sequences, layers=["norm", "*wo"])
        words = rf"'norm' is not observed.*sequences='{sequences}'.*\(Shard\(1\)\)"
        with pytest.warns(UserWarning, match=words), torch.no_grad():
            model(batches[0])
        assert list(probe.covariances("train")) == ["layers.0.attention.wo"]


def rows_are_drawn_before_they_travel(rank, world):
    """As many rows as in one process, each a row of the whole, and no row on two processes."""
    mesh = mesh_of(world)
    generator = torch.Generator().manual_seed(0)
    # No token twice in a sample: no two rows after the first attention are alike.
    samples = [torch.randperm(VOCABULARY, generator=generator)[: 2 * world] for _ in range(15)]
    batches = list(torch.stack(samples).split(5))
    expected = outputs(batches, KINDS)
    for sequence in (False, True):
        model, probe = probed(
            mesh, {"rows": Rows(), "spectrum": sm.SpectrumMetric()}, sequence=sequence, is_local=False,
            layers=KINDS, rows_per_feature=0.3, seed=4,
        )  # fmt: skip
        with torch.no_grad():
            for batch in batches:
                model(batch)
        for name in probe.layers:
            parts = gathered(probe["train", name]["rows"].compute())
            found, everything = torch.cat(parts), torch.cat([each.flatten(0, -2) for each in expected[name]])
            width = everything.shape[1]
            each = min(-(-3 * width // 10), len(everything) // 3)
            assert len(found) == 3 * each, name
            assert max(map(len, parts)) - min(map(len, parts)) <= 3
            distances = torch.cdist(found, everything, compute_mode="donot_use_mm_for_euclid_dist")
            assert distances.min(1).values.max() < 1e-12
            if name.startswith("layers.0.f"):  # feed_forward, ffn_norm
                assert len(distances.min(1).indices.unique()) == len(found)
        with probe.merged():
            for name in ("layers.0.feed_forward.w1", "output"):
                count = int(probe["train", name]["spectrum"].count)
                assert count == 3 * min(
                    -(-3 * len(probe["train", name]["spectrum"].compute()) // 10), 10 * world
                )


def folds_histories_and_marginals(rank, world):
    """All processes put one forward into one fold, and it is one row of a history."""
    mesh = mesh_of(world)
    batches = [tokens(seed, 5, 2 * world) for seed in range(5)]

    def new():
        return [sm.SpectrumMetric(), sm.MaxAbsMetric(), sm.HistoryMetric(steps=8)]

    def run(model, probe):
        for batch in batches:
            model(batch)

    expected = alone(new(), run, folds=2)
    for sequence in (False, True):
        model, probe = probed(mesh, new(), sequence=sequence, folds=2, is_local=not sequence)
        run(model, probe)
        values = probe.compute("train")
        for key, value in expected.compute().items():
            if "history" not in key:
                assert_same(values[key], value, 1e-9)
        for (key, own), its in zip(
            probe.intervals("train").items(), expected.intervals().values(), strict=True
        ):
            assert "spectrum" in key
            for one, other in zip(own, its, strict=True):
                assert_same(one, other, 1e-9)
        assert expected.history("train").forwards == list(range(5))
        for mine, its in zip(probe.history("train").rows, expected.history("train").rows, strict=True):
            assert mine[:4] == its[:4]
            assert mine[4:] == pytest.approx(its[4:], rel=1e-9)


def a_history_leaves_what_others_draw(rank, world):
    mesh = mesh_of(world)
    for sequence in (False, True):
        found = []
        for joins in ([], [sm.HistoryMetric(steps=8)]):
            metrics = [sm.CovarianceTraceMetric(), sm.MaxAbsMetric(), *joins]
            model, probe = probed(mesh, metrics, sequence=sequence, is_local=not sequence, rows_per_feature=0.3)
            with torch.no_grad():
                model.eval()  # in training, a forward without gradients is a rollout, which has no history
                for seed in range(3):
                    model(tokens(seed, 5, 2 * world))
            found.append(probe.compute("eval"))
        for key, value in found[0].items():
            assert torch.equal(found[1][key], value), key
        assert {row.observations for row in probe.history("eval")} == {10 * world}


class Fussy(sm.SpectralMetric):
    """Fails in an update on some process."""

    fails = False

    def statistic(self, spectrum):
        return spectrum.eigenvalues.sum()

    def observe(self, observations):
        if Fussy.fails:
            raise RuntimeError("no")
        super().observe(observations)


def each_process_has_another_fate(rank, world):
    """A process that is paused, full, failed or out of budget takes part, and the others go on."""
    mesh = mesh_of(world)
    batches = [tokens(seed, 5, 2 * world) for seed in range(12)]
    unlucky = world - 1
    fates = ("paused", "full", "failed", "budget", "merged")
    everything = list(itertools.product(fates, (False, True)))
    # On two processes each fate runs once; on four with the other layout, because it takes seconds.
    for fate, sequence in (everything[2 * k + (k + (world > 2)) % 2] for k in range(5)):
        metrics = [Fussy()] if fate == "failed" else [sm.SpectrumMetric()]
        arguments = {"budget": 1e-6 if rank == unlucky else 0.9} if fate == "budget" else {}
        model, probe = probed(mesh, metrics, sequence=sequence, is_local=not sequence, folds=2, **arguments)
        want = llama()(batches[-1]).detach()
        if fate == "full" and rank == unlucky:
            probe.max_samples = 12
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for number, batch in enumerate(batches):
                Fussy.fails = fate == "failed" and rank == unlucky and number == 4
                if fate == "paused" and rank == unlucky and number in (0, 4, 5):
                    with probe.paused():
                        output = model(batch)
                elif fate == "merged" and number == 3:
                    with probe.merged():
                        output = model(batch)
                else:
                    output = model(batch)
                if fate == "budget" and number % 4 == 3:
                    probe.compute("train")
            assert (whole(output) - want).abs().max() < 1e-12
            assert len(probe.compute("train")) == len(probe.layers)
        with probe.merged():
            counts = {
                name: int(next(iter(probe["train", name].values(copy_state=False))).count)
                for name in probe.layers
            }
        each = 5 * 2 * world
        whole_ones = len(batches) * each
        if fate == "budget":  # as many rows as the plan says, from layers of equal width
            widths = {name: model.get_submodule(name).out_features for name in counts}
            assert len(set(zip(widths.values(), counts.values(), strict=True))) == len(set(widths.values()))
            assert min(counts.values()) > 0
            assert max(counts.values()) <= whole_ones
        else:
            (count,) = set(counts.values())
            lost = {"paused": 3, "failed": 8, "full": 10, "merged": world}[fate]
            own = each / world
            assert abs(count - (whole_ones - lost * own)) <= (0 if fate != "full" else 3 * own)
        probe.remove()


def every_placement_of_rows(rank, world):
    """Rows of all placements along one dimension and, on four processes, along two."""
    rule = ObservationRule()
    meshes = [mesh_of(world)] + ([init_device_mesh("cpu", (2, 2))] if world == 4 else [])
    for shape, mesh in itertools.product(((5, 6, 8), (1, 7, 9), (3, 1, 1), (2, 9)), meshes):
        last = len(shape) - 1
        every = [Replicate(), Partial(), Shard(0), Shard(last), *([Shard(1)] if last > 1 else [])]
        full = torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape) ** 1.5
        expected = full.reshape(-1, shape[-1])
        for placements in itertools.product(every, repeat=mesh.ndim):
            plain = [Replicate() if isinstance(each, Partial) else each for each in placements]
            values = distribute_tensor(full, mesh, plain)
            size = 1
            for dim, each in enumerate(placements):
                size *= mesh.size(dim) if isinstance(each, Partial) else 1
            if size > 1:
                values = DTensor.from_local(
                    values.to_local() / size, mesh, placements, shape=values.shape, stride=values.stride()
                )
            part = part_of(values)
            placed = place(part, lambda each, _: rule.batch(None, each), rule)
            for number in (None, 4):
                own = bring(placed.observations(rule, None), placed, number, seed=3).rows()
                found = torch.cat(gathered(own))
                assert len(found) == (len(expected) if number is None else min(number, len(expected)))
                nearest = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist").min(1)
                assert nearest.values.max() < 1e-6, placements
                assert len(nearest.indices.unique()) == len(found), placements


def counting(graphs):
    """A backend that keeps the graphs it gets."""

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


def compiled(mesh, is_local):
    """One graph, and bit for bit the same gradients as without a probe."""
    batches = [tokens(seed, 5, 2 * mesh.size()) for seed in range(2)]
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(batch.shape, generator=generator) < 0.7 for batch in batches]
    ends = []
    for has_probe in (False, True):
        torch.compiler.reset()
        graphs = []
        model = llama()
        parallelize_module(model, mesh, plan(is_local=is_local, sequence=True))
        if has_probe:
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
        whole_model = torch.compile(model, backend=counting(graphs), fullgraph=True)
        for batch, mask in zip(batches, masks, strict=True):
            with probe.mask(mask) if has_probe else contextlib.nullcontext():
                loss_of(whole_model(batch)).backward()
        ends.append([whole(parameter.grad) for parameter in model.parameters()])
        ends[-1].append(torch.tensor(len(graphs)))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    expected = {
        name: torch.cat([each[mask] for each, mask in zip(found, masks, strict=True)])
        for name, found in outputs(batches, KINDS, llama()).items()
    }
    if is_local:  # a row-parallel embedding shows only its rows, which no mask fits
        expected["tokens"] = rows(batches, (nn.Embedding,), llama())["tokens"]
    assert_holds(probe, "train", expected)


def compiled_llamas(rank, world):
    """Sequence parallel. `compiled_layers` has the rest: probes made before, and batches of different sizes."""
    mesh = mesh_of(world)
    compiled(mesh, is_local=False)
    compiled(mesh, is_local=True)


def compiled_layers(rank, world):
    """Local and DTensor outputs, and a user's function: one graph, and the same training to the bit."""
    mesh = mesh_of(world)
    batches = [
        torch.randn(size, 8, generator=torch.Generator().manual_seed(size)).double() for size in (5, 6, 7)
    ]

    def new():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()

    expected = every_linear(new(), batches)

    def from_local(output):
        shape = torch.Size((*output.shape[:-1], 12))
        return DTensor.from_local(output, mesh, [Shard(-1)], shape=shape, stride=(12, 1))

    for is_local, is_before, select in (
        (True, False, None),
        (False, True, None),
        (True, False, {"0": from_local}),
    ):
        ends = []
        for has_probe in (False, True):
            torch.compiler.reset()
            graphs = []
            model = new()
            if has_probe and is_before:
                probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(LINEAR))
            plan_of = {"0": ColwiseParallel(use_local_output=is_local), "2": RowwiseParallel()}
            parallelize_module(model, mesh, plan_of)
            if has_probe and not is_before:
                probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(LINEAR), select=select)
            whole_model = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=is_local)
            optimizer = torch.optim.AdamW(model.parameters(), 0.0)
            for batch in batches[: 3 if is_local else 1] if select is None else batches:
                loss_of(whole_model(batch)).backward()
                optimizer.step()
            with torch.no_grad():
                ends.append([whole(each) for p in model.parameters() for each in (p, p.grad)])
            ends[-1].append(torch.tensor(len(graphs)))
        assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
        assert_holds(probe, "train", expected if is_local else every_linear(new(), batches[:1]))


def plain_outputs_beside_tensor_parallelism(rank, world):
    """Norms, a layer outside of the plan, activations of divided features, outputs of unclear placement."""
    mesh = mesh_of(world)
    batches = [tokens(seed, 5, 6) for seed in range(2)]
    for is_before in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(6, 4 * world), nn.ReLU(), nn.Linear(4 * world, 5), nn.GELU(), nn.LayerNorm(5),
            nn.Linear(5, 3),
        ).double()  # fmt: skip
        inputs = [
            torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2)
        ]
        kinds = (nn.Linear, nn.ReLU, nn.GELU, nn.LayerNorm)
        expected = rows(inputs, kinds, copy.deepcopy(model))
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(kinds)) if is_before else None
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        probe = probe or sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(kinds))
        for each in inputs:
            model(each).square().mean().backward()
        assert_holds(probe, "train", expected)
    model = llama()
    parallelize_module(model, mesh, {name: each for name, each in plan().items() if name != "output"})
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
    for batch in batches:
        model(batch)
    assert_holds(probe, "train", rows(batches))


class OfOne(nn.Module):
    """The first process runs one layer more, and an activation is registered last."""

    diagnoses = True

    def __init__(self, world):
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.Linear(6, 6 * world)
        self.down = nn.Linear(6 * world, 6)
        self.diagnosis = nn.Linear(6, 2)
        self.act = nn.GELU()
        self.double()

    def forward(self, x):
        x = self.down(self.act(self.up(x)))
        if self.diagnoses:
            self.diagnosis(x)
        return self.down(self.up(x))


def plain_layers_that_one_process_runs(rank, world):
    """No process waits for the others for long, and an activation is divided like the layer before it."""
    rendezvous.PATIENCE, before = 1.0, rendezvous.PATIENCE
    try:
        model, kinds = OfOne(world), (nn.Linear, nn.GELU)
        inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double()
        expected = rows([inputs], kinds, copy.deepcopy(model))
        assert expected["act"].shape[1] == 6 * world  # while each process has as many as other layers have
        model.diagnoses = rank == 0
        parallelize_module(model, mesh_of(world), {"up": ColwiseParallel(), "down": RowwiseParallel()})
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(kinds))
        model(inputs).sum().backward()
        assert_holds(probe, "train", expected)
    finally:
        rendezvous.PATIENCE = before


class RunsTwice(nn.Module):
    """An activation runs on whole samples, and then on this process' share of them."""

    def __init__(self, world):
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 4 * world), nn.Linear(4 * world, 6)
        self.act = nn.Hardtanh()
        self.double()

    def forward(self, x):
        return self.act(2 * self.down(self.up(self.act(self.stem(x)))))


def each_call_of_a_layer_is_placed_by_itself(rank, world):
    model, kinds = RunsTwice(world), (nn.Linear, nn.Hardtanh)
    inputs = [torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2)]
    expected = rows(inputs, kinds, copy.deepcopy(model))
    shares = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(0))}
    parallelize_module(model, mesh_of(world), shares)
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(kinds))
    for each in inputs:
        model(each).sum().backward()
    assert_holds(probe, "train", expected)


def groups_of_which_one_holds_another(rank, world):
    """Attention over two processes, experts over all: only the smaller mesh places plain outputs."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)).double()
    replicas = [torch.randn(7, 6, generator=torch.Generator().manual_seed(each)).double() for each in range(2)]
    expected = rows(replicas, (nn.Linear, nn.LayerNorm), copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"1": ColwiseParallel(), "2": RowwiseParallel()})
    weights = distribute_tensor(torch.randn(4, 6, 6), init_device_mesh("cpu", (4,)), [Shard(0)])
    model.append(nn.Identity())
    model[4].weights = nn.Parameter(weights)
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=[nn.Linear, nn.LayerNorm])
    model(replicas[mesh["dp"].get_local_rank()])
    assert_holds(probe, "train", expected)


class Untold(nn.Module):
    """Gives no sign of how its outputs are placed."""

    def forward(self, x):
        return x[..., :1] * torch.arange(7) + dist.get_rank()


def unknown_placements_are_left_out_with_words(rank, world):
    mesh = mesh_of(world)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4 * world), nn.Linear(4 * world, 5), Untold())
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=["0", "2"])
    with pytest.warns(UserWarning, match=r"'2' is not observed.*differ between the processes.*select="):
        model(torch.randn(9, 6))
    model(torch.randn(9, 6))  # warned once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(probe.compute("train")) == ["spectrum/train/0"]
    # Zeros are alike everywhere and say nothing about the next forward.
    model = nn.Sequential(nn.Linear(6, 4 * world), nn.Linear(4 * world, 5), nn.Linear(5, 4)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=["2"])
    model(torch.ones(2 * world, 6).double())
    nn.init.ones_(model[2].weight)
    model[2](torch.randn(4, 5).double() + rank)  # now each process has its own samples
    model[2](torch.randn(4, 5).double() + rank)
    with probe.merged():
        assert int(probe["train", "2"]["spectrum"].count) == 2 * world + 2 * 4 * world


def select_says_what_nothing_tells(rank, world):
    """`select` places the output of a Megatron-style layer, of which each process holds some features."""
    mesh = mesh_of(world)
    width = 3 * world - 1
    chunk = -(-width // world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Identity()).double()
    inputs = [
        torch.randn(size, 6, generator=torch.Generator().manual_seed(size)).double() for size in (5, 1, 8)
    ]
    expected = rows(inputs, LINEAR, copy.deepcopy(model))
    mine = slice(rank * chunk, min((rank + 1) * chunk, width))
    own = nn.Sequential(nn.Linear(6, mine.stop - mine.start)).double()
    own[0].load_state_dict({name: value[mine] for name, value in model[0].state_dict().items()})
    fails = []

    def place_it(output):
        if fails and fails.pop():
            raise ValueError("not now")
        shape = (*output.shape[:-1], width)
        return DTensor.from_local(output, mesh, [Shard(-1)], shape=torch.Size(shape), stride=(width, 1))

    probe = sm.LayerProbe(own, sm.SpectrumMetric(), select={"0": place_it})
    for each in inputs:
        own(each)
    probe._identity._is_compared = True  # the weights differ on purpose
    assert_holds(probe, "train", expected)
    # Uneven parts without their shape: all processes warn, because the parts would not fit.
    forgetful = sm.LayerProbe(
        own, sm.SpectrumMetric(), select={"0": lambda output: DTensor.from_local(output, mesh, [Shard(-1)])}
    )
    with pytest.warns(UserWarning, match="give DTensor.from_local the shape and stride"):
        own(inputs[0])
    forgetful.remove()
    # A function that fails on one process leaves out its rows, and the others do not wait.
    if rank == world - 1:
        fails += [True]
        with pytest.warns(UserWarning, match="ValueError: not now"):
            own(inputs[0])
    else:
        own(inputs[0])
    own(inputs[2])
    probe.remove()
    inputs_of = sm.LayerProbe(
        own, sm.SpectrumMetric(), observe="inputs",
        select={"0": lambda x: DTensor.from_local(x, mesh, [Replicate()])},
    )  # fmt: skip
    inputs_of._identity._is_compared = True
    for each in inputs:
        own(each)
    assert_holds(inputs_of, "train", {"0": torch.cat(inputs)})


def inputs_equal_one_process(rank, world):
    """Inputs of layers: divided features of row-parallel layers, replicated ones of column-parallel layers."""
    mesh = mesh_of(world)
    batches = [tokens(seed, 5, 2 * world) for seed in range(2)]
    expected = {}
    for name, module in (model := llama()).named_modules():
        if isinstance(module, nn.Linear):

            def keep(module, args, name=name):
                expected.setdefault(name, []).append(args[0].detach().flatten(0, -2))

            module.register_forward_pre_hook(keep)
    for batch in batches:
        model(batch)
    expected = {name: torch.cat(each) for name, each in expected.items()}
    for is_local, sequence, is_before in ((True, False, False), (True, False, True), (False, True, False)):
        model, probe = probed(mesh, is_local=is_local, sequence=sequence, is_before=is_before, observe="inputs")
        for batch in batches:
            loss_of(model(batch)).backward()
        assert_holds(probe, "train", expected)


def context_parallel_rows_add_up(rank, world):
    """Each process has its own positions of every sample: nothing is warned about."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    full = torch.randn(3, 2 * world + 1, 6, generator=torch.Generator().manual_seed(2)).double()
    probe = sm.LayerProbe(model, sm.SpectrumMetric())
    own = full.tensor_split(world, 1)[rank]
    model(own)
    probe.pause()
    assert_holds(probe, "train", rows([full], LINEAR, model))


def tensor_parallel_and_fsdp(rank, world):
    """Two by two: sums cover all replicas, and each layer is whole; probes made before, between and after."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh["dp"].get_local_rank()
    batches = [[tokens(10 * each + seed, 4 + each, 6) for seed in range(2)] for each in range(2)]
    for when, sequence in itertools.product(("before", "between", "after"), (False, True)):
        model, layers = llama(blocks=2), list(KINDS)
        new = lambda model=model, layers=layers: sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers)  # noqa: E731
        probe = new() if when == "before" else None
        parallelize_module(model, mesh["tp"], plan(is_local=True, sequence=sequence, blocks=2))
        probe = new() if when == "between" else probe
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        probe = new() if when == "after" else probe
        for batch in batches[replica]:
            loss_of(model(batch)).backward()
        assert_holds(probe, "train", rows(batches[0] + batches[1], KINDS, llama(blocks=2)))
        probe.remove()


def tensor_parallel_and_replicas_of_fsdp(rank, world):
    """FSDP2 with a mesh that only replicates; layers outside of its blocks run before any block is whole."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    batches = [[tokens(10 * each + seed, 4 + each, 6) for seed in range(2)] for each in range(2)]
    for is_before in (False, True):
        model = llama()
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS)) if is_before else None
        blocks = {name: each for name, each in plan(is_local=True).items() if name.startswith("layers.")}
        parallelize_module(model, mesh["tp"], blocks)
        for block in (*model.layers, model):
            replicate(block, mesh=mesh["dp"])
        probe = probe or sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
        for batch in batches[mesh["dp"].get_local_rank()]:
            loss_of(model(batch)).backward()
        assert_holds(probe, "train", rows(batches[0] + batches[1]))
        probe.remove()


def a_mesh_of_one_process_is_as_none(rank, world):
    """A tensor-parallel degree of one: each process has DTensors and batches of its own."""
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))["tp"]
    batches = [[tokens(10 * each + seed, 4 + each, 6) for seed in range(2)] for each in range(world)]
    expected = rows([batch for of_rank in batches for batch in of_rank])
    with sm.LayerSimilarity(model := llama(), layers=list(KINDS)) as similarity:
        for batch in batches[rank]:
            model(batch)
    similar = similarity.compute()
    for is_local, sequence in itertools.product((True, False), repeat=2):
        model = llama()
        parallelize_module(model, mesh, plan(is_local=is_local, sequence=sequence))
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
        gradients = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(LINEAR), observe="gradients")
        with sm.LayerSimilarity(model, layers=list(KINDS)) as similarity:
            for batch in batches[rank]:
                loss_of(model(batch)).backward()
        assert_holds(probe, "train", expected)
        assert len(gradients.compute("train")) == len(gradients.layers)
        found = similarity.compute()
        assert found.count == similar.count
        assert_same(found.matrix, similar.matrix, 1e-9)
    model = llama()
    parallelize_module(model, mesh, plan(is_local=False, sequence=True))
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
    run = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        for batch in batches[rank]:
            run(batch)
    assert_holds(probe, "train", rows([each for some in batches for each in some], KINDS, llama()))


def layers_that_processes_share_are_compared_whole(rank, world):
    """Each forward counts once, also when compared with another model, which is whole everywhere."""
    batches = [tokens(seed, 5 + seed, 2 * world) for seed in range(3)]
    expected = sm.LayerSimilarity(model := llama(), layers=list(KINDS))
    for batch in batches:
        model(batch)
    matrix, layers = expected.compute().matrix, expected.layers
    mesh = mesh_of(world)
    for is_local, sequence in itertools.product((True, False), repeat=2):
        is_before = is_local == sequence
        model = llama()
        parallelize = lambda model=model, local=is_local, sequence=sequence: parallelize_module(  # noqa: E731
            model, mesh, plan(is_local=local, sequence=sequence)
        )
        if not is_before:
            parallelize()
        with sm.LayerSimilarity(model, layers=list(KINDS)) as similarity:
            if is_before:
                parallelize()
            for batch in batches[:-1]:
                loss_of(model(batch)).backward()
            # A paused process takes part in the exchange all the same; here it is the one that counts.
            with similarity.paused() if rank == 0 else contextlib.nullcontext():
                model(tokens(9, 5, 2 * world))
            model(batches[-1])
        found = similarity.compute()
        assert found.layers == layers
        assert found.count == sum(map(len, batches))
        assert_same(found.matrix, matrix, 1e-9)
    whole_model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)).double()
    with sm.LayerSimilarity(left := llama(), whole_model, layers=list(LINEAR)) as similarity:
        for batch in batches:
            left(batch), whole_model(batch)
    expected = similarity.compute().matrix
    parallelize_module(left := llama(), mesh, plan(is_local=True, sequence=False))
    with sm.LayerSimilarity(left, whole_model, layers=list(LINEAR)) as similarity:
        for batch in batches:
            left(batch), whole_model(batch)
    found = similarity.compute()
    assert found.count == sum(map(len, batches))
    assert_same(found.matrix, expected, 1e-9)
    if world == 4:  # replicas with batches of their own
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model := llama(), mesh["tp"], plan(is_local=True, sequence=True))
        # Over all processes, or over one of those that share a forward.
        for group in (None, mesh["dp"].get_group()):
            with sm.LayerSimilarity(model, layers=list(KINDS), process_group=group) as similarity:
                for batch in batches[mesh["dp"].get_local_rank() :: 2]:
                    model(batch)
            found = similarity.compute()
            assert found.count == sum(map(len, batches))
            assert_same(found.matrix, matrix, 1e-9)


def fsdp_alone_adds_up(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world)
    batches = [[tokens(10 * each + seed, 4 + each, 6) for seed in range(2)] for each in range(world)]
    for is_before in (True, False):
        model = llama()
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS)) if is_before else None
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        probe = probe or sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(KINDS))
        for batch in batches[rank]:
            loss_of(model(batch)).backward()
        assert not probe._router.meshes.active
        assert_holds(probe, "train", rows([batch for some in batches for batch in some]))


def data_parallel_over_tensor_parallel(rank, world):
    """DDP gets this process' parts of weights as plain parameters; in a forward they are DTensors."""
    from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh["dp"].get_local_rank()
    batches = [[tokens(10 * each + seed, 4, 6) for seed in range(2)] for each in range(world // 2)]
    everything = [batch for each in batches for batch in each]
    for made, observe in itertools.product(("before", "between", "after"), ("outputs", "gradients")):
        model = llama()
        probes, kinds = [], KINDS if observe == "outputs" else LINEAR

        def make(when, made=made, observe=observe, model=model, probes=probes, kinds=kinds):
            if when == made:
                metric = sm.CovarianceMetric()
                probes.append(sm.LayerProbe(model, metric, layers=list(kinds), observe=observe))

        make("before")
        parallelize_module(model, mesh["tp"], plan(is_local=True))
        make("between")
        _pre_dp_module_transform(model)
        parallel = nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())
        make("after")
        for batch in batches[replica]:
            loss_of(parallel(batch)).backward()
        expected = rows(everything) if observe == "outputs" else gradients(everything)
        covariances = probes[0].covariances("train")
        with probes[0].merged():
            counts = {name: int(probes[0]["train", name]["covariance"].count) for name in expected}
        assert counts == {name: len(each) for name, each in expected.items()}, (made, observe)
        for name, each in expected.items():
            assert_same(covariances[name], torch.cov(each.T, correction=0), 1e-12)
        probes[0].remove()


def gradients(batches):
    """The gradients of each linear layer's outputs in one process, by name."""
    model, kept = llama(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, output, name=name: kept.setdefault(name, []).append(output)
            )
    loss = sum(loss_of(model(batch)) for batch in batches)
    found = torch.autograd.grad(loss, [each for calls in kept.values() for each in calls])
    number = len(batches)
    return {
        name: torch.cat([each.flatten(0, -2) for each in found[number * k : number * (k + 1)]])
        for k, name in enumerate(kept)
    }


# Scenarios that run differently where processes form a grid, or where each has a smaller part.
EVERYWHERE = [
    every_placement_of_rows,
    tensor_parallel_equals_one_process,
    sequence_parallel_equals_one_process,
    rows_are_drawn_before_they_travel,
    each_process_has_another_fate,
    layers_that_processes_share_are_compared_whole,
    data_parallel_over_tensor_parallel,
    training.training_with_sharded_weights_is_the_same_to_the_bit,
    experts.experts_that_are_spread_equal_one_process,
    experts.tokens_that_travel_to_experts_of_other_processes_are_seen,
]
ON_TWO = [
    training_is_the_same_to_the_bit,
    masks_and_labels,
    observations_of_whole_sequences,
    folds_histories_and_marginals,
    a_history_leaves_what_others_draw,
    plain_outputs_beside_tensor_parallelism,
    plain_layers_that_one_process_runs,
    each_call_of_a_layer_is_placed_by_itself,
    unknown_placements_are_left_out_with_words,
    select_says_what_nothing_tells,
    inputs_equal_one_process,
    context_parallel_rows_add_up,
    a_mesh_of_one_process_is_as_none,
    fsdp_alone_adds_up,
    compiled_layers,
    *settings.SCENARIOS,
    *training.ON_TWO,
    *experts.ON_TWO,
]


def transformers_llama(folder, **arguments):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **arguments)


def saved_llama(rank, world):
    """Folder of a Llama with random weights, see :func:`saved`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return saved(LlamaForCausalLM, config, rank, world)


@contextlib.contextmanager
def saved(kind, config, rank, world):
    """Folder of a model with random weights; sets the environment variables of a launcher."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    told = [tempfile.mkdtemp() if rank == 0 else None]
    if rank == 0:
        torch.manual_seed(0)
        kind(config).save_pretrained(told[0])
    dist.broadcast_object_list(told)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in launched.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield told[0]
    finally:
        os.environ.clear()
        os.environ.update(before)


def tp_plan_of_transformers(rank, world):
    """No output is a DTensor: planned and unplanned layers, embeddings, norms, the head."""
    with saved_llama(rank, world) as folder:
        model = transformers_llama(folder)
        layers = [nn.Linear, nn.Embedding, type(model.model.norm)]
        batches = [tokens(seed, 3, 5) for seed in range(2)]
        expected = rows(batches, tuple(layers), model)
        for sequences in ("timesteps", "mean"):
            model = transformers_llama(folder, tp_plan="auto")
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers, sequences=sequences)
            for batch in batches:
                model(batch).logits.square().mean().backward()
            if sequences == "timesteps":
                assert_holds(probe, "eval", expected)
            else:
                assert len(probe.compute("eval")) == len(expected)


def experts_of_transformers(rank, world):
    """Tensor and expert parallelism of transformers: each expert is cut, or each process has some experts."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    batches = [tokens(seed, 3, 5) for seed in range(2)]
    with saved(MixtralForCausalLM, config, rank, world) as folder:

        def new(**arguments):
            return MixtralForCausalLM.from_pretrained(
                folder, dtype=torch.float64, experts_implementation="eager", **arguments
            )

        expected = {}

        def keep(module, args, output):
            for number, weights in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                chosen = args[0][(args[1] == number).any(1)]
                expected.setdefault(f"model.layers.0.mlp.experts.{number}", []).append(
                    experts.put_out(chosen, *weights)
                )

        plain = new()
        plain.model.layers[0].mlp.experts.register_forward_hook(keep)
        with torch.no_grad():
            for batch in batches:
                plain(batch)
        expected = {name: torch.cat(each) for name, each in expected.items()}
        for distributed in (
            DistributedConfig(tp_size=world, tp_plan="auto"),
            DistributedConfig(tp_size=world, ep_size=world),
            DistributedConfig(tp_size=world, ep_size=world, ep_implementation="all_to_all"),
        ):
            model = new(distributed_config=distributed)
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="*.experts")
            for batch in batches:
                model(batch)
            assert_holds(probe, "eval", expected)
        # Each process has its own tokens, which are exchanged inside the layer.
        model = new(distributed_config=DistributedConfig(fsdp_size=world, ep_size=world))
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="*.experts")
        model(batches[rank])
        assert_holds(probe, "eval", expected)


def accelerate_with_fsdp2(rank, world):
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with saved_llama(rank, world) as folder:
        batches = [[tokens(10 * each + seed, 3, 5) for seed in range(2)] for each in range(world)]
        layers = [nn.Linear, nn.Embedding]
        expected = rows(
            [batch for some in batches for batch in some], tuple(layers), transformers_llama(folder)
        )
        for is_before in (True, False):
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=[LlamaDecoderLayer.__name__],
            )
            accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
            model = transformers_llama(folder).train()
            probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers) if is_before else None
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            model, optimizer = accelerator.prepare(model, optimizer)
            probe = probe or sm.LayerProbe(model, sm.SpectrumMetric(), layers=layers)
            for batch in batches[rank]:
                accelerator.backward(model(batch).logits.square().mean())
                optimizer.step()
            assert_holds(probe, "train", expected, 1e-6)
            probe.remove()


def parallelized_as_by_torchtitan(rank, world):
    """Tensor parallel, checkpoints, compiled blocks, FSDP2; the probe is made after all of these."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh["dp"].get_local_rank()
    batches = [[tokens(10 * each + seed, 4, 6) for seed in range(2)] for each in range(2)]
    model = llama()
    parallelize_module(model, mesh["tp"], plan(is_local=True, sequence=True))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[0].compile(backend="aot_eager")
    for block in model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers=list(LINEAR))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        for batch in batches[replica]:
            loss_of(model(batch)).backward()
    assert_holds(probe, "train", rows(batches[0] + batches[1], LINEAR, llama()))


LONG = [compiled_llamas, tp_plan_of_transformers, experts_of_transformers, accelerate_with_fsdp2]

ON_FOUR = [
    groups_of_which_one_holds_another,
    tensor_parallel_and_fsdp,
    tensor_parallel_and_replicas_of_fsdp,
    parallelized_as_by_torchtitan,
]

SCENARIOS = {"2": EVERYWHERE + ON_TWO, "2-long": LONG, "4": EVERYWHERE + ON_FOUR}

ALL = list(dict.fromkeys(scenario for some in SCENARIOS.values() for scenario in some))
