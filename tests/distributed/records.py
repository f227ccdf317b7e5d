"""Records of models spread over processes: the first process writes sums that it fetches from the others."""

import contextlib
import errno
import os
import re
import signal
import tempfile
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectralmetrics as sm
from spectralmetrics.probing import exchange
from tests.distributed.scenarios import counted_collectives, packed_size
from tests.metrics.properties import assert_same


class Keeper(sm.Writer):
    """Keeps the result of ``read`` for a record."""

    name = "keeper"
    keeps_records = True

    def __init__(self, read=lambda record: None):
        self.read = read

    def write(self, record):
        self.record, self.found = record, self.read(record)


@contextlib.contextmanager
def limits(**values):
    """Inside the context, layers travel in batches of these limits."""
    kept = {name: getattr(exchange, name) for name in values}
    vars(exchange).update(values)
    try:
        yield
    finally:
        vars(exchange).update(kept)


def one_by_one():
    return limits(_BATCH_BYTES=1, _KEPT_BYTES=0, _WORTH_SHARING=0.0)


@contextlib.contextmanager
def counted_decompositions():
    """Widths of all matrices that this process decomposes inside the context."""
    seen = []
    originals = {name: getattr(torch.linalg, name) for name in ("eigvalsh", "eigh")}

    def wrap(name):
        def wrapped(matrix, *rest, **options):
            seen.extend([matrix.shape[-1]] * matrix[..., 0, 0].numel())
            return originals[name](matrix, *rest, **options)

        return wrapped

    for name in originals:
        setattr(torch.linalg, name, wrap(name))
    try:
        yield seen
    finally:
        for name, function in originals.items():
            setattr(torch.linalg, name, function)


def shared_folder(rank):
    told = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(told)
    return Path(told[0])


def outputs_of(rank, world):
    """Rows of each layer on a process: one layer that all have, one of its own."""
    generator = torch.Generator().manual_seed(rank)
    rows = {name: torch.randn(24 + rank, 5, generator=generator).double() for name in ("mean", "b", "c")}
    return rows | {f"own{rank}": torch.randn(16, 7, generator=generator).double()}


def probe_of(names, metrics=None, **arguments):
    """A probe of layers that return their input; one of them has the name of the means."""
    model = nn.ModuleDict({name: nn.Identity() for name in names})
    metrics = metrics or [sm.SpectrumMetric(), sm.HistoryMetric(steps=4), sm.SaturationMetric()]
    return model, sm.LayerProbe(model, metrics, layers="*", exclude="ModuleDict", **arguments)


def observe(model, rows):
    for name, each in rows.items():
        for part in each.split(8):
            model[name](part)


def arrays_in(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def a_record_fetches_a_layer_at_a_time(rank, world):
    """Whatever a writer reads, in any order: the first process holds one batch, which is decomposed once."""
    folder = shared_folder(rank)
    everything = {}
    for each in range(world):
        for name, rows in outputs_of(each, world).items():
            everything.setdefault(name, []).append(rows)
    recorded = ["mean (layer)", "b", "c", *(f"own{each}" for each in range(world))]

    def read(record):
        assert list(record.sums) == [("train", name) for name in recorded]
        assert ("train", "own0") in record.sums
        assert ("train", "nothing") not in record.sums
        assert ("eval", "b") not in record.sums
        with pytest.raises(KeyError):
            record.sums["train", "nothing"]
        first = weakref.ref(record.sums["train", "b"][0].counts)
        found = {}
        for name in [*reversed(recorded), "b"]:
            found[name] = int(record.sums["train", name][0].num_observations)
            assert record.spectrum("train", name).knows("eigenvalues")
            if world > 1 and name == recorded[-1]:
                assert first() is None  # only the last batch is held
        assert {name: each.num_features for (_, name), each in record.moments.items()} == {
            name: 7 if name.startswith("own") else 5 for name in recorded
        }
        return found

    def record(folder, probe, model, rows, keeper):
        with sm.Recorder(folder, probe, ["csv", "arrays", "history", "console", keeper]) as recorder:
            observe(model, rows)
            with counted_decompositions() as decomposed, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return recorder.record(), decomposed

    with one_by_one():
        keeper = Keeper(read)
        model, probe = probe_of(outputs_of(rank, world), folds=2)
        values, decomposed = record(folder / "many", probe, model, outputs_of(rank, world), keeper)
    counts = [None] * world
    dist.all_gather_object(counts, len(decomposed))
    # One for each layer, and one for each of the two held-out folds.
    assert sum(counts) == 3 * len(recorded)
    if rank == 0:
        assert keeper.found == {
            name: sum(map(len, everything[name.removesuffix(" (layer)")])) for name in recorded
        }
        if world > 1:
            with pytest.raises(RuntimeError, match="'b' to be read before `write` returns"):
                keeper.record.sums["train", "b"]
    assert not probe["train", "b"]["spectrum"].update_called  # it starts anew
    # One process with the same rows in the same folds.
    if rank == 0:
        metrics = [sm.SpectrumMetric(), sm.HistoryMetric(steps=4), sm.SaturationMetric()]
        for metric in metrics:
            metric.sync_on_compute = False
        model, alone = probe_of(everything, metrics)
        for name, parts in everything.items():
            for part in parts:
                model[name](part)
        expected = alone.compute()
        for name in everything:
            key = f"spectrum/train/{name}"
            assert_same(values[key.replace("/mean", "/mean (layer)")], expected[key], 1e-9)
        arrays = arrays_in(folder / "many" / "arrays" / "epoch-000000.npz")
        assert {name.split("/")[1] for name in arrays} == set(recorded)
        for name, parts in everything.items():
            place = "train/mean (layer)" if name == "mean" else f"train/{name}"
            rows = torch.cat(parts)
            assert_same(torch.as_tensor(arrays[f"{place}/covariance"]), torch.cov(rows.T, correction=0), 1e-12)
            assert int(arrays[f"{place}/count"]) == len(rows)
            assert_same(
                torch.as_tensor(arrays[f"{place}/eigenvalues"]), expected[f"spectrum/train/{name}"], 1e-9
            )
        assert {row["layer"] for row in sm.read_records(folder / "many")} == {*recorded, "mean"}
        assert (folder / "many" / "history.csv").exists()


def what_no_writer_reads_does_not_travel(rank, world):
    """A record of numbers alone needs the collectives of `compute` and a few flags."""
    if world == 1:
        return
    model, probe = probe_of(["a", "b"], [sm.SpectrumMetric()])
    numbers, whole = ([], [])
    for writers, kept in ((["csv"], numbers), (["csv", "arrays"], whole)):
        with sm.Recorder(shared_folder(rank), probe, writers) as recorder:
            observe(model, {name: torch.randn(200, 60).double() for name in "ab"})
            with counted_collectives() as seen, limits(_BATCH_BYTES=1, _KEPT_BYTES=0):
                recorder.record()
        kept.extend(size for name, size in seen if name == "reduce")
    # The sums of two layers: each goes to the process that reads it, and then to the first one.
    assert (len(numbers), len(whole)) == (2, 4)
    assert max(numbers + whole) == packed_size(60)


def whatever_ends_a_record_is_raised_on_all(rank, world):
    """A full disk, or an interrupt in a writer, progress or an exchange: no trace, and the next call works."""
    folder = shared_folder(rank)
    state = {"step": None}

    def read(record):
        for number, place in enumerate(record.sums):
            record.sums[place]
            if number == 1 and state["step"] == "disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number == 1 and state["step"] == "writer":
                raise KeyboardInterrupt("in the writer")
            if number == 1 and state["step"] == "broken":
                raise ArithmeticError("in the writer")

    model, probe = probe_of(outputs_of(rank, world), folds=2)
    whole = exchange.Agreement.exchange

    def interrupted(self, batch, reader=None):
        if state["step"] == "travel" and rank == state["culprit"]:
            state["calls"] += 1
            if state["calls"] == state["at"]:
                os.kill(os.getpid(), signal.SIGINT)
        return whole(self, batch, reader)

    def stop(done, total):
        raise KeyboardInterrupt("enough")

    layers = 3 + world
    exchange.Agreement.exchange = interrupted
    try:
        with one_by_one(), sm.Recorder(folder, probe, ["csv", "arrays", Keeper(read)]) as recorder:
            observe(model, outputs_of(rank, world))

            def fails(error, words, step, culprit, **more):
                state.update(step=step, culprit=culprit, calls=0, **more)
                is_own = rank == culprit or step in ("disk", "broken")
                expected = error if is_own else RuntimeError
                words = words if is_own else f"process {culprit} raised {error.__name__}.*({words})"
                progress = stop if step == "progress" and rank == culprit else None
                with pytest.raises(expected, match=words):
                    recorder.record(progress=progress)
                state.update(step=None)
                assert recorder.next_epoch == 0
                assert int(probe["train", "b"]["spectrum"].fold_count.sum()) == 24 + rank
                dist.barrier()
                if rank == 0:
                    assert not list(folder.rglob("*.npz")) + list(folder.rglob(".*.tmp"))
                    assert not (folder / "records.csv").exists() or not list(sm.read_records(folder))
                dist.barrier()

            fails(OSError, "cannot record epoch 0", "disk", 0)
            fails(KeyboardInterrupt, "in the writer", "writer", 0)
            fails(ArithmeticError, "in the writer", "broken", 0)
            for culprit in range(world):
                fails(KeyboardInterrupt, "enough", "progress", culprit)
                if world > 1:
                    # While layers travel to those that read them, and while they travel to the first process.
                    fails(KeyboardInterrupt, "^|$", "travel", culprit, at=2)
                    fails(KeyboardInterrupt, "^|$", "travel", culprit, at=layers + 2)
            observe(model, {"b": torch.randn(3, 5).double()})
            values = recorder.record()
            assert recorder.next_epoch == 1
        assert {f"spectrum/train/own{each}" for each in range(world)} <= set(values)
        if rank == 0:
            arrays = arrays_in(folder / "arrays" / "epoch-000000.npz")
            assert int(arrays["train/b/count"]) == sum(27 + each for each in range(world))
    finally:
        exchange.Agreement.exchange = whole


def an_interrupt_from_the_keyboard_waits_for_the_others(rank, world):
    """One process gets Ctrl-C while sums travel: it raises that, others an error, and the next call works."""
    if world == 1:
        return
    model, probe = probe_of(["a", "b"], [sm.SpectrumMetric(), sm.CovarianceTraceMetric()])
    whole = exchange.Agreement.exchange
    state = {"culprit": None}

    def interrupted(self, batch, reader=None):
        if rank == state["culprit"]:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, batch, reader)

    calls = {
        "compute": probe.compute,
        "summary": lambda: probe.summary("train"),
        "iter_merged": lambda: list(probe.iter_merged("train")),
    }
    handler = signal.getsignal(signal.SIGINT)
    exchange.Agreement.exchange = interrupted
    try:
        for name, call in calls.items():
            for culprit in range(world):
                observe(model, {each: torch.randn(20, 6).double() for each in "ab"})
                count = int(probe["train", "a"]["spectrum"].count)
                state["culprit"] = culprit
                words = f"process {culprit} raised KeyboardInterrupt"
                mine = pytest.raises(KeyboardInterrupt)
                with one_by_one(), mine if rank == culprit else pytest.raises(RuntimeError, match=words):
                    call()
                state["culprit"] = None
                assert signal.getsignal(signal.SIGINT) is handler
                assert int(probe["train", "a"]["spectrum"].count) == count, name
                assert len(probe.compute()) == 4
    finally:
        exchange.Agreement.exchange = whole


def groups_agree_on_errors(rank, world):
    """Metrics of several process groups in one probe, and a group of its own for each process."""
    if world < 3:
        return
    some = [0, world - 1]
    group = dist.new_group(some)

    class Fussy(sm.SpectralMetric):
        culprit = None

        def statistic(self, spectrum):
            if dist.get_rank() == self.culprit:
                raise KeyboardInterrupt("in the metric")
            return spectrum.eigenvalues.sum()

    Fussy.short_name = "fussy"  # set after the class body, which would register the name everywhere
    metrics = {"some": sm.CovarianceTraceMetric(process_group=group), "all": Fussy()}
    model, probe = probe_of(["a"], metrics)
    rows = [torch.randn(9 + each, 4, generator=torch.Generator().manual_seed(each)) for each in range(world)]
    observe(model, {"a": rows[rank]})

    def stop(done, total):
        raise KeyboardInterrupt("enough")

    def raises(culprit, words):
        if rank == culprit:
            return pytest.raises(KeyboardInterrupt, match=words)
        return pytest.raises(RuntimeError, match=f"raised.*{words}")

    folder = shared_folder(rank)
    with sm.Recorder(folder, probe, ["csv", "arrays"]) as recorder:
        for culprit in range(world):
            for call in (probe.compute, recorder.record):
                with raises(culprit, "enough"):
                    call(progress=stop if rank == culprit else None)
                Fussy.culprit = culprit
                with raises(culprit, "in the metric"):
                    call()
                Fussy.culprit = None
                assert int(probe["train", "a"]["some"].count) == 9 + rank
        # A width that differs in one group only.
        other, wide = probe_of(["a"], metrics)
        observe(other, {"a": torch.randn(9, 4 + (rank == some[1]))} if rank in some else {})
        with pytest.raises((ValueError, RuntimeError), match=r"4 on process 0.*5 on process"):
            wide.compute()
        values = recorder.record()
    together = torch.cat(rows).double()
    assert_same(values["all/train/a"], together.var(0, correction=0).sum(), 1e-6)
    if rank in some:
        together = torch.cat([rows[each] for each in some]).double()
        assert_same(values["some/train/a"], together.var(0, correction=0).sum(), 1e-6)
    # Each process has one of two groups, and the first process of each group writes into its directory.
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    mine = rank >= world // 2
    model, probe = probe_of(["a", "b"], [sm.CovarianceTraceMetric(process_group=groups[mine])])
    observe(model, dict.fromkeys("ab", rows[rank]))
    folder = shared_folder(rank) / f"{int(mine)}"
    with one_by_one(), sm.Recorder(folder, probe, ["csv", "arrays"]) as recorder:
        for culprit in halves[mine]:
            with raises(culprit, "enough"):
                recorder.record(progress=stop if rank == culprit else None)
        values = recorder.record()
    expected = torch.cat([rows[each] for each in halves[mine]]).double()
    assert_same(values["covariance_trace/train/a"], expected.var(0, correction=0).sum(), 1e-6)
    assert int(arrays_in(folder / "arrays" / "epoch-000000.npz")["train/a/count"]) == len(expected)
    with pytest.raises(OSError, match="holds records"):
        sm.Recorder(folder, probe)
    dist.barrier()


def layers_of_nan_are_in_the_run(rank, world):
    """Of all processes, or of the last one, whose rows are left out and counted; runs say what probes say."""
    nan = torch.full((9, 4), float("nan"))
    model, probe = probe_of(["everywhere", "somewhere", "fine"], [sm.SaturationMetric(), sm.SpreadMetric()])
    fine = torch.randn(40, 4, generator=torch.Generator().manual_seed(rank))
    model["everywhere"](nan)
    model["somewhere"](nan if rank == world - 1 else fine)
    model["fine"](fine)
    findings, summary = probe.findings("train"), probe.summary("train")
    counts = {"everywhere": 9 * world, "somewhere": 9}
    problems = [each for each in findings if each.severity == "problem"]
    assert [(each.layer, each.kind, each.value) for each in problems] == [
        (layer, "non_finite", count) for layer, count in counts.items()
    ]
    folder = shared_folder(rank)
    words = ", ".join(f"{count} of {layer!r}" for layer, count in counts.items())
    probe._warned.add("train: 'everywhere'" if world > 1 else "train: 'everywhere', 'somewhere'")
    with sm.Recorder(folder, probe, ["csv", "arrays"]) as recorder, pytest.warns(UserWarning, match=words):
        values = recorder.record(reset=False)
    dist.barrier()
    run = sm.summarise_run(folder, stage="train")
    for each in (summary, run):
        assert [(row.layer, row.observations) for row in each.rows] == [
            ("everywhere", 0), ("somewhere", 40 * (world - 1)), ("fine", 40 * world)
        ]  # fmt: skip
        assert [row.stands_out[0] for row in each.rows[:2]] == [
            f"{count} rows with NaN or infinities left out" for count in counts.values()
        ]
    assert str(run).splitlines()[1:] == str(summary).splitlines()[1:]
    layers = {key.split("/")[2] for key in values if key.startswith("saturation/")} - {"mean"}
    assert layers == ({"somewhere", "fine"} if world > 1 else {"fine"})


def a_record_knows_which_weights_are_new_on_whichever_process_they_are(rank, world):
    """A small variance is a note while weights are new, also of a layer of another process."""
    generator = torch.Generator().manual_seed(rank)
    for merges in (True, False):
        torch.manual_seed(0)
        last = f"own{world - 1}"
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("everywhere", f"own{rank}")})
        probe = sm.LayerProbe(model, [sm.SaturationMetric(sync_on_compute=merges)])
        folder = shared_folder(rank)
        with sm.Recorder(folder, probe, ["csv", "arrays"]) as recorder:
            for epoch in range(3):
                if epoch == 1 and last in model:
                    model[last].weight.data.add_(0.1)
                scale = 1e-3 if rank or world == 1 else 1.0  # variances that differ between processes
                model["everywhere"](1 + scale * torch.randn(400, 8, generator=generator))
                model[f"own{rank}"](1 + 1e-3 * torch.randn(400, 8, generator=generator))
                severities = {e.layer: e.severity for e in probe.findings("train") if e.kind == "collapsed"}
                assert severities[f"own{rank}"] == ("problem" if epoch and last in model else "note")
                recorder.record()
                dist.barrier()
                found = sm.summarise_run(folder, stage="train").findings
                severities = {e.layer: e.severity for e in found if e.kind == "collapsed"}
                severities.pop("everywhere", None)
                expected = {f"own{each}": "note" for each in range(world)}
                assert severities == expected | ({last: "problem"} if epoch else {})
                dist.barrier()


def what_the_members_of_a_group_do_waits_for_nobody_else(rank, world):
    """A recorder and a monitor that only the members of a group make do not wait for other processes."""
    if world == 1:
        return
    members = list(range(1, world))
    group = dist.new_group(members)
    folder = shared_folder(rank)
    if rank in members:
        model, probe = probe_of(["a"], [sm.RootMeanSquareMetric(process_group=group)])
        writer = Keeper(lambda record: len(record.sums["train", "a"]))
        with sm.Recorder(folder, probe, ["csv", writer]) as recorder:
            monitor = sm.Monitor(probe, every=1, recorder=recorder)
            for step in range(3):
                model["a"](torch.full((9, 4), float("nan") if step == 2 else float(rank)))
                is_told = step == 2 and rank == 1
                with pytest.warns(UserWarning, match="NaN") if is_told else contextlib.nullcontext():
                    alarms = monitor.step()
            assert len(alarms) == 1
            recorder.add_scalar("speaker", rank)
            with pytest.warns(UserWarning, match="NaN or infinite"):
                values = recorder.record()
            assert recorder.next_epoch == 1
        assert_same(values["rms/train/a"], torch.tensor(members).double().square().mean().sqrt(), 1e-6)
        assert values["speaker"] == rank
        assert hasattr(writer, "found") == (rank == 1)
        kept = {row["statistic"]: row["value"] for row in sm.read_records(folder)}
        assert kept["speaker"] == 1
        assert len((folder / "alarms.csv").read_text().splitlines()) == 2  # with its head
    dist.barrier()


def arguments_of_one_process_are_an_error_on_all(rank, world):
    """Different arguments: an error that names both, and the next call works. A wrong one: no process waits."""
    if world == 1:
        return
    last = world - 1
    differs = rank == last

    def raises(*calls):
        told = [f"{call} on process {each}" for call, each in zip(calls, (0, last), strict=True)]
        return pytest.raises(ValueError, match=re.escape(" and ".join(told)))

    model, probe = probe_of(["a"])
    observe(model, {"a": torch.randn(40, 4, generator=torch.Generator().manual_seed(rank)).double()})
    for _ in range(2):
        with raises("summary(statistic='effective_rank')", "summary(statistic='stable_rank')"):
            probe.summary("train", "stable_rank" if differs else "effective_rank")
        with raises("covariances(unbiased=False, center=False)", "covariances(unbiased=False, center=True)"):
            probe.covariances("train", center=differs)
        with raises("compute", "findings"):
            probe.findings("train") if differs else probe.compute("train")
        assert probe.summary("train", "effective_rank").rows
    for its in (probe, None):
        folder = shared_folder(rank)
        with sm.Recorder(folder, its) as recorder:
            recorder.add_scalar("loss", 1)
            for name, values in {"epoch": (0, 1), "step": (None, 2), "reset": (True, False)}.items():
                settings = [{"epoch": 0, "step": None, "reset": True} | {name: value} for value in values]
                calls = (", ".join(f"{key}={value}" for key, value in each.items()) for each in settings)
                with raises(*(f"record({each})" for each in calls)):
                    recorder.record(**settings[differs])
            assert recorder.next_epoch == 0
            recorder.record(reset=False)
            recorder.add_scalar("loss", 2)
            with pytest.raises(ValueError if differs else RuntimeError, match="recorded one, 0, got 0"):
                recorder.record(0 if differs else 1)
            recorder.record(1, reset=False)
        if rank == 0:
            assert {row["epoch"] for row in sm.read_records(folder)} == {0, 1}
        dist.barrier()


SCENARIOS = [
    layers_of_nan_are_in_the_run,
    a_record_knows_which_weights_are_new_on_whichever_process_they_are,
    arguments_of_one_process_are_an_error_on_all,
    a_record_fetches_a_layer_at_a_time,
    what_no_writer_reads_does_not_travel,
    whatever_ends_a_record_is_raised_on_all,
    an_interrupt_from_the_keyboard_waits_for_the_others,
    groups_agree_on_errors,
    what_the_members_of_a_group_do_waits_for_nobody_else,
]
