"""Values that are written are read back unchanged."""

import torch

from spectralmetrics import CovarianceMetric, Recorder, SpectrumMetric
from spectralmetrics.functional import eigenvalues
from spectralmetrics.recording.record import RecordKey, Row
from spectralmetrics.recording.writers.arrays import read_layers, saved_records
from spectralmetrics.recording.writers.csv import format_rows, read_rows
from tests.recording.runs import make_model, make_probe, run_epoch


def test_a_table_of_rows(tmp_path):
    rows = [Row(0, "eval", "a,b", "saturation", 0.1 + 0.2, 0.1, float("inf")), Row(7, "", "", "loss", 3)]
    (tmp_path / "table.csv").write_bytes(format_rows(rows))
    assert read_rows(tmp_path / "table.csv") == rows
    assert format_rows([row._asdict() for row in rows]) == format_rows(rows)
    assert format_rows(rows) == format_rows([]) + format_rows(rows, header=False)


def test_a_spectrum_is_about_the_mean_unless_it_is_asked_for_about_zero(tmp_path):
    model = make_model()
    metrics = {"about mean": CovarianceMetric(), "about zero": SpectrumMetric(center=False)}
    with make_probe(model, metrics) as probe, Recorder(tmp_path, probe, "arrays") as recorder:
        run_epoch(model, 0)
        values = recorder.record()
    layers = list(read_layers(saved_records(tmp_path)[RecordKey(0)]))
    assert [(each.stage, each.layer) for each in layers] == [(s, k) for s in ("train", "eval") for k in "012"]
    for layer in layers:
        where = f"{layer.stage}/{layer.layer}"
        expected = eigenvalues(values[f"about mean/{where}"])
        torch.testing.assert_close(layer.spectrum().eigenvalues, expected)
        torch.testing.assert_close(layer.spectrum(False).eigenvalues, values[f"about zero/{where}"])
        assert layer.spectrum(False).eigenvalues[0] > 1.1 * expected[0]  # the mean is not zero
