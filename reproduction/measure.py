"""Train four networks on the real MNIST digits with several seeds and measure every layer.

For each network and seed: the accuracy on held-out digits; for every layer, on the held-out digits, the
saturation, intrinsic dimension and effective rank by ``LayerProbe``, the accuracy of a logistic regression on
its pooled features, and the time of each; receptive fields; and saturations by the delve package.
Every finished pair of network and seed is kept in ``results.json`` and is not measured again.

    python -m reproduction.measure [--seeds 3] [--epochs 10] [--networks ResNet-18 ...]
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import describe_machine
from reproduction.networks import EXAMPLE, NETWORKS, WIDTH
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics import (
    EffectiveRankMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    SaturationMetric,
    border_layer,
    receptive_fields,
)
from spectralmetrics.demo import load_digits

RESULTS = Path(__file__).parent / "results.json"
POOLED = 4
"""Maps are averaged to at most 4 x 4 positions before a logistic regression sees them, as in the papers."""
BATCH = 250


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


def predict(model: nn.Module, images: Tensor, batch: int = BATCH) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch)])


def timed_predictions(model: nn.Module, images: Tensor, batch: int = BATCH) -> float:
    started = time.perf_counter()
    predict(model, images, batch)
    return time.perf_counter() - started


def spectra(model: nn.Module, images: Tensor) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Statistics of every layer, and the seconds of each statistic when it is the only one."""
    metrics = {
        "saturation": SaturationMetric(),
        "intrinsic dimension": IntrinsicDimensionMetric(),
        "effective rank": EffectiveRankMetric(),
    }
    with LayerProbe(model, metrics, max_map_size=None) as probe:
        predict(model, images)
        values = probe.compute("eval")
        layers = {
            layer: {name: float(values[f"{name}/eval/{layer}"]) for name in metrics}
            | {"observations": int(probe["eval", layer]["saturation"].count)}
            for layer in probe.layers
        }
    timed_predictions(model, images)
    seconds = {}
    for name, metric in metrics.items():
        with LayerProbe(model, {name: metric}, max_map_size=None) as probe:
            predict(model, images)  # the first updates also move the origin and allocate memory
            probe.reset()
            with probe.paused():
                plain = min(timed_predictions(model, images) for _ in range(3))
            started = time.perf_counter()
            predict(model, images)
            probe.compute()
            seconds[name] = max(time.perf_counter() - started - plain, 0.0)
    return layers, seconds


def pooled(output: Tensor, size: int = POOLED) -> Tensor:
    """Maps averaged to at most ``size`` positions in each direction, as rows."""
    if output.ndim != 4:
        return output
    return functional.adaptive_avg_pool2d(output, [min(size, extent) for extent in output.shape[2:]]).flatten(1)


def pooled_features(
    model: nn.Module, images: Tensor, layers: list[str], size: int = POOLED
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def hook(layer: str) -> Any:
        def pool(module: nn.Module, args: object, output: Tensor) -> None:
            parts[layer].append(pooled(output, size))

        return pool

    handles = [model.get_submodule(layer).register_forward_hook(hook(layer)) for layer in layers]
    predict(model, images)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(of) for layer, of in parts.items()}


def logistic_regressions(
    model: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor], layers: list[str], size: int = POOLED
) -> tuple[dict[str, float], float]:
    """Held-out accuracy of a logistic regression on each layer's features, and the seconds of all of them."""
    images, labels, validation_images, validation_labels = digits
    started = time.perf_counter()
    features = pooled_features(model, images, layers, size)
    validation = pooled_features(model, validation_images, layers, size)
    accuracy = {}
    for layer in layers:
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # accuracies have settled long before
            regression.fit(features[layer].numpy(), labels.numpy())
        accuracy[layer] = float(regression.score(validation[layer].numpy(), validation_labels.numpy()))
    return accuracy, time.perf_counter() - started


def as_delve_reports(model: nn.Module, images: Tensor, batch: int) -> dict[str, float]:
    """Saturation of every layer from the delve package, without interpolation."""
    import delve  # sets up logging when imported

    logging.getLogger("delve").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/delve"
        tracker = delve.SaturationTracker(
            target, save_to="csv", modules=model, stats=["lsat"], device="cpu", interpolation_strategy=None
        )
        predict(model, images, batch)
        tracker.add_saturations()
        tracker.close()
        for module in model.modules():
            module._forward_hooks.clear()
        with open(f"{target}.csv", newline="") as file:
            row = next(csv.DictReader(file, delimiter=";"))
    prefix = "eval-saturation_"
    return {
        key.removeprefix(prefix).replace("-", "."): float(value)
        for key, value in row.items()
        if key.startswith(prefix)
    }


def by_the_rule_of_delve(model: nn.Module, images: Tensor, batch: int) -> dict[str, float]:
    with LayerProbe(model, SaturationMetric(rule="delve"), max_map_size=None) as probe:
        predict(model, images, batch)
        values = probe.compute("eval")
        return {layer: float(values[f"saturation/eval/{layer}"]) for layer in probe.layers}


def compare_with_delve(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Saturations by both, in one batch and in several, of which delve 0.1.50 keeps only the last."""
    return {
        "delve, one batch": as_delve_reports(model, images, len(images)),
        "rule, one batch": by_the_rule_of_delve(model, images, len(images)),
        "delve, batches": as_delve_reports(model, images, BATCH),
        "rule, last batch": by_the_rule_of_delve(model, images[-BATCH:], BATCH),
        "rule, batches": by_the_rule_of_delve(model, images, BATCH),
    }


def measure(network: str, seed: int, epochs: int) -> dict[str, Any]:
    digits = load_digits(seed)
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    started = time.perf_counter()
    train(model, *digits[:2], epochs)
    seconds = {"training": time.perf_counter() - started}
    model.eval()
    images, labels = digits[2:]
    predictions = predict(model, images)
    layers, of_spectra = spectra(model, images)
    fields = receptive_fields(model, EXAMPLE)
    regressions, seconds["logistic regression"] = logistic_regressions(model, digits, list(layers))
    comparison = compare_with_delve(model, images)
    for layer, values in layers.items():
        values["logistic regression"] = regressions[layer]
        values |= {name: saturations[layer] for name, saturations in comparison.items()}
        values["largest field"] = _finite(fields[layer].largest[0])
        values["smallest field"] = _finite(fields[layer].smallest[0])
    return {
        "network": network,
        "seed": seed,
        "width": WIDTH,
        "epochs": epochs,
        "accuracy": float((predictions.argmax(1) == labels).double().mean()),
        "loss": float(functional.cross_entropy(predictions, labels)),
        "border": {paths: border_layer(fields, 32, paths=paths) for paths in ("largest", "smallest")},
        "layers": layers,
        "seconds": seconds | of_spectra,
    }


def _finite(extent: float) -> float | None:
    return None if math.isinf(extent) else extent


def arguments(description: str | None, networks: Collection[str], results: Path) -> argparse.Namespace:
    """Read the command line: networks to train, and the file of results."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(networks))
    parser.add_argument("--results", type=Path, default=results)
    return parser.parse_args()


def measure_missing(
    options: argparse.Namespace,
    measure: Callable[[str, int, int], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
) -> None:
    """Measure the runs missing from the results, and save each at once.

    Args:
        options: see :func:`arguments`.
        measure: function of a network, a seed and a number of epochs; returns a run.
        describe: function of a run; returns a line to print.
    """
    kept = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    for seed in range(options.seeds):
        for network in options.networks:
            wanted = {"network": network, "seed": seed, "width": WIDTH, "epochs": options.epochs}
            if any(wanted.items() <= run.items() for run in kept):
                continue
            run = measure(network, seed, options.epochs)
            kept.append(run)
            print(f"{network}, seed {seed}: accuracy {run['accuracy']:.3f}, {describe(run)}", flush=True)
            options.results.write_text(
                json.dumps({"machine": describe_machine(), "runs": kept}, indent=1) + "\n"
            )


def main() -> None:
    measure_missing(
        arguments(__doc__, NETWORKS, RESULTS),
        measure,
        lambda run: f"trained {run['seconds']['training'] / 60:.1f} min",
    )


if __name__ == "__main__":
    main()
