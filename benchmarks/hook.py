"""Host time of a forward hook, in a chain of many small layers that are all observed.

    python benchmarks/hook.py [--rounds 15] [--forwards 256] [--arms …]

A network of 100 linear layers of width 8 runs on 16 rows in one thread: it computes so little that the hooks'
own time remains. Each round runs every arm in turn, for as many forwards as fill the buffer in which rows wait
for a product (2048 rows), so that each round holds one product. An arm's time is its mean forward less the same
round's mean forward without hooks, per layer. Before the first round each arm runs for two rounds, in which
origins move; later they move less and less often.

The arms "compiled" run a chain of 20 layers under `torch.compile`, compared with the same chain without a
probe. Their ratios refer to the eager arms, because an empty hook leaves nothing in the graph, and Delve's
hooks break it. The arms "not observed" run forwards that `every_n_steps`, a budget or `probe.paused()` leave
out.

The script reports medians over the rounds, with the least and the most, and medians of the rounds' ratios to
an empty hook and to Delve's. Time is the thread's own processor time: no forward waits, and other programs on
the machine count only by their effect on the caches.
"""

import logging
import statistics
import tempfile
import time
import warnings

import delve
import torch
from common import Parser, table, write_result
from torch import nn

import spectralmetrics as sm

LAYERS, COMPILED_LAYERS, WIDTH, ROWS = 100, 20, 8, 16
THREE = [sm.SaturationMetric(), sm.EffectiveRankMetric(), sm.ParticipationRatioMetric()]
SELDOM = {"every_n_steps": 10**9}
ARMS = {
    "no hook": None,
    "a hook that does nothing": "nothing",
    "exact": {},
    "sampled": {"rows_per_feature": 1},
    "exact, three statistics": {"metrics": THREE},
    "not observed, every_n_steps": SELDOM,
    "not observed, budget": {"budget": 1e-9},
    "not observed, paused": {"paused": True},
    "Delve": "delve",
    "compiled, no hook": None,
    "compiled, exact": {},
    "compiled, sampled": {"rows_per_feature": 1},
    "compiled, not observed, every_n_steps": SELDOM,
    "compiled, not observed, paused": {"paused": True},
}
REFERENCES = ("a hook that does nothing", "Delve")


def is_compiled(arm):
    return arm.startswith("compiled")


def base_of(arm):
    """The arm without hooks that an arm is compared with."""
    return "compiled, no hook" if is_compiled(arm) else "no hook"


def nothing(module, args, output):
    pass


def watched(settings, folder, layers=LAYERS):
    """A network with the hooks of an arm; and the probe or tracker, which must live as long."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    keeper = None
    if settings == "nothing":
        for layer in model:
            layer.register_forward_hook(nothing)
    elif settings == "delve":
        keeper = delve.SaturationTracker(
            folder, save_to="csv", modules=model, stats=["lsat"], device="cpu", writer_args={}, max_samples=None
        )
    elif settings is not None:
        keeper = sm.LayerProbe(model, **{name: each for name, each in settings.items() if name != "paused"})
        if "paused" in settings:
            keeper.pause()
    return model, keeper


def mean_forward(model, rows, forwards):
    start = time.thread_time()
    for _ in range(forwards):
        model(rows)
    return (time.thread_time() - start) / forwards


def main():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forwards", type=int, default=256)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="besides the references")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # Delve logs each layer
    torch.set_num_threads(1)
    rows = torch.randn(ROWS, WIDTH)
    chosen = {"no hook", *REFERENCES, *options.arms, *map(base_of, options.arms)}
    arms = {arm: settings for arm, settings in ARMS.items() if arm in chosen}
    layers = {arm: COMPILED_LAYERS if is_compiled(arm) else LAYERS for arm in arms}
    seconds = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        networks = {arm: watched(settings, folder, layers[arm]) for arm, settings in arms.items()}
        runs = {
            arm: torch.compile(model) if is_compiled(arm) else model for arm, (model, _) in networks.items()
        }
        for model in runs.values():
            mean_forward(model, rows, 2 * options.forwards)  # allocations, compilation, the first updates
        for _ in range(options.rounds):
            for arm, model in runs.items():
                mean_forward(model, rows, 2)  # replace the other arms' code and data in the caches
                seconds[arm].append(mean_forward(model, rows, options.forwards))
    hook = {
        arm: [1e6 * (t - p) / layers[arm] for t, p in zip(times, seconds[base_of(arm)], strict=True)]
        for arm, times in seconds.items()
        if arm != base_of(arm)
    }
    ratios = {
        arm: [statistics.median(map(float.__truediv__, values, hook[beside])) for beside in REFERENCES]
        for arm, values in hook.items()
    }
    cells = [
        [
            arm,
            *(f"{figure(hook[arm]):.1f}" for figure in (statistics.median, min, max)),
            *map("{:.2f}".format, each),
        ]
        for arm, each in ratios.items()
    ]
    print(table(["hook", "µs per layer and forward", "least", "most", "of an empty one", "of Delve's"], cells))
    if len(arms) == len(ARMS):
        sizes = {"layers": LAYERS, "compiled layers": COMPILED_LAYERS, "width": WIDTH, "rows": ROWS}
        write_result("hook", {**sizes, "microseconds": hook})


if __name__ == "__main__":
    main()
