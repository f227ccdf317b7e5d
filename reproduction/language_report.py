"""Make the figure and the tables of docs/language_models.md from language.jsonl, in seconds.

The questions were fixed before there were results:

- **Early spectra and the later loss.** Seeds of a combination of learning rate and batch size are averaged,
  so that combinations are the independent observations. Each statistic is read after 2, 5, 10 and 20 % of
  the training: its mean over all layers, and its value for the last norm's output. The tables show Spearman's
  rank correlation with the final validation loss; the partial correlation given the training loss of that
  moment; and the partial correlation given also learning rate (the logarithm and its square) and batch size.
  Intervals are the middle 95 % of a bootstrap over combinations. The claim is judged by the exponent of the
  spectrum's tail, averaged over layers, after 5 %. Baselines: the training loss of that moment, the learning
  rate, the batch size.
- **Phases.** For RankMe of the last norm's output: the largest rise between two moments, a fall before it
  and a fall after it, each by at least a tenth. For the exponent, rise and fall are exchanged.

Added once there were results: predictions of each of these for a combination that is left out, and the phases
of the grid's own runs at their twelve moments.

    python -m reproduction.language_report
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmarks.common import table
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from reproduction.language import RESULTS, read
from reproduction.report import BLUE, DOCS, GREEN, ORANGE, PINK
from scipy.stats import rankdata

Run = dict[str, Any]

EARLY = (0.02, 0.05, 0.1, 0.2)
NAMES = {
    "tail_exponent": "exponent of the tail",
    "exponent": "exponent (α-ReQ)",
    "rankme": "RankMe",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "saturation": "saturation",
}
OF_LAYERS = {"mean": "mean of all layers", "norm": "last hidden state"}
PRIMARY = ("tail_exponent", "mean", 0.05)
RESAMPLES = 2000
CHANGE = 0.1
"""A phase is a rise or fall by at least this share."""


class Correlation(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        text = f"{self.value:+.2f} ({self.low:+.2f} … {self.high:+.2f})".replace("-", "\N{MINUS SIGN}")
        return text.replace(" ", "\N{NO-BREAK SPACE}")


# -- early spectra and the later loss ------------------------------------------------------------------------


def at(run: Run, share: float) -> Run:
    """The measurement after this share of the training."""
    return next(moment for moment in run["moments"] if moment["step"] == round(share * run["steps"]))


def statistic_of(moment: Run, statistic: str, of: str) -> float:
    """Value of a layer, or mean over layers; NaN if no layer has one, as after a loss that is not finite."""
    layers = moment["layers"]
    found = [layers[of]] if of in layers else list(layers.values())
    numbers = [layer[statistic] for layer in found if layer[statistic] is not None]
    return statistics.mean(numbers) if numbers else math.nan


def combinations_of(runs: list[Run]) -> dict[tuple[float, int], list[Run]]:
    """The runs of each learning rate and batch size, without combinations that lack a seed."""
    found: dict[tuple[float, int], list[Run]] = defaultdict(list)
    for run in runs:
        if run["kind"] == "grid":
            found[run["rate"], run["batch"]].append(run)
    most = max(map(len, found.values()))
    return {key: found[key] for key in sorted(found) if len(found[key]) == most}


def number(value: float | None) -> float:
    """The loss; infinity if it is not finite, so that it ranks last."""
    return math.inf if value is None else value


class Grid:
    """Numbers of each combination, averaged over seeds."""

    def __init__(self, runs: list[Run]) -> None:
        self.combinations = combinations_of(runs)
        self.rate, self.batch = np.array(list(self.combinations)).T
        self.final = self.mean(lambda run: number(run["validation_loss"]))
        self.seeds = len(next(iter(self.combinations.values())))

    def mean(self, of: Any) -> np.ndarray:
        return np.array([statistics.mean(map(of, runs)) for runs in self.combinations.values()])

    def loss(self, share: float) -> np.ndarray:
        return self.mean(lambda run: number(at(run, share)["train_loss"]))

    def statistic(self, statistic: str, of: str, share: float) -> np.ndarray:
        return self.mean(lambda run: statistic_of(at(run, share), statistic, of))

    def settings(self) -> list[np.ndarray]:
        rate = np.log(self.rate) - np.log(self.rate).mean()
        return [rate, rate**2, np.log(self.batch)]

    def correlation(self, values: np.ndarray, *given: np.ndarray, ranked: int = 0) -> Correlation:
        """Spearman's partial correlation with the final loss, given columns; the first ``ranked`` as ranks."""
        known = np.flatnonzero(np.isfinite(values) | np.isposinf(values))
        draws = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
        chosen = known[np.vstack([np.arange(len(known)), draws])]  # (1 + resamples, combinations)
        design = [np.ones(chosen.shape)]
        for place, column in enumerate(given):
            design.append(rankdata(column[chosen], axis=1) if place < ranked else column[chosen])
        found = partial_correlation(
            rankdata(values[chosen], axis=1), rankdata(self.final[chosen], axis=1), np.stack(design, axis=-1)
        )
        low, high = np.nanquantile(found[1:], (0.025, 0.975))
        return Correlation(float(found[0]), float(low), float(high))


def partial_correlation(x: np.ndarray, y: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Pearson's correlation, for each row, of both residuals of a linear regression on the design."""
    inverse = np.linalg.pinv(design)
    x, y = (v - (design @ (inverse @ v[..., None]))[..., 0] for v in (x, y))
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.where(norm > 1e-9, (x * y).sum(1) / np.maximum(norm, 1e-9), np.nan)


def correlation_rows(grid: Grid, share: float) -> list[list[str]]:
    loss, settings = grid.loss(share), grid.settings()
    rows = []
    for statistic, of in itertools.product(NAMES, OF_LAYERS):
        values = grid.statistic(statistic, of, share)
        found = (
            grid.correlation(values),
            grid.correlation(values, loss, ranked=1),
            grid.correlation(values, loss, *settings, ranked=1),
        )
        rows.append([NAMES[statistic], OF_LAYERS[of], *map(str, found)])
    rows.append(
        ["*training loss*", "", str(grid.correlation(loss)), "", str(grid.correlation(loss, *settings))]
    )
    for name, values in (("learning rate", grid.rate), ("batch size", grid.batch)):
        rows.append(
            [f"*{name}*", "", str(grid.correlation(values)), str(grid.correlation(values, loss, ranked=1)), ""]
        )
    return rows


HEADER = [
    "statistic",
    "of",
    "rank correlation with the final loss",
    "given the training loss",
    "given also rate and batch",
]


def correlations_table(grid: Grid) -> str:
    return table([f"after {PRIMARY[2]:.0%}: statistic", *HEADER[1:]], correlation_rows(grid, PRIMARY[2]))


def moments_table(grid: Grid) -> str:
    rows = [
        [f"{share:.0%}", *row]
        for share in EARLY
        for row in correlation_rows(grid, share)
        if share != PRIMARY[2]
    ]
    return table(["after", *HEADER], rows)


def primary_table(grid: Grid) -> str:
    """The claim and its baselines, after each share of the training."""
    statistic, of, _ = PRIMARY
    rows = []
    for share in EARLY:
        loss, values = grid.loss(share), grid.statistic(statistic, of, share)
        rows.append(
            [
                f"{share:.0%}",
                str(grid.correlation(values)),
                str(grid.correlation(loss)),
                str(grid.correlation(values, loss, ranked=1)),
                str(grid.correlation(values, loss, *grid.settings(), ranked=1)),
            ]
        )
    return table(
        [
            "after",
            NAMES[statistic],
            "training loss",
            "exponent given the loss",
            "exponent given loss, rate and batch",
        ],
        rows,
    )


def left_out(columns: list[np.ndarray], target: np.ndarray) -> np.ndarray:
    """Prediction for each combination, by a linear regression on all others."""
    design = np.column_stack([np.ones(len(target)), *columns])
    everyone = np.arange(len(target))
    return np.array(
        [
            design[i] @ np.linalg.lstsq(design[everyone != i], target[everyone != i], rcond=None)[0]
            for i in everyone
        ]
    )


def predictions_table(grid: Grid) -> str:
    """Error of the predicted logarithm of the final loss, for a combination that is left out."""
    statistic, of, _ = PRIMARY
    target = np.log(grid.final)
    rows = []
    for name, with_settings, with_loss, with_statistic in (
        ("none (the mean)", False, False, False),
        ("learning rate and batch size", True, False, False),
        ("training loss", False, True, False),
        (NAMES[statistic], False, False, True),
        (f"training loss, {NAMES[statistic]}", False, True, True),
        ("rate, batch, training loss", True, True, False),
        (f"rate, batch, training loss, {NAMES[statistic]}", True, True, True),
    ):
        cells = []
        for share in EARLY:
            columns = [*grid.settings()] if with_settings else []
            columns += [np.log(grid.loss(share))] if with_loss else []
            columns += [grid.statistic(statistic, of, share)] if with_statistic else []
            cells.append(f"{100 * np.sqrt(np.mean((left_out(columns, target) - target) ** 2)):.1f} %")
        rows.append([name, *cells])
    return table(["predictors", *(f"after {share:.0%}" for share in EARLY)], rows)


def losses_table(grid: Grid) -> str:
    """Final validation loss of each combination: mean and half the range of the seeds."""
    batches = sorted(set(grid.batch))
    rows = []
    for rate in sorted(set(grid.rate)):
        cells = []
        for batch in batches:
            losses = [number(run["validation_loss"]) for run in grid.combinations.get((rate, batch), [])]
            half = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.3f}{half}" if losses else "")
        rows.append([f"{rate:g}", *cells])
    return table(["learning rate", *(f"batch of {batch:.0f}" for batch in batches)], rows)


# -- phases --------------------------------------------------------------------------------------------------


class Phases(NamedTuple):
    """Relative changes before, in and after the largest rise, and where it begins and ends."""

    before: float
    rise: float
    behind: float
    begin: int
    end: int

    @property
    def seen(self) -> bool:
        return self.before <= -CHANGE and self.rise >= CHANGE and self.behind <= -CHANGE


def phases_of(values: list[float]) -> Phases:
    pairs = itertools.combinations(range(len(values)), 2)
    begin, end = max(pairs, key=lambda pair: values[pair[1]] / values[pair[0]])
    return Phases(
        values[begin] / values[0] - 1,
        values[end] / values[begin] - 1,
        values[-1] / values[end] - 1,
        begin,
        end,
    )


def series(run: Run, statistic: str, of: str = "norm") -> list[float]:
    return [statistic_of(moment, statistic, of) for moment in run["moments"]]


KINDS = {"grid": "grid", "phases": "followed closely"}


def phases_table(runs: list[Run]) -> str:
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["kind"], run["vocabulary"]].append(run)
    rows = []
    for ((kind, vocabulary), found), statistic in itertools.product(
        sorted(groups.items()), ("rankme", "exponent")
    ):
        inverse = -1 if statistic == "exponent" else 1
        seen = [phases_of([value**inverse for value in series(run, statistic)]) for run in found]
        cells = []
        for name in ("before", "rise", "behind"):
            changes = [(1 + getattr(phases, name)) ** inverse - 1 for phases in seen]
            ends = f" ({min(changes):+.0%} … {max(changes):+.0%})" if len(changes) > 1 else ""
            text = f"{statistics.median(changes):+.0%}{ends}"
            cells.append(text.replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}"))
        first = sum(phases.before <= -CHANGE and phases.rise >= CHANGE for phases in seen)
        rows.append(
            [
                f"{KINDS[kind]}, {vocabulary}",
                NAMES[statistic],
                *cells,
                f"{first} of {len(seen)}",
                f"{sum(phases.seen for phases in seen)} of {len(seen)}",
            ]
        )
    header = [
        "runs",
        "statistic",
        "warm-up",
        "entropy-seeking",
        "compression-seeking",
        "first two",
        "all three",
    ]
    return table(header, rows)


def runs_table(runs: list[Run]) -> str:
    """The runs: number, size, duration, and corpus."""
    kinds: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        kinds[run["kind"], run["vocabulary"]].append(run)
    rows = []
    for (kind, vocabulary), found in sorted(kinds.items()):
        losses = [number(run["validation_loss"]) for run in found]
        rows.append(
            [
                KINDS[kind],
                f"{vocabulary} ({found[0]['vocabulary_size']:,})",
                str(len(found)),
                f"{found[0]['parameters']:,}",
                f"{found[0]['tokens'] / 1e6:.1f} million",
                f"{min(losses):.3f}" + (f" … {max(losses):.3f}" if len(losses) > 1 else ""),
                f"{sum(run['seconds'] for run in found) / 60:.0f} min",
                ", ".join(sorted({run["device"] for run in found})),
            ]
        )
    return table(
        [
            "runs",
            "vocabulary",
            "number",
            "parameters",
            "tokens each",
            "validation loss",
            "time of a process",
            "device",
        ],
        rows,
    )


# -- the figure ----------------------------------------------------------------------------------------------


def draw(grid: Grid, runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1))
    scatter, plain, partial = upper.subplots(1, 3, width_ratios=(1.25, 1, 1))
    draw_scatter(scatter, grid)
    draw_correlations(plain, grid, given=False)
    draw_correlations(partial, grid, given=True)
    partial.sharey(plain)
    partial.set_ylabel("")
    upper.legend(
        *plain.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower right", ncols=4
    )
    for axis, (kind, statistic) in zip(
        lower.subplots(1, 4), itertools.product(KINDS, ("rankme", "exponent")), strict=True
    ):
        draw_phases(axis, [run for run in runs if run["kind"] == kind], kind, statistic)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9), axis.yaxis.label.set_size(9), axis.title.set_size(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# Without the brightest end: the site's dark mode inverts it to the darkest.
viridis = ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_scatter(axis: Axes, grid: Grid) -> None:
    statistic, of, share = PRIMARY
    values = grid.statistic(statistic, of, share)
    norm = LogNorm(min(grid.rate), max(grid.rate))
    batches = sorted(set(grid.batch))
    for marker, batch in zip(MARKERS, batches, strict=False):
        chosen = grid.batch == batch
        points = axis.scatter(
            values[chosen],
            grid.final[chosen],
            36,
            grid.rate[chosen],
            marker=marker,
            cmap=viridis,
            norm=norm,
            edgecolors="0.3",
            linewidths=0.5,
        )
    axis.legend(
        [
            Line2D([], [], marker=marker, ls="", color="0.4")
            for marker, _ in zip(MARKERS, batches, strict=False)
        ],
        [f"batch of {batch:.0f}" for batch in batches],
        frameon=False,
        fontsize=8,
    )
    bar = axis.figure.colorbar(points, ax=axis, aspect=30, pad=0.02)
    bar.set_label("learning rate", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    axis.set(
        xlabel=f"{NAMES[statistic]}, {OF_LAYERS[of]}, after {share:.0%}",
        ylabel="final validation loss",
        title=f"Early spectrum and final loss: {grid.correlation(values)}",
    )


def draw_correlations(axis: Axes, grid: Grid, given: bool) -> None:
    places = np.arange(len(EARLY))
    lines = [
        ("tail_exponent", BLUE, "o"),
        ("rankme", ORANGE, "s"),
        ("participation_ratio", GREEN, "^"),
    ]
    for shift, (statistic, colour, marker) in zip((-0.15, 0, 0.15), lines, strict=True):
        found = []
        for share in EARLY:
            values = grid.statistic(statistic, "mean", share)
            taken = [grid.loss(share)] if given else []
            found.append(grid.correlation(values, *taken, ranked=1))
        error_bars(axis, places + shift, found, NAMES[statistic], colour, marker)
    if not given:
        found = [grid.correlation(grid.loss(share)) for share in EARLY]
        error_bars(axis, places + 0.3, found, "training loss (baseline)", PINK, "D")
    axis.axhline(0, color="0.7", lw=0.8, zorder=0)
    axis.set(
        ylim=(-1.05, 1.05),
        xlabel="share of the training",
        ylabel="rank correlation with the final loss",
        title="Given the training loss" if given else "By itself",
    )
    axis.set_xticks(places, [f"{share:.0%}" for share in EARLY])


def error_bars(
    axis: Axes, places: np.ndarray, found: list[Correlation], label: str, colour: str, marker: str
) -> None:
    values, low, high = np.array(found).T
    axis.errorbar(
        places,
        values,
        np.maximum([values - low, high - values], 0),  # a bootstrap's interval can miss the value
        fmt=marker,
        ms=5,
        lw=1,
        capsize=2,
        color=colour,
        label=label,
    )


def draw_phases(axis: Axes, runs: list[Run], kind: str, statistic: str) -> None:
    """Plot the last hidden state's statistic over the tokens; the grid's runs in the colours of their rates."""
    rates = [run["rate"] for run in runs]
    norm = LogNorm(min(rates), max(rates)) if kind == "grid" else None
    styles = {"characters": (BLUE, "-"), "words": (ORANGE, "--")}
    for run in runs:
        tokens = [run["tokens"] * moment["step"] / run["steps"] for moment in run["moments"]]
        colour, line = (viridis(norm(run["rate"])), "-") if norm else styles[run["vocabulary"]]
        label = None if norm else f"{run['vocabulary']} ({run['vocabulary_size']:,})"
        axis.plot(
            [max(least_of(runs), each) for each in tokens],
            series(run, statistic),
            line,
            color=colour,
            label=label,
        )
    axis.set_xscale("log")
    if kind != "grid":
        axis.legend(frameon=False, fontsize=8)
    axis.set(xlabel="tokens (the first point: before training)", title=f"{NAMES[statistic]}, {KINDS[kind]}")
    axis.grid(axis="y", color="0.92")


def least_of(runs: list[Run]) -> float:
    """Place of 0 on a logarithmic axis: half of the first moment of training."""
    return min(run["tokens"] * run["moments"][1]["step"] / run["steps"] for run in runs) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    runs = read(options.results)
    grid = Grid(runs)
    draw(grid, runs, options.docs / "images" / "language_models.png")
    folder = options.docs / "language_models_tables"
    folder.mkdir(parents=True, exist_ok=True)
    for make, of in (
        (runs_table, runs),
        (losses_table, grid),
        (primary_table, grid),
        (correlations_table, grid),
        (moments_table, grid),
        (predictions_table, grid),
        (phases_table, runs),
    ):
        text = make(of)
        (folder / f"{make.__name__.removesuffix('_table')}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
