"""Groups of processes that are killed, and saved states that groups of other sizes load."""

import errno
import os
import tempfile
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import spectralmetrics as sm
from spectralmetrics.probing import exchange, rendezvous
from tests.distributed import groups
from tests.oracles import relative_error, two_pass_covariance

pytestmark = pytest.mark.xdist_group("processes")

DIES = 7  # exit status of a process that ends on purpose


def run(function, world, *arguments, dying=()):
    """Run a function on processes of a fresh group; all must pass except ``dying``, which end on purpose."""
    folder = tempfile.mkdtemp()
    codes = groups.run(
        world, [function], folder, filters=groups.LENIENT, timeout=40, limit=120, arguments=arguments
    )
    for text in groups.failures(folder).values():
        raise AssertionError(text)
    assert codes == [DIES if rank in dying else 0 for rank in range(world)]


def outputs(world):
    """Outputs of each process by layer: a shared layer, its own layer, and one that only some have."""
    found = []
    for rank in range(world):
        generator = torch.Generator().manual_seed(rank)
        rows = {"shared": torch.randn(10 + rank, 4, generator=generator).double() + 5 * rank}
        rows[f"own{rank}"] = torch.randn(6, 3 + rank, generator=generator).double()
        if rank % 2:
            del rows["shared"]
        found.append(rows)
    return found


def everything(world):
    together = {}
    for rows in outputs(world):
        for name, each in rows.items():
            together.setdefault(name, []).append(each)
    return {name: torch.cat(each) for name, each in together.items()}


def probe_of(names, **arguments):
    """A probe of layers that return their input."""
    model = nn.ModuleDict({name: nn.Identity() for name in names})
    metrics = [sm.SpectrumMetric(), sm.EigenspaceEmbeddingMetric(max_samples=8), sm.CovarianceTraceMetric()]
    return model, sm.LayerProbe(model, metrics, layers="*", exclude="ModuleDict", **arguments)


def own_layers(rank, saved, world):
    """The shared layer, and some of the saved processes' own layers, dealt to other processes than before."""
    return ["shared", *(f"own{k}" for k in range(saved) if (k + 1) % world == rank)]


def assert_saved(probe, saved):
    covariances = probe.covariances("train")
    expected = everything(saved)
    assert set(covariances) == set(expected)
    for name, rows in expected.items():
        assert relative_error(covariances[name], two_pass_covariance(rows)) < 1e-12
    with probe.merged():
        counts = {name: int(probe["train", name]["spectrum"].count) for name in expected}
        sizes = {name: int(probe["train", name]["embedding"].sample_keys.isfinite().sum()) for name in expected}
    assert counts == {name: len(rows) for name, rows in expected.items()}
    assert sizes == {name: min(8, len(rows)) for name, rows in expected.items()}


def save(rank, world, folder, how):
    rows = outputs(world)[rank]
    model, probe = probe_of({"shared": 0, **rows})
    for name in reversed(list(rows)):
        model[name](rows[name])
    own = probe["train", f"own{rank}"]["spectrum"]
    before = {key: value.clone() for key, value in own.metric_state.items()}
    if how == "save":
        dcp.save({"probe": probe.sharded()}, checkpoint_id=folder)
    else:
        dcp.async_save({"probe": probe.sharded()}, checkpoint_id=folder).result()
    assert all(torch.equal(value, getattr(own, key)) for key, value in before.items())
    assert_saved(probe, world)


def load(rank, world, folder, saved):
    model, probe = probe_of(own_layers(rank, saved, world))
    model["shared"](torch.randn(99, 4).double())  # forgotten by loading
    for _ in range(2):
        dcp.load({"probe": probe.sharded()}, checkpoint_id=folder)
        assert_saved(probe, saved)
    counts = [None] * world
    own = {name: int(probe["train", name]["spectrum"].count) for name in probe.layers}
    dist.all_gather_object(counts, own)
    total = sum(sum(each.values()) for each in counts)
    assert total == sum(map(len, everything(saved).values()))  # each row is on one process
    model["shared"](torch.ones(1, 4).double())  # and accumulation continues
    with probe.merged():
        assert int(probe["train", "shared"]["spectrum"].count) == len(everything(saved)["shared"]) + world


def load_too_few(rank, world, folder):
    _, probe = probe_of(["shared", "own1"])
    with pytest.raises(ValueError, match="got sums of 'own0', 'own2', 'own3'"):
        dcp.load({"probe": probe.sharded()}, checkpoint_id=folder)


def test_a_checkpoint_of_four_processes_on_two_and_of_two_on_eight(tmp_path):
    run(save, 4, str(tmp_path / "four"), "save")
    run(load, 2, str(tmp_path / "four"), 4)
    run(load_too_few, 2, str(tmp_path / "four"))
    run(save, 2, str(tmp_path / "two"), "async")
    run(load, 8, str(tmp_path / "two"), 2)
    # Load on one process without a group.
    _, probe = probe_of(everything(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"probe": probe.sharded()}, checkpoint_id=tmp_path / "four")
    assert_saved(probe, 4)


def record_on(rank, world, folder, saved, mode):
    rows = outputs(saved)
    model, probe = probe_of(["shared", *(f"own{k}" for k in range(saved) if k % world == rank)])
    with sm.Recorder(folder, probe, ["csv", "arrays"], mode=mode) as recorder:
        for each in rows[rank::world]:
            for name, values in each.items():
                if name in model:
                    model[name](values)
        epoch = recorder.next_epoch
        recorder.record()
    if rank == 0:
        kept = {row["layer"] for row in sm.read_records(folder) if row["epoch"] == epoch}
        assert kept >= {"shared", *(f"own{k}" for k in range(saved))}


def test_a_run_of_four_processes_goes_on_with_two_and_with_eight(tmp_path):
    for world, mode in ((4, "create"), (2, "resume"), (8, "resume")):
        run(record_on, world, str(tmp_path), 4, mode)
    rows = sm.recompute(tmp_path, statistics="covariance_trace")
    assert {row["epoch"] for row in rows} == {0, 1, 2}
    expected = {name: float(each.var(0, correction=0).sum()) for name, each in everything(4).items()}
    for row in rows:
        if row["layer"] in expected and row["epoch"] == 0:
            assert row["value"] == pytest.approx(expected[row["layer"]], rel=1e-12)


def dies_in_compute(rank, world, _, where):
    model, probe = probe_of(["a", "b"])
    model["a"](torch.randn(9, 4).double())
    assert len(probe.compute()) == 3
    model["a"](torch.randn(9, 4).double())
    if rank == 1:
        if where == "before":
            os._exit(DIES)
        probe.compute(progress=lambda done, total: os._exit(DIES))
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        probe.compute()
    assert time.monotonic() - start < 40  # within the timeout of the group
    assert int(probe["train", "a"]["spectrum"].count) == 18


@pytest.mark.parametrize("where", ["before", "while it reads"])
def test_a_process_that_dies_is_an_error_for_the_others(where):
    run(dies_in_compute, 3, "dies", where, dying=(1,))


class Dying(sm.Writer):
    """Ends the process once it has read a layer, if ``dies`` is set."""

    name = "dying"
    keeps_records = True
    dies = False

    def write(self, record):
        for place in record.sums:
            record.sums[place]
            if self.dies:
                os._exit(DIES)


def dies_in_record(rank, world, _, folder, culprit):
    writer = Dying()
    model, probe = probe_of(["shared", f"own{rank}"])
    recorder = sm.Recorder(folder, probe, ["csv", "arrays", writer])
    for _ in range(2):
        for name in model:
            model[name](torch.randn(9, 4).double())
        if recorder.next_epoch == 0:
            recorder.record()
    if rank == 0:
        writer.dies = culprit == 0
    elif rank == culprit:
        # When the first process asks for sums that it is about to write.
        exchange.Agreement.fetch = lambda self, *arguments: os._exit(DIES)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        recorder.record()
    assert time.monotonic() - start < 40  # within the timeout of the group
    assert int(probe["train", "shared"]["spectrum"].count) == 9
    assert recorder.next_epoch == 1


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_process_that_dies_in_a_record_leaves_none_behind(tmp_path, culprit):
    run(dies_in_record, 3, "dies", str(tmp_path), culprit, dying=(culprit,))
    with sm.Recorder(tmp_path, None, ["csv", "arrays"], mode="resume") as recorder:
        assert recorder.next_epoch == 1
    assert {row["epoch"] for row in sm.read_records(tmp_path)} == {0}
    assert [path.name for path in (tmp_path / "arrays").iterdir()] == ["epoch-000000.npz"]


def disk_full_on_the_first(rank, world, folder):
    class Full(sm.Writer):
        name = "full"
        keeps_records = True
        is_full = True

        def write(self, record):
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.seen = {layer for _, layer in record.sums}

    writer = Full()
    model, probe = probe_of(["shared", f"own{rank}"])
    with sm.Recorder(folder, probe, ["csv", writer]) as recorder:
        for name in model:
            model[name](torch.randn(9, 4).double())
        with pytest.raises(OSError, match="cannot record epoch 0"):
            recorder.record()
        assert int(probe["train", "shared"]["spectrum"].count) == 9
        assert recorder.next_epoch == 0
        writer.is_full = False
        values = recorder.record()
        assert {f"spectrum/train/own{k}" for k in range(world)} <= set(values)
        if rank == 0:
            assert writer.seen == {"shared", *(f"own{k}" for k in range(world))}


def test_a_full_disk_on_the_first_process_is_an_error_for_all(tmp_path):
    run(disk_full_on_the_first, 3, str(tmp_path))


def probes_on_one(rank, world):
    rendezvous.PATIENCE = 2
    for _ in range(2):
        if rank == 0:
            model, probe = probe_of(["a"])
            model["a"](torch.randn(9, 4).double())
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=r"a probe on every process.*none on process 1"):
                probe.compute()
            assert time.monotonic() - start < 10
        dist.barrier()
        # This time each process has the probe.
        model, probe = probe_of(["a"])
        model["a"](torch.randn(9, 4).double())
        probe.compute()
        with probe.merged():
            assert int(probe["train", "a"]["spectrum"].count) == 18
        if rank == 1:
            probe["train", "a"].reset()
        values, covariance = probe.compute()["spectrum/train/a"], probe.covariances("train")["a"]
        torch.testing.assert_close(values, torch.linalg.eigvalsh(covariance).flip(0), rtol=1e-9, atol=1e-12)
        with probe.merged():
            assert int(probe["train", "a"]["spectrum"].count) == 9


def test_a_probe_on_some_processes_only_is_an_error_within_seconds():
    run(probes_on_one, 2)


def another_group(rank, world, folder):
    model, probe = probe_of(["a"])
    model["a"](torch.full((3, 4), float(rank)).double())
    metric = sm.CovarianceTraceMetric()
    metric.update(torch.full((3, 4), float(rank)).double())
    before = probe.compute()["spectrum/train/a"], metric.compute()
    dist.barrier()
    dist.destroy_process_group()
    # Another group, in which this process has only its own rows.
    dist.init_process_group("gloo", init_method=f"file://{folder}/{rank}", rank=0, world_size=1)
    after = probe.compute()["spectrum/train/a"], metric.compute()
    assert before[0].sum() > 0 == after[0].sum()
    assert before[1] > 0 == after[1]


def test_merged_sums_do_not_outlive_their_group(tmp_path):
    run(another_group, 2, str(tmp_path))


def test_probes_are_merged_by_name():
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(9, 3, generator=generator).double() for name in "abc"}
    whole_model, whole = probe_of("abc")
    probes = []
    for names in ("ab", "cb"):
        model, probe = probe_of(names)
        probes.append(probe)
        for name in names:
            model[name](rows[name])
            whole_model[name](rows[name])
    model, total = probe_of("abc")
    for probe in probes:
        total.merge_state(probe)
    merged, expected = total.covariances("train"), whole.covariances("train")
    assert list(merged) == list("abc")
    for name, covariance in expected.items():
        torch.testing.assert_close(merged[name], covariance, rtol=1e-12, atol=1e-12)
        assert int(total["train", name]["spectrum"].count) == int(whole["train", name]["spectrum"].count)
    with pytest.raises(ValueError, match="got 'c'"):
        probes[0].merge_state(probes[1])
    other_model, other = probe_of("ab")
    other_model["b"](torch.randn(9, 3).double())
    other_model["a"](torch.randn(9, 5).double())
    before = int(total["train", "b"]["spectrum"].count)
    with pytest.raises(ValueError, match=r"layer 'a' with 3 features, got 5 features"):
        total.merge_state(other)
    assert int(total["train", "b"]["spectrum"].count) == before
    with pytest.raises(TypeError, match="another LayerProbe"):
        total.merge_state(3)
    with pytest.raises(ValueError, match="expected a probe with the metrics"):
        total.merge_state(sm.LayerProbe(other_model, sm.SpectrumMetric(), layers=["a"]))
