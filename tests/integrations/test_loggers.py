"""The numbers that go to experiment loggers, with the real W&B and MLflow, offline."""

import json
import math

import pytest
import torch
from torch import nn

from spectralmetrics import EffectiveRankMetric, LayerProbe, SaturationMetric, SpectrumMetric, loggable
from tests.integrations.rows import Rows

NAMES = ["a:b", "a_b", "a?b", "with space", "é", "..", "slash/in", "%", "x" * 300, "x" * 301]


@pytest.fixture
def values():
    """Values of a model whose layers have names that loggers refuse."""
    torch.manual_seed(0)
    model = nn.Module()
    for name in NAMES:
        model._modules[name] = nn.Linear(4, 3)
    probe = LayerProbe(model, [SaturationMetric(), EffectiveRankMetric(), SpectrumMetric()])
    for layer in model.children():
        layer(torch.randn(32, 4))
    return probe.compute() | {"undefined/train/a:b": torch.tensor(math.nan)}


def test_the_finite_scalars_are_kept_apart(values):
    found = loggable(values)
    finite = [float(each) for each in values.values() if each.numel() == 1 and math.isfinite(each)]
    assert list(found.values()) == finite
    assert len(finite) == 2 * len(NAMES)
    assert all(type(each) is float for each in found.values())


def test_names_that_are_accepted_stay_as_they_are():
    given = {"saturation/eval/model.0": torch.tensor(0.5), "loss": 1, "rank/train/a-b c": torch.tensor([2])}
    assert loggable(given) == {"saturation/eval/model.0": 0.5, "loss": 1.0, "rank/train/a-b c": 2.0}


def test_a_model_that_is_a_layer_and_metrics_of_several_numbers():
    model = nn.Linear(4, 3)
    with LayerProbe(model, {"rows": Rows()}) as probe:
        model(torch.zeros(2, 4))
        assert loggable(probe.compute()) == {"rows/train/Linear": 2.0}
    several = {"rouge/eval/fc": {"1": torch.tensor(0.5), "L": torch.tensor(float("inf")), "s": "text"}}
    assert loggable(several) == {"rouge_1/eval/fc": 0.5}
    assert loggable({"flag": torch.tensor(True), "wave": torch.tensor(1j), "none": torch.ones(0)}) == {
        "flag": 1
    }


def test_mlflow_takes_them(values, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}")
    # Not set_experiment: later tests in this process would use it, in a folder of this test.
    with mlflow.start_run(experiment_id=mlflow.create_experiment("layers")) as run:
        mlflow.log_metrics(loggable(values), step=3)
    logged = mlflow.get_run(run.info.run_id).data.metrics
    assert logged == loggable(values)


@pytest.mark.filterwarnings("ignore")
def test_wandb_takes_them(values, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="layers", mode="offline", dir=str(tmp_path)) as run:
        run.log(loggable(values))
        logged = {key: run.summary[key] for key in loggable(values)}
    assert logged == loggable(values)
    json.dumps(logged)
    assert list(tmp_path.rglob("*.wandb"))
