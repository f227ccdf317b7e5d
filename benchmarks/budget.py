"""What a probe with a budget takes of a training, what it sees, and how near its dimensions are to the exact
ones.

    python benchmarks/budget.py [--models mlp vgg resnet vit] [--budgets 0.01 0.03 0.1] [--blocks 12]

For each model and budget, blocks of training steps with the probe and with the probe paused take turns. The
share
is measured from outside: the time of the steps with it over that of those without, less one, as the median over
pairs of neighbouring blocks. The first blocks, in which the sums are made and their price is paid off, are left
out of it and told apart. Exact dimensions are those of a probe without a budget on the same network and inputs
afterwards; the inputs are drawn anew for each step, so that they have a spectrum of their own.
"""

import argparse
import statistics
import time
import warnings

import torch
from common import table, write_result
from torch import nn
from training_step import MODELS

import spectralmetrics as sm

STEPS = {"mlp": 40, "vgg": 8, "resnet": 6, "vit": 8}  # a block: one to three seconds
UNTIMED_BLOCKS = 2


def batches(inputs):
    """New inputs of the same shape at each step, in a subspace, so that the layers have dimensions to find."""
    generator = torch.Generator().manual_seed(1)
    width = inputs[0].numel()
    mixing = torch.randn(40, width, generator=generator) / 40**0.5
    while True:
        yield (torch.randn(len(inputs), 40, generator=generator) @ mixing).view_as(inputs)


def measure(name, budget, blocks):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    targets = torch.arange(len(inputs)) % 10
    data = batches(inputs)

    def run(steps):
        drawn = [next(data) for _ in range(steps)]
        start = time.perf_counter()
        for each in drawn:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(each), targets).backward()
            optimizer.step()
        return time.perf_counter() - start

    run(STEPS[name])
    probe = sm.LayerProbe(model, sm.IntrinsicDimensionMetric(), budget=budget)
    shares = []
    for block in range(UNTIMED_BLOCKS + blocks):
        if block % 2:
            with probe.paused():
                without = run(STEPS[name])
            probed = run(STEPS[name])
        else:
            probed = run(STEPS[name])
            with probe.paused():
                without = run(STEPS[name])
        if block >= UNTIMED_BLOCKS:
            shares.append(100 * (probed / without - 1))
    summary = probe.summary("train")
    own = probe._steps.budget.spent("train")
    probe.remove()
    exact = sm.LayerProbe(model, sm.IntrinsicDimensionMetric())
    run(STEPS[name])
    truth = {key.rpartition("/")[2]: int(value) for key, value in exact.compute("train").items()}
    exact.remove()
    rows = [
        {
            "layer": row.layer,
            "width": row.width,
            "n": row.observations,
            "dimension": row.value,
            "exact": truth[row.layer],
        }
        for row in summary.rows
    ]
    return {
        "model": name,
        "budget": budget,
        "measured percent": shares,
        "own percent": 100 * own.share,
        "forwards": own.forwards,
        "observed": own.observed,
        "layers": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--blocks", type=int, default=12)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for name in options.models:
        for budget in options.budgets:
            results.append(measure(name, budget, options.blocks))
            print(table(HEADS, [row_of(results[-1])]), flush=True)
    print(table(HEADS, map(row_of, results)))
    write_result("budget", results)


HEADS = ["model", "budget %", "measured %", "by itself %", "observed", "n / D, least and most", "largest error"]


def row_of(result):
    layers = result["layers"]
    ratios = [layer["n"] / layer["width"] for layer in layers]
    errors = [abs(layer["dimension"] - layer["exact"]) for layer in layers]
    return [
        result["model"],
        f"{100 * result['budget']:g}",
        f"{statistics.median(result['measured percent']):.1f}",
        f"{result['own percent']:.2f}",
        f"{result['observed']} of {result['forwards']}",
        f"{min(ratios):.1f} … {max(ratios):.1f}",
        f"{max(errors):g} of {max(layer['width'] for layer in layers)}",
    ]


if __name__ == "__main__":
    main()
