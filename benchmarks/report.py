"""Turn ``results/*.json`` into the page ``docs/benchmarks.md``.

python benchmarks/report.py
"""

import json
import statistics
from pathlib import Path

from common import RESULTS, table

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python -m nox -s benchmarks` from `benchmarks/results/*.json`. All arms of a table ran in turn in one run.
The machine is shared and noisy: ratios of arms that ran side by side say more than times, and runs on another day
differed by a third. The bars that the project has set itself stand with each table. "By PyTorch" is what
is left on a machine for which the accumulation is not [compiled](guide/cost.md).
"""


def spread(values, digits=2):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def ratios(numerators, denominators):
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def machine(content):
    facts = content["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "torchmetrics", "numpy"))
    products = f"compiled for {facts['compiled']}" if facts.get("compiled") else "not compiled"
    return f"*{facts['date']}, {facts['processor']}, {facts['cores']} cores, {versions}; {products}.*\n"


def update(results):
    yield (
        "## Update\n\nA batch of rows added to a covariance. In units of OpenBLAS' speed at one triangle of the product"
        " alone (`dsyrk` for float64, `ssyrk` for float32), and of Delve's; median, least and most of the rounds."
        " Bars: 0.65 of `dsyrk` and 0.75 of `ssyrk` for D ≥ 256; three times Delve's rate in float32 for D ≤ 128.\n"
    )
    rows = []
    for result in results:
        seconds = result["seconds"]
        for name, values in seconds.items():
            syrk = seconds["ssyrk" if "32" in name or name == "ssyrk" else "dsyrk"]
            cells = (spread(ratios(others, values)) for others in (syrk, seconds["delve"]))
            milliseconds = f"{1e3 * statistics.median(values):.2f}"
            rows.append([result["width"], result["rows"], name, milliseconds, *cells])
    yield table(["D", "rows", "arm", "ms", "of `syrk`", "of Delve's rate"], rows)


def training_step(results):
    yield (
        "## Training step\n\nAdded time per step with a probe on every layer, in per cent of the step without one;"
        " median, least and most of the rounds. Bars, in units of Delve's: float64 0.75, float32 0.4, on the MLP, VGG"
        " and ResNet; sampled at most 3 % (VGG, ResNet) and 5 % (MLP, ViT). Delve looks at one token of the ViT.\n"
    )
    rows = []
    for result in results:
        delve = statistics.median(result["added percent"]["delve"])
        for name, values in result["added percent"].items():
            if name != "plain":
                # A share of next to nothing says nothing.
                share = f"{statistics.median(values) / delve:.2f}" if delve > 2 else ""
                rows.append([result["model"], name, spread(values, 1), share])
    yield table(["model", "arm", "added %", "of Delve's"], rows)


def hook(results):
    yield (
        f"## Hook\n\nHost time of a hook (processor time), in microseconds per layer and forward: {results['layers']} linear layers of"
        f" width {results['width']}, {results['rows']} rows, one thread; median, least and most of the rounds. Sampled draws"
        " half of the rows. Bars: 40 exact, 60 sampled.\n"
    )
    yield table(["hook", "µs"], [[name, spread(values, 1)] for name, values in results["microseconds"].items()])


def compute(results):
    yield (
        "## Compute\n\nSeven scalar statistics of one layer, from sums to values, in units of one `eigvalsh`. Bar: 1.2"
        " for D ≥ 512.\n"
    )
    rows = [
        [result["width"], name, spread(ratios(values, result["seconds"]["one eigvalsh"]))]
        for result in results
        for name, values in result["seconds"].items()
        if name != "one eigvalsh"
    ]
    yield table(["D", "arm", "of one eigvalsh"], rows)


def merge(results):
    yield (
        "## Merge\n\nResNet-18's 21 layers with three metrics each, across processes (gloo). Bar: 10 times faster than"
        " torchmetrics' own path on 4 processes, in two collectives.\n"
    )
    rows = [
        [
            result["processes"],
            name,
            result["collectives"][name],
            f"{statistics.median(values):.4f}",
            f"{result['stock over fused, median']:.1f}" if name == "stock" else "1",
        ]
        for result in results
        for name, values in result["seconds"].items()
    ]
    yield table(["processes", "arm", "collectives", "median s", "of the fused"], rows)


def folds(results):
    yield (
        "## Folds\n\nAn update with 8 folds beside one with one, on one thread. The cost of an update does not change"
        " by more than the noise; the state is 8 times as large. Median, least and most of the rounds.\n"
    )
    rows = [
        [
            result["width"],
            result["rows"],
            *(f"{1e6 * statistics.median(result['seconds'][number]):.0f}" for number in ("1", "8")),
            spread(ratios(result["seconds"]["8"], result["seconds"]["1"])),
            *(f"{result['state'][number] / 2**20:.2f}" for number in ("1", "8")),
        ]
        for result in results
    ]
    headings = ["D", "rows", "µs, 1 fold", "µs, 8 folds", "ratio", "state MB, 1 fold", "state MB, 8 folds"]
    yield table(headings, rows)


def memory(results):
    yield (
        "## Memory\n\nOf the state, and at the peak of an update above it, with a batch of 128 MB in float32, whose"
        " float64 copy would take 256 MB.\n"
    )
    rows = [
        [
            result["width"],
            result["products"],
            f"{result['state'] / 2**20:.2f}",
            f"{(result['peak'] - result['state']) / 2**20:.0f}",
        ]
        for result in results
    ]
    yield table(["D", "products", "state MB", "peak above it MB"], rows)


def projection(results):
    yield (
        "## What projections cost in accuracy\n\nA convolutional network on MNIST digits, every convolution restricted"
        " to the share of variance in the first column; mean, least and most over the seeds.\n"
    )
    rows = []
    for threshold in dict.fromkeys(row["threshold"] for row in results):
        own = [row for row in results if row["threshold"] == threshold]
        cells = [spread([row[key] for row in own], 3) for key in ("saturation", "projected", "random")]
        rows.append([threshold, *cells])
    yield table(["threshold", "saturation", "accuracy", "random directions of the same rank"], rows)
    yield "![Accuracy over the threshold](images/projection.png)\n"


def similarity(results):
    yield (
        "## Similarity of layers\n\nTwo ResNet-18 for images of 32 x 32 pixels, 21 x 21 layers. Added time of"
        " `LayerSimilarity`, in per cent of the forward passes of both, on one core; median, least and most of the rounds."
        " `pytorch-cka` computes in float32.\n"
    )
    rows = [
        [result["batch"], name, f"{1e3 * statistics.median(result['seconds'][name]):.0f}", spread(values, 1)]
        for result in results["cost"]
        for name, values in result["added percent"].items()
    ]
    yield table(["batch", "arm", "ms a batch", "added %"], rows)
    growth = results["batches"]
    yield (
        f"\nHow far batches are from all {growth['samples']:,} samples at once: 21 x 21 pairs of layers of two"
        f" networks that were trained on digits, whose mean CKA is {growth['mean of the whole']:.2f}. The biased"
        " estimator is the one without the correction.\n"
    )
    kinds = ("debiased", "biased")
    rows = [
        [row["batch"], *(f"{row[kind][key]:.4f}" for kind in kinds for key in row[kind])]
        for row in growth["batches"]
    ]
    yield table(["batch", *(f"{kind}, {key}" for kind in kinds for key in growth["batches"][0][kind])], rows)


def main():
    parts = [HEAD]
    for write in (update, training_step, hook, compute, merge, memory, folds, similarity, projection):
        path = RESULTS / f"{write.__name__}.json"
        if path.exists():
            content = json.loads(path.read_text())
            parts += [*write(content["results"]), machine(content)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
