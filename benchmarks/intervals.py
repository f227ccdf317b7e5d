"""Share of intervals from folds that contain the value for unlimited data: Gaussian features of known spectra.

    python benchmarks/intervals.py [--draws 200] [--width 192] [--threads 1]

The features are independent, since no statistic here depends on the axes. Their variances, for i = 1 … D: flat,
1; 1/i; i^-2; exponential, exp(-i/16); two levels, 1 for the first quarter and 0.01 for the rest. The folds get
each draw in 32 batches. "Within one" counts a draw whose interval misses the truth by one at most.
"Scatter" is the standard deviation of the plain value over the draws.
"""

import torch
from common import Parser, table, write_result

import spectralmetrics as sm
from spectralmetrics import functional as F  # noqa: N812

BATCHES = 32
RATIOS = (0.5, 1.5, 4, 16)
FOLDS = (2, 8)
STATISTICS = {
    "dimension": sm.IntrinsicDimensionMetric,
    "effective rank": sm.EffectiveRankMetric,
    "participation ratio": sm.ParticipationRatioMetric,
}


def spectra(width):
    i = torch.arange(1, width + 1, dtype=torch.float64)
    return {
        "flat": torch.ones_like(i),
        "1/i": 1 / i,
        "i^-2": i**-2,
        "exponential": torch.exp(-i / 16),
        "two levels": torch.where(i <= width // 4, 1.0, 0.01),
    }


def truth(variances):
    return {
        "dimension": float(F.intrinsic_dimension(variances, threshold=0.99)),
        "effective rank": float(F.effective_rank(variances)),
        "participation ratio": float(F.participation_ratio(variances)),
    }


def draw(variances, count, metrics, generator):
    """Results of one draw: folds -> statistic -> plain, held out, low, high."""
    rows = torch.randn(count, len(variances), dtype=torch.float64, generator=generator) * variances.sqrt()
    found = {}
    for number, metric in metrics.items():
        metric.reset()
        for batch in rows.chunk(BATCHES):
            metric.update(batch)
        plain = metric.spectrum
        found[number] = {}
        for name, kind in STATISTICS.items():
            values = [float(kind().statistic(spectrum)) for spectrum in (plain, plain.held_out())]
            found[number][name] = (*values, *map(float, kind().interval_of(plain)))
    return found


def measure(name, variances, ratio, draws):
    generator = torch.Generator().manual_seed(0)
    count = int(ratio * len(variances))
    metrics = {folds: sm.IntrinsicDimensionMetric(folds=folds) for folds in FOLDS}
    found = [draw(variances, count, metrics, generator) for _ in range(draws)]
    for folds in FOLDS:
        for statistic, value in truth(variances).items():
            of = torch.tensor([each[folds][statistic] for each in found], dtype=torch.float64)
            plain, held_out, low, high = of.T
            # A tolerance for round-off.
            missed = torch.clamp(torch.maximum(low - value, value - high) - 1e-9 * value, min=0)
            yield {
                "spectrum": name,
                "ratio": ratio,
                "folds": folds,
                "statistic": statistic,
                "truth": value,
                "plain": float(plain.mean()),
                "held out": float(held_out.mean()),
                "holds": float((missed == 0).double().mean()),
                "within one": float((missed <= 1).double().mean()),
                "missed below": float((value > high + 1e-9 * value).double().mean()),
                "missed above": float((value < low - 1e-9 * value).double().mean()),
                "farthest": float(missed.max()),
                "width": float((high - low).mean()),
                "scatter": float(plain.std()),
            }


def main():
    parser = Parser(__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for name, variances in spectra(options.width).items()
        for ratio in RATIOS
        for row in measure(name, variances, ratio, options.draws)
    ]
    keys = ("spectrum", "ratio", "folds", "statistic", "truth", "plain", "held out", "holds", "within one")
    keys += ("missed below", "missed above", "farthest", "width", "scatter")
    shown = [[f"{row[k]:.3g}" if isinstance(row[k], float) else row[k] for k in keys] for row in rows]
    print(table(keys, shown))
    write_result("intervals", {"width": options.width, "draws": options.draws, "rows": rows})


if __name__ == "__main__":
    main()
