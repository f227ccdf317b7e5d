"""Host time of a forward hook: a chain of many small layers, each of which is observed.

    python benchmarks/hook.py [--rounds 15] [--forwards 256]

A network of 100 linear layers of width 8 runs on 16 rows in one thread, so that next to nothing is computed and
what is left is the hooks' own time. Each round runs every arm in turn, for as many forwards as fill the buffer
in which rows wait for a product (2048 rows), so that each round holds one of all that happens. An arm's time is
that round's mean forward less the same round's mean forward without hooks, per layer. Reported are medians over
the rounds, with the least and the most. Time is the thread's own processor time: nothing here waits for
anything, and other programs that share the machine do not count.
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

LAYERS, WIDTH, ROWS = 100, 8, 16
ARMS = {
    "no hook": None,
    "a hook that does nothing": "nothing",
    "exact": {},
    "sampled": {"rows_per_feature": 1},
    "exact, three statistics": {
        "metrics": [sm.SaturationMetric(), sm.EffectiveRankMetric(), sm.ParticipationRatioMetric()]
    },
    "Delve": "delve",
}


def nothing(module, args, output):
    pass


def watched(arm, folder):
    """A network with the hooks of an arm, and what must live as long."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    keeper = None
    if arm == "nothing":
        for layer in model:
            layer.register_forward_hook(nothing)
    elif arm == "delve":
        keeper = delve.SaturationTracker(
            folder, save_to="csv", modules=model, stats=["lsat"], device="cpu", writer_args={}, max_samples=None
        )
    elif arm is not None:
        keeper = sm.LayerProbe(model, **arm)
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
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # Delve tells of each layer
    torch.set_num_threads(1)
    rows = torch.randn(ROWS, WIDTH)
    seconds = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        networks = {arm: watched(settings, folder) for arm, settings in ARMS.items()}
        for model, _ in networks.values():
            mean_forward(model, rows, options.forwards)  # allocations, the first updates
        for _ in range(options.rounds):
            for arm, (model, _) in networks.items():
                mean_forward(model, rows, 2)  # the other arms' code and data leave the caches
                seconds[arm].append(mean_forward(model, rows, options.forwards))
    plain = seconds["no hook"]
    hook = {
        arm: [1e6 * (t - p) / LAYERS for t, p in zip(times, plain, strict=True)]
        for arm, times in seconds.items()
        if arm != "no hook"
    }
    cells = [
        [arm, *(f"{figure(values):.1f}" for figure in (statistics.median, min, max))]
        for arm, values in hook.items()
    ]
    print(table(["hook", "µs per layer and forward", "least", "most"], cells))
    write_result("hook", {"layers": LAYERS, "width": WIDTH, "rows": ROWS, "microseconds": hook})


if __name__ == "__main__":
    main()
