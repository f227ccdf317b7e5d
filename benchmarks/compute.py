"""All scalar statistics of one layer beside one ``eigvalsh`` and beside Delve's five, interleaved in one run.

    python benchmarks/compute.py [--widths 128 256 512 1024 2048] [--rounds 7]

Ours are read from one state, from sums to values, nothing kept from earlier calls; Delve decomposes the
covariance anew for most of its statistics.
"""

import statistics
import time

import torch
from common import Parser, write_result
from delve import metrics as delve
from torchmetrics import MetricCollection

import spectralmetrics as sm

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


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    results = []
    print(f"{'D':>5}  {'arm':<22} {'ms':>9}  of one eigvalsh (least … most)")
    for width in options.widths:
        torch.manual_seed(0)
        rows = torch.randn(2 * width, width) @ torch.diag(torch.logspace(0, -2, width))
        collection = MetricCollection([kind() for kind in SEVEN])
        collection.update(rows)
        covariance = torch.cov(rows.double().T, correction=0)

        def ours(collection=collection, row=rows[:1]):
            # The clock starts with nothing computed yet, and no row waiting to be added.
            collection.update(row)
            int(next(iter(collection.values(copy_state=False))).count)
            start = time.perf_counter()
            collection.compute()
            return time.perf_counter() - start

        def one(covariance=covariance):
            start = time.perf_counter()
            torch.linalg.eigvalsh(covariance)
            return time.perf_counter() - start

        def theirs(covariance=covariance):
            start = time.perf_counter()
            for statistic in DELVES:
                statistic(covariance)
            return time.perf_counter() - start

        arms = {"one eigvalsh": one, "ours, seven": ours, "Delve, five": theirs}
        seconds = {name: [] for name in arms}
        for function in arms.values():
            function()
        for _ in range(options.rounds):
            for name, function in arms.items():
                seconds[name].append(function())
        for name, values in seconds.items():
            ratios = [value / base for value, base in zip(values, seconds["one eigvalsh"], strict=True)]
            print(
                f"{width:>5}  {name:<22} {1e3 * statistics.median(values):>9.2f}"
                f"  {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})",
                flush=True,
            )
        results.append({"width": width, "seconds": seconds})
    write_result("compute", results)


if __name__ == "__main__":
    main()
