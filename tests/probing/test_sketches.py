"""Layers too wide for a covariance are sketched."""

import math

import pytest
import torch
from torch import nn

from spectralmetrics import (
    CovarianceMetric,
    CovarianceTraceMetric,
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    HistoryMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    LinearProbeMetric,
    PCAProjection,
    Recorder,
    SaturationMetric,
    compare,
    read_records,
    recompute,
    summarise_run,
    write_report,
)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 10))


def run(model, number=8):
    with torch.no_grad():
        for _ in range(number):
            model(torch.randn(50, 6))


def test_wide_layers_are_sketched_and_others_are_not():
    model = network().eval()
    probe = LayerProbe(model, IntrinsicDimensionMetric(), max_features=50, sketch_size=12)
    exact = LayerProbe(model, IntrinsicDimensionMetric())
    run(model)
    assert probe["eval", "0"].intrinsic_dimension.sketch_size == 12
    assert probe["eval", "2"].intrinsic_dimension.sketch_size is None
    assert {key: int(value) for key, value in probe.compute().items()} == {
        key: int(value) for key, value in exact.compute().items()
    }
    intervals = probe.intervals()
    assert list(intervals) == ["intrinsic_dimension/eval/0"]
    low, high = intervals["intrinsic_dimension/eval/0"]
    assert int(low) == int(high) == 6  # the layer has rank 6


def test_without_a_size_the_warning_says_what_to_do():
    model = network().eval()
    LayerProbe(model, max_features=50, layers="0").reset()
    probe = LayerProbe(model, max_features=50)
    with pytest.warns(UserWarning, match=r"90 features exceed .* a sketch \(sketch_size=512\)"):
        run(model, 1)
    probe.remove()


def test_the_warning_says_what_either_would_take():
    model = nn.Sequential(nn.Linear(2, 2**16))
    probe = LayerProbe(model)  # noqa: F841  # without a name it would be gone
    with pytest.warns(UserWarning, match=r"would take 32\.0 GiB, a sketch \(sketch_size=512\) 0\.25 GiB"):
        model(torch.randn(1, 2))


def test_metrics_that_are_sketches_themselves_are_never_too_wide():
    model = network().eval()
    probe = LayerProbe(model, SaturationMetric(sketch_size=12), max_features=5)
    run(model)
    assert len(probe.compute()) == 2


def test_what_cannot_be_read_of_them_is_left_out_with_a_word():
    model = network().eval()
    metrics = [SaturationMetric(), EffectiveRankMetric(), LinearProbeMetric(2), EigenspaceEmbeddingMetric()]
    probe = LayerProbe(model, metrics, max_features=50, sketch_size=12, folds=2)
    for _ in range(4):
        with probe.labels(torch.arange(50) % 2):
            run(model, 1)
    with pytest.warns(
        UserWarning, match=r"left out: .*'effective_rank' of '0'.*'linear_probe' of '0' \(not read"
    ):
        values = probe.compute()
    assert {key.split("/")[0] for key in values if key.endswith("/2")} == {
        "saturation",
        "effective_rank",
        "linear_probe",
        "embedding",
    }
    assert {key.split("/")[0] for key in values if key.endswith("/0")} == {"saturation", "embedding"}


def test_one_warning_for_all_that_a_sketch_does_not_reach():
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80)).eval()
    probe = LayerProbe(model, max_features=50, sketch_size=4)
    with torch.no_grad():
        model(torch.randn(900, 80))
    with pytest.warns(UserWarning, match=r"sketch of 4 columns does not hold .* of '0', '1', and") as caught:
        values = probe.compute()
    assert len([each for each in caught if "sketch of" in str(each.message)]) == 1
    assert all(value.isnan() for value in values.values())
    summary = probe.summary("eval")
    assert all(math.isnan(row.saturation) and row.low > 1 for row in summary.rows)
    assert "more than" in str(summary)


def test_an_epoch_goes_on_after_a_crash():
    model = network().eval()
    whole, first, second = (LayerProbe(model, max_features=50, sketch_size=12) for _ in range(3))
    for probe in (whole, first, second):
        probe.persistent()
    with second.paused():
        run(model)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(2)
    with first.paused():
        run(model)
    assert second["eval", "0"].saturation.sketch_size == 12
    for key, value in whole.compute().items():
        torch.testing.assert_close(second.compute()[key], value, rtol=1e-9, atol=0)


def test_reset_and_go_on():
    model = network().eval()
    probe = LayerProbe(model, max_features=50, sketch_size=12)
    run(model)
    probe.reset()
    run(model, 3)
    assert int(probe["eval", "0"].saturation.count) == 150
    assert len(probe.compute()) == 2


def test_a_run_is_resumed_whose_first_layer_is_sketched(tmp_path):
    """Metrics that the probe has turned into sketches keep the settings with which the run began."""
    model, states = network(), []
    for mode in ("create", "resume"):
        probe = LayerProbe(model, CovarianceTraceMetric(), max_features=50, sketch_size=12)
        probe.persistent()
        for state in states:
            probe.load_state_dict(state)
        with Recorder(tmp_path, probe, ["csv", "arrays"], mode=mode) as recorder:
            run(model)
            recorder.record(reset=False)
        states.append(probe.state_dict())
    assert {row["epoch"] for row in read_records(tmp_path) if row["layer"] == "0"} == {0, 1}


@pytest.mark.filterwarnings("ignore:values that could not be computed")
def test_a_history_may_come_first():
    """A history keeps marginals, whatever the other metrics keep."""
    values = []
    for history in ({}, {"history": HistoryMetric()}):
        model = network().eval()
        metrics = {**history, "covariance": CovarianceMetric(), "saturation": SaturationMetric()}
        probe = LayerProbe(model, metrics, max_features=50, sketch_size=12)
        run(model)
        values.append(probe.compute())
    without, beside = values
    assert "saturation/eval/0" in without
    assert all(torch.equal(beside[key], value) for key, value in without.items())


@pytest.mark.filterwarnings("ignore:left out the spectrum of '0'")
def test_records_of_sketched_layers(tmp_path):
    model = network().eval()
    probe = LayerProbe(model, [IntrinsicDimensionMetric(), SaturationMetric()], max_features=50, sketch_size=12)
    with Recorder(tmp_path / "run", probe, ["csv", "arrays"]) as recorder:
        for _ in range(2):
            run(model)
            recorder.record()
    recorded = {
        (row["epoch"], row["layer"], row["statistic"]): (row["value"], row["low"], row["high"])
        for row in read_records(tmp_path / "run")
        if row["layer"] != "mean"
    }
    again = {
        (row["epoch"], row["layer"], row["statistic"]): (row["value"], row["low"], row["high"])
        for row in recompute(tmp_path / "run")
        if row["layer"] != "mean"
    }
    assert again == recorded
    assert recorded[0, "0", "intrinsic_dimension"] == (6, 6, 6)
    other = recompute(tmp_path / "run", threshold=0.5, statistics=["intrinsic_dimension"])
    assert all(row["value"] < 6 for row in other if row["layer"] == "0")
    rows = {row["layer"]: row for row in compare(tmp_path / "run", epochs=(0, 1))}
    assert rows["0"]["subspace_overlap"] == pytest.approx(1, abs=1e-6)  # the same six directions
    assert rows["0"]["frechet_distance"] is None
    assert rows["2"]["frechet_distance"] is not None
    assert "sketched" in str(summarise_run(tmp_path / "run", stage="eval"))
    assert write_report(tmp_path / "run", tmp_path / "report.html").exists()


def test_a_projection_of_a_sketch():
    torch.manual_seed(0)
    rows = torch.randn(500, 5) @ torch.randn(5, 70) + 3
    exact, sketched = PCAProjection(70), PCAProjection(70, sketch_size=10)
    exact(rows)
    sketched(rows)
    assert exact.rank == sketched.rank == 5
    torch.testing.assert_close(sketched.eval()(rows), exact.eval()(rows), rtol=1e-4, atol=1e-4)
    small = PCAProjection(70, sketch_size=3)
    small(rows)
    with pytest.raises(RuntimeError, match=r"a sketch of 3 columns holds .* and not 99 %"):
        small.eval()(rows)


def test_progress_and_an_interrupt_without_loss():
    model = nn.Sequential(*[nn.Linear(400, 400) for _ in range(4)]).eval()
    probe = LayerProbe(model)
    with torch.no_grad():
        model(torch.randn(1000, 400))
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe.compute("eval", progress=stop)
    again = []
    values = probe.compute("eval", progress=lambda done, total: again.append((done, total)))
    assert seen == [(1, 8), (2, 8)]
    assert again[0][1] == 2 + 4  # two of the four decompositions remain
    assert again[-1][0] == again[-1][1]
    assert len(values) == 4


def test_the_state_of_a_probe_with_sketches_is_none_of_one_without():
    model = network().eval()
    with_sketches = LayerProbe(model, SaturationMetric(), max_features=50, sketch_size=12)
    run(model)
    with_sketches.persistent()
    without = LayerProbe(model, SaturationMetric())
    without.persistent()
    with pytest.raises(RuntimeError, match=r"sketch_image"):
        without.load_state_dict(with_sketches.state_dict())
