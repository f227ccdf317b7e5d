"""Make the tables and the picture of docs/guide/observations.md from results/*.json, in seconds.

python benchmarks/intervals_report.py
"""

import json
import statistics
from pathlib import Path

from common import RESULTS, table
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DOCS = Path(__file__).parents[1] / "docs"
SPACE = "\N{NO-BREAK SPACE}"
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def percent(share):
    digits = 1 if 0.99 < share < 1 else 0
    return f"{100 * share:.{digits}f}{SPACE}%"


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def between(low, high):
    """Both ends, without a line break."""
    return f"{number(low)}{SPACE}…{SPACE}{number(high)}"


def pivoted(results):
    """(spectrum, n / D, statistic) -> folds -> row."""
    found = {}
    for row in results["rows"]:
        found.setdefault((row["spectrum"], row["ratio"], row["statistic"]), {})[row["folds"]] = row
    return found


def spectra(results):
    """Table of the dimension: truth, means, and share of intervals that contain the truth."""
    rows = []
    for (spectrum, ratio, statistic), of in pivoted(results).items():
        if statistic == "dimension":
            two, eight = of[2], of[8]
            rows.append(
                [
                    spectrum,
                    f"{ratio:g}",
                    f"{two['truth']:.0f}",
                    f"{two['plain']:.0f}",
                    *(f"{row['held out']:.0f}" for row in (eight, two)),
                    *(percent(row["holds"]) for row in (eight, two)),
                    percent(min(row["within one"] for row in (eight, two))),
                ]
            )
    headings = ["spectrum", "n/D", "true dimension", "plain", "held out, 8 folds", "… 2 folds"]
    return table([*headings, "holds, 8 folds", "… 2 folds", "within one"], rows)


def ranks(results, statistic):
    """Table of another statistic with 8 folds."""
    rows = []
    for (spectrum, ratio, name), of in pivoted(results).items():
        if name == statistic:
            row = of[8]
            cells = [number(row["truth"]), between(row["plain"], row["held out"])]
            cells += [number(row["width"]), number(row["scatter"])]
            rows.append([spectrum, f"{ratio:g}", *cells, percent(row["holds"]), number(row["farthest"])])
    headings = ["spectrum", "n/D", f"true {statistic}", "plain … held out", "width", "scatter", "holds"]
    return table([*headings, "farthest miss"], rows)


def digits(results):
    """Table of real layers: share of intervals that contain the value of all digits."""
    rows = []
    for statistic in dict.fromkeys(row["statistic"] for row in results["rows"]):
        for count in dict.fromkeys(row["digits"] for row in results["rows"]):
            own = [r for r in results["rows"] if (r["statistic"], r["digits"]) == (statistic, count)]
            widths = [h - low for r in own for low, h in zip(r["low"], r["high"], strict=True)]
            rows.append(
                [
                    statistic,
                    f"{count:,}",
                    percent(statistics.mean(share for r in own for share in r["holds"])),
                    percent(statistics.mean(share for r in own for share in r["within one"])),
                    f"{max(miss for r in own for miss in r['farthest']):.2g}",
                    f"{statistics.median(widths):.2g} ({max(w for r in own for w in r['widest']):.2g})",
                    f"{statistics.median(each for r in own for each in r['scatter']):.2g}",
                ]
            )
    headings = [
        "statistic",
        "digits",
        "holds",
        "within one",
        "farthest miss",
        "width, median (most)",
        "scatter",
    ]
    return table(headings, rows)


def layers(results):
    """Each layer's dimension in the first network, and the share of all networks' intervals that hold it."""
    found = {}
    for row in results["rows"]:
        if row["statistic"] == "dimension":
            found.setdefault(row["layer"], {})[row["digits"]] = row
    rows = []
    for layer, of in found.items():
        first = next(iter(of.values()))
        cells = []
        for row in of.values():
            cells += [between(row["low"][0], row["high"][0]), percent(statistics.mean(row["holds"]))]
        rows.append(
            [f"`{layer}`", first["width"], f"{first['observations']:,}", f"{first['of all'][0]:.0f}", *cells]
        )
    counts = next(iter(found.values()))
    headings = ["layer", "D", f"n of {min(counts)} digits", "all digits"]
    for count in counts:
        headings += [f"{count:,} digits", "holds"]
    return table(headings, rows)


def cost(results):
    """Time of updates and size of states, with one fold and with 8."""
    rows = []
    for result in results:
        one, eight = result["seconds"]["1"], result["seconds"]["8"]
        share = statistics.median(b / a for a, b in zip(one, eight, strict=True))
        times = [f"{1e6 * statistics.median(values):,.0f}" for values in (one, eight)]
        states = [f"{result['state'][folds] / 2**20:.2f}" for folds in ("1", "8")]
        rows.append([result["width"], f"{result['rows']:,}", *times, f"{share:.2f}", *states])
    headings = ["D", "rows", "µs, 1 fold", "µs, 8 folds", "ratio", "state in MB, 1 fold", "8 folds"]
    return table(headings, rows)


def draw(closing, path):
    """Plot the interval of some layers over the number of digits seen."""
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    names = list(dict.fromkeys(row["layer"] for row in closing))
    for axis, layer in zip(figure.subplots(2, 2, sharex=True).flat, names, strict=True):
        own = [row for row in closing if row["layer"] == layer]
        x, low, high = ([row[key] for row in own] for key in ("digits", "low", "high"))
        final = own[-1]["plain"]
        axis.fill_between(x, low, high, color=BLUE, alpha=0.25, lw=0, label="interval, 8 folds")
        axis.plot(x, [row["plain"] for row in own], "o-", color=BLUE, ms=3.5, lw=1.4, label="value")
        axis.axhline(final, color=ORANGE, ls="--", lw=1.4, label="value of all 5,000 digits")
        axis.set_title(f"{layer} ({own[0]['width']} features)", fontsize=11)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([32, 128, 512, 2048, 5000]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axis.set_ylim(0, max(*high, final) * 1.08)
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=10)
    figure.supxlabel("digits seen", fontsize=11)
    figure.supylabel("intrinsic dimension at 99 %", fontsize=11)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)


def main():
    folder = DOCS / "guide" / "observations_tables"
    folder.mkdir(exist_ok=True)
    known, real = read("intervals"), read("intervals_real")
    texts = {
        "spectra": spectra(known),
        "effective_rank": ranks(known, "effective rank"),
        "participation_ratio": ranks(known, "participation ratio"),
        "digits": digits(real),
        "layers": layers(real),
        "cost": cost(read("folds")),
    }
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)
    draw(real["closing"], DOCS / "images" / "interval.png")


if __name__ == "__main__":
    main()
