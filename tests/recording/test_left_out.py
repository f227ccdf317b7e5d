"""Layers whose observations were all NaN: a run warns as the probe does, and has no values of them."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.recording.report.collect import collect
from spectralmetrics.recording.saved import SavedRun

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings(
    "ignore:observations with NaN", "ignore:layers that saw nothing", "ignore:nothing was observed"
)
WORDS = "40 rows with NaN or infinities left out"


class Keep(sm.Writer):
    def write(self, record):
        self.spectrum = record.spectrum("eval", "2")
        self.moments = set(record.moments)


@pytest.fixture(params=["covariances", "folds", "a sketch", "marginals"])
def probed(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4)).eval()
    options = {"folds": {"folds": 2}, "a sketch": {"max_features": 3, "sketch_size": 3}}.get(request.param, {})
    metrics = (
        [sm.RootMeanSquareMetric()] if request.param == "marginals" else [sm.SaturationMetric(threshold=0.5)]
    )
    with sm.LayerProbe(model, [*metrics, sm.HistoryMetric()], layers=nn.Linear, **options) as probe:
        yield model, probe


def run_epoch(model, is_broken):
    for rows in torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)):
        model[2].bias.data.fill_(math.nan if is_broken else 0.5)
        model(rows)


@pytest.fixture
def run(probed, tmp_path):
    """Two epochs; in the second, two of three layers return only NaN."""
    (model, probe), keep = probed, Keep()
    writers = ["csv", "arrays", "history", keep]
    with sm.Recorder(tmp_path, probe, writers) as recorder:
        for is_broken in (False, True):
            run_epoch(model, is_broken)
            found = [(each.layer, each.message) for each in probe.findings("eval")]
            recorder.record()
    assert [(layer, words) for layer, words in found if words == WORDS] == [("2", WORDS), ("3", WORDS)]
    assert keep.spectrum is None
    assert keep.moments <= {("eval", "0")}
    return tmp_path


def test_the_findings_are_those_of_the_probe(run):
    summary = sm.summarise_run(run, statistic="rms")
    assert [row.layer for row in summary.rows] == ["0", "2", "3"]
    assert [(row.observations, math.isnan(row.value)) for row in summary.rows[1:]] == [(0, True)] * 2
    assert [str(each) for each in summary.findings if each.severity == "problem"] == [
        f"problem: {layer!r} in : {WORDS}" for layer in ("2", "3")
    ]


def test_there_are_no_values(run):
    for rows in (sm.read_records(run), sm.recompute(run)):
        assert {row["layer"] for row in rows if row["epoch"] == 1} == {"0", "mean"}
    assert [row.non_finite for row in SavedRun(run).history["eval"] if row.layer == "2"][-2:] == [20, 20]
    with np.load(run / "arrays" / "epoch-000001.npz") as arrays:
        of_layer = {name: arrays[name] for name in arrays if name.startswith("eval/2/")}
    assert {int(each) for name, each in of_layer.items() if name.endswith("/count")} <= {0}
    assert all(np.isfinite(each).all() for each in of_layer.values())


def test_the_page_names_them(run, recwarn):
    content = collect({"run": SavedRun(run)}, lambda name, total: None)
    stage, (page,) = content["stages"].index("eval"), content["runs"]
    for layer in ("2", "3"):
        where = (stage, content["layers"].index(layer))
        said = page["stands_out"][(*where, slice(None), 1)]
        assert {page["words"][index] for index in said} == {WORDS}
        assert {page["problems"][index] for index in said} == {WORDS}
        arrays = page["arrays"]
        assert (arrays["observations"][where][1], arrays["non_finite"][where][1]) == (0, 40)
        assert all((table[(*where, slice(None), 1)] == -1).all() for table in arrays["dimensions"])


def test_a_comparison_names_them(run):
    rows = {row["layer"]: row for row in sm.compare(run, epochs=(0, 1))}
    assert rows["2"]["note"] == "all rows with NaN or infinities on the right"
    assert rows["2"]["frechet_distance"] is None
    text = sm.describe_comparison(run, epochs=(0, 1))
    assert f"problem on the right: 2: {WORDS}" in text


def test_pictures_leave_them_out(run, recwarn):
    assert sm.draw_run(run)
    assert not any("finite covariance" in str(each.message) for each in recwarn)


def test_an_epoch_of_nothing_else_is_a_record(probed, tmp_path):
    model, probe = probed
    with sm.Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        run_epoch(model, False)
        recorder.record()
        model[0].bias.data.fill_(math.nan)
        run_epoch(model, True)
        assert recorder.record() == {}
    assert len(sm.summarise_run(tmp_path, statistic="rms").findings) == 3
    assert sm.compare(tmp_path, epochs=(0, 1))[0]["note"].startswith("all rows")
    with sm.Recorder(tmp_path, probe, ["csv", "arrays"], mode="resume") as recorder:
        assert recorder.next_epoch == 2
