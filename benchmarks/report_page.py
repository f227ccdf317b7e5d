"""Size of the report's page, and how long a browser takes until it can be used.

    python benchmarks/report_page.py [--runs runs/demo] [--keep FOLDER]

Measures two made-up runs (21 layers and 10 epochs; 200 layers and 100 epochs; two stages each) and the recorded
runs in `--runs`. Layers have 16 to 64 features whose eigenvalues fall by power laws that drift and jitter from
epoch to epoch. The time runs from the start of the navigation until sliders, table and the charts in view are
there; the median of several loads, each in an empty profile, window 1280 x 900. Needs Chromium and the extra
`test`.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Parser, table, write_result

from spectralmetrics import functional, write_report
from spectralmetrics.recording.writers.csv import format_rows

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MADE_UP = {"21 layers, 10 epochs": (21, 10), "200 layers, 100 epochs": (200, 100)}
STAGES = ("train", "eval")


def write_run(directory, layers, epochs, seed=0):
    """A run with a table and arrays, in the format that ``ArraysWriter`` documents."""
    generator = np.random.default_rng(seed)
    (directory / "arrays").mkdir(parents=True)
    widths = generator.choice([16, 32, 48, 64], layers)
    slopes = np.linspace(0.5, 3.0, layers)
    rows = []
    for epoch in range(epochs):
        arrays = {}
        for stage in STAGES:
            for layer, width in enumerate(map(int, widths)):
                name = f"blocks.{layer // 8}.sub{layer % 8}.conv"
                slope = slopes[layer] * (1 + 0.5 * np.exp(-epoch / 10)) + generator.normal(0, 0.02)
                values = np.arange(1, width + 1) ** -slope * np.exp(generator.normal(0, 0.05, width))
                rotation = np.linalg.qr(generator.normal(size=(width, width)))[0]
                key = f"{stage}/{name}"
                arrays[f"{key}/covariance"] = (rotation * values) @ rotation.T
                arrays[f"{key}/mean"] = generator.normal(size=width)
                arrays[f"{key}/count"] = np.int64(50_000 >> (layer * 8 // layers))
                arrays[f"{key}/non_finite"] = np.int64(0)
                dimension = int(functional.intrinsic_dimension(torch.from_numpy(values)))
                effective = float(functional.effective_rank(torch.from_numpy(values)))
                for statistic, value in (
                    ("saturation", dimension / width),
                    ("intrinsic_dimension", dimension),
                    ("effective_rank", effective),
                ):
                    rows.append(
                        {"epoch": epoch, "stage": stage, "layer": name, "statistic": statistic, "value": value}
                    )
            for scalar in ("accuracy", "loss"):
                value = 1 - np.exp(-epoch / 20) if scalar == "accuracy" else 2 * np.exp(-epoch / 20)
                rows.append(
                    {"epoch": epoch, "stage": stage, "layer": "", "statistic": scalar, "value": float(value)}
                )
        np.savez(directory / "arrays" / f"epoch-{epoch:06d}.npz", **arrays)
    (directory / "records.csv").write_bytes(format_rows(rows))
    settings = {
        name: {"metric": name, "center": True, "threshold": 0.99, "rule": "explained"}
        for name in ("saturation", "intrinsic_dimension")
    }
    manifest = {
        "format": 1,
        "writers": {"csv": None, "arrays": None},
        "statistics": settings,
        "last_epoch": epochs - 1,
    }
    (directory / "recording.json").write_text(json.dumps(manifest))


def time_to_interactive(browser, path, loads):
    """Median seconds of some loads, from navigation to readiness and to the last chart."""
    ready, drawn = [], []
    for _ in range(loads):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        ready.append(page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000)
        drawn.append(page.evaluate("performance.getEntriesByName('drawn')[0].startTime") / 1000)
        context.close()
    return statistics.median(ready), statistics.median(drawn)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="recorded runs to measure as well")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder in which to leave the pages")
    options = parser.parse_args()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        print("left out: no Chromium found (Debian: apt-get install chromium)")
        return
    from playwright.sync_api import sync_playwright

    pages = {}
    with tempfile.TemporaryDirectory() as folder:
        target = options.keep or Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, (layers, epochs) in MADE_UP.items():
            directory = Path(folder, f"{layers}x{epochs}")
            write_run(directory, layers, epochs)
            pages[name] = ([directory], target / f"{layers}x{epochs}.html")
        for run in options.runs:
            pages[f"recorded run {run.name}"] = ([run], target / f"recorded-{run.name}.html")
        results = []
        for name, (runs, path) in pages.items():
            started = time.perf_counter()
            write_report(runs, path)
            results.append(
                {"page": name, "write_s": time.perf_counter() - started, "megabytes": path.stat().st_size / 1e6}
            )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
            for result, (_, path) in zip(results, pages.values(), strict=True):
                result["ready_s"], result["drawn_s"] = time_to_interactive(browser, path, options.loads)
            browser.close()
    headings = ["page", "written in s", "MB", "interactive after s", "all charts after s"]
    print(
        table(
            headings,
            [
                [
                    r["page"],
                    f"{r['write_s']:.1f}",
                    *(f"{r[k]:.2f}" for k in ("megabytes", "ready_s", "drawn_s")),
                ]
                for r in results
            ],
        )
    )
    write_result("report_page", results)


if __name__ == "__main__":
    main()
