"""A kind of sum from outside the package, in one file (``toy.py``): all other code works with it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from spectralmetrics import CovarianceMetric, LayerProbe, Observations, Recorder, SaturationMetric, recompute
from spectralmetrics.sums import Intake, SpectralSum, Sum, intake
from spectralmetrics.sums.about_origin import AboutOrigin
from spectralmetrics.sums.folds import InFolds
from tests.metrics import properties
from tests.metrics.properties import assert_same, feed
from tests.oracles import random_rows
from tests.sums.toy import CrestFactorMetric, Extremes, crest_factor


def test_by_hand():
    rows = random_rows(0, 70, 5, mean=3.0)
    metric = CrestFactorMetric()
    for part in rows.split(9):
        metric.update(part)
    assert_same(metric.compute(), crest_factor(rows))
    assert isinstance(metric.sums[1], Extremes)
    assert torch.equal(metric.largest_magnitude, rows.abs().amax(0))
    metric.reset()
    assert_same(feed(metric, rows[:20]).compute(), crest_factor(rows[:20]))


@pytest.mark.parametrize("check", properties.ON_METRIC, ids=lambda check: check.__name__)
def test_it_passes_the_shared_metric_tests(check):
    check(CrestFactorMetric)


def test_forward_gives_the_batch_and_keeps_the_rest():
    rows = random_rows(0, 60, 4, mean=10.0)
    metric = CrestFactorMetric()
    for part in rows.split(20):
        assert_same(metric(part), crest_factor(part))
    assert_same(metric.compute(), crest_factor(rows))


def test_merging_copying_and_saving():
    rows = random_rows(0, 60, 4)
    left, right = feed(CrestFactorMetric(), rows[:25]), feed(CrestFactorMetric(), rows[25:])
    left.persistent(True)
    twin, pickled, loaded = copy.deepcopy(left), pickle.loads(pickle.dumps(left)), CrestFactorMetric()
    loaded.load_state_dict(left.state_dict())
    for metric in (twin, pickled, loaded):
        metric.merge_state(right)
        assert_same(metric.compute(), crest_factor(rows))
    assert_same(left.compute(), crest_factor(rows[:25]))
    empty = CrestFactorMetric()
    empty.merge_state(right.metric_state)
    assert_same(empty.compute(), crest_factor(rows[25:]))


def test_folds_and_other_layouts():
    maps = torch.randn(6, 3, 5, 4, dtype=torch.float64)
    rows = maps.movedim(1, -1).reshape(-1, 3)
    metric = CrestFactorMetric(folds=3)
    for part in maps.split(2):
        metric.update(Observations(part, feature_dim=1))
    assert_same(metric.compute(), crest_factor(rows))


def test_in_a_collection_it_does_not_share_what_others_have_not():
    collection = MetricCollection([CrestFactorMetric(), SaturationMetric(), CovarianceMetric()])
    rows = random_rows(0, 60, 4)
    for part in rows.split(20):
        collection.update(part)
    groups = sorted(sorted(names) for names in collection.compute_groups.values())
    assert groups == [["CovarianceMetric", "SaturationMetric"], ["CrestFactorMetric"]]
    assert_same(collection.compute()["CrestFactorMetric"], crest_factor(rows))


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def batches():
    return torch.randn(3, 300, 4).unbind()  # too many rows to wait


def outputs(model, batches):
    inputs = torch.cat(batches)
    with torch.no_grad():
        return {"0": model[0](inputs), "2": model(inputs)}


@pytest.mark.parametrize("others", [[SaturationMetric()], [SaturationMetric(), CovarianceMetric()]], ids=len)
def test_a_probe_accumulates_once_for_all(model, batches, others, monkeypatch):
    calls = []
    accumulate = intake.accumulate
    monkeypatch.setattr(intake, "accumulate", lambda *args, **how: calls.append(1) or accumulate(*args, **how))
    probe = LayerProbe(model, [*others, CrestFactorMetric()])
    for batch in batches:
        model(batch)
    values = probe.compute()
    assert len(calls) == 2 * len(batches)  # layers times forwards
    assert len(probe["train", "0"].compute_groups) == 1
    for layer, rows in outputs(model, batches).items():
        assert_same(values[f"crest_factor/train/{layer}"], crest_factor(rows), 1e-6)
        assert_same(values[f"saturation/train/{layer}"], feed(SaturationMetric(), rows).compute())
        assert [type(each).__name__ for each in probe.sums("train", layer)] == ["Moments", "Extremes"]


def test_a_probe_that_goes_on_from_a_state(model, batches):
    metrics = [SaturationMetric(), CrestFactorMetric()]
    first, second = LayerProbe(model, metrics), LayerProbe(model, metrics)
    first.persistent()
    second.persistent()
    with second.paused():
        model(batches[0])
    first.remove()
    second.load_state_dict(first.state_dict())
    for batch in batches[1:]:
        model(batch)
    for layer, rows in outputs(model, batches).items():
        assert_same(second.compute()[f"crest_factor/train/{layer}"], crest_factor(rows), 1e-6)


def test_a_run_keeps_it_and_recomputes_from_it(model, batches, tmp_path):
    probe = LayerProbe(model, [SaturationMetric(), CrestFactorMetric()])
    with Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        for batch in batches:
            model(batch)
        values = recorder.record()
    names = {
        name for name in np.load(tmp_path / "arrays" / "epoch-000000.npz").files if name.startswith("train/0/")
    }
    assert names == {
        f"train/0/{each}"
        for each in ("covariance", "eigenvalues", "mean", "count", "non_finite", "largest_magnitudes")
    }
    rows = recompute(tmp_path, statistics="crest_factor")
    found = {row["layer"]: row["value"] for row in rows if row["layer"] != "mean"}
    assert set(found) == {"0", "2"}
    for layer, rows in outputs(model, batches).items():
        np.testing.assert_allclose(found[layer], values[f"crest_factor/train/{layer}"], rtol=1e-12)
        np.testing.assert_allclose(found[layer], crest_factor(rows), rtol=1e-6)


def test_a_run_without_it_says_what_is_missing(model, batches, tmp_path):
    with Recorder(tmp_path, LayerProbe(model), ["arrays"]) as recorder:
        model(batches[0])
        recorder.record()
    wanted = r"'crest_factor' of '0' in train, epoch 0: expected largest magnitudes for 'crest_factor'; none"
    with pytest.raises(ValueError, match=wanted):
        recompute(tmp_path, statistics="crest_factor")


REQUIRED = {
    Sum: {"empty", "exchange", "intake", "merged", "num_features"},
    SpectralSum: {
        *("empty", "exchange", "intake", "merged", "num_features", "num_observations", "num_left_out"),
        *("in_range", "mean", "centred", "variances", "covariance", "eigenvalues", "eigenvectors"),
    },
    InFolds: {"empty"},
    AboutOrigin: {
        *("empty", "intake", "about", "squares"),
        *("covariance", "eigenvalues", "eigenvectors"),
    },
    Intake: {"add"},
}


@pytest.mark.parametrize("base", REQUIRED, ids=lambda base: base.__name__)
def test_what_a_kind_must_have_is_asked_for_where_it_is_made(base):
    assert base.__abstractmethods__ == REQUIRED[base]
    for name in base.__abstractmethods__:
        lacking = type("Lacking", (base,), dict.fromkeys(base.__abstractmethods__ - {name}))
        with pytest.raises(TypeError, match=f"abstract method '?{name}'?"):
            lacking()
