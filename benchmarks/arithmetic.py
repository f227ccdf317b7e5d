"""Time that exact sums add to a training step, compared with the symmetric products alone on the same rows.

    python benchmarks/arithmetic.py [--models mlp vgg resnet vit gpt] [--rounds 9] [--clock wall]

Each round runs the arms in turn: steps without a probe, steps with exact sums in float64 and in float32,
compiled and by PyTorch, and scipy's `dsyrk` and `ssyrk` of the rows that the probed layers put out in one step.
The first ratio of an arm is the time that its steps take longer than the same round's plain steps, over that
round's products: the whole cost of a probe, with its effect on caches. The second is the time inside the hooks
alone over the products; other programs on the same cores disturb it less. Medians over rounds, with the
quartiles of the first ratio.

`--clock processor` measures processor time of all threads, for machines that others use. No step waits, but
threads of a library that spin count.
"""

import statistics
import time
import warnings

import budget
import numpy as np
import torch
import training_step
from common import CLOCKS, Parser, table, write_result
from scipy.linalg.blas import dsyrk, ssyrk
from torch import nn

import spectralmetrics as sm
from spectralmetrics.functional import compiled

MODELS = budget.MODELS
STEPS = {**training_step.STEPS, "gpt": 8}
ARMS = {
    "compiled, float64": "exact, float64 products",
    "by PyTorch, float64": "exact, float64 products, by PyTorch",
    "compiled, float32": "exact, float32 products",
    "by PyTorch, float32": "exact, float32 products, by PyTorch",
}
PAUSE_SECONDS = 0.1  # until the threads of another library stop spinning


def rows_of(model, inputs):
    """The rows that each probed layer puts out in one step, (N, D)."""
    probe = sm.LayerProbe(model, max_map_size=None)
    found = []

    def keep(module, args, output):
        values = (output[0] if isinstance(output, tuple) else output).detach()
        values = values.movedim(1, -1) if values.ndim == 4 else values  # maps
        found.append(values.reshape(-1, values.shape[-1]))

    handles = [
        module.register_forward_hook(keep) for name, module in model.named_modules() if name in probe.layers
    ]
    with torch.no_grad():
        model(inputs)
    leaders = [next(iter(probe["train", name].values(copy_state=False))) for name in probe.layers]
    numbers = [int(leader.count) for leader in leaders]
    probe.remove()
    for handle in handles:
        handle.remove()
    assert sorted(numbers) == sorted(map(len, found)), "these are not the rows that the probe takes"
    return found


def products(rows, function, dtype):
    """A function that computes one triangle of the product of each layer's rows, and adds it to a sum."""
    values = [np.asfortranarray(each.numpy().T.astype(dtype)) for each in rows]
    sums = [np.zeros((len(each), len(each)), dtype, order="F") for each in values]

    def run():
        for each, total in zip(values, sums, strict=True):
            function(1.0, each, beta=1.0, c=total, overwrite_c=1)

    return run


def seconds_of(function, clock):
    time.sleep(PAUSE_SECONDS)
    function()
    start, repeats = clock(), 3
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


class Timed:
    """A hook that adds up the time it takes."""

    def __init__(self, hook, clock, total):
        self.hook, self.clock, self.total = hook, clock, total

    def __call__(self, *arguments):
        start = self.clock()
        result = self.hook(*arguments)
        self.total[0] += self.clock() - start
        return result


def mean_step(model, inputs, settings, steps, clock):
    """Seconds of a step, and of the hooks in it."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    targets = torch.arange(len(inputs)) % 10
    probe = None if settings is None else sm.LayerProbe(model, max_map_size=None, **settings)
    in_hooks = [0.0]
    for module in model.modules():
        for number, hook in module._forward_hooks.items():
            module._forward_hooks[number] = Timed(hook, clock, in_hooks)

    def run(number):
        for _ in range(number):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    run(training_step.UNTIMED_STEPS)
    in_hooks[0], start = 0.0, clock()
    run(steps)
    seconds = (clock() - start) / steps
    if probe is not None:
        probe.remove()
    return seconds, in_hooks[0] / steps


def measure(name, rounds, clock):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    rows = rows_of(model, inputs)
    alone = {"float64": products(rows, dsyrk, "f8"), "float32": products(rows, ssyrk, "f4")}
    steps = {arm: [] for arm in ("plain", *ARMS)}
    times = {kind: [] for kind in alone}
    for _ in range(rounds):
        for arm in steps:
            settings = training_step.ARMS[ARMS.get(arm, "plain")]
            time.sleep(PAUSE_SECONDS)
            with compiled.using(None if "PyTorch" in arm else compiled.instruction_set()):
                steps[arm].append(mean_step(model, inputs, settings, STEPS[name], clock))
        for kind, run in alone.items():
            times[kind].append(seconds_of(run, clock))
    ratios = {
        arm: [
            ((with_sums - plain) / product, in_hooks / product)
            for (with_sums, in_hooks), (plain, _), product in zip(
                steps[arm], steps["plain"], times[arm.split()[-1]], strict=True
            )
        ]
        for arm in ARMS
    }
    return {"model": name, "seconds per step": steps, "seconds of products": times, "ratios": ratios}


def cells(result):
    def milliseconds(values):
        return f"{1e3 * statistics.median(values):.1f}"

    def spread(pairs):
        added, in_hooks = zip(*pairs, strict=True)
        low, middle, high = statistics.quantiles(added, n=4) if len(added) > 1 else added * 3
        return f"{middle:.2f} ({low:.2f} … {high:.2f}), {statistics.median(in_hooks):.2f}"

    times = result["seconds of products"]
    return [
        result["model"],
        milliseconds([seconds for seconds, _ in result["seconds per step"]["plain"]]),
        f"{milliseconds(times['float64'])} / {milliseconds(times['float32'])}",
        *(spread(pairs) for pairs in result["ratios"].values()),
    ]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    heads = ["model", "step ms", "products ms, float64 / float32", *ARMS]
    results = []
    for name in options.models:
        results.append(measure(name, options.rounds, CLOCKS[options.clock]))
        print(table(heads, [cells(results[-1])]), flush=True)
    print(table(heads, map(cells, results)))
    if len(results) == len(MODELS):
        write_result("arithmetic", {"clock": options.clock, "models": results})


if __name__ == "__main__":
    main()
