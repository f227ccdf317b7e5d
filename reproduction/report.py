"""Make the figures and tables of docs/published_picture.md from results.json and labels.json, in seconds.

python -m reproduction.report
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from benchmarks.common import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ConstantInputWarning, spearmanr

from spectralmetrics import low_saturation_tail

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"  # Okabe and Ito
COMPARED = ("saturation", "intrinsic dimension", "effective rank", "logistic regression")
PLATEAU = 0.005

Run = dict[str, Any]


def values(run: Run, key: str) -> dict[str, float]:
    return {layer: of[key] for layer, of in run["layers"].items()}


def tail_of(run: Run) -> list[str]:
    return low_saturation_tail(values(run, "saturation"))


def plateau_of(run: Run) -> str:
    """The first layer whose regression no later layer beats by more than half a per cent."""
    accuracy = values(run, "logistic regression")
    layers = list(accuracy)
    return next(
        layer
        for index, layer in enumerate(layers)
        if max(accuracy[later] for later in layers[index:]) - accuracy[layer] <= PLATEAU
    )


def spread(numbers: list[float], digits: int = 3) -> str:
    """Mean, least and most."""
    found = f"{statistics.mean(numbers):.{digits}f} ({min(numbers):.{digits}f} … {max(numbers):.{digits}f})"
    return found.replace(" ", "\N{NO-BREAK SPACE}")


def counted(names: list[str]) -> str:
    """The names, with the number of seeds of each if they differ."""
    distinct = sorted(set(names), key=names.index)
    if len(distinct) == 1:
        return distinct[0]
    return ", ".join(f"{name} ({names.count(name)} of {len(names)})" for name in distinct)


def network_table(networks: dict[str, list[Run]]) -> str:
    rows = []
    for network, runs in networks.items():
        rows.append(
            [
                network,
                spread([run["accuracy"] for run in runs]),
                str(runs[0]["border"]["largest"]),
                str(runs[0]["border"]["smallest"]),
                counted([(tail_of(run) or ["none"])[0] for run in runs]),
                counted([plateau_of(run) for run in runs]),
            ]
        )
    header = [
        "network",
        "accuracy",
        "border layer",
        "… by the smallest path",
        "tail begins at",
        "regressions gain nothing after",
    ]
    return table(header, rows)


def correlation_table(networks: dict[str, list[Run]]) -> str:
    rows = []
    for first, second in itertools.combinations(COMPARED, 2):
        found = [[rank_correlation(run, first, second) for run in runs] for runs in networks.values()]
        rows.append([f"{first}, {second}", *(spread(of, 2) for of in found)])
    return table(["rank correlation over layers", *networks], rows)


def cost_table(networks: dict[str, list[Run]]) -> str:
    kinds = [*COMPARED, "training"]
    rows = []
    for kind in kinds:
        cells = [statistics.median(run["seconds"][kind] for run in runs) for runs in networks.values()]
        rows.append([kind, *(f"{seconds:.1f} s" for seconds in cells)])
    return table(["all layers, median over the seeds", *networks], rows)


def delve_table(networks: dict[str, list[Run]]) -> str:
    pairs = (
        ("all digits in one batch", "delve, one batch", "rule, one batch"),
        ("batches of 250, ours on the last batch alone", "delve, batches", "rule, last batch"),
        ("batches of 250, ours on all of them", "delve, batches", "rule, batches"),
    )
    rows = []
    for label, theirs, ours in pairs:
        layers = [of for runs in networks.values() for run in runs for of in run["layers"].values()]
        equal = sum(abs(of[theirs] - of[ours]) < 1e-12 for of in layers)
        largest = max(abs(of[theirs] - of[ours]) for of in layers)
        rows.append([label, f"{equal} of {len(layers)}", f"{largest:.3g}"])
    return table(["comparison", "layers with equal saturation", "largest difference"], rows)


def layer_table(networks: dict[str, list[Run]]) -> str:
    rows = []
    for network, runs in networks.items():
        for layer, first in runs[0]["layers"].items():
            of = [run["layers"][layer] for run in runs]
            field = "all" if first["largest field"] is None else f"{first['largest field']:.0f}"
            smallest = "all" if first["smallest field"] is None else f"{first['smallest field']:.0f}"
            rows.append(
                [
                    network,
                    layer,
                    field,
                    smallest,
                    str(first["observations"]),
                    *(
                        spread([each[key] for each in of], 3 if key != "effective rank" else 1)
                        for key in COMPARED
                    ),
                ]
            )
    header = ["network", "layer", "receptive field", "smallest", "observations", *COMPARED]
    return table(header, rows)


def normal_table(networks: dict[str, list[Run]]) -> str:
    """Typical values: median, least and most over the layers of a stage and the seeds."""
    rows = []
    for network, runs in networks.items():
        stages: dict[str, list[dict[str, float]]] = {}
        for run in runs:
            width: float = 0
            for layer, of in run["layers"].items():
                width = of["intrinsic dimension"] / of["saturation"] if of["saturation"] else width
                stage = "1×1 convolutions of shortcuts" if "downsample" in layer else layer.partition(".")[0]
                shares = {key: of[key] for key in ("saturation", "intrinsic dimension")}
                shares["effective rank"] = of["effective rank"] / width
                stages.setdefault(stage, []).append(shares)
        for stage, found in stages.items():
            cells = []
            for key, digits in (("saturation", 2), ("intrinsic dimension", 0), ("effective rank", 2)):
                numbers = [of[key] for of in found]
                ends = f"{min(numbers):.{digits}f} … {max(numbers):.{digits}f}"
                cells.append(
                    f"{statistics.median(numbers):.{digits}f} ({ends})".replace(" ", "\N{NO-BREAK SPACE}")
                )
            rows.append([network, stage, *cells])
    return table(["network", "layers", "saturation", "intrinsic dimension", "effective rank / width"], rows)


PAIRS = (
    ("linear probe, means", "logistic regression, means"),
    ("linear probe, maps of 4 x 4", "logistic regression, maps of 4 x 4"),
    ("linear probe, means", "logistic regression, maps of 4 x 4"),
    ("logistic regression, means", "logistic regression, maps of 4 x 4"),
    ("saturation", "linear probe, means"),
)


def rank_correlation(run: Run, first: str, second: str) -> float:
    """Rank correlation over the layers, without the output."""
    hidden = [layer for layer in run["layers"] if layer != "fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(
            spearmanr(*([run["layers"][layer][key] for layer in hidden] for key in (first, second))).statistic
        )


def labels_table(networks: dict[str, list[Run]]) -> str:
    rows = []
    for first, second in PAIRS:
        of = [
            ", ".join(f"{rank_correlation(run, first, second):.2f}" for run in runs)
            for runs in networks.values()
        ]
        rows.append([f"{first}", second, *of])
    return table(["", "rank correlation with", *(f"{name}, three seeds" for name in networks)], rows)


def labels_cost_table(networks: dict[str, list[Run]]) -> str:
    rows = []
    for kind in (
        "linear probe, means",
        "linear probe, maps of 4 x 4",
        "logistic regression, means",
        "logistic regression, maps of 4 x 4",
    ):
        cells = [statistics.median(run["seconds"][kind] for run in runs) for runs in networks.values()]
        rows.append([kind, *(f"{seconds:.2f} s" for seconds in cells)])
    return table(["all layers, median of three seeds", *networks], rows)


def draw_labels(networks: dict[str, list[Run]], path: Path) -> None:
    """Plot saturation and R² of each layer above, accuracies of logistic regressions below."""
    figure = Figure(figsize=(12.5, 5.8), layout="constrained")
    grid = figure.subplots(2, len(networks), sharex="col", sharey="row", height_ratios=(1.4, 1))
    for (upper, lower), (network, runs) in zip(grid.T, networks.items(), strict=True):
        layers = list(runs[0]["layers"])
        places = range(len(layers))
        for axis, key, label, colour, marker in (
            (upper, "saturation", "saturation", BLUE, "o"),
            (upper, "linear probe, means", "labels explained by the layer's means (R²)", ORANGE, "s"),
            (lower, "logistic regression, means", "accuracy of a logistic regression on means", GREEN, "^"),
            (lower, "logistic regression, maps of 4 x 4", "on maps of 4 × 4", PINK, "D"),
        ):
            of = [[run["layers"][layer][key] for run in runs] for layer in layers]
            axis.plot(places, list(map(statistics.mean, of)), marker, ls="-", ms=4, color=colour, label=label)
            axis.fill_between(places, list(map(min, of)), list(map(max, of)), color=colour, alpha=0.25, lw=0)
            axis.grid(axis="y", color="0.92")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylim(0, 1.02)
        tails = [tail_of(run) for run in runs]
        common = [layers.index(layer) for layer in layers if sum(layer in t for t in tails) * 2 > len(runs)]
        for axis in (upper, lower):
            if common:
                axis.axvspan(
                    common[0] - 0.5, common[-1] + 0.5, color="0.88", zorder=0, label="low-saturation tail"
                )
        accuracy = statistics.mean(run["accuracy"] for run in runs)
        upper.set_title(f"{network}: accuracy {accuracy:.3f}", fontsize=10)
        lower.set_xticks(places, layers, rotation=90, fontsize=8)
    grid[0, 0].set_ylabel("saturation, R²", fontsize=8)
    grid[1, 0].set_ylabel("accuracy", fontsize=8)
    shown: dict[str, Any] = {}
    for axis in grid[:, 0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw(networks: dict[str, list[Run]], path: Path) -> None:
    figure = Figure(figsize=(12.5, 10.5), layout="constrained")
    panels = figure.subfigures(2, 2).flat
    shown: dict[str, Any] = {}
    for panel, (network, runs) in zip(panels, networks.items(), strict=True):
        upper, lower = panel.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        draw_network(upper, lower, runs)
        accuracy = statistics.mean(run["accuracy"] for run in runs)
        upper.set_title(f"{network}: accuracy {accuracy:.3f}", fontsize=10)
        for axis in (upper, lower):
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    seeds = len(next(iter(networks.values())))
    figure.suptitle(f"MNIST digits at 32 × 32, validation data: mean and range of {seeds} seeds", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_network(upper: Axes, lower: Axes, runs: list[Run]) -> None:
    """Plot saturation above, regressions below, with the tail and the border layers in both."""
    layers = list(runs[0]["layers"])
    places = range(len(layers))
    for axis, key, label, colour, marker in (
        (upper, "saturation", "saturation", BLUE, "o"),
        (lower, "logistic regression", "accuracy of a logistic regression on the layer", ORANGE, "s"),
    ):
        of = [[run["layers"][layer][key] for run in runs] for layer in layers]
        axis.plot(places, list(map(statistics.mean, of)), marker, ls="-", ms=4, color=colour, label=label)
        axis.fill_between(places, list(map(min, of)), list(map(max, of)), color=colour, alpha=0.25, lw=0)
        tails = [tail_of(run) for run in runs]
        common = [layers.index(layer) for layer in layers if sum(layer in t for t in tails) * 2 > len(runs)]
        if common:
            axis.axvspan(common[0] - 0.5, common[-1] + 0.5, color="0.88", zorder=0, label="low-saturation tail")
        borders = runs[0]["border"]
        styles = [("largest", "-", "border layer")]
        if borders["smallest"] != borders["largest"]:
            styles.append(("smallest", "--", "border layer by the smallest path"))
        for paths, style, label in styles:
            if borders[paths] is not None:
                axis.axvline(layers.index(borders[paths]), color=GREEN, ls=style, label=label)
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    accuracy = statistics.mean(run["accuracy"] for run in runs)
    lower.axhline(accuracy, color="0.35", ls=":", label="accuracy of the network")
    upper.set_ylim(0, 1.02)
    lower.set_ylim(0.87, 1.0)
    upper.set_ylabel("saturation", fontsize=8)
    lower.set_ylabel("accuracy", fontsize=8)
    lower.set_xticks(places, layers, rotation=90, fontsize=8)


def by_network(results: Path) -> dict[str, list[Run]]:
    """The runs of a file of results."""
    networks: dict[str, list[Run]] = {}
    for run in json.loads(results.read_text())["runs"]:
        networks.setdefault(run["network"], []).append(run)
    return networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--labels", type=Path, default=HERE / "labels.json")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    networks, labelled = by_network(options.results), by_network(options.labels)
    draw_labels(labelled, options.docs / "images" / "published_labels.png")
    draw(networks, options.docs / "images" / "published_picture.png")
    folder = options.docs / "published_picture_tables"
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        (make, networks)
        for make in (network_table, normal_table, correlation_table, cost_table, delve_table, layer_table)
    ]
    for make, of in [*made, (labels_table, labelled), (labels_cost_table, labelled)]:
        text = make(of)
        (folder / f"{make.__name__.removesuffix('_table')}.md").write_text(text, encoding="utf-8")
        if make is not layer_table:
            print(text)


if __name__ == "__main__":
    main()
