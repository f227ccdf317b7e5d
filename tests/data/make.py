"""Write the files of this folder with one release, for the tests of every later release.

python tests/data/make.py 0.3.0      # with that release installed
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

import spectralmetrics as sm

HERE = Path(__file__).parent


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def metrics(max_samples):
    embedding = sm.EigenspaceEmbeddingMetric(num_components=2, max_samples=max_samples)
    return [sm.SaturationMetric(threshold=0.9), sm.IntrinsicDimensionMetric(), embedding]


def write_run(network, probe, target, feed):
    shutil.rmtree(target, ignore_errors=True)
    with sm.Recorder(target, probe, ["csv", "arrays"]) as recorder:
        for epoch in range(3):
            for training in (True, False):
                network.train(training)
                feed()
            recorder.add_scalar("accuracy", epoch / 4, stage="eval")
            recorder.record()


def run(release):
    network = model()
    probe = sm.LayerProbe(network, metrics(6))
    write_run(network, probe, HERE / f"run-{release}", lambda: network(torch.randn(24, 5)))


def run_with_folds(release):
    """Run with folds, labels and a sketched layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    chosen = [sm.IntrinsicDimensionMetric(), sm.CovarianceTraceMetric(), sm.LinearProbeMetric(num_classes=3)]
    probe = sm.LayerProbe(network, chosen, folds=3, sketch_size=4, max_features=8)

    def feed():
        for _ in range(3):
            rows = torch.randn(20, 5)
            with probe.labels(rows[:, :3].argmax(1)):
                network(rows)

    write_run(network, probe, HERE / f"run-with-folds-{release}", feed)


def states(release):
    torch.manual_seed(0)
    one = {
        "saturation": sm.SaturationMetric(threshold=0.9),
        "embedding": sm.EigenspaceEmbeddingMetric(num_components=2, max_samples=8),
        "with folds": sm.CovarianceTraceMetric(folds=3),
        "sketched": sm.CovarianceTraceMetric(sketch_size=2),
    }
    saved, expected = {}, {}
    rows = torch.randn(12, 4)
    for name, metric in one.items():
        metric.persistent(True)
        for batch in rows.split(4):
            metric.update(batch)
        saved[name] = metric.state_dict()
        expected[name] = metric.compute().tolist()
    expected["interval"] = [float(each) for each in one["with folds"].interval()]
    cka = sm.LinearCKAMetric()
    cka.persistent(True)
    cka.update(rows, rows.square())
    saved["cka"], expected["cka"] = cka.state_dict(), cka.compute().tolist()
    network = model()
    probe = sm.LayerProbe(network, [one["saturation"].clone(), one["embedding"].clone()])
    probe.persistent()
    network(torch.randn(12, 5))
    saved["probe"] = probe.state_dict()
    expected["probe"] = {key: value.tolist() for key, value in probe.compute().items()}
    torch.save(saved, HERE / f"state-{release}.pt")
    (HERE / f"state-{release}.json").write_text(json.dumps(expected, indent=1))


def projection(release):
    network = model()
    sm.insert_projections(network, ["0", "2"])
    network(torch.randn(30, 5))
    sm.set_projection_threshold(network, 0.9)
    network.eval()
    rows = torch.arange(10.0).reshape(2, 5) / 5
    expected = {"input": rows.tolist(), "output": network(rows).tolist()}
    torch.save(network.state_dict(), HERE / f"projection-{release}.pt")
    (HERE / f"projection-{release}.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    for make in (run, run_with_folds, states, projection):
        make(sys.argv[1])
