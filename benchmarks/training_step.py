"""Added time per training step of a probe on every layer: Delve beside ours, arms interleaved in one run.

    python benchmarks/training_step.py [--models mlp vgg resnet] [--rounds 5] [--steps 24]

Each round runs every arm for some steps and takes the mean step; added time is relative to the same round's
plain arm. Reported are medians over rounds, with the least and the largest.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import delve
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import demo


def mlp():
    widths = [784, 1024, 1024, 1024, 1024]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 784)


def vgg():
    layers, channels = [], 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), torch.randn(64, 3, 32, 32)


def resnet():
    model = demo.ResidualNetwork(width=64)
    model.stem, model.pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, torch.randn(32, 3, 32, 32)


MODELS = {"mlp": mlp, "vgg": vgg, "resnet": resnet}
METRIC = {"float64": sm.SaturationMetric(), "float32": sm.SaturationMetric(gram_dtype=torch.float32)}
ARMS = {
    "plain": None,
    "delve": "delve",
    "exact, float64 products": {"metrics": METRIC["float64"]},
    "exact, float32 products": {"metrics": METRIC["float32"]},
    "sampled": {"metrics": METRIC["float32"], "rows_per_feature": 4, "every_n_steps": 8},
}


def mean_step(model, inputs, arm, steps, folder):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    targets = torch.arange(len(inputs)) % 10
    tracker = None
    if arm == "delve":
        tracker = delve.SaturationTracker(
            folder, save_to="csv", modules=model, stats=["lsat"], device="cpu", writer_args={}, max_samples=None
        )
    elif arm is not None:
        tracker = sm.LayerProbe(model, max_map_size=None, **arm)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    step()  # allocations, and what only the first call does
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    if arm == "delve":
        for module in model.modules():
            module._forward_hooks.clear()
    elif tracker is not None:
        tracker.remove()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=24, help="a multiple of 8, so that sampling is counted whole"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "results": [],
    }
    print(f"{'model':>7}  {'arm':<24}  {'step ms':>8}  {'added %':>8}  {'least':>6}  {'most':>6}  of Delve's")
    for name in options.models:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        seconds = {arm: [] for arm in ARMS}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(options.rounds):
                for arm, settings in ARMS.items():
                    steps = options.steps
                    seconds[arm].append(mean_step(model, inputs, settings, steps, folder))
        added = {
            arm: [100 * (t / p - 1) for t, p in zip(times, seconds["plain"], strict=True)]
            for arm, times in seconds.items()
        }
        reference = statistics.median(added["delve"])
        for arm, values in added.items():
            share = statistics.median(values) / reference
            print(
                f"{name:>7}  {arm:<24}  {1e3 * statistics.median(seconds[arm]):>8.1f}"
                f"  {statistics.median(values):>8.1f}  {min(values):>6.1f}  {max(values):>6.1f}  {share:.2f}",
                flush=True,
            )
        report["results"].append({"model": name, "seconds per step": seconds, "added percent": added})
    target = Path(__file__).parent / "results" / "training_step.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
