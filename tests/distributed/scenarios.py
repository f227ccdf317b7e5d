"""Scenarios that each process of a group runs; a failed assertion fails the test that started the group."""

import contextlib
import copy
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

import spectralmetrics as sm
from spectralmetrics.probing import exchange
from spectralmetrics.recording.writers.csv import read_rows
from tests.metrics.properties import assert_same, feed
from tests.metrics.test_properties import VARIANTS
from tests.oracles import random_rows
from tests.sums.toy import CrestFactorMetric, crest_factor


@contextlib.contextmanager
def counted_collectives():
    """Number of elements of every collective inside the context."""
    seen = []
    names = ("all_reduce", "reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "barrier")
    names += ("broadcast", "all_to_all_single")
    originals = {name: getattr(dist, name) for name in names}

    def wrap(name):
        def wrapped(*args, **kwargs):
            tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
            seen.append((name, None if tensor is None else tensor.numel()))
            return originals[name](*args, **kwargs)

        return wrapped

    for name in names:
        setattr(dist, name, wrap(name))
    try:
        yield seen
    finally:
        for name in names:
            setattr(dist, name, originals[name])


# Collectives of a probe of small layers: flags; widths, origins and sums; the size of the values, the values.
PROBE = ["all_reduce"] * 3 + ["reduce"] + ["all_reduce"] * 2
DIFFERING = (
    PROBE[:1] + ["all_reduce"] * 2 + PROBE[1:]
)  # where processes have different layers: the layers of each
METRIC = ["all_reduce"] * 3  # widths, origins, sums


def of_several(world, names):
    """The collectives; none if there is only one process."""
    return names if world > 1 else []


def shares(world, without, *, far):
    """Rows of each process: uneven numbers, none on one of them, each about its own mean."""
    parts = []
    for rank in range(world):
        mean = (1e6 + 1e3 * rank) if far == "zero" else 1e7 * rank if far == "each other" else 0.5
        parts.append(random_rows(rank, 20 + 13 * rank, 6, mean=mean, decay=0.3))
    if without is not None and world > 1:
        parts[without] = parts[without][:0]
    return parts


def each_share(world):
    """Each distance, and each process without rows, once: the two do not interact."""
    if world == 1:
        return [(None, None), ("zero", None), ("each other", None)]
    without = [(None, 0), ("zero", world - 1), ("each other", world // 2)]
    return [(None, None), *without, ("each other", None)]


def alone(new, rows):
    """Value on this process alone, without merging."""
    return feed(new(sync_on_compute=False), rows).compute()


def every_statistic_equals_that_of_one_process(rank, world):
    for far, without in each_share(world):
        parts = shares(world, without, far=far)
        everything = torch.cat(parts)
        # Far apart, all covariances are nearly singular, and values from the smallest eigenvalues are lost.
        fragile = ("covariance_determinant", "determinant_log", "power_law_exponent")
        fragile += ("effective_rank",) if far == "each other" else ()
        for name, new in VARIANTS.items():
            if far and (name in fragile or name in ("rankme", "uncentred_spectrum")):
                continue
            metric = new()
            for part in parts[rank].split(7):
                if len(part):
                    metric.update(part)
            value = metric.compute()
            if name == "embedding":
                assert value.shape == (len(everything), 2)
                values = [torch.empty_like(value) for _ in range(world)]
                dist.all_gather(values, value)
                assert all(torch.equal(value, other) for other in values)
            else:
                assert_same(value, alone(new, everything), 1e-9)
            # Accumulation continues on some processes only, and every process computes again.
            assert int(metric.count) == len(parts[rank])
            more = random_rows(100, 9, 6, mean=float(everything.mean()))
            if rank == 0:
                metric.update(more)
            again = metric.compute()
            if name != "embedding":
                assert_same(again, alone(new, torch.cat([everything, more])), 1e-9)


def the_covariance_is_exact_far_from_zero(rank, world):
    from tests.oracles import relative_error, two_pass_covariance

    for mean in (0.0, 1e4, 1e8):
        rows = random_rows(0, 2000, 9, mean=mean)
        # Blocks of one distribution with very different sizes.
        sizes = [2000 - 10 * (world - 1)] + [10] * (world - 1)
        metric = feed(sm.CovarianceMetric(), rows.split(sizes)[rank], 100)
        assert relative_error(metric.compute(), two_pass_covariance(rows)) < 1e-9
        parts = [random_rows(k, 300, 9, mean=mean * (-1) ** k) for k in range(world)]
        metric = feed(sm.CovarianceMetric(), parts[rank], 100)
        assert relative_error(metric.compute(), two_pass_covariance(torch.cat(parts))) < 1e-12


def no_process_saw_anything(rank, world):
    with pytest.raises(RuntimeError, match="no observation"):
        sm.SaturationMetric().compute()
    metric = sm.SaturationMetric(nan_strategy="ignore")
    metric.update(torch.full((2, 3), torch.nan))
    with pytest.raises(RuntimeError, match=f"{2 * world} with NaN"):
        metric.compute()


def widths_that_differ_are_an_error_everywhere(rank, world):
    if world == 1:
        return
    metric = sm.SaturationMetric()
    metric.update(torch.randn(9, 4 if rank == world - 1 else 3))
    with pytest.raises(ValueError, match=f"4 on process {world - 1}"):
        metric.compute()


def bad_rows_are_counted_over_all_processes(rank, world):
    metric = sm.CovarianceTraceMetric()
    rows = random_rows(rank, 10, 3)
    rows[: rank + 1] = torch.nan
    metric.update(rows)
    total = world * (world + 1) // 2
    with pytest.warns(UserWarning, match=f"left out {total} of {10 * world}"):
        metric.compute()


def settings_of_torchmetrics(rank, world):
    parts = shares(world, None, far=None)
    local = sm.CovarianceTraceMetric(sync_on_compute=False)
    together = sm.CovarianceTraceMetric()
    stepwise = sm.CovarianceTraceMetric(dist_sync_on_step=True)
    for part in parts[rank].split(10):
        local.update(part)
        together.update(part)
    with counted_collectives() as seen:
        own = local.compute()
    assert not seen
    assert_same(own, alone(sm.CovarianceTraceMetric, parts[rank]))
    assert_same(together.compute(), alone(sm.CovarianceTraceMetric, torch.cat(parts)))
    # forward returns the value of the step on all processes, and the state stays this process' own
    batch = torch.cat([part[:10] for part in parts])
    assert_same(stepwise(parts[rank][:10]), alone(sm.CovarianceTraceMetric, batch))
    assert int(stepwise.count) == 10
    plain = sm.CovarianceTraceMetric()
    with counted_collectives() as seen:
        plain(parts[rank][:10])
    assert not seen
    # by hand
    together.sync()
    assert int(together.count) == sum(len(part) for part in parts)
    together.unsync()
    assert int(together.count) == len(parts[rank])
    with together.sync_context():
        assert int(together.count) == sum(len(part) for part in parts)
    assert int(together.count) == len(parts[rank])


class BrokenMetric(sm.SpectralMetric):
    """A statistic that raises."""

    def statistic(self, spectrum):
        raise ArithmeticError("mine")


def own_rows(rank, spoiled=False):
    rows = random_rows(rank, 10 + rank, 3)
    if spoiled:
        rows[0] = torch.nan
    return rows


def assert_goes_on(metric, rank, world, new):
    """The metric holds only this process' rows, takes more, and merges as if no error had occurred."""
    assert not metric._is_synced
    assert int(metric.count) == 10 + rank
    metric.update(random_rows(70 + rank, 10, 3))
    assert int(metric.count) == 20 + rank
    parts = [part for each in range(world) for part in (own_rows(each), random_rows(70 + each, 10, 3))]
    assert_same(metric.compute(), alone(new, torch.cat(parts)), 1e-12)


def an_error_in_compute_leaves_the_state_as_it_was(rank, world):
    metric = sm.SaturationMetric()
    with pytest.raises(RuntimeError, match="no observation"):
        metric.compute()  # nothing yet, on any process
    metric.update(own_rows(rank))
    assert_goes_on(metric, rank, world, sm.SaturationMetric)

    strict = sm.CovarianceTraceMetric(nan_strategy="error")
    strict.update(own_rows(rank, spoiled=True))
    with pytest.raises(RuntimeError, match=f"{world} of "):
        strict.compute()
    assert not strict._is_synced
    assert (int(strict.count), int(strict.non_finite)) == (9 + rank, 1)
    strict.reset()
    strict.update(own_rows(rank))
    assert_goes_on(strict, rank, world, sm.CovarianceTraceMetric)

    broken = feed(BrokenMetric(), own_rows(rank))
    with pytest.raises(ArithmeticError, match="mine"):
        broken.compute()
    broken.statistic = lambda spectrum: spectrum.eigenvalues.sum()
    assert_goes_on(broken, rank, world, sm.CovarianceTraceMetric)

    pair = sm.LinearCKAMetric(nan_strategy="error")
    left = torch.cat([torch.full((1, 3), torch.nan, dtype=torch.float64), own_rows(rank)])
    pair.update(left, left)
    with pytest.raises(RuntimeError, match=f"NaN or infinite values: {world}"):
        pair.compute()
    assert not pair._is_synced
    assert (int(pair.count), int(pair.non_finite)) == (10 + rank, 1)


def an_error_in_a_collection_leaves_all_states_as_they_were(rank, world):
    for groups in (True, False):
        collection = MetricCollection(
            {"trace": sm.CovarianceTraceMetric(), "broken": BrokenMetric()}, compute_groups=groups
        )
        collection.update(own_rows(rank))
        with pytest.raises(ArithmeticError, match="mine"):
            collection.compute()
        assert [int(metric.count) for metric in collection.values()] == [10 + rank] * 2
        collection["broken"].statistic = lambda spectrum: spectrum.eigenvalues.sum()
        collection.update(random_rows(70 + rank, 10, 3))
        parts = [part for each in range(world) for part in (own_rows(each), random_rows(70 + each, 10, 3))]
        expected = alone(sm.CovarianceTraceMetric, torch.cat(parts))
        for value in collection.compute().values():
            assert_same(value, expected, 1e-12)

    strict = MetricCollection([sm.CovarianceTraceMetric(nan_strategy="error"), sm.StableRankMetric()])
    strict.update(own_rows(rank, spoiled=True))
    with pytest.raises(RuntimeError, match=f"{world} of "):
        strict.compute()
    assert [int(metric.count) for metric in strict.values()] == [9 + rank] * 2
    assert not any(metric._is_synced for metric in strict.values())


def an_update_while_synced_is_undone(rank, world):
    rows, more = random_rows(rank, 30, 4), random_rows(50 + rank, 30, 4)
    metric = feed(sm.CovarianceTraceMetric(), rows)
    expected = metric.compute()
    metric.sync()
    metric.update(more)
    metric.unsync()
    assert_same(metric.compute(), expected)


def a_value_that_is_changed_in_place_is_the_callers_own(rank, world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    probe = sm.LayerProbe(model, [sm.SpectrumMetric(), sm.SaturationMetric()])
    model(torch.randn(20, 4))
    values = probe.compute()
    kept = {key: value.clone() for key, value in values.items()}
    for value in values.values():
        value.zero_()
    for key, value in probe.compute().items():
        assert torch.equal(value, kept[key])


def a_process_group_of_some_ranks(rank, world):
    if world < 3:
        return
    members = [0, world - 1]
    group = dist.new_group(members)
    parts = shares(world, None, far=None)
    metric = feed(sm.CovarianceTraceMetric(process_group=group), parts[rank], 10)
    value = metric.compute()
    rows = torch.cat([parts[m] for m in members]) if rank in members else parts[rank]
    assert_same(value, alone(sm.CovarianceTraceMetric, rows))


def a_gather_function_of_the_users(rank, world):
    calls = []

    def gather(tensor, group=None):
        calls.append(tensor.shape)
        gathered = [None] * world
        dist.all_gather_object(gathered, tensor, group=group)
        return gathered

    parts = shares(world, world - 1, far="each other")
    for new in (sm.CovarianceTraceMetric, sm.EigenspaceEmbeddingMetric):
        metric = new(dist_sync_fn=gather)
        if len(parts[rank]):
            metric.update(parts[rank])
        value = metric.compute()
        if new is sm.CovarianceTraceMetric:
            assert_same(value, alone(new, torch.cat(parts)))
        else:
            assert len(value) == sum(len(part) for part in parts)
        assert int(metric.count) == len(parts[rank])
    assert calls


def the_sample_is_the_rows_with_the_smallest_keys_of_all(rank, world):
    for size, without in ((8, None), (8, world - 1), (1000, 0)):
        parts = shares(world, without, far=None)
        metric = sm.EigenspaceEmbeddingMetric(num_components=6, max_samples=size, seed=5)
        for batch in parts[rank].split(7):
            if len(batch):
                metric.update(batch)
        # Keys of the rows that each process has drawn, from its number and the number of the batch.
        keys = []
        for process, part in enumerate(parts):
            for number, batch in enumerate(part.split(7)):
                if len(batch):
                    entropy = np.random.SeedSequence([5, process, number]).generate_state(1, np.uint64)
                    generator = torch.Generator().manual_seed(int(entropy[0]) >> 1)
                    keys.append(torch.rand(len(batch), generator=generator, dtype=torch.float64))
        everything = torch.cat(parts)
        smallest = torch.cat(keys).argsort()[:size]
        mean, covariance = everything.mean(0), torch.cov(everything.T, correction=0)
        expected = (everything[smallest] - mean) @ sm.functional.eigenvectors(covariance)[1]
        assert_same(metric.compute(), expected, 1e-9)
        with metric.sync_context():
            occupied = metric.sample_keys.isfinite()
            assert torch.equal(metric.sample_rows[occupied], everything[smallest])
            assert torch.equal(metric.sample_keys[occupied], torch.cat(keys).sort().values[:size])


def packed_size(features):
    """Two counts, a vector sum, and products 16 rows at a time, starting at the diagonal of the first row."""
    return 2 + features + sum(min(16, left) * left for left in range(features, 0, -16))


def a_single_metric_moves_packed_sums(rank, world):
    features = 40
    metric = feed(sm.SaturationMetric(), random_rows(rank, 30, features))
    with counted_collectives() as seen:
        metric.compute()
    assert [name for name, _ in seen] == METRIC
    # Bounded, whatever the number of processes.
    assert [size for _, size in seen] == [2 * world, features + 1, packed_size(features)]


def a_collection_merges_its_sums_once(rank, world):
    collection = MetricCollection([sm.SaturationMetric(), sm.CovarianceTraceMetric(), sm.EffectiveRankMetric()])
    parts = shares(world, None, far=None)
    collection.update(parts[rank][:5])
    collection.update(parts[rank][5:])
    with counted_collectives() as seen:
        values = collection.compute()
    assert len([size for _, size in seen if size > 20]) == 1
    for name, value in values.items():
        assert_same(value, alone(getattr(sm, name), torch.cat(parts)))
    # One process continues, the others do not: their earlier merged result must not pass as the new one.
    if rank == 0:
        collection.update(random_rows(50, 8, 6))
    everything = torch.cat([*parts, random_rows(50, 8, 6)])
    for name, value in collection.compute().items():
        assert_same(value, alone(getattr(sm, name), everything))


class Experts(nn.Module):
    """One layer that all processes run and one for each process."""

    def __init__(self, world):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(world))

    def forward(self, x, expert):
        return self.experts[expert](self.shared(x).relu())


def a_probe_merges_all_layers_in_few_collectives(rank, world):
    parts = [random_rows(k, 30 + 7 * k, 6, mean=3.0 * k, dtype=torch.float32) for k in range(world)]
    metrics = [
        sm.SaturationMetric(),
        sm.CovarianceTraceMetric(),
        sm.EffectiveRankMetric(center=False),
        sm.EigenspaceEmbeddingMetric(max_samples=16),
    ]
    model = Experts(world)
    probe = sm.LayerProbe(model, metrics)
    model(parts[rank], rank)  # each expert sees the data of one process only
    model.eval()
    if rank == 0:
        model(parts[rank], 0)
    unseen = pytest.warns(UserWarning, match="saw nothing in eval") if world > 1 else contextlib.nullcontext()
    with counted_collectives() as seen, unseen:
        values = probe.compute()
    assert [name for name, _ in seen] == of_several(world, DIFFERING)
    # The same model on one process with all data.
    single = Experts(world)
    reference = sm.LayerProbe(single, [m.clone() for m in metrics])
    for place in reference._places.values():
        for metric in place.collection.values(copy_state=False):
            metric.sync_on_compute = False
    for k in range(world):
        single(parts[k], k)
    single.eval()
    single(parts[0], 0)
    unseen = pytest.warns(UserWarning, match="saw nothing in eval") if world > 1 else contextlib.nullcontext()
    with unseen:
        expected = reference.compute()
    assert set(values) == set(expected)
    for key, value in values.items():
        if "embedding" not in key:
            assert_same(value, expected[key], 1e-9)
        else:
            assert value.shape == expected[key].shape
    # The states are this process' own again, and accumulate further.
    assert int(probe["train", "shared"]["saturation"].count) == len(parts[rank])
    model.train()
    model(parts[rank], rank)
    total = 2 * sum(len(part) for part in parts)
    with probe.merged():
        assert int(probe["train", "shared"]["saturation"].count) == total


def dealt(rows, sizes, folds):
    """Batches of each process, and the rows of each fold over all processes."""
    batches = [list(part.split(size)) if len(part) else [] for part, size in zip(rows, sizes, strict=True)]
    of_folds = [[rows[0][:0]] for _ in range(folds)]
    for rank, own in enumerate(batches):
        for turn, batch in enumerate(own):
            of_folds[(rank * folds // len(rows) + turn) % folds].append(batch)
    return batches, [torch.cat(parts) for parts in of_folds]


def folds_equal_one_process(rank, world):
    sizes = [5 + 2 * k for k in range(world)]
    for far, without in each_share(world):
        parts = shares(world, without, far=far)
        batches, of_folds = dealt(parts, sizes, 3)
        for name in ("saturation", "intrinsic_dimension", "participation_ratio", "spectrum", "covariance"):
            new = VARIANTS[name]
            folded, plain = new(folds=3), new()
            one = new(folds=3, sync_on_compute=False)
            for batch in batches[rank]:
                folded.update(batch)
                plain.update(batch)
            for fold, rows in enumerate(of_folds):
                one.update(sm.Observations(rows, group=fold))
            with counted_collectives() as seen:
                value = folded.compute()
            assert [kind for kind, _ in seen] == METRIC
            assert_same(value, plain.compute(), 1e-9)
            assert_same(value, one.compute(), 1e-9)
            if name != "covariance":
                with counted_collectives() as seen:
                    interval = folded.interval()
                # No new rows since. A process that never had any cannot detect that.
                assert [kind for kind, _ in seen] == (
                    METRIC if without is not None and world > 1 else METRIC[:1]
                )
                for mine, its in zip(interval, one.interval(), strict=True):
                    assert_same(mine, its, 1e-7 if far else 1e-9)
            assert sum(folded.fold_count.tolist()) == len(parts[rank])  # this process' own again
        unbiased = sm.ParticipationRatioMetric(unbiased=True, folds=3)
        one = sm.ParticipationRatioMetric(unbiased=True, folds=3, sync_on_compute=False)
        for batch in batches[rank]:
            unbiased.update(batch)
        for fold, rows in enumerate(of_folds):
            one.update(sm.Observations(rows, group=fold))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with so few rows the value may lie at its limit
            assert_same(unbiased.compute(), one.compute(), 1e-9 if far else 1e-12)


def intervals_of_a_probe_take_few_collectives(rank, world):
    rows = [random_rows(k, 60 + 9 * k, 6, mean=2.0 * k) for k in range(world)]
    batches, of_folds = dealt(rows, [7 + k for k in range(world)], 4)
    metrics = [new() for name, new in VARIANTS.items() if name in ("saturation", "effective_rank", "spectrum")]
    metrics.append(sm.EigenspaceEmbeddingMetric(max_samples=8))

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double().eval()

    mine, alone = model(), model()
    probe = sm.LayerProbe(mine, metrics, folds=4)
    own = [metric.clone() for metric in metrics]
    for metric in own:
        metric.sync_on_compute = False
    reference = sm.LayerProbe(alone, own, folds=4)
    with torch.no_grad():
        for batch in batches[rank]:
            mine(batch)
        for turn in range(4):  # the reference starts at this process' fold
            alone(of_folds[(rank * 4 // world + turn) % 4])
    with counted_collectives() as seen:
        intervals = probe.intervals("eval")
    assert [name for name, _ in seen] == of_several(world, PROBE)
    with counted_collectives() as seen:
        values = probe.compute("eval")
    # No new rows since, so no sum travels.
    assert [name for name, _ in seen] == of_several(world, [PROBE[0], *PROBE[4:]])
    expected = reference.compute("eval")
    for key, value in values.items():
        if "embedding" not in key:
            assert_same(value, expected[key], 1e-9)
    expected = reference.intervals("eval")
    assert list(intervals) == list(expected) == [key for key in values if "embedding" not in key]
    for key, interval in intervals.items():
        for end, its in zip(interval, expected[key], strict=True):
            assert_same(end, its, 1e-9)
            others = [torch.empty_like(end) for _ in range(world)]
            dist.all_gather(others, end)
            assert all(torch.equal(end, other) for other in others)
    # The states are this process' own again, and dealing continues.
    metric = probe["eval", "0"]["saturation"]
    counts = [sum(map(len, batches[rank][turn::4])) for turn in range(4)]
    start = rank * 4 // world
    assert metric.fold_count.tolist() == counts[4 - start :] + counts[: 4 - start]


def replicas_fill_all_folds_alike(rank, world):
    model = nn.Sequential(nn.Linear(6, 5)).double()
    together, apart = (sm.LayerProbe(model, sm.EffectiveRankMetric(), folds=8) for _ in range(2))
    for leader in together._places["train", "0"].spectral_leaders:
        leader.replica = (0, 1)  # as for ranks that share their forwards
    metric = sm.EffectiveRankMetric(folds=8)
    for batch in random_rows(rank, 10 * (8 // world + 1), 6).split(10):
        model(batch)
        metric.update(batch)
    with together.merged(), apart.merged():
        counts = [each["train", "0"]["effective_rank"].fold_count.tolist() for each in (together, apart)]
    assert counts[0] == [10 * world] * (8 // world + 1) + [0] * (7 - 8 // world) if world > 1 else True
    assert max(counts[1]) - min(counts[1]) <= 10
    assert min(counts[1]) > 0
    with metric.sync_context():
        assert metric.fold_count.tolist() == counts[1]
    assert not any(end.isnan() for end in metric.interval())
    assert not any(end.isnan() for end in apart.intervals()["effective_rank/train/0"])


def a_fold_that_is_empty_everywhere(rank, world):
    metric = sm.SaturationMetric(folds=3 * world)
    metric.update(random_rows(rank, 20, 4))
    if rank == world - 1:
        metric.update(random_rows(50, 20, 4))
    low, high = metric.interval()
    assert low == metric.compute()
    assert high.isnan()
    for seed in (60, 70):
        metric.update(random_rows(seed + rank, 20, 4))
    assert not any(end.isnan() for end in metric.interval())


def data_parallel_training_is_bit_identical(rank, world):
    def train(probed):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        parallel = nn.parallel.DistributedDataParallel(model)
        probe = sm.LayerProbe(parallel) if probed else None
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        torch.manual_seed(2 + rank)
        for step in range(4):
            rows = random_rows(10 * rank + step, 12, 6, dtype=torch.float32)
            optimizer.zero_grad()
            parallel(rows).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state(), probe

    plain, plain_rng, _ = train(False)
    weights, rng, probe = train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    assert torch.equal(plain_rng, rng)
    assert probe.layers == ["0", "3"]
    values = probe.compute()
    assert set(values) == {"saturation/train/0", "saturation/train/3"}
    assert int(probe["train", "0"]["saturation"].count) == 48


def fully_sharded_training_is_observed(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plain.load_state_dict(model.state_dict())
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    probe = sm.LayerProbe(model, sm.SpectrumMetric())
    reference = sm.LayerProbe(plain, sm.SpectrumMetric())
    rows = random_rows(rank, 20, 6, dtype=torch.float32)
    model(rows).square().mean().backward()
    plain(rows)
    values, expected = probe.compute(), reference.compute()
    assert set(values) == {"spectrum/train/0", "spectrum/train/2"}
    for key, value in values.items():
        assert_same(value, expected[key], 1e-5)


class Captured(nn.Module):
    """Layers whose outputs are views, followed by activations in place."""

    def __init__(self, *, inplace):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(6, 8), nn.Linear(8, 4), nn.ReLU(inplace)

    def forward(self, rows):
        return self.second(self.relu(self.first(rows)))


def trained_with_gradients(rank, wrap, shape, probed, steps=6):
    """Weights after some steps of two micro-batches each, and the observations of a probe."""
    torch.manual_seed(1)
    model = wrap(Captured(inplace=True).double())
    probe = sm.LayerProbe(model, sm.CovarianceMetric(center=False), observe="gradients") if probed else None
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    expected = {"first": [], "second": []}
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            rows = random_rows(100 * rank + 10 * step + micro, 12, 6).reshape(shape)
            if not probed:
                own = {name: _full(each.detach()) for name, each in model.named_parameters()}
                twin = Captured(inplace=False).double()
                twin.load_state_dict({name.removeprefix("module."): each for name, each in own.items()})
                hidden = twin.first(rows)
                outputs = twin.second(torch.relu(hidden))
                found = torch.autograd.grad(outputs.square().mean(), [hidden, outputs])
                for name, gradient in zip(expected, found, strict=True):
                    expected[name].append(gradient.reshape(12, -1))
            syncs = micro == 1 or not hasattr(model, "no_sync")
            with contextlib.nullcontext() if syncs else model.no_sync():
                model(rows).square().mean().backward()
        optimizer.step()
    return [_full(each.detach()) for each in model.parameters()], probe, expected


def _full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def check_gradients(rank, world, wrap, shape):
    weights, _, rows = trained_with_gradients(rank, wrap, shape, probed=False)
    found, probe, _ = trained_with_gradients(rank, wrap, shape, probed=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))
    moments = probe.covariances("train", center=False)
    for name, each in rows.items():
        stacked = torch.cat(each)
        own = stacked.T @ stacked
        dist.all_reduce(own)
        assert_same(moments[name], own / (len(stacked) * world), 1e-12)


def gradients_of_data_parallel_training(rank, world):
    check_gradients(rank, world, nn.parallel.DistributedDataParallel, (4, 3, 6))


def gradients_of_fully_sharded_training(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))

    def wrap(model):
        for layer in (model.first, model.second, model):
            fully_shard(layer, mesh=mesh)
        return model

    # For a 3-D input a linear layer returns a view, and FSDP2 does not allow changing it in place.
    check_gradients(rank, world, wrap, (12, 6))


def hybrid_sharded_training_is_observed(rank, world):
    """Sharded in one dimension of the mesh, replicated in the other: each process' rows count once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def new():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    parts = [random_rows(each, 20 + each, 6, dtype=torch.float32) for each in range(world)]
    plain = new()
    with torch.no_grad():
        outputs = {
            "0": torch.cat([plain[:1](part) for part in parts]),
            "2": torch.cat([plain(p) for p in parts]),
        }
    for is_before in (False, True):
        model = new()
        probe = sm.LayerProbe(model, sm.SpectrumMetric(), folds=2) if is_before else None
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        probe = probe or sm.LayerProbe(model, sm.SpectrumMetric(), folds=2)
        model(parts[rank]).square().mean().backward()
        model.eval()
        with torch.no_grad():
            model(parts[rank])
        for stage in ("train", "eval"):
            covariances = probe.covariances(stage)
            assert list(covariances) == ["0", "2"]
            for name, rows in outputs.items():
                expected = torch.cov(rows.double().T, correction=0)
                assert_same(covariances[name], expected, 1e-5)
            with probe.merged():
                assert int(probe[stage, "0"]["spectrum"].fold_count.sum()) == sum(map(len, parts))
        values = probe.compute()
        gathered = [None] * world
        dist.all_gather_object(gathered, {key: value.tolist() for key, value in values.items()})
        assert all(each == gathered[0] for each in gathered)
        assert len(values) == 4
        probe.remove()


def only_the_first_process_records(rank, world):
    everything = shares(world, None, far=None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    runs = Path(folder[0])
    probe = sm.LayerProbe(model, [sm.SaturationMetric(), sm.IntrinsicDimensionMetric()])
    own = runs / "own" if rank == 0 else Path("/nowhere/that/can/be/written")
    with sm.Recorder(own, probe, ["csv", "arrays"]) as recorder:
        for epoch in range(2):
            model(everything[rank])
            if rank == 0:
                recorder.add_scalar("loss", 0.5)
            values = recorder.record()
            assert recorder.next_epoch == epoch + 1
            assert "saturation/train/mean" in values
    probe.remove()
    dist.barrier()
    # All processes raise the error, and none waits for the others.
    with pytest.raises(FileExistsError, match="already holds records"):
        sm.Recorder(runs / "own", probe)
    with sm.Recorder(runs / "own", None, ["csv", "arrays"], mode="resume") as recorder:
        assert recorder.next_epoch == 2
    if rank == 0:
        whole = sm.LayerProbe(model, sm.SaturationMetric(sync_on_compute=False))
        model(torch.cat(everything))
        alone = whole.compute()
        whole.remove()
        rows = [row for row in read_rows(runs / "own" / "records.csv") if row.statistic == "saturation"]
        assert {row.value for row in rows if row.layer == "0"} == {float(alone["saturation/train/0"])}
        with np.load(runs / "own" / "arrays" / "epoch-000001.npz", allow_pickle=False) as arrays:
            assert int(arrays["train/1/count"]) == sum(map(len, everything))


def a_second_recorder_is_refused_everywhere(rank, world):
    told = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(told)
    with sm.Recorder(told[0]) as recorder:
        for mode in ("create", "resume", "overwrite"):
            with pytest.raises(BlockingIOError, match="that is still open"):
                sm.Recorder(told[0], mode=mode)
        recorder.add_scalar("loss", 1.0)
        recorder.record()
    dist.barrier()
    with sm.Recorder(told[0], mode="resume") as recorder:
        assert recorder.next_epoch == 1
    dist.barrier()
    if rank == 0:
        assert sorted(path.name for path in Path(told[0]).iterdir()) == ["recording.json", "records.csv"]


def projections_are_alike_everywhere(rank, world):
    for without in {None, 0, world - 1} if world > 1 else {None}:
        parts = shares(world, without, far="each other")
        model = nn.Sequential(sm.PCAProjection(6, threshold=0.9))
        alone = nn.Sequential(sm.PCAProjection(6, threshold=0.9, dim=1))
        model(parts[rank])
        rows = sm.set_projection_threshold(model, 0.8)  # during training
        model(parts[rank])
        model.eval()
        everything = torch.cat(parts)
        found = model(everything)
        assert rows[0].dimension == model[0].rank
        # One process without a group:
        reference = sm.CovarianceMetric(sync_on_compute=False)
        reference.update(everything)
        spectrum = reference.spectrum
        vectors = spectrum.eigenvectors[:, : model[0].rank]
        expected = (everything - spectrum.mean) @ vectors @ vectors.mT + spectrum.mean
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-3)
        assert int(model[0].covariance.count) == 2 * len(everything)  # a saved state is complete
        sm.randomize_projections(model, torch.Generator().manual_seed(rank))
        for values in (found, model(everything)):
            others = [torch.empty_like(values) for _ in range(world)]
            dist.all_gather(others, values)
            assert all(torch.equal(values, other) for other in others)
        fresh = copy.deepcopy(alone)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(everything), model(everything))
        model.train()
        model(parts[rank])
        assert int(model[0].covariance.count) == len(parts[rank])


def a_pair_of_models():
    """Two models that run their layers in reverse order of registration."""

    class Backwards(nn.Sequential):
        def forward(self, rows):
            for layer in reversed(self):
                rows = layer(rows)
            return rows

    torch.manual_seed(3)
    return [Backwards(nn.Linear(width, 5), nn.ReLU(), nn.Linear(6, width)) for width in (9, 30)]


def similarities_equal_those_of_one_process(rank, world):
    batches = torch.randn(8, 12, 6, generator=torch.Generator().manual_seed(0))
    left, right = a_pair_of_models()

    def observe(some, other):
        metric = sm.LinearCKAMetric()
        with sm.LayerSimilarity(left, other) as similarity:
            for batch in some:
                metric.update(left(batch).detach(), right(batch).detach())
        return similarity, metric

    for other in (right, None):
        # A process without rows contributes nothing and does not have the order of the layers.
        for first in {0, 1 if world > 1 else 0}:
            similarity, metric = observe(batches[rank::world] if rank >= first else batches[:0], other)
            everything = torch.cat([batches[r::world] for r in range(first, world)])
            alone, alone_metric = observe(everything, other)
            with counted_collectives() as seen:
                result = similarity.compute()
            assert [name for name, _ in seen] == (["all_reduce"] if world > 1 else [])
            assert result.count == 12 * len(everything)
            assert result.layers == result.other_layers == ["2", "0"]
            # Layers are kept in order of registration.
            expected = sm.functional.cka(*alone._sums).flip(0, 1)
            torch.testing.assert_close(result.matrix, expected, rtol=1e-10, atol=1e-12)
            expected = sm.functional.cka(alone_metric.cross, alone_metric.left, alone_metric.right)
            torch.testing.assert_close(metric.compute(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="no forward of the model"):
        sm.LayerSimilarity(left).compute()


def a_kind_of_sum_from_elsewhere_is_merged_like_ours(rank, world):
    for without in (None, 0):
        parts = shares(world, without, far="each other")
        everything = torch.cat(parts)
        assert_same(feed(CrestFactorMetric(), parts[rank]).compute(), crest_factor(everything))
        model = nn.Sequential(nn.Linear(6, 4)).double()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).view(parameter.shape))
        probe = sm.LayerProbe(model, [sm.SaturationMetric(), CrestFactorMetric()])
        model(parts[rank])
        with counted_collectives() as seen:
            values = probe.compute()
        assert [name for name, _ in seen] == of_several(world, PROBE if without is None else DIFFERING)
        assert_same(values["crest_factor/train/0"], crest_factor(model(everything).detach()))


def histories_are_added_by_the_number_of_the_forward(rank, world):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).view(parameter.shape))
    probe = sm.LayerProbe(model, [sm.HistoryMetric(steps=4), sm.MaxAbsMetric(), sm.SpreadMetric()])
    forwards = [torch.randn(5 + rank, 6).double() * (1 + step) for step in range(7 - (rank == 1))]
    for probe.step, rows in enumerate(forwards):
        model(rows)
    with probe.paused():
        outputs = [model(rows).detach() for rows in forwards]
    gathered = [None] * world
    dist.all_gather_object(gathered, outputs)
    history = probe.history("train")
    expected = []
    for step in range(3, 7):  # the last one without the second process
        values = torch.cat([own[step] for own in gathered if len(own) > step])
        expected.append(
            (step, step, len(values), values.square().mean().sqrt(), values.mean(), values.abs().max())
        )
    found = [(row.forward, row.step, row.observations, row.rms, row.mean, row.max_abs) for row in history.rows]
    np.testing.assert_allclose(found, [[float(each) for each in row] for row in expected], rtol=1e-12)
    everything = torch.cat([values for own in gathered for values in own])
    values = probe.compute()
    assert values["max_abs/train/0"] == everything.abs().max()
    spread = everything.var(0, correction=0).sum() / everything.square().sum(1).mean()
    assert_same(values["spread/train/0"], spread, 1e-12)
    assert int(probe["train", "0"].max_abs.count) == sum(map(len, outputs))  # of this process, as before


def labels_equal_one_process(rank, world):
    """Each process has its own classes and its own mean, and one has no labels."""
    classes = 2 * world
    for far, silent in each_share(world)[:3]:
        parts = shares(world, None, far=far)
        labels = [2 * k + torch.arange(len(part)) % 2 for k, part in enumerate(parts)]
        if silent is not None and world > 1:
            labels[silent] = torch.full_like(labels[silent], -100)
        batches, of_folds = dealt(parts, [5 + k for k in range(world)], 3)
        of_batches, labels_of_folds = dealt(labels, [5 + k for k in range(world)], 3)
        for new in (sm.LinearProbeMetric, sm.NeuralCollapseMetric):
            for folds in (1, 3):
                metric = new(classes, folds=folds)
                one = new(classes, folds=folds, sync_on_compute=False)
                for batch, of_batch in zip(batches[rank], of_batches[rank], strict=True):
                    metric.update(batch, of_batch)
                for fold, each in enumerate(zip(of_folds, labels_of_folds, strict=True)):
                    one.update(sm.Observations(each[0], group=fold), each[1])
                with counted_collectives() as seen:
                    value = metric.compute()
                assert [kind for kind, _ in seen] == METRIC
                assert_same(value, one.compute(), 1e-7 if far else 1e-9)
                assert int(metric.count) == int((labels[rank] >= 0).sum())  # this process' own again


def labels_beside_a_model_on_some_processes(rank, world):
    """A process without labels contributes nothing to statistics of labels, and all to the others."""
    torch.manual_seed(0)
    mine, whole = (nn.Sequential(nn.Linear(6, 5)).double().eval() for _ in range(2))
    whole.load_state_dict(mine.state_dict())
    metrics = [sm.SaturationMetric(), sm.LinearProbeMetric(3), sm.NeuralCollapseMetric(3)]
    probe = sm.LayerProbe(mine, metrics, folds=2)
    own = [metric.clone() for metric in metrics]
    for metric in own:
        metric.sync_on_compute = False
    reference = sm.LayerProbe(whole, own, folds=2)
    for observing in (probe, reference):  # all begin with the same fold, so that folds are the same
        for place in observing._places.values():
            for leader in place.spectral_leaders:
                leader.replica = (0, 1)
    parts = shares(world, None, far=None)
    silent = world - 1 if world > 1 else None
    for each, part in enumerate(parts):
        # The reference deals each process' batches in turn, as that process does.
        for turn, batch in enumerate(part.chunk(2)):
            for model, observing, present in ((mine, probe, each == rank), (whole, reference, True)):
                if present:
                    labels = (torch.arange(len(batch)) + turn) % 3
                    labelled = observing.labels(labels) if each != silent else contextlib.nullcontext()
                    with torch.no_grad(), labelled:
                        model(batch)
    with counted_collectives() as seen:
        values = probe.compute("eval")
    assert [name for name, _ in seen] == of_several(world, DIFFERING)
    assert len(values) == 3
    for key, expected in reference.compute("eval").items():
        assert_same(values[key], expected, 1e-9)


def sketches_equal_one_process(rank, world):
    """Shares of any size, far from each other; bounds and trace equal the ones of all rows."""
    parts = shares(world, 0, far="each other")
    whole, mine = (sm.StableRankMetric(sketch_size=4) for _ in range(2))
    for part in parts:
        if len(part):
            whole.update(part)
    if len(parts[rank]):
        mine.update(parts[rank])
    expected = alone(sm.StableRankMetric, torch.cat(parts))
    with counted_collectives() as seen:
        low, high = mine.interval()
    assert [name for name, _ in seen] in ([], METRIC)
    assert low * (1 - 1e-9) <= expected <= high * (1 + 1e-9)
    whole.sync_on_compute = False
    whole._to_sync = False
    for end, other in zip((low, high), whole.interval(), strict=True):
        assert_same(end, other, 1e-7)


def large_decompositions_are_shared(rank, world):
    """Each is decomposed on one process; all get the eigenvalues, even if one process has some already."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin())
    metrics = [sm.SpectrumMetric(), sm.SaturationMetric()]
    generator = torch.Generator().manual_seed(rank)
    decomposed = []
    original, threshold = torch.linalg.eigvalsh, exchange._WORTH_SHARING

    def counting(matrix, *rest, **options):
        decomposed.extend([matrix.shape[-1]] * matrix[..., 0, 0].numel())
        return original(matrix, *rest, **options)

    torch.linalg.eigvalsh, exchange._WORTH_SHARING = counting, 0.0
    try:
        probe = sm.LayerProbe(model, metrics)
        with torch.no_grad():
            model(torch.randn(40, 6, generator=generator))
        with probe.merged():
            if rank == 0:  # reads one layer by itself, as a user may
                probe["eval", "0"].spectrum.read()
        decomposed.clear()
        values = probe.compute("eval")
        assert len(decomposed) <= -(-5 // world)
        with probe.merged():
            for name in probe.layers:
                spectral = probe.sums("eval", name)[0]
                assert_same(values[f"spectrum/eval/{name}"], spectral.eigenvalues(), 1e-12)
        decomposed.clear()
        assert probe.compute("eval").keys() == values.keys()
        assert not decomposed
    finally:
        torch.linalg.eigvalsh, exchange._WORTH_SHARING = original, threshold


def a_monitor_says_the_same_everywhere(rank, world):
    """The last process sees nothing for a while."""
    found = []
    for monitors in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).double()
        probe = sm.LayerProbe(model, [sm.SaturationMetric(), sm.CovarianceMetric(), sm.HistoryMetric()])
        said = []
        monitor = sm.Monitor(probe, every=8, on_alarm=said.append) if monitors else None
        generator = torch.Generator().manual_seed(rank)
        for step in range(40):
            probe.step = step
            if step == 30:
                with torch.no_grad():
                    model[2].weight.mul_(30), model[2].bias.mul_(30)
            if not (rank == world - 1 > 0 and 10 <= step < 25):
                model(1e3 + torch.randn(40, 6, generator=generator, dtype=torch.float64))
            if monitor:
                monitor.step()
        found.append(probe.compute())
    for key, value in found[0].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[1][key], value, rtol=1e-11, atol=1e-11 * scale)
    assert [(alarm.step, alarm.finding.layer) for alarm in said] == [(31, "2")]
    told = [None] * world
    dist.all_gather_object(told, [said, probe._remembered])
    assert len(set(map(repr, told))) == 1  # a NaN is not equal to itself


def metrics_of_other_libraries_have_values_where_something_ran(rank, world):
    """On whichever process; a stage in which nothing ran has none, as on one process."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    probe = sm.LayerProbe(model, {"mean": MeanMetric()})
    first = torch.full((9, 4), float(rank))
    for stage in ("train", "eval"):
        model.train(stage == "train")
        model["a"](first)
        model["b"](first)
    keys = {f"mean/{stage}/{layer}" for stage in ("train", "eval") for layer in "ab"}
    assert set(probe.compute()) == keys
    probe.reset()
    with pytest.warns(UserWarning, match="nothing was observed"):
        assert not probe.compute()
    with pytest.raises(RuntimeError, match="nothing was observed"):
        probe.findings("eval")
    if rank == world - 1:
        model["a"](first)
    for _ in range(2):
        with pytest.warns(UserWarning, match="saw nothing in eval are left out: 'b'"):
            values = probe.compute()
        probe._warned.clear()
        assert list(values) == ["mean/eval/a"]
        assert_same(values["mean/eval/a"], model["a"](torch.full((9, 4), world - 1.0)).mean(), 1e-6)
        probe.reset("train")
    assert probe.findings("eval") == []
    # Not merged, each process has its own.
    alone = sm.LayerProbe(model, {"mean": MeanMetric(sync_on_compute=False)})
    if rank == world - 1:
        model["a"](first)
        model["b"](first)
        assert len(alone.compute()) == 2
    else:
        with pytest.warns(UserWarning, match="nothing was observed"):
            assert not alone.compute()


EVERYWHERE = [
    metrics_of_other_libraries_have_values_where_something_ran,
    a_monitor_says_the_same_everywhere,
    histories_are_added_by_the_number_of_the_forward,
    every_statistic_equals_that_of_one_process,
    the_covariance_is_exact_far_from_zero,
    no_process_saw_anything,
    widths_that_differ_are_an_error_everywhere,
    bad_rows_are_counted_over_all_processes,
    settings_of_torchmetrics,
    an_error_in_compute_leaves_the_state_as_it_was,
    an_error_in_a_collection_leaves_all_states_as_they_were,
    an_update_while_synced_is_undone,
    a_value_that_is_changed_in_place_is_the_callers_own,
    a_process_group_of_some_ranks,
    a_gather_function_of_the_users,
    the_sample_is_the_rows_with_the_smallest_keys_of_all,
    a_single_metric_moves_packed_sums,
    a_collection_merges_its_sums_once,
    a_probe_merges_all_layers_in_few_collectives,
    folds_equal_one_process,
    intervals_of_a_probe_take_few_collectives,
    replicas_fill_all_folds_alike,
    a_fold_that_is_empty_everywhere,
    data_parallel_training_is_bit_identical,
    gradients_of_data_parallel_training,
    only_the_first_process_records,
    a_second_recorder_is_refused_everywhere,
    projections_are_alike_everywhere,
    similarities_equal_those_of_one_process,
    labels_equal_one_process,
    sketches_equal_one_process,
    large_decompositions_are_shared,
    labels_beside_a_model_on_some_processes,
    a_kind_of_sum_from_elsewhere_is_merged_like_ours,
]
ON_FOUR = [
    every_statistic_equals_that_of_one_process,
    folds_equal_one_process,
    a_probe_merges_all_layers_in_few_collectives,
    hybrid_sharded_training_is_observed,
]
ON_TWO = [
    fully_sharded_training_is_observed,
    gradients_of_fully_sharded_training,
]
