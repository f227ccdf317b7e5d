"""Compare linear probes from sums with logistic regressions: the order of the layers, and the cost.

Trains the two networks with early downsampling as ``measure.py`` does. Measures for every layer the held-out
accuracy of a logistic regression fitted to the training digits, and the held-out R² of ``LinearProbeMetric``
from one pass over the validation digits; both on maps averaged to at most 4 x 4 positions and on their means.
Seconds are processor time. Every finished pair of network and seed is kept in ``labels.json`` and is not
measured again.

    python -m reproduction.labels [--seeds 3] [--epochs 10] [--networks ResNet-18 sequential]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import threadpoolctl
import torch
from reproduction.measure import arguments, logistic_regressions, measure_missing, pooled, predict, train
from reproduction.networks import NETWORKS, WIDTH
from torch import Tensor, nn

from spectralmetrics import LayerProbe, LinearProbeMetric, SaturationMetric, layer_profile
from spectralmetrics.demo import load_digits

RESULTS = Path(__file__).parent / "labels.json"
MEASURED = ("ResNet-18", "sequential")
"""They train in a quarter of the time of the other two."""
FOLDS, BATCH = 8, 50
"""Twenty batches of the 1,000 validation digits, two or three in each fold."""
FEATURES = {"maps of 4 x 4": 4, "means": 1}


def seconds_of(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The function's result, and its processor time in seconds."""
    started = time.process_time()
    result = work(*arguments)
    return result, time.process_time() - started


def linear_probes(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> dict[str, float]:
    """Held-out R² of all layers from one pass over the data."""
    select = None if size == 1 else {"*": lambda output: pooled(output, size)}
    with LayerProbe(model, LinearProbeMetric(num_classes=10), folds=FOLDS, select=select) as probe:
        with torch.no_grad():
            for some, classes in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                with probe.labels(classes):
                    model(some)
        values = probe.compute("eval")
        return {name: float(values[f"linear_probe/eval/{name}"]) for name in probe.layers}


def measure(network: str, seed: int, epochs: int) -> dict[str, Any]:
    digits = load_digits(seed)
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    train(model, *digits[:2], epochs)
    model.eval()
    images, labels = digits[2:]
    accuracy = float((predict(model, images).argmax(1) == labels).double().mean())
    layers: dict[str, dict[str, float]] = {}
    with LayerProbe(model, SaturationMetric(), max_map_size=None) as probe:
        predict(model, images)
        for name, value in layer_profile(probe.compute("eval"), "saturation", "eval").items():
            layers[name] = {"saturation": float(value)}
    seconds = {"pass": min(seconds_of(predict, model, images, BATCH)[1] for _ in range(3))}
    for features, size in FEATURES.items():
        key = f"linear probe, {features}"
        found = {key: {}}
        for _ in range(3):
            found[key], passed = seconds_of(linear_probes, model, images, labels, size)
            seconds[key] = min(passed, seconds.get(key, passed))
        names = list(found[key])
        key = f"logistic regression, {features}"
        (found[key], _), seconds[key] = seconds_of(logistic_regressions, model, digits, names, size)
        for key, of in found.items():
            for layer, value in of.items():
                layers[layer][key] = value
    return {
        "network": network,
        "seed": seed,
        "width": WIDTH,
        "epochs": epochs,
        "accuracy": accuracy,
        "layers": layers,
        "seconds": seconds,
    }


def main() -> None:
    options = arguments(__doc__, MEASURED, RESULTS)
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    measure_missing(options, measure, lambda run: str(run["seconds"]))


if __name__ == "__main__":
    main()
