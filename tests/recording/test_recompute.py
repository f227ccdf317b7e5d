import numpy as np
import pytest
import torch
from torch import nn

from spectralmetrics import (
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    Recorder,
    SaturationMetric,
    SpectralMetric,
    recompute,
    statistics,
)
from spectralmetrics.cli import main
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import MarginalMetric, base
from tests.metrics.test_properties import VARIANTS
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch

NUMBERS = {
    name: new
    for name, new in VARIANTS.items()
    if name not in ("covariance", "spectrum", "embedding")
    and "spectrum" not in name
    and "covariance_unbiased" not in name
}


def record(directory, metrics, writers=("csv", "arrays"), epochs=2, **options):
    model = make_model(width=8)
    with make_probe(model, metrics, **options) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            run_epoch(model, epoch)
            recorder.record()


def same_rows(left, right, rel=1e-9):
    assert [list(row) for row in left] == [list(row) for row in right]
    for one, other in zip(left, right, strict=True):
        assert [str(one[k]) for k in list(one)[:4]] == [str(other[k]) for k in list(other)[:4]]
        assert float(one["value"]) == pytest.approx(float(other["value"]), rel=rel, abs=1e-300, nan_ok=True)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("rule", ["explained", "delve"])
def test_equals_what_recording_at_that_threshold_would_have_given(threshold, rule, tmp_path):
    def metrics(share):
        return [kind(threshold=share, rule=rule) for kind in (SaturationMetric, IntrinsicDimensionMetric)]

    record(tmp_path / "given", metrics(0.99))
    record(tmp_path / "wanted", metrics(threshold))
    found = recompute(tmp_path / "given", threshold)
    same_rows(found, read_csv(tmp_path / "wanted"), rel=0)
    assert any(
        float(row["value"]) != float(old["value"])
        for row, old in zip(found, read_csv(tmp_path / "given"), strict=True)
    )


def test_every_statistic_with_its_recorded_settings(tmp_path):
    metrics = {name.replace(".", "_"): new() for name, new in NUMBERS.items()}
    record(tmp_path, metrics)
    same_rows(recompute(tmp_path), read_csv(tmp_path))


def test_statistics_that_were_not_recorded(tmp_path):
    record(tmp_path / "given", [SaturationMetric()])
    wanted = [EffectiveRankMetric(center=False), SaturationMetric(threshold=0.7)]
    record(tmp_path / "wanted", wanted)
    same_rows(recompute(tmp_path / "given", statistics=wanted), read_csv(tmp_path / "wanted"))
    found = recompute(tmp_path / "given", statistics={"rankme": EffectiveRankMetric(center=False)})
    assert {row["statistic"] for row in found} == {"rankme"}
    for name, kind in statistics().items():
        if not kind.__module__.startswith("spectralmetrics.") or kind.needs_labels or name == "embedding":
            continue
        if issubclass(kind, MarginalMetric) and not kind().can_read_matrix:
            with pytest.raises(ValueError, match=f"expected marginals for '{name}'; none was recorded"):
                recompute(tmp_path / "given", statistics=name)
        else:
            assert {row["statistic"] for row in recompute(tmp_path / "given", statistics=name)} == {name}


def test_arrays_are_returned_where_they_are_asked_for(tmp_path):
    record(tmp_path, [SaturationMetric(), EigenspaceEmbeddingMetric(max_samples=16)])
    assert {row["statistic"] for row in recompute(tmp_path)} == {"saturation"}
    rows = recompute(tmp_path, statistics=["spectrum", "embedding"])
    shapes = {(row["statistic"], row["value"].shape) for row in rows}
    assert shapes == {("spectrum", (8,)), ("embedding", (16, 2))}


def test_the_embedding_of_the_sample_that_was_kept(tmp_path):
    model = make_model(width=8)
    metrics = [EigenspaceEmbeddingMetric(max_samples=16)]
    with make_probe(model, metrics) as probe, Recorder(tmp_path, probe, ["arrays"]) as recorder:
        run_epoch(model, 0)
        values = recorder.record()
    for row in recompute(tmp_path, statistics=["embedding"]):
        expected = values[f"embedding/{row['stage']}/{row['layer']}"].numpy()
        np.testing.assert_allclose(row["value"], expected, rtol=1e-9, atol=1e-9)


def test_several_thresholds(tmp_path):
    record(tmp_path, [SaturationMetric()], epochs=1)
    rows = recompute(tmp_path, [0.9, 0.5])
    assert [row["statistic"] for row in rows[:2]] == ["saturation@0.9", "saturation@0.5"]
    for share in (0.9, 0.5):
        alone = [row["value"] for row in recompute(tmp_path, share)]
        assert [row["value"] for row in rows if row["statistic"] == f"saturation@{share}"] == alone


class TopShareMetric(SpectralMetric):
    short_name = "top_share_of_tests"

    def __init__(self, num_features=None, threshold=0.5, ks=(0,), weigh=None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.threshold = threshold
        self.ks = ks
        self.weigh = weigh

    def statistic(self, spectrum):
        picked = spectrum.eigenvalues[list(self.ks)]
        return picked.sum() * self.threshold * (1.0 if self.weigh is None else self.weigh(2.0))


def test_settings_of_a_users_own_statistic(tmp_path):
    record(tmp_path / "a", [TopShareMetric(ks=(0, 2))])
    same_rows(recompute(tmp_path / "a"), read_csv(tmp_path / "a"))
    found = recompute(tmp_path / "a", 1.0, TopShareMetric(ks=(0, 2)))
    assert [row["value"] for row in found] == [2 * float(row["value"]) for row in read_csv(tmp_path / "a")]
    record(tmp_path / "b", [TopShareMetric(weigh=lambda x: x), SaturationMetric()])
    with pytest.raises(ValueError, match=r"settings \['weigh'\] of 'top_share_of_tests' could not be recorded"):
        recompute(tmp_path / "b", statistics=["top_share_of_tests"])
    with pytest.warns(UserWarning, match="left out 'top_share_of_tests'"):
        rows = recompute(tmp_path / "b")
    assert {row["statistic"] for row in rows} == {"saturation"}


def test_a_statistic_whose_class_is_not_imported(tmp_path, monkeypatch, capsys):
    record(tmp_path, [TopShareMetric(), SaturationMetric()])
    monkeypatch.delitem(base._STATISTICS, "top_share_of_tests")
    with pytest.raises(ValueError, match="recorded by a class that is not imported"):
        recompute(tmp_path, statistics="top_share_of_tests")
    assert main(["recompute", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "left out 'top_share_of_tests'" in printed.err
    assert printed.err.count("\n") == 1
    assert ",saturation," in printed.out


def test_layers_whose_names_look_alike_stay_apart(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(3, 3)})
            self.add_module("a/b", nn.Linear(3, 3))

        def forward(self, x):
            return self.get_submodule("a/b")(self.a["b"](x)[:10])

    model = Model()
    with LayerProbe(model) as probe, Recorder(tmp_path, probe, ["arrays"]) as recorder:
        model(torch.randn(20, 3))
        recorder.record()
    with np.load(tmp_path / "arrays/epoch-000000.npz", allow_pickle=False) as arrays:
        assert [int(arrays[f"train/{name}/count"]) for name in ("a.b", "a/b")] == [20, 10]
    assert [row["layer"] for row in recompute(tmp_path)] == ["a.b", "a/b", "mean"]


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="writer 'arrays'"):
        recompute(tmp_path)
    record(tmp_path, [SaturationMetric()], epochs=1)
    with pytest.raises(ValueError, match="got 'saturations'"):
        recompute(tmp_path, 0.9, ["saturations"])
    with pytest.raises(ValueError, match=r"got 1\.5"):
        recompute(tmp_path, 1.5)
    with pytest.raises(ValueError, match=r"'embedding' of '0' in train, epoch 0: expected a sample"):
        recompute(tmp_path, statistics="embedding")
    (tmp_path / "arrays" / "epoch-000000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="epoch-000000"):
        recompute(tmp_path)


def test_the_arrays_merge(tmp_path):
    """Two runs over parts of the data, merged by the formula of the docs, are one run over all."""
    parts = [torch.randn(30, 8, dtype=torch.float64) + 5 * k for k in range(2)]
    model = make_model(layers=1, width=8).double()
    for name, batches in (("0", parts[:1]), ("1", parts[1:]), ("all", parts)):
        with make_probe(model) as probe, Recorder(tmp_path / name, probe, ["arrays"]) as recorder:
            for batch in batches:
                model(batch)
            recorder.record()
    saved = {
        name: dict(np.load(tmp_path / name / "arrays/epoch-000000.npz", allow_pickle=False))
        for name in ("0", "1", "all")
    }
    left, right, whole = ({k.rpartition("/")[2]: v for k, v in each.items()} for each in saved.values())
    n, m = int(left["count"]), int(right["count"])
    d = right["mean"] - left["mean"]
    merged = (n * left["covariance"] + m * right["covariance"]) / (n + m) + n * m / (n + m) ** 2 * np.outer(
        d, d
    )
    np.testing.assert_allclose(merged, whole["covariance"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose((n * left["mean"] + m * right["mean"]) / (n + m), whole["mean"], rtol=1e-13)
    assert whole["count"] == n + m
    assert whole["count"].dtype == np.int64
    assert whole["non_finite"] == 0
    expected = np.cov(model(torch.cat(parts)).detach().numpy().T, bias=True)
    np.testing.assert_allclose(whole["covariance"], expected, rtol=1e-10)


def test_the_spectrum_of_a_covariance_reads_it_as_it_is():
    covariance = torch.randn(5, 5, dtype=torch.float64)
    covariance = covariance @ covariance.T / 3
    mean = torch.randn(5, dtype=torch.float64)
    assert torch.equal(Spectrum.of_covariance(covariance, mean, 7).covariance, covariance)
    assert torch.equal(Spectrum.of_covariance(covariance, mean, 1).covariance, covariance)
    uncentred = Spectrum.of_covariance(covariance, mean, 7, center=False)
    torch.testing.assert_close(uncentred.covariance, covariance + torch.outer(mean, mean))
    torch.testing.assert_close(uncentred.variances, (covariance + torch.outer(mean, mean)).diagonal())
