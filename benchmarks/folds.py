"""Cost of folds: time of an update and size of the state with 8 folds and with one.

    python benchmarks/folds.py [--rounds 9] [--threads 1]

Each round times both arms in turn, with so many updates that every fold adds its waiting rows often.
"""

import statistics

import torch
from common import Parser, table, write_result
from torch.utils.benchmark import Timer

import spectralmetrics as sm

FOLDS = (1, 8)
CASES = ((64, 32), (64, 8192), (256, 128), (256, 4096), (1024, 128), (1024, 2048))


def measure(width, count, rounds):
    rows = torch.randn(count, width)
    metrics = {folds: sm.SaturationMetric(folds=folds) for folds in FOLDS}
    timers = {
        folds: Timer("metric.update(rows)", globals={"metric": metric, "rows": rows}, num_threads=1)
        for folds, metric in metrics.items()
    }
    updates = max(4 * 8, 4 * 8 * 2048 // count)
    seconds = {folds: [] for folds in FOLDS}
    for timer in timers.values():
        timer.timeit(updates)
    for _ in range(rounds):
        for folds, timer in timers.items():
            seconds[folds].append(timer.timeit(updates).mean)
    state = {
        folds: sum(value.nbytes for name, value in metric.metric_state.items() if name != "configuration")
        for folds, metric in metrics.items()
    }
    return {
        "width": width,
        "rows": count,
        "updates": updates,
        "seconds": {str(folds): values for folds, values in seconds.items()},
        "state": {str(folds): size for folds, size in state.items()},
    }


def main():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, shown = [], []
    for width, count in CASES:
        result = measure(width, count, options.rounds)
        results.append(result)
        one, eight = (result["seconds"][str(folds)] for folds in FOLDS)
        share = statistics.median(b / a for a, b in zip(one, eight, strict=True))
        cells = [f"{1e6 * statistics.median(values):.0f}" for values in (one, eight)]
        shown.append([width, count, *cells, f"{share:.2f}", result["state"]["8"] / result["state"]["1"]])
        print(shown[-1], flush=True)
    headings = ["D", "rows", "µs, 1 fold", "µs, 8 folds", "ratio of times", "ratio of states"]
    print(table(headings, shown))
    write_result("folds", results)


if __name__ == "__main__":
    main()
