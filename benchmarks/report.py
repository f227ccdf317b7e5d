"""Turn ``results/*.json`` into the page ``docs/benchmarks.md``.

python benchmarks/report.py
"""

import json
import statistics
from pathlib import Path

import pieces as pieces_benchmark
from budget import HEADS, SHORT_HEADS, row_of, short_row
from common import RESULTS, table
from matplotlib.figure import Figure

import accelerator as gpu

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

IMAGES = PAGE.parent / "images"

HEAD = """# Benchmarks

{headline}

```{{image}} images/benchmarks.png
:alt: {alternative}
:align: center
```

*Above: time that a probe on every layer adds to a training step, median of the rounds; 0 if noise made it negative. (In the
ViT, Delve reads one token, a probe all tokens.) Below: speed of adding a batch of rows to a covariance, relative to
Delve 0.1.50. Measured on {machine}.*

## How to read the tables

`python -m nox -s benchmarks` measures, and writes this page from `benchmarks/results/*.json`. All arms of a table ran in turn in
one run. The machine is shared and noisy, and times of another day differed by a third: trust ratios of arms of one run more
than times. "By PyTorch" applies to machines for which the sums are not [compiled](guide/cost.md).
"""

BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#D55E00", "0.6"  # Okabe and Ito
ARMS = {
    "delve": ("Delve 0.1.50", GREY),
    "exact, float64 products": ("exact, float64", BLUE),
    "exact, float32 products": ("exact, float32", SKY),
    "sampled": ("sampled", ORANGE),
}
MODELS = {"mlp": "MLP", "vgg": "VGG-11", "resnet": "ResNet-18", "vit": "ViT"}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def added(results, arm):
    """Model -> median of the added time, in per cent of a step."""
    return {row["model"]: statistics.median(row["added percent"][arm]) for row in results}


def rates(results, arm):
    """Width -> median of the rate relative to Delve's."""
    return {
        row["width"]: statistics.median(ratios(row["seconds"]["delve"], row["seconds"][arm])) for row in results
    }


def ends(values, digits=0):
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def headline(steps, updates, hooks):
    """The main results in a paragraph."""
    exact, fast, compiled, sampled, delve = (
        added(steps, arm)
        for arm in (
            "exact, float64 products",
            "exact, float32 products",
            "compiled, exact, float32 products",
            "sampled",
            "delve",
        )
    )
    large = ("vgg", "resnet")
    double, single = (rates(updates, arm).values() for arm in ("ours, float64", "ours, float32"))
    return (
        f"**A probe on every layer adds {ends([fast[m] for m in large], 1)} % to a training step of VGG-11 and ResNet-18 with"
        f" float32 products, and {ends([exact[m] for m in large], 1)} % with exact float64 products**; Delve adds"
        f" {ends([delve[m] for m in large])} %. It costs most where layers are wide and the rest is cheap: "
        f"{fast['mlp']:.0f} % and {exact['mlp']:.0f} % on an MLP of four wide layers, {fast['vit']:.0f} % and"
        f" {exact['vit']:.0f} % on a small vision transformer. Sampling (`rows_per_feature=4, every_n_steps=8`) costs"
        f" {max(sampled.values()):.1f} % or less. Under `torch.compile` float32 products add"
        f" {ends([compiled[m] for m in large], 1)} % to the two convolutional networks. An update is {ends(double)} times as fast as Delve's in float64 and"
        f" {ends(single)} times in float32. A hook takes"
        f" {statistics.median(hooks['microseconds']['exact']):.0f} µs of host time."
    )


def draw(steps, updates, path):
    """Plot the time added to a training step, and the speed of an update."""
    figure = Figure(figsize=(6.4, 7.4), layout="constrained")  # one above the other, for phones
    upper, lower = figure.subplots(2, 1)
    height = 0.8 / len(ARMS)
    for index, (arm, (label, colour)) in enumerate(ARMS.items()):
        values = [max(value, 0) for value in added(steps, arm).values()]
        places = [place + (index - 1.5) * height for place in range(len(values))]
        bars = upper.barh(places, values, height, color=colour, label=label)
        upper.bar_label(bars, [f"{value:.0f} %" for value in values], padding=3, fontsize=8)
    upper.set_yticks(range(len(steps)), [MODELS.get(row["model"], row["model"]) for row in steps])
    upper.invert_yaxis()
    upper.set_xlabel("added to a training step, per cent")
    upper.legend(frameon=False, fontsize=9, loc="lower right")
    for arm, label, colour, marker in (
        ("ours, float32", "float32", SKY, "s"),
        ("ours, float64", "float64", BLUE, "o"),
        ("ours, float32, by PyTorch", "float32, by PyTorch", SKY, None),
        ("ours, float64, by PyTorch", "float64, by PyTorch", BLUE, None),
        ("delve", "Delve 0.1.50", GREY, None),
    ):
        found = rates(updates, arm)
        line = {"ls": "-" if marker else "--", "marker": marker, "color": colour, "label": label}
        lower.plot(list(found), list(found.values()), lw=1.5, ms=4, **line)
    lower.set_xscale("log", base=2)
    lower.set_xticks(list(found), [str(width) for width in found])
    lower.set_ylim(0, 1.4 * lower.get_ylim()[1])  # room for the legend
    lower.set_xlabel("width of the layer")
    lower.set_ylabel("rows per second, relative to Delve")
    lower.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def spread(values, digits=2):
    low, high = min(values), max(values)
    found = f"{statistics.median(values):.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"
    return found.replace(" ", "\N{NO-BREAK SPACE}")


def ratios(numerators, denominators):
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def machine(content):
    facts = content["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "torchmetrics", "numpy"))
    products = f"compiled for {facts['compiled']}" if facts.get("compiled") else "not compiled"
    return f"*{facts['date']}, {processor(facts)}, {versions}; {products}.*\n"


def processor(facts):
    known = facts["processor"] + ("" if "family" in facts["processor"] else " (generation not recorded)")
    return f"{known}, {facts['cores']} cores"


def update(results):
    yield (
        "## Update\n\nA batch of rows is added to a covariance. The rates are relative to BLAS, which computes one triangle of"
        " the product alone (OpenBLAS' `dsyrk` for float64, `ssyrk` for float32), and to Delve: above 1 is faster. Median, least"
        " and most of the rounds.\n"
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


def pieces(results):
    yield (
        "### As a share of a core's peak\n\nRate of the compiled sums, and of BLAS on rows that are converted already, as a"
        " share of the multiply-adds that a loop in registers makes on the same core. One thread, processor time. Median,"
        " least and most of the rounds.\n"
    )
    yield table(pieces_benchmark.HEADS, map(pieces_benchmark.row_of, results))


def training_step(results):
    yield (
        "## Training step\n\nAdded time per step with a probe on every layer, in per cent of the step without one;"
        " median, least and most of the rounds. In the ViT, Delve reads one token, a probe all tokens. The arms"
        ' "compiled" train under `torch.compile`, and are compared with a compiled step without a probe.\n'
    )
    rows = []
    for result in results:
        delve = statistics.median(result["added percent"]["delve"])
        for name, values in result["added percent"].items():
            if not name.endswith("plain"):
                # Delve reads one token of the ViT: the ratio would compare different work.
                share = f"{statistics.median(values) / delve:.2f}" if result["model"] != "vit" else ""
                rows.append([result["model"], name, spread(values, 1), share])
    yield table(["model", "arm", "added %", "of Delve's"], rows)


def budget(results):
    yield (
        "## Budget\n\nTime that a probe with a budget adds to a training step: measured from outside (steps with it and steps"
        " with it paused, in turns), and by the probe itself. Then the forwards that it observed, rows for each feature, and"
        " the largest difference of a layer's dimension from its dimension without a budget, on other batches.\n"
    )
    yield table(HEADS, map(row_of, results))


def budget_short(results):
    yield (
        "## Budget of short trainings\n\nWhole runs from their first step on, eager and compiled: the time that the probe"
        " added. For comparison, the difference of two runs with the probe paused: the noise of this machine.\n"
    )
    yield table(SHORT_HEADS, map(short_row, results))


def accelerator(results):
    yield (
        "## On a GPU\n\nTime that a probe adds to training steps in bfloat16 on an"
        f" {results['device']}: a Llama of GPT-2's size (12 blocks of width 768, 16 sequences of 1,024 tokens). The host of this"
        " machine takes 10 to 60 µs for a launch, and causes much of the time.\n"
    )
    yield table(gpu.HEADS, map(gpu.row, results["steps"]))
    yield "\nSingle updates, and the largest error of an entry as a share of the size of its summands:\n"
    yield gpu.table_of_updates(results["updates"])


def hook(results):
    yield (
        f"## Hook\n\nHost time of a hook (processor time), in microseconds per layer and forward: {results['layers']} linear layers of"
        f" width {results['width']}, {results['rows']} rows, one thread; median, least and most of the rounds. Sampled draws"
        " half of the rows.\n"
    )
    hooks = results["microseconds"]
    heads = {"of an empty one": "a hook that does nothing", "of Delve's": "Delve"}
    rows = [
        [
            name,
            spread(values, 1),
            *(f"{statistics.median(ratios(values, hooks[beside])):.2f}" for beside in heads.values()),
        ]
        for name, values in hooks.items()
    ]
    yield table(["hook", "µs", *heads], rows)


def arithmetic(results):
    yield (
        "## Relative to the arithmetic\n\nTime that exact sums add to a training step, over the time of the symmetric products"
        " alone (OpenBLAS' `dsyrk` or `ssyrk` on the rows that the layers put out in one step); then the time in the hooks"
        f" alone over the same. Median of the rounds; clock: {results['clock']}.\n"
    )
    rows = [
        [
            each["model"],
            *(
                ", ".join(f"{statistics.median(values):.2f}" for values in zip(*pairs, strict=True))
                for pairs in each["ratios"].values()
            ),
        ]
        for each in results["models"]
    ]
    yield table(["model", *results["models"][0]["ratios"]], rows)


def compute_record(results):
    yield (
        f"### A record\n\nA recorder reads seven statistics and their intervals from ResNet-18's 21 layers with"
        f" {results['folds']} folds: time over one `eigvalsh` per fold and layer. Intervals need the eigenvectors of all folds"
        " but one. The arithmetic alone is an `eigh` and a product along the vectors for each fold, and an `eigvalsh` for each"
        " layer. A record decomposes several matrices at a time, the other arms one after the other.\n"
    )
    base, *others = results["seconds"].items()
    yield table(
        ["arm", "of one eigvalsh each"], [[name, spread(ratios(each, base[1]))] for name, each in others]
    )


def compute(results):
    yield (
        "## Compute\n\nTime to compute seven scalar statistics of one layer from its sums, as a multiple of one"
        " `eigvalsh`.\n"
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
        '## Merge\n\nResNet-18\'s 21 layers with three metrics each are merged across processes (gloo). "Stock" is'
        " torchmetrics' own path.\n"
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
        "## Folds\n\nAn update with 8 folds and with one fold, on one thread. The cost of an update does not change"
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


def marginals(results):
    yield (
        "## Marginals and a history\n\nTime that metrics without a matrix, and loggers as others write them, add to a training"
        " step with all linear or convolutional layers watched: one thread, processor time. The first column is relative to"
        " the fastest step, which other programs disturb least; then median and quartiles of the rounds.\n"
    )
    rows = []
    for name, result in results.items():
        for arm, shares in result["added"].items():
            low, middle, high = statistics.quantiles(shares, n=4)
            cells = [f"{100 * each:.1f}" for each in (result["least"][arm], middle)]
            rows.append([MODELS.get(name, name), arm, *cells, f"{100 * low:.1f} … {100 * high:.1f}"])
    yield table(["model", "arm", "least, %", "median, %", "quartiles, %"], rows)


def files(results):
    made = results["synthetic"]
    yield (
        f"## Embeddings in files\n\n`measure` of {made[0]['gigabytes']:.3g} GB of float16 rows of width 768"
        " (`IncrementalPCA`: a hundredth), generated while they are read; the time includes generating them.\n"
    )
    rows = [
        [
            each["arm"],
            f"{each['rate']:.3f}",
            f"{each['gigabytes'] / each['processor']:.3f}",
            f"{each['peak']:.2f}",
        ]
        for each in made
    ]
    yield table(["arm", "GB/s", "GB per second of processor time", "peak memory, GB"], rows)
    disk = results["disk"]
    yield (
        f"\nA file of {disk['gigabytes']:.2f} GB: the disk alone reads {disk['disk']:.2f} GB/s, `measure`"
        f" {disk['measure']:.2f} GB/s; the command takes {results['file']['command']:.1f} s, `numpy.load` and `numpy.cov`"
        f" {results['file']['numpy']:.1f} s.\n"
    )


def memory(results):
    yield (
        "## Memory\n\nMemory of the state, and peak of an update above it, with a batch of 128 MB in float32, whose"
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
        "## Accuracy with projections\n\nA convolutional network on MNIST digits, every convolution restricted"
        " to the share of variance in the first column; median, least and most over the seeds.\n"
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
        f"\nError of batches, compared with all {growth['samples']:,} samples at once: 21 x 21 pairs of layers of two"
        f" networks trained on digits; mean CKA {growth['mean of the whole']:.2f}. The biased"
        " estimator does without the correction.\n"
    )
    kinds = ("debiased", "biased")
    rows = [
        [row["batch"], *(f"{row[kind][key]:.4f}" for kind in kinds for key in row[kind])]
        for row in growth["batches"]
    ]
    yield table(["batch", *(f"{kind}, {key}" for kind in kinds for key in growth["batches"][0][kind])], rows)


def main():
    steps, updates, hooks = (read(name) for name in ("training_step", "update", "hook"))
    draw(steps["results"], updates["results"], IMAGES / "benchmarks.png")
    alternative = (
        "Bars of the time that Delve and three kinds of probe add to a training step of four networks; and the speed of an"
        " update over the width of the layer"
    )
    said = headline(steps["results"], updates["results"], hooks["results"])
    parts = [HEAD.format(headline=said, alternative=alternative, machine=processor(updates["machine"]))]
    for write in (
        update,
        pieces,
        training_step,
        arithmetic,
        accelerator,
        budget,
        budget_short,
        hook,
        compute,
        compute_record,
        merge,
        marginals,
        files,
        memory,
        folds,
        similarity,
        projection,
    ):
        path = RESULTS / f"{write.__name__}.json"
        if path.exists():
            content = json.loads(path.read_text())
            parts += [*write(content["results"]), machine(content)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
