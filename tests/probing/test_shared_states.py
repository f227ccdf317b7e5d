"""Values that readers of a collection get, also inside `merged`, and modules that run several times."""

import copy
import pickle
import weakref

import pytest
import torch
import torchmetrics
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe, Recorder
from spectralmetrics.probing.facts import facts_of


def probed(metrics, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    return model, LayerProbe(model, metrics, **options)


@pytest.mark.parametrize("read", ["collection", "item", "attribute", "interval"])
def test_every_member_reads_what_is_there_now(read):
    metrics = {"a": sm.SaturationMetric(folds=2), "b": sm.CovarianceTraceMetric(folds=2)}
    model, probe = probed(metrics)
    collection = probe["train", "0"]

    def value():
        if read == "collection":
            return collection.compute()["b"]
        if read == "item":
            return collection["b"].compute()
        if read == "attribute":
            return collection.b.compute()
        return torch.stack(collection["b"].interval()).mean()

    for scale in (1, 100, 10_000):
        for _ in range(4):
            model(scale * torch.randn(50, 8))
        seen = value()
        expected = probe.compute()["b/train/0"]
        if read == "interval":
            expected = torch.stack(probe.intervals()["b/train/0"]).mean()
        torch.testing.assert_close(seen, expected)


def test_a_member_that_a_reader_changes_is_changed_alone_and_until_the_next_observation():
    model, probe = probed({"a": sm.SaturationMetric(), "b": sm.CovarianceTraceMetric()})
    collection = probe["train", "0"]
    model(torch.randn(50, 8))
    add = lambda metric: metric.update(torch.randn(7, 6))  # noqa: E731
    for change in (add, add, sm.SpectralMetric.reset):
        member = collection["b"]
        change(member)
        assert int(member.count) != int(collection.a.count) == int(probe.sums("train", "0")[0].count)
        model(torch.randn(50, 8))
        assert int(member.count) == int(collection.a.count) == int(probe.sums("train", "0")[0].count)
    assert int(member.count) == 200


@pytest.mark.parametrize("change", ["merge_state", "load_state_dict", "sharded"])
def test_members_read_before_read_what_the_probe_takes_over(change):
    metrics = {"a": sm.SaturationMetric(), "b": sm.CovarianceTraceMetric(), "c": sm.MaxAbsMetric()}
    (model, probe), (other_model, other) = probed(metrics), probed(metrics)
    for each in (probe, other):
        each.persistent()
    model(torch.randn(50, 8))
    other_model(100 * torch.randn(50, 8))
    collection = probe["train", "0"]
    before = [collection[name].compute() for name in ("b", "c")]
    if change == "merge_state":
        probe.merge_state(other)
    elif change == "load_state_dict":
        probe.load_state_dict(other.state_dict())
    else:
        probe.sharded().load_state_dict(other.sharded().state_dict())
    after, values = [collection[name].compute() for name in ("b", "c")], probe.compute()
    assert after == [values["b/train/0"], values["c/train/0"]]
    assert all(each > other for each, other in zip(after, before, strict=True))


@pytest.mark.parametrize("way", ["update", "forward", "merge_state", "collection"])
def test_members_that_are_all_given_the_same_rows_count_them_once(way):
    model, probe = probed({"a": sm.SaturationMetric(), "b": sm.CovarianceTraceMetric()})
    model(torch.randn(50, 8))
    collection, rows = probe["train", "0"], torch.randn(7, 6)
    for times in (1, 2):
        if way == "collection":
            collection(rows)
        for metric in () if way == "collection" else collection.values():
            given = type(metric)()
            given.update(rows)
            getattr(metric, way)(given if way == "merge_state" else rows)
        assert int(collection.a.count) == int(collection.b.count) == 50 + 7 * times
        assert collection.compute()["b"] == probe.compute()["b/train/0"]
    model(torch.randn(50, 8))
    assert int(collection.b.count) == 114


def test_metrics_that_read_the_sums_of_another_are_made_when_somebody_asks():
    metrics = [sm.SaturationMetric(), sm.CovarianceTraceMetric(), sm.StableRankMetric()]
    model, probe = probed(metrics)
    assert sum(isinstance(each, sm.SpectralMetric) for each in probe.modules()) == 2  # one in each stage
    rows = model(torch.randn(50, 8)).detach()
    collection = probe["train", "0"]
    assert collection is probe["train", "0"]
    for twin in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        for name, metric in zip(("saturation", "covariance_trace", "stable_rank"), metrics, strict=True):
            metric.reset()
            torch.testing.assert_close(twin["train", "0"][name].compute(), metric(rows))
        twin["train", "0"].update(torch.randn(7, 6))
        assert [int(each.count) for each in twin["train", "0"].values()] == [57] * 3
    assert [int(each.count) for each in collection.values()] == [50] * 3


@pytest.mark.filterwarnings("ignore:.*sketch")
def test_metrics_of_a_layer_that_turns_out_wide_read_its_sketch_whenever_they_were_made():
    model, probe = probed([sm.CovarianceTraceMetric(), sm.StableRankMetric()], max_features=4, sketch_size=2)
    early = probe["train", "0"]
    model(torch.randn(50, 8))
    late = copy.deepcopy(probe)["train", "0"]
    for name in ("covariance_trace", "stable_rank"):
        assert early[name].sketch_size == late[name].sketch_size == 2
        assert early[name].compute() == late[name].compute() == probe.compute("train")[f"{name}/train/0"]


def test_members_keep_no_sums_alive_that_are_there_no_more():
    model, probe = probed({"a": sm.SaturationMetric(), "b": sm.CovarianceTraceMetric()})
    model(torch.randn(50, 8))
    member = probe["train", "0"].b
    member.compute()
    seen = weakref.ref(member.second_moment)
    probe["train", "0"].a.reset()
    assert seen() is None


@pytest.mark.parametrize(
    ("kept", "joining"),
    [
        (sm.RootMeanSquareMetric, lambda: sm.HistoryMetric(steps=4)),
        (sm.SaturationMetric, lambda: sm.EigenspaceEmbeddingMetric(num_components=2, max_samples=8)),
    ],
)
@pytest.mark.parametrize("state_of", [lambda probe: probe, LayerProbe.sharded], ids=["whole", "sharded"])
def test_a_state_goes_to_whichever_metric_leads_now(kept, joining, state_of):
    """A state saved under the name of a metric that leads no longer is not lost."""
    model, probe = probed(kept())
    inputs = [torch.randn(30, 8), torch.randn(20, 8)]
    model(inputs[0])
    probe.persistent()
    saved = state_of(probe).state_dict()
    model(inputs[1])
    probe.remove()
    later = LayerProbe(model, [kept(), joining()])
    state_of(later).load_state_dict(saved)
    loaded = later["train", "0"][kept.short_name]
    assert int(loaded.counts()[0]) == 30
    model(inputs[1])
    name = f"{kept.short_name}/train/0"
    torch.testing.assert_close(later.compute()[name], probe.compute()[name], rtol=1e-13, atol=0)
    assert loaded.compute() == later.compute()[name]


@pytest.mark.parametrize("folds", [2, 4])
def test_what_one_forward_shows_of_its_inputs_stays_in_one_fold(folds):
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            return self.cell(self.cell(x))

    model = Unrolled()
    probe = LayerProbe(model, sm.SaturationMetric(folds=folds))
    for size in range(1, 9):
        model(torch.randn(size, 3))
    kept = [int(fold.count) for fold in probe.sums("train", "cell")[0].folds]
    assert kept == [2 * sum(range(1 + turn, 9, folds)) for turn in range(folds)]


def test_merged_nests_and_resets_afterwards(tmp_path):
    model, probe = probed([sm.SaturationMetric()])
    model(torch.randn(40, 8))
    with probe.merged():
        with probe.merged():
            pass
        with pytest.warns(UserWarning, match="ran inside `merged"):
            model(torch.randn(5, 8))
        with Recorder(tmp_path, probe) as recorder:
            recorder.record()
        assert int(probe["train", "0"]["saturation"].count) == 40
    assert int(probe["train", "0"]["saturation"].count) == 0
    model(torch.randn(7, 8))
    assert int(probe["train", "0"]["saturation"].count) == 7


def test_a_layer_that_overflowed_does_not_take_the_others_along(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().eval()
    probe = LayerProbe(model, folds=2)
    for _ in range(4):
        model(torch.randn(40, 4).double())
    model[1](1e200 * torch.randn(40, 3).double())
    assert [row.layer for row in probe.summary().rows] == ["0"]
    with Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder, pytest.warns(UserWarning, match="overflow"):
        recorder.record()
    assert {row["layer"] for row in sm.recompute(tmp_path)} == {"0", "mean"}


def test_arrays_keep_the_folds_of_whichever_metric_has_them(tmp_path):
    model, probe = probed([sm.SaturationMetric(), sm.IntrinsicDimensionMetric(folds=4)])
    for _ in range(8):
        model(torch.randn(30, 8))
    ends = tuple(map(float, probe.intervals()["intrinsic_dimension/train/0"]))
    row = probe.summary("train").rows[0]
    assert (row.low, row.high) == ends
    with Recorder(tmp_path, probe, ["arrays"]) as recorder:
        recorder.record()
    found = sm.recompute(tmp_path, statistics=["intrinsic_dimension"])[0]
    assert (found["low"], found["high"]) == ends


def test_one_observation_is_few_and_kills_no_feature():
    model, probe = probed([sm.SaturationMetric()])
    model(torch.randn(1, 8))
    assert probe.summary("train").rows[0].stands_out == ("few observations",)


def test_a_ceiling_that_is_refuted_is_none():
    class Bent(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    assert facts_of(Bent(2, 64)).ceiling is None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64))
    probe = LayerProbe(model)
    for _ in range(40):  # changing weights
        nn.init.normal_(model[0].weight)
        model(torch.randn(30, 2))
    row = probe.summary("train").rows[0]
    assert row.value > 2
    assert row.ceiling == 64
    assert "at its ceiling" not in row.stands_out


def test_an_interrupted_forward_leaves_nothing_behind():
    class Halting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.halts = False

        def forward(self, x):
            if self.halts:
                raise KeyboardInterrupt
            return self.inner(x)

    model = Halting()
    probe = LayerProbe(model, every_n_steps=4)
    model(torch.randn(5, 3))
    model.halts = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(5, 3))
    model.halts = False
    for _ in range(40):
        model(torch.randn(5, 3))
    seen = int(probe["train", "inner"]["saturation"].count)
    for _ in range(40):
        model.inner(torch.randn(5, 3))
    assert int(probe["train", "inner"]["saturation"].count) == seen + 50


def test_interval_ends_are_values_that_the_statistic_can_have():
    metric = sm.CovarianceTraceMetric(folds=4)
    for scale in (1, 1000, 1, 1):
        metric.update(scale * torch.randn(10, 3))
    assert metric.interval().low >= 0
    metric = sm.CovarianceDeterminantMetric(log=True, folds=4)
    for _ in range(4):
        metric.update(torch.randn(1, 9))
    low, high = metric.interval()
    assert low == -torch.inf
    assert not high.isnan()


@pytest.mark.filterwarnings("ignore:.*was called before:UserWarning")
def test_a_metric_of_another_library_gives_the_value_of_what_was_put_back():
    model, probe = probed({"sum": torchmetrics.SumMetric()})
    total = model(torch.randn(50, 8)).sum()
    metric = probe["train", "0"]["sum"]
    torch.testing.assert_close(metric.compute(), total.detach())
    with probe._without(["train"]):
        assert metric.compute() == 0
    torch.testing.assert_close(metric.compute(), total.detach())
