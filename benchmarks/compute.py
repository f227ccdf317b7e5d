"""All scalar statistics of one layer beside one ``eigvalsh`` and beside Delve's five, interleaved in one run.

    python benchmarks/compute.py [--widths 128 256 512 1024 2048] [--rounds 7] [--folds 8] [--clock wall]

Our seven statistics are computed from one state, with no cached result. Delve decomposes the covariance anew
for most of its statistics.

Then a record of a network with the 21 widths of ResNet-18: a recorder reads seven statistics with intervals
from a probe with folds, compared with one `eigvalsh` per fold and layer. "Its arithmetic alone" is the least
work of a record, in sequence: for each fold an `eigh` of the other folds and a product along its eigenvectors,
and for each layer an `eigvalsh` of all folds.
"""

import statistics

import torch
from common import CLOCKS, Parser, write_result
from delve import metrics as delve
from torch import nn
from torchmetrics import MetricCollection

import spectralmetrics as sm
from spectralmetrics.probing.probe import read_probe

WIDTHS = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5 + [1000]  # ResNet-18
SEVEN = (
    sm.SaturationMetric,
    sm.IntrinsicDimensionMetric,
    sm.CovarianceTraceMetric,
    sm.DiagonalTraceMetric,
    sm.EffectiveRankMetric,
    sm.ParticipationRatioMetric,
    sm.StableRankMetric,
)
DELVES = (
    lambda covariance: delve.compute_saturation(covariance, 0.99),
    lambda covariance: delve.compute_intrinsic_dimensionality(covariance, 0.99),
    delve.compute_cov_determinant,
    delve.compute_cov_trace,
    delve.compute_diag_trace,
)


def decaying(width, rows):
    return torch.randn(rows, width) @ torch.diag(torch.logspace(0, -2, width))


def tell(what, seconds):
    """Print a line for each arm: its median time, and the ratios to the first arm."""
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, next(iter(seconds.values())), strict=True)]
        print(
            f"{what}  {name:<22} {1e3 * statistics.median(values):>9.2f}"
            f"  {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})",
            flush=True,
        )


def record(folds, rounds, clock):
    """Seconds of a record of ResNet-18, and of the decompositions alone."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(width, width) for width in WIDTHS)
    probe = sm.LayerProbe(layers, [kind() for kind in SEVEN], folds=folds)
    covariances = {
        width: torch.cov(decaying(width, 2 * width).double().T, correction=0) for width in set(WIDTHS)
    }

    def show():
        for layer, width in zip(layers, WIDTHS, strict=True):
            layer(decaying(width, 2 * width))

    def ours():
        show()  # new rows make cached values invalid
        start = clock()
        with read_probe(probe) as read:
            seconds = clock() - start
        assert len(read.values) == len(SEVEN) * len(WIDTHS) == len(read.intervals)
        return seconds

    def alone(of_fold, of_layer=None):
        start = clock()
        for width in WIDTHS:
            for _ in range(folds):
                of_fold(covariances[width])
            if of_layer is not None:
                of_layer(covariances[width])
        return clock() - start

    def held_out(covariance):
        _, vectors = torch.linalg.eigh(covariance)
        return (covariance @ vectors * vectors).sum(0)

    arms = {
        "one eigvalsh each": lambda: alone(torch.linalg.eigvalsh),
        "one eigh each": lambda: alone(torch.linalg.eigh),
        "its arithmetic alone": lambda: alone(held_out, torch.linalg.eigvalsh),
        "a record": ours,
    }
    with torch.no_grad():
        for _ in range(folds):
            show()
        seconds = {name: [] for name in arms}
        for _ in range(rounds):
            for name, function in arms.items():
                seconds[name].append(function())
    probe.remove()
    return seconds


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    results = []
    print(f"{'D':>5}  {'arm':<22} {'ms':>9}  of one eigvalsh (least … most)")
    for width in options.widths:
        torch.manual_seed(0)
        rows = decaying(width, 2 * width)
        collection = MetricCollection([kind() for kind in SEVEN])
        collection.update(rows)
        covariance = torch.cov(rows.double().T, correction=0)

        def ours(collection=collection, row=rows[:1]):
            # Before the clock starts: empty the cache, and add the waiting row.
            collection.update(row)
            int(next(iter(collection.values(copy_state=False))).count)
            start = clock()
            collection.compute()
            return clock() - start

        def one(covariance=covariance):
            start = clock()
            torch.linalg.eigvalsh(covariance)
            return clock() - start

        def theirs(covariance=covariance):
            start = clock()
            for statistic in DELVES:
                statistic(covariance)
            return clock() - start

        arms = {"one eigvalsh": one, "ours, seven": ours, "Delve, five": theirs}
        seconds = {name: [] for name in arms}
        for function in arms.values():
            function()
        for _ in range(options.rounds):
            for name, function in arms.items():
                seconds[name].append(function())
        tell(f"{width:>5}", seconds)
        results.append({"width": width, "seconds": seconds})
    print(f"a record of {len(WIDTHS)} layers with {options.folds} folds, of one eigvalsh per fold and layer")
    seconds = record(options.folds, options.rounds, clock)
    tell(f"{'all':>5}", seconds)
    write_result("compute", results)
    write_result("compute_record", {"folds": options.folds, "seconds": seconds})


if __name__ == "__main__":
    main()
