"""Runs of earlier releases still work. ``tests/data`` was made by the releases in its names."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import (
    EigenspaceEmbeddingMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    Recorder,
    SaturationMetric,
    insert_projections,
    recompute,
)
from spectralmetrics.cli import main
from tests.recording.runs import read_csv

DATA = Path(__file__).parents[1] / "data"
ADDED = {"0.1.0": ",low,high,step", "0.2.0": ",step"}  # columns added since
RELEASES = tuple(ADDED)


@pytest.fixture(params=RELEASES)
def release(request):
    return request.param


@pytest.fixture
def run(release, tmp_path):
    return Path(shutil.copytree(DATA / f"run-{release}", tmp_path / "run"))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def make_probe(model):
    embedding = EigenspaceEmbeddingMetric(num_components=2, max_samples=6)
    return LayerProbe(model, [SaturationMetric(threshold=0.9), IntrinsicDimensionMetric(), embedding])


def test_its_numbers_are_rebuilt_from_its_arrays(run):
    recorded = [row for row in read_csv(run) if row["statistic"] != "accuracy"]
    rebuilt = recompute(run)
    assert len(rebuilt) == len(recorded) == 3 * 2 * 3 * 2
    for old, new in zip(recorded, rebuilt, strict=True):
        assert [old[key] for key in ("epoch", "stage", "layer", "statistic")] == [
            str(new[key]) for key in ("epoch", "stage", "layer", "statistic")
        ]
        assert float(old["value"]) == new["value"]


def test_its_samples_are_embedded(run):
    rows = recompute(run, statistics="embedding")
    assert [row["value"].shape for row in rows] == [(6, 2)] * 3 * 2 * 2


def test_it_is_resumed(run, release):
    before, added = (run / "records.csv").read_text(), ADDED[release]
    model = make_model()
    with make_probe(model) as probe, Recorder(run, probe, ["csv", "arrays"], mode="resume") as recorder:
        assert recorder.next_epoch == 3
        model(torch.randn(24, 5))
        recorder.record()
    after = (run / "records.csv").read_text().splitlines()
    assert after[0] == before.splitlines()[0] + added
    assert after[1 : len(before.splitlines())] == [
        line + "," * added.count(",") for line in before.splitlines()[1:]
    ]
    assert {row["epoch"] for row in recompute(run)} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"threshold=0.9, got threshold=0.5"):
        Recorder(run, LayerProbe(model, SaturationMetric(threshold=0.5)), mode="resume")


def test_it_is_drawn(run, capsys):
    assert main(["plot", str(run), "--dpi", "40"]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "saturation-epoch-000002.png",
        "saturation-train-epochs.png",
        "saturation-eval-epochs.png",
        "intrinsic_dimension-epoch-000002.png",
        "intrinsic_dimension-train-epochs.png",
        "intrinsic_dimension-eval-epochs.png",
        "spectrum-train-epoch-000002.png",
        "spectrum-eval-epoch-000002.png",
    ]


@pytest.mark.parametrize("release", RELEASES)
def test_a_state_dict_with_inserted_projections(release):
    expected = json.loads((DATA / f"projection-{release}.json").read_text())
    model = make_model()
    insert_projections(model, ["0", "2"])
    model.load_state_dict(torch.load(DATA / f"projection-{release}.pt", weights_only=True))
    torch.testing.assert_close(
        model.eval()(torch.tensor(expected["input"])), torch.tensor(expected["output"]), rtol=1e-5, atol=1e-6
    )


def test_a_run_with_folds_labels_and_a_sketch(tmp_path):
    run = Path(shutil.copytree(DATA / "run-with-folds-0.2.0", tmp_path / "run"))
    recorded = {
        tuple(row[key] for key in ("epoch", "stage", "layer", "statistic")): row
        for row in read_csv(run)
        if row["statistic"] != "accuracy"
    }
    with pytest.warns(UserWarning, match="sketch"):
        rebuilt = recompute(run)
    assert len(rebuilt) == 3 * 2 * (5 + 3)  # two layers, and the means
    for row in rebuilt:
        old = recorded[str(row["epoch"]), row["stage"], row["layer"], row["statistic"]]
        if (row["layer"], row["statistic"]) == ("mean", "intrinsic_dimension"):
            assert (old["value"], row["value"]) == ("nan", 3)  # since 0.3.0 over the layers with a value
            continue
        for key in ("value", "low", "high"):
            before = float(old[key] or "nan")
            after = math.nan if row[key] is None else row[key]
            # Releases of SciPy differ by 1e-11 in the quantiles behind intervals.
            assert after == pytest.approx(before, rel=1e-12 if key == "value" else 1e-9, nan_ok=True), (
                row,
                old,
            )
    assert "(4-12)" in str(sm.summarise_run(run, stage="train"))
    with pytest.warns(UserWarning, match="sketch"):
        assert sm.write_report(run, tmp_path / "report.html").stat().st_size > 50_000
