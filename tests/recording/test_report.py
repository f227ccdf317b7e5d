"""Content of a report, and errors in making it. The page itself: test_report_page.py."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmetrics import (
    EigenspaceEmbeddingMetric,
    IntrinsicDimensionMetric,
    Recorder,
    SaturationMetric,
    recompute,
    write_report,
)
from spectralmetrics.cli import main
from spectralmetrics.functional import intrinsic_dimension
from spectralmetrics.recording.report.collect import _in_order as in_order
from spectralmetrics.recording.report.collect import collect
from spectralmetrics.recording.report.slider import UNKNOWN, ZERO, dimensions, points, positions, slider
from spectralmetrics.recording.report.write import pack
from spectralmetrics.recording.saved import SavedRun, run_names
from tests.recording.runs import make_model, make_probe, run_epoch


def record(directory, metrics=None, writers=("csv", "arrays"), epochs=2, layers=3):
    model = make_model(layers)
    with make_probe(model, metrics) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            run_epoch(model, epoch)
            recorder.record()


def content(*directories):
    return collect({str(each): SavedRun(each) for each in directories}, lambda name, total: None)


SPECTRA = st.lists(
    st.sampled_from([0.0, 1e-300, 1e-20, 0.1, 0.25, 0.5, 1.0, 3.0, 1e10]), min_size=1, max_size=30
)


@given(SPECTRA, st.sampled_from(["explained", "delve"]))
def test_the_dimensions_of_the_slider_are_those_of_the_pure_function(values, rule):
    eigenvalues = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    thresholds = slider([1 / 3, 0.9999])
    found = dimensions(eigenvalues, np.array(thresholds), rule)
    assert found.tolist() == [int(intrinsic_dimension(eigenvalues, t, rule)) for t in thresholds]


def test_the_slider_has_what_people_type_and_what_was_recorded():
    found = slider([0.9995, 0.123])
    assert found == sorted(set(found))
    assert {0.5, 0.55, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999, 1.0, 0.9995, 0.123} <= set(found)


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 1000, 65536])
def test_positions_reach_from_the_first_to_the_last(width):
    found = positions(width, 32)
    assert found[0] == 1
    assert found[-1] == width
    assert (np.diff(found) > 0).all()
    assert len(found) <= 32
    assert width > 32 or len(found) == width


def test_points_are_within_their_step():
    eigenvalues = np.sort(np.random.default_rng(0).lognormal(sigma=8, size=50))[::-1].copy()
    eigenvalues[-1] = 0
    found = points(eigenvalues, np.arange(1, 51))
    assert found[-1] == ZERO
    np.testing.assert_allclose(eigenvalues[0] * 10 ** (-found[:-1] / 4096), eigenvalues[:-1], rtol=3e-4)
    assert points(np.zeros(2), np.array([1, 2])).tolist() == [ZERO, ZERO]


@pytest.mark.parametrize(
    "metrics",
    [
        [SaturationMetric(threshold=0.8, rule="delve"), IntrinsicDimensionMetric(center=False)],
        {"own": SaturationMetric(threshold=0.75)},
        [EigenspaceEmbeddingMetric(max_samples=8)],
    ],
    ids=["settings", "another name", "neither"],
)
def test_the_content_at_any_threshold_is_what_recompute_gives(metrics, tmp_path):
    record(tmp_path, metrics)
    page = content(tmp_path)
    [run] = page["runs"]
    moved = {name: entry for name, entry in run["statistics"].items() if entry["kind"]}
    assert set(moved) == {"saturation", "intrinsic_dimension"} | (
        set(metrics) if isinstance(metrics, dict) else set()
    )
    assert page["thresholds"][page["threshold"]] == next(iter(moved.values()))["threshold"]
    for index, threshold in list(enumerate(page["thresholds"]))[::9]:
        rows = [row for row in recompute(tmp_path, threshold, list(moved)) if row["layer"] != "mean"]
        assert len(rows) == len(moved) * 2 * 2 * 3
        for row in rows:
            entry = moved[row["statistic"]]
            where = (page["stages"].index(row["stage"]), page["layers"].index(row["layer"]))
            found = run["arrays"]["dimensions"][entry["family"]][*where, index, row["epoch"]]
            width = run["arrays"]["width"][*where, row["epoch"]]
            assert (found / width if entry["kind"] == "share" else found) == row["value"]


@pytest.mark.filterwarnings("ignore:.*observations:UserWarning")
def test_held_out_dimensions_are_the_other_ends_of_recomputed_intervals(tmp_path):
    metrics = [SaturationMetric(threshold=0.8, rule="delve"), IntrinsicDimensionMetric(center=False)]
    model = make_model()
    with make_probe(model, metrics, folds=2) as probe, Recorder(tmp_path, probe, ["arrays"]) as recorder:
        run_epoch(model, 0, rows=6)
        recorder.record()
    page = content(tmp_path)
    [run] = page["runs"]
    differ = 0
    for index, threshold in list(enumerate(page["thresholds"]))[::9]:
        for row in recompute(tmp_path, threshold):
            if row["layer"] == "mean":
                continue
            family = run["statistics"][row["statistic"]]["family"]
            place = (page["stages"].index(row["stage"]), page["layers"].index(row["layer"]), index, 0)
            ends = sorted(int(run["arrays"][name][family][place]) for name in ("dimensions", "held_out"))
            size = 6 if row["statistic"] == "saturation" else 1
            assert (row["low"], row["high"]) == (ends[0] / size, ends[1] / size)
            differ += ends[0] < ends[1]
    assert differ > 5


@pytest.mark.filterwarnings("ignore:.*observations:UserWarning")
def test_while_a_fold_is_empty_the_other_end_is_unknown(tmp_path):
    model = make_model()
    with make_probe(model, folds=3) as probe, Recorder(tmp_path, probe, ["arrays"]) as recorder:
        run_epoch(model, 0)  # two batches
        recorder.record()
    [run] = content(tmp_path)["runs"]
    [held_out] = run["arrays"]["held_out"]
    assert (held_out == UNKNOWN).all()
    assert (run["arrays"]["dimensions"][0] > 0).all()


def test_what_is_known_of_the_layers(tmp_path):
    record(tmp_path / "now")
    record(tmp_path / "earlier", layers=4)
    path = tmp_path / "earlier" / "recording.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": {}}))
    now, earlier = content(tmp_path / "now", tmp_path / "earlier")["runs"]
    unknown = {"kind": "", "ceiling": None}
    assert now["facts"] == [{"kind": "Linear", "ceiling": 6}] * 3 + [unknown]
    assert earlier["facts"] == [unknown] * 4
    assert "held_out" not in now["arrays"]


def test_epochs_without_arrays_have_none(tmp_path):
    record(tmp_path, epochs=2)
    (tmp_path / "arrays" / "epoch-000000.npz").unlink()
    [run] = content(tmp_path)["runs"]
    assert (run["arrays"]["dimensions"][0][..., 0] == -1).all()
    assert (run["arrays"]["dimensions"][0][..., 1] > 0).all()
    assert run["statistics"]["saturation"]["is_recorded"].all()


def test_arrays_without_a_table(tmp_path):
    record(tmp_path, writers=("arrays",))
    [run] = content(tmp_path)["runs"]
    assert run["epochs"] == [0, 1]
    assert set(run["statistics"]) == {"saturation", "intrinsic_dimension"}


def test_a_covariance_that_cannot_be_decomposed_is_left_out_with_a_warning(tmp_path):
    record(tmp_path, epochs=1)
    path = tmp_path / "arrays" / "epoch-000000.npz"
    arrays = dict(np.load(path))
    arrays["eval/1/covariance"][0, 0] = np.inf
    del arrays["eval/1/eigenvalues"]  # earlier releases saved none
    np.savez(path, **arrays)
    with pytest.warns(UserWarning, match="left out the spectrum of '1' in eval, epoch 0"):
        page = content(tmp_path)
    found = page["runs"][0]["arrays"]["dimensions"][0]
    assert (found[page["stages"].index("eval"), 1] == -1).all()
    assert (found != -1).sum() == found.size - found.shape[2]


def test_runs_of_different_networks_share_their_axes(tmp_path):
    record(tmp_path / "small", layers=2)
    record(tmp_path / "large", layers=4, epochs=3)
    page = content(tmp_path / "small", tmp_path / "large")
    assert page["layers"] == ["0", "1", "2", "3"]
    small, large = (run["arrays"]["width"] for run in page["runs"])
    assert small.shape == (2, 4, 2)
    assert large.shape == (2, 4, 3)
    assert (small[:, 2:] == -1).all()
    assert (small[:, :2] == 6).all()


def test_a_run_of_scalars_alone(tmp_path):
    with Recorder(tmp_path, None, ["csv"]) as recorder:
        recorder.add_scalar("loss", 0.5)
        recorder.record()
    page = content(tmp_path)
    assert page["layers"] == []
    assert [each["name"] for each in page["runs"][0]["scalars"]] == ["loss"]


def test_names_of_runs(tmp_path):
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "x" / "demo", tmp_path / "y" / "demo"]) == ["x/demo", "y/demo"]
    assert run_names([tmp_path / "a", tmp_path / "a"]) == ["a (1)", "a (2)"]


def test_the_order_of_the_layers_of_several_runs():
    assert in_order([["stem", "head"], ["stem", "block", "head", "extra"]]) == [
        "stem",
        "block",
        "head",
        "extra",
    ]
    assert in_order([["a", "b"], ["b", "a"]]) == ["a", "b"]


def test_nothing_of_a_run_is_markup(tmp_path):
    run = tmp_path / "<script>alert(1)<!-- data -->"
    record(run)
    text = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>spectralmetrics: &lt;script&gt;alert(1)&lt;!-- data --&gt;</title>" in text
    assert "<script>alert" not in text
    assert "<!-- " not in text


def test_a_float_that_is_no_json_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack({"a": float("nan")})
    with pytest.raises(TypeError, match="expected JSON or an array, got"):
        pack({"a": {1, 2}})


def test_progress_counts_every_spectrum(tmp_path):
    record(tmp_path)
    seen = []
    write_report(tmp_path, tmp_path / "page.html", progress=lambda *arguments: seen.append(arguments))
    assert len(seen) == 2 * 2 * 3
    assert seen[0] == (f"{tmp_path.name}, epoch 0: 0 in train", 12)


def test_the_command(tmp_path, capsys):
    record(tmp_path / "run")
    record(tmp_path / "other", epochs=1)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    output = tmp_path / "new" / "both.html"
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "other"), "--output", str(output)]) == 0
    assert output.exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: None, "expected a run with a records.csv or arrays"),
        (
            lambda run: (run / "records.csv").write_text("epoch,stage,layer,statistic,value\n"),
            "expected records in",
        ),
        (lambda run: (run / "records.csv").write_text("a,b\n"), "to begin with epoch,stage"),
        (
            lambda run: ((run / "arrays").mkdir(), (run / "arrays/epoch-000000.npz").write_bytes(b"PK")),
            "array file",
        ),
    ],
    ids=["empty", "no records", "another table", "no archive"],
)
def test_what_is_no_run_is_one_line_and_status_two(break_it, message, tmp_path, capsys):
    break_it(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_no_directory_at_all(tmp_path):
    with pytest.raises(ValueError, match="at least one run, got none"):
        write_report([], tmp_path / "page.html")
