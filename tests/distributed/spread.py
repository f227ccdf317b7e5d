"""Models spread over processes: each process has its own layers, order and data."""

import contextlib
import copy
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectralmetrics as sm
from spectralmetrics.probing import exchange
from spectralmetrics.sums import about_origin
from tests.distributed.scenarios import counted_collectives
from tests.metrics.properties import assert_same
from tests.oracles import relative_error, two_pass_covariance
from tests.sums.toy import CrestFactorMetric


def outputs(model, batches, kinds):
    """Outputs of the layers of these kinds for each batch, in one process without a probe."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, kinds):

            def keep(module, args, output, name=name):
                found.setdefault(name, []).append(output.detach().double())

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


def every_linear(model, batches):
    """Output rows of each linear layer of a model, by name."""
    found = outputs(model, batches, nn.Linear)
    return {name: torch.cat([each.flatten(0, -2) for each in every]) for name, every in found.items()}


def assert_holds(probe, stage, rows, tolerance=1e-12):
    """All processes have the covariances and counts of these rows, by name and in the same order."""
    covariances = probe.covariances(stage)
    with contextlib.suppress(UserWarning), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        values = probe.compute(stage)
    assert set(covariances) == set(rows)
    for name, expected in rows.items():
        assert relative_error(covariances[name], two_pass_covariance(expected)) < tolerance
        spectrum = torch.linalg.eigvalsh(torch.cov(expected.T, correction=0)).flip(0)
        assert_same(values[f"spectrum/{stage}/{name}"], spectrum, 1e-9)
    with probe.merged():
        assert {name: int(probe[stage, name]["spectrum"].count) for name in rows} == {
            name: len(expected) for name, expected in rows.items()
        }
    keys = [None] * dist.get_world_size()
    dist.all_gather_object(keys, (list(values), list(covariances)))
    assert all(each == keys[0] for each in keys)
    return values


class Experts(nn.Module):
    """Experts that run in any order, each on the tokens given for it."""

    def __init__(self, names, width=5):
        super().__init__()
        torch.manual_seed(7)
        self.experts = nn.ModuleDict({name: nn.Linear(6, width).double() for name in names})

    def forward(self, tokens):
        for name, rows in tokens.items():
            if len(rows):
                self.experts[name](rows)


def experts_run_in_any_order(rank, world):
    """Uneven tokens, another order on each process, an expert without tokens, a process without data."""
    names = [f"e{k}" for k in range(6)]
    generator = torch.Generator().manual_seed(0)
    tokens = [
        {
            name: torch.randn(3 * ((k + 3 * each) % 4), 6, generator=generator).double() * 10**k
            for k, name in enumerate(names)
        }
        for each in range(world)
    ]
    for each in range(world):
        order = names[each:] + names[:each]
        tokens[each] = {name: tokens[each][name] for name in (order if each % 2 else reversed(order))}
        del tokens[each]["e4"]  # no tokens anywhere
    if world > 2:
        tokens[1] = {}
    threshold, exchange._WORTH_SHARING = exchange._WORTH_SHARING, 0.0  # each reads some
    try:
        model = Experts(names).eval()
        probe = sm.LayerProbe(model, [sm.SpectrumMetric(), sm.CovarianceTraceMetric()])
        with torch.no_grad():
            model(tokens[rank])
        plain = copy.deepcopy(model)
        rows = {}
        for name in names:
            parts = torch.cat([each.get(name, torch.zeros(0, 6).double()) for each in tokens])
            if len(parts):
                rows[f"experts.{name}"] = plain.experts[name](parts).detach()
        values = assert_holds(probe, "eval", rows)
        for name in rows:
            trace, spectrum = (values[f"{each}/eval/{name}"] for each in ("covariance_trace", "spectrum"))
            assert_same(spectrum.sum(), trace, 1e-9)
    finally:
        exchange._WORTH_SHARING = threshold


def experts_of_each_process_reach_all(rank, world):
    """Expert parallel: each process probes its own experts, under their global names."""
    own = {f"{2 * rank + k}": nn.Linear(6, 3 + rank).double() for k in range(2)}
    model = nn.ModuleDict({"experts": nn.ModuleDict(own)}).eval()
    probe = sm.LayerProbe(model, [sm.SpectrumMetric()])
    mine = {}
    for number, (name, expert) in enumerate(own.items()):
        with torch.no_grad():
            output = expert(torch.randn(20 + 5 * number + rank, 6).double())
        mine[f"experts.{name}"] = output
    gathered = [None] * world
    dist.all_gather_object(gathered, mine)
    rows = {name: each for some in gathered for name, each in some.items()}
    assert_holds(probe, "eval", rows)
    assert list(probe.compute("eval")) == [f"spectrum/eval/experts.{k}" for k in range(2 * world)]
    assert probe.layers == list(mine) or world == 1
    summary = probe.summary()
    assert [row.layer for row in summary.rows] == list(rows)
    assert [row.width for row in summary.rows] == [3 + k // 2 for k in range(2 * world)]
    assert {row.kind for row in summary.rows} == {"Linear"}
    # One layer at a time, to all.
    seen = {}
    for layer, sums in probe.iter_merged("eval"):
        seen[layer] = int(sums[0].num_observations)
    assert seen == {name: len(each) for name, each in rows.items()}
    assert int(probe["eval", next(iter(mine))]["spectrum"].count) == 20 + rank  # this process' own again


def findings_are_the_same_on_all(rank, world):
    """All processes get one process' findings, which depend on whether its weights are new."""
    own = {f"new{rank}": nn.Linear(8, 8), f"trained{rank}": nn.Linear(8, 8)}
    with torch.no_grad():
        own[f"trained{rank}"].weight.mul_(1e-3)
    model = nn.ModuleDict(own).eval()
    with sm.LayerProbe(model) as probe, torch.no_grad():
        for layer in model.values():
            layer(1 + 1e-3 * torch.randn(100, 8))
    collapsed = {each.layer: each.severity for each in probe.findings("eval") if each.kind == "collapsed"}
    expected = {f"new{each}": "note" for each in range(world)} | {
        f"trained{each}": "problem" for each in range(world)
    }
    assert collapsed == expected
    assert [each.severity for each in probe.summary().findings if each.kind == "collapsed"][:world] == [
        "problem"
    ] * world


def a_loop_over_merged_sums_ends_for_all(rank, world):
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    probe = sm.LayerProbe(model, sm.SpectrumMetric())
    model(torch.randn(9, 4))
    for _ in probe.iter_merged("train"):  # all leave at the same layer
        break
    assert [layer for layer, _ in probe.iter_merged("train")] == ["0", "1", "2"]
    if world > 1:
        iterator = probe.iter_merged("train")
        next(iterator)
        if rank == world - 1:
            iterator.close()
        else:
            with pytest.raises(RuntimeError, match=f"process {world - 1} raised.*ended early"):
                list(iterator)
    assert len(probe.compute("train")) == 3
    with pytest.raises(ValueError, match="expected a stage"):
        next(probe.iter_merged("test"))


def sketches_beside_idle_processes(rank, world):
    """A layer is sketched on the process that ran it, before idle processes get its width."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 90), nn.Linear(90, 4)).double().eval()
    probe = sm.LayerProbe(
        model, [sm.StableRankMetric(), sm.CovarianceTraceMetric()], max_features=50, sketch_size=12
    )
    rows = [torch.randn(30 + k, 8, generator=torch.Generator().manual_seed(k)).double() for k in range(world)]
    busy = [k for k in range(world) if k != 0 or world == 1]
    with torch.no_grad():
        if rank in busy:
            model(rows[rank])
        plain = nn.functional.linear(torch.cat([rows[k] for k in busy]), model[0].weight, model[0].bias)
    values = probe.compute("eval")
    assert list(values) == [f"{m}/eval/{k}" for k in "01" for m in ("stable_rank", "covariance_trace")]
    assert_same(values["covariance_trace/eval/0"], plain.var(0, correction=0).sum(), 1e-12)
    expected = sm.functional.stable_rank(sm.functional.eigenvalues(torch.cov(plain.T, correction=0)))
    assert_same(values["stable_rank/eval/0"], expected, 1e-6)
    with probe.merged():
        assert int(probe["eval", "0"]["covariance_trace"].sketch_count) == len(plain)
    if rank not in busy:  # and the layer runs there later
        with torch.no_grad():
            model(rows[rank])
    assert probe.compute("eval").keys() == values.keys()


def what_does_not_fit_is_an_error_everywhere(rank, world):
    if world == 1:
        return
    other = world - 1
    model = nn.ModuleDict({"a": nn.Linear(4, 3 + (rank == other)), "b": nn.Linear(4, 4)})
    nn.init.ones_(model["b"].weight)
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="a")
    probe._identity._is_compared = True
    model["a"](torch.randn(9, 4))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"layer 'a' in train: 3 on process 0.*4 on process {other}"):
            probe.compute()
    assert int(probe["train", "a"]["spectrum"].count) == 9
    # Other settings; another stage.
    probe = sm.LayerProbe(model, sm.SpectrumMetric(folds=2 + (rank == other)), layers="b")
    model["b"](torch.randn(9, 4))
    with pytest.raises(ValueError, match=f"same metrics.*process 0.*process {other}"):
        probe.compute()
    probe = sm.LayerProbe(model, sm.SpectrumMetric(), layers="b")
    model["b"](torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"same stages.*'train'.*process 0.*'eval'"):
        probe.compute("eval" if rank == other else "train")
    assert list(probe.compute("train")) == ["spectrum/train/b"]


def large_layers_travel_by_themselves(rank, world):
    """With the smallest pieces and batches and every kind of sum, values equal the ones of a single batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 30), nn.Linear(30, 5)).double().eval()
    metrics = [
        sm.SpectrumMetric(),
        sm.SaturationMetric(),
        sm.EigenspaceEmbeddingMetric(max_samples=8),
        sm.LinearProbeMetric(3),
        CrestFactorMetric(),
    ]
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(rank)).double()

    def read(limits):
        kept = {name: getattr(room, name) for room, name in limits}
        for (room, name), value in limits.items():
            setattr(room, name, value)
        probe = sm.LayerProbe(model, metrics, folds=3, max_features=20, sketch_size=4)
        try:
            for part in rows.split(10):
                with torch.no_grad(), probe.labels(torch.arange(10) % 3):
                    model(part)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [
                    probe.compute("eval"),
                    probe.intervals("eval"),
                    probe.summary("eval"),
                    probe.compute("eval"),
                ]
            found.append({layer: sums[0].variances() for layer, sums in probe.iter_merged("eval")})
            assert probe.layers == ["0", "1", "2"]
            return found
        finally:
            probe.remove()
            for room, name in limits:
                setattr(room, name, kept[name])

    small = {
        (exchange, "_BATCH_BYTES"): 1,
        (exchange, "_KEPT_BYTES"): 0,
        (exchange, "_WORTH_SHARING"): 0.0,
        (about_origin, "MOST_BYTES"): 100,
        (about_origin, "_ROWS_BYTES"): 100,
    }
    (values, intervals, summary, again, variances), expected = read(small), read({})
    assert list(values) == list(expected[0]) == list(again)
    for key, value in values.items():
        assert_same(value, expected[0][key], 1e-9)
        assert_same(again[key], value, 1e-12)
    assert list(intervals) == list(expected[1])
    for key, interval in intervals.items():
        for end, its in zip(interval, expected[1][key], strict=True):
            assert_same(end, its, 1e-9)
    assert str(summary) == str(expected[2])
    assert list(variances) == list(expected[4]) == ["0", "1", "2"]
    for layer, each in variances.items():
        assert_same(each, expected[4][layer], 1e-12)


class Fussy(sm.SpectralMetric):
    """Raises an interrupt on some process."""

    ranks = ()

    def statistic(self, spectrum):
        if dist.get_rank() in Fussy.ranks:
            raise KeyboardInterrupt("in the metric")
        return spectrum.eigenvalues.sum()


def what_one_process_raises_all_raise(rank, world):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 6) if k == 0 else nn.Linear(6, 6) for k in range(world + 1)])
    probe = sm.LayerProbe(model, [sm.SpectrumMetric(), Fussy()])
    threshold, exchange._WORTH_SHARING = exchange._WORTH_SHARING, 0.0
    try:
        model(torch.randn(5 + rank, 4))

        def stop(done, total):
            raise KeyboardInterrupt("enough")

        def raises(culprit, words):
            if rank == culprit:
                return pytest.raises(KeyboardInterrupt, match=words)
            return pytest.raises(RuntimeError, match=f"process {culprit} raised KeyboardInterrupt: {words}")

        for culprit in range(world):
            for question in (probe.compute, probe.compute):
                with raises(culprit, "enough"):
                    question(progress=stop if rank == culprit else None)
                assert int(probe["train", "0"]["spectrum"].count) == 5 + rank
        for culprit in range(world):
            Fussy.ranks = (culprit,)
            model(torch.randn(1, 4))
            with raises(culprit, "in the metric"):
                probe.compute("train")
            Fussy.ranks = ()
        assert int(probe["train", "0"]["spectrum"].count) == 5 + rank + world
        told = []
        values = probe.compute("train", progress=lambda done, total: told.append((done, total)))
        assert len(values) == 2 * (world + 1)
        assert told == sorted(told)
        assert told[-1] == (world + 1, world + 1) or world == 1
    finally:
        exchange._WORTH_SHARING, Fussy.ranks = threshold, ()


def a_metrics_own_group_is_heeded(rank, world):
    if world < 3:
        return
    members = [0, world - 1]
    group = dist.new_group(members)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    parts = [torch.randn(9 + k, 4, generator=torch.Generator().manual_seed(k)).double() for k in range(world)]
    outputs = [model(part).detach() for part in parts]
    rows = torch.cat([outputs[m] for m in members]) if rank in members else outputs[rank]
    everything = torch.cat(outputs)
    probe = sm.LayerProbe(model, sm.CovarianceTraceMetric(process_group=group))
    model(parts[rank])
    assert_same(probe.compute()["covariance_trace/train/0"], rows.var(0, correction=0).sum(), 1e-12)
    assert_same(probe.covariances("train")["0"], torch.cov(rows.T, correction=0), 1e-12)
    probe.remove()
    mixed = sm.LayerProbe(
        model, {"some": sm.CovarianceTraceMetric(process_group=group), "all": sm.CovarianceTraceMetric()}
    )
    model(parts[rank])
    for _ in range(2):
        values = mixed.compute()
        assert_same(values["some/train/0"], rows.var(0, correction=0).sum(), 1e-12)
        assert_same(values["all/train/0"], everything.var(0, correction=0).sum(), 1e-12)
    mixed.remove()
    twin = copy.deepcopy(sm.CovarianceTraceMetric(process_group=group))
    assert twin.process_group is group


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stage(nn.Module):
    """Some blocks of a stack, under their names in the whole model."""

    def __init__(self, blocks, numbers):
        super().__init__()
        self.blocks = nn.ModuleDict({str(k): blocks[k] for k in numbers})

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


def pipelines_equal_one_process(rank, world):
    """torch's own schedules over equal and unequal stages; forwards that only infer shapes are not counted."""
    if world == 1:
        return
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    batches = [torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(k)).double() for k in range(2)]
    for kind, sizes in ((ScheduleGPipe, [1] * world), (Schedule1F1B, [1 + k % 2 for k in range(world)])):
        torch.manual_seed(3)
        blocks = [Block(6).double() for _ in range(sum(sizes))]
        whole = Stage(copy.deepcopy(blocks), range(sum(sizes)))
        start = sum(sizes[:rank])
        mine = Stage(blocks, range(start, start + sizes[rank]))
        probe = sm.LayerProbe(mine, [sm.SpectrumMetric(), sm.SaturationMetric()], folds=2)
        stage = PipelineStage(mine, rank, world, torch.device("cpu"))
        schedule = kind(stage, n_microbatches=4, loss_fn=lambda output, target: output.square().mean())
        for batch in batches:
            if rank == 0:
                schedule.step(batch)
            elif rank == world - 1:
                schedule.step(target=batch)
            else:
                schedule.step()
        rows = every_linear(whole, batches)
        values = assert_holds(probe, "train", rows)
        assert list(values) == [f"{m}/train/{name}" for name in rows for m in ("spectrum", "saturation")]
        assert set(probe.intervals("train")) == set(values)
        probe.remove()


def what_is_not_merged_is_recorded_of_all(rank, world):
    """Metrics that each process keeps for itself: its own values, and values of the others' layers."""
    model = nn.ModuleDict({name: nn.Linear(4, 3).double() for name in ("shared", f"own{rank}")})
    nn.init.ones_(model["shared"].weight)
    probe = sm.LayerProbe(model, sm.CovarianceTraceMetric(sync_on_compute=False))
    rows = {name: model[name](torch.randn(9, 4).double()).detach() for name in model}
    expected = {name: each.var(0, correction=0).sum() for name, each in rows.items()}
    gathered = [None] * world
    dist.all_gather_object(gathered, expected)
    told = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(told)
    with counted_collectives() as seen:
        assert set(probe.compute()) == {f"covariance_trace/train/{name}" for name in model}
    assert not seen
    with sm.Recorder(told[0], probe, ["csv", "arrays"]) as recorder:
        values = recorder.record(reset=False)
    for each, others in enumerate(gathered):
        assert_same(values[f"covariance_trace/train/own{each}"], others[f"own{each}"], 1e-12)
    assert_same(values["covariance_trace/train/shared"], expected["shared"], 1e-12)
    if rank == 0:
        kept = {row["layer"]: row["value"] for row in sm.read_records(told[0])}
        assert set(kept) == {"mean", "shared", *(f"own{k}" for k in range(world))}
        assert kept["shared"] == pytest.approx(float(expected["shared"]))
    dist.barrier()
    assert len(probe["train", f"own{rank}"].values()) == 1
    assert int(probe["train", "shared"]["covariance_trace"].count) == 9


def stages_that_count_from_zero_are_told(rank, world):
    if world == 1:
        return
    torch.manual_seed(rank)  # each process has layers of its own, and calls them "0"
    stage = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    probe = sm.LayerProbe(stage, sm.SpectrumMetric())
    stage(torch.randn(9, 4))
    with pytest.warns(UserWarning, match=r"the name '0' means different layers.*on process 0.*ModuleDict"):
        probe.compute()
    probe.compute()  # the warning comes once
    probe.remove()
    # The solution that the warning names.
    probe = sm.LayerProbe(nn.ModuleDict({f"stage{rank}": stage}), sm.SpectrumMetric())
    stage(torch.randn(9, 4))
    assert [key.split("/")[-1] for key in probe.compute()] == [
        f"stage{k}.{j}" for k in range(world) for j in "01"
    ]
    probe.remove()
    # Replicas that have drifted apart a little still count as the same layers.
    torch.manual_seed(0)
    local = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        local[0].weight.add_(0.01 * rank)
    probe = sm.LayerProbe(local, sm.SpectrumMetric())
    local(torch.randn(9, 4))
    probe.compute()


def wrappers_do_not_rename(rank, world):
    """FSDP's first version and checkpoint wrappers: names and numbers are the model's own."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    batches = [torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(k)).double() for k in range(world)]

    def new():
        torch.manual_seed(3)
        return Stage([Block(6).double(), Block(6).double()], range(2))

    rows = every_linear(new(), batches)
    for use_orig_params in (False, True):
        for is_before in (False, True):
            model = new()
            probe = sm.LayerProbe(model, sm.SpectrumMetric()) if is_before else None
            for name in list(model.blocks):
                model.blocks[name] = checkpoint_wrapper(model.blocks[name])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = FullyShardedDataParallel(
                    model,
                    device_id=torch.device("cpu"),
                    auto_wrap_policy=ModuleWrapPolicy({Block}),
                    use_orig_params=use_orig_params,
                )
            probe = probe or sm.LayerProbe(wrapped, sm.SpectrumMetric())
            assert set(probe.layers) == set(rows)
            wrapped(batches[rank]).square().mean().backward()
            assert_holds(probe, "train", rows)
            probe.remove()
    # A module whose name equals a wrapper's attribute is no wrapper.
    odd = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2), "module": nn.Linear(2, 2)})
    assert sm.LayerProbe(odd).layers == ["_orig_mod", "module"]


def uneven_batches_under_join(rank, world):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    plain = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    probe = sm.LayerProbe(parallel, sm.SpectrumMetric())
    batches = [
        [
            torch.randn(7, 6, generator=torch.Generator().manual_seed(10 * r + k)).double()
            for k in range(1 + 2 * r)
        ]
        for r in range(world)
    ]
    with parallel.join():
        for batch in batches[rank]:
            parallel(batch).square().mean().backward()
    assert_holds(probe, "train", every_linear(plain, [batch for some in batches for batch in some]))


SCENARIOS = [
    experts_run_in_any_order,
    experts_of_each_process_reach_all,
    findings_are_the_same_on_all,
    a_loop_over_merged_sums_ends_for_all,
    sketches_beside_idle_processes,
    what_does_not_fit_is_an_error_everywhere,
    large_layers_travel_by_themselves,
    what_one_process_raises_all_raise,
    a_metrics_own_group_is_heeded,
    pipelines_equal_one_process,
    what_is_not_merged_is_recorded_of_all,
    stages_that_count_from_zero_are_told,
    wrappers_do_not_rename,
    uneven_batches_under_join,
]
