"""A probe with a budget: its share of a training's time, the rows it observes, the error of its dimensions.

    python benchmarks/budget.py [--models mlp vgg resnet vit gpt] [--budgets 0.01 0.03 0.1] [--blocks 12]
    python benchmarks/budget.py --models mlp resnet gpt --short 600 --arms eager compiled

For each model and budget, blocks of training steps with the probe and with the probe paused take turns. The
share is measured from outside: time with the probe over time without, less one; the median over pairs of
neighbouring blocks. It leaves out the first blocks, in which the probe allocates its sums and pays their time
off. A probe without a budget then measures the exact dimensions, on the same network and further inputs. Every
step draws new inputs from one distribution.

``--short`` measures whole runs of so many steps instead, from the first step on: blocks of steps with the
probe, with the probe paused, and with it paused again take turns, and the share is taken over all blocks
together. The second paused arm over the first shows how much the machine itself varies. The processor's time
stands beside wall time, because other programs on the same cores disturb it less.
"""

import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from common import Parser, table, write_result
from torch import nn
from training_step import MODELS

import spectralmetrics as sm

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks.first_movers import Block


class SmallGPT(nn.Module):
    """Six causal blocks of width 256 over 512 positions, of vectors in place of tokens."""

    def __init__(self, width=256, length=512):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(6)])
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(x + self.positions)).mean(1)


MODELS = {**MODELS, "gpt": lambda: (SmallGPT(), torch.randn(2, 512, 256))}
STEPS = {"mlp": 40, "vgg": 8, "resnet": 6, "vit": 8, "gpt": 6}  # a block: one to three seconds
SHORT_STEPS = {"mlp": 5, "vgg": 2, "resnet": 1, "vit": 2, "gpt": 1}
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


def measure_short(name, budget, steps, arm):
    """A whole run, compared with as many steps without the probe."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    targets = torch.arange(len(inputs)) % 10
    data = batches(inputs)
    probe = sm.LayerProbe(model, sm.IntrinsicDimensionMetric(), budget=budget)
    torch.compiler.reset()
    runs = torch.compile(model) if arm == "compiled" else model

    def run(number):
        drawn = [next(data) for _ in range(number)]
        start = time.perf_counter(), time.process_time()
        for each in drawn:
            optimizer.zero_grad()
            nn.functional.cross_entropy(runs(each), targets).backward()
            optimizer.step()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    with probe.paused():
        run(3)
    size = SHORT_STEPS[name]
    blocks = {"probed": [], "paused": [], "paused again": []}
    for block in range(steps // size):
        turns = list(blocks)
        for turn in turns[block % 3 :] + turns[: block % 3]:
            if turn == "probed":
                blocks[turn].append(run(size))
            else:
                with probe.paused():
                    blocks[turn].append(run(size))
    own = probe._steps.budget.spent("train")
    probe.remove()

    def added(turn, clock):
        paused = sum(each[clock] for name in ("paused", "paused again") for each in blocks[name]) / 2
        base = paused if turn == "probed" else sum(each[clock] for each in blocks["paused"])
        return 100 * (sum(each[clock] for each in blocks[turn]) / base - 1)

    return {
        "model": name,
        "arm": arm,
        "budget": budget,
        "steps": steps,
        "step ms": 1e3 * statistics.median(each[1] for each in blocks["paused"]) / size,
        "added percent": added("probed", 0),
        "added percent of processor": added("probed", 1),
        "machine percent": added("paused again", 0),
        "machine percent of processor": added("paused again", 1),
        "own percent": 100 * own.share,
        "forwards": own.forwards,
        "observed": own.observed,
    }


SHORT_HEADS = ["model", "arm", "budget %", "step ms", "added % (processor)", "machine % (processor)"]
SHORT_HEADS += ["by itself %", "observed"]


def short_row(result):
    return [
        result["model"],
        result["arm"],
        f"{100 * result['budget']:g}",
        f"{result['step ms']:.0f}",
        f"{result['added percent']:.2f} ({result['added percent of processor']:.2f})",
        f"{result['machine percent']:.2f} ({result['machine percent of processor']:.2f})",
        f"{result['own percent']:.2f}",
        f"{result['observed']} of {result['forwards']}",
    ]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--short", type=int, help="measure whole runs of so many steps")
    parser.add_argument("--arms", nargs="+", choices=["eager", "compiled"], default=["eager"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    if options.short:
        for name in options.models:
            for arm in options.arms:
                for budget in options.budgets:
                    results.append(measure_short(name, budget, options.short, arm))
                    print(table(SHORT_HEADS, [short_row(results[-1])]), flush=True)
        print(table(SHORT_HEADS, map(short_row, results)))
        write_result("budget_short", results)
        return
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
