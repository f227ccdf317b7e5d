"""Embeddings in files: rate and memory of `measure`, compared with numpy, scikit-learn and the disk itself.

    python benchmarks/files.py [--gigabytes 50] [--width 768] [--folder DIR] [--parts synthetic file disk]

``synthetic``: float16 rows, generated while they are read. Each arm runs in its own process, which reports its
peak memory: `measure` with and without folds and with float32 products, `numpy.cov` added up over blocks,
scikit-learn's `IncrementalPCA` (on a hundredth of the rows, since it is slow), and the generator alone.
``file``: 100,000 rows by the command line, compared with `numpy.load` and `numpy.cov`. ``disk``: reading a file
alone, and `measure` of it, each after the operating system's cache of the file is emptied.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Parser, table, write_result

import spectralmetrics as sm

BLOCK = 16384


def peak():
    """Peak memory of this process, in GiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def blocks(gigabytes, width):
    """Blocks of float16 rows, each cut from one array of noise: a block costs little more than a copy."""
    generator = np.random.default_rng(0)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    noise = (generator.standard_normal((2 * BLOCK, width), dtype=np.float32) * scale).astype(np.float16)
    for index in range(max(int(gigabytes * 1e9 / (2 * width * BLOCK)), 1)):
        start = index * 997 % BLOCK
        yield noise[start : start + BLOCK].copy()


def by_measure(source, folds=8, gram_dtype=None):
    metrics = [
        sm.IntrinsicDimensionMetric(gram_dtype=gram_dtype),
        sm.EffectiveRankMetric(gram_dtype=gram_dtype),
    ]
    return float(sm.measure(source, metrics, folds=folds).values["effective_rank"])


def by_numpy(source):
    """Sums of `numpy.cov` over blocks, as people write it; it ignores that the blocks' means differ."""
    count, total = 0, 0
    for rows in source:
        count += len(rows)
        total = total + np.cov(rows.astype(np.float64), rowvar=False, bias=True) * len(rows)
    return float(sm.functional.effective_rank(torch.linalg.eigvalsh(torch.from_numpy(total / count)).flip(0)))


def by_incremental_pca(source):
    from sklearn.decomposition import IncrementalPCA

    model = IncrementalPCA()
    for rows in source:
        model.partial_fit(rows.astype(np.float64))
    return float(sm.functional.effective_rank(torch.from_numpy(model.explained_variance_)))


def nothing(source):
    return float(sum(len(rows) for rows in source))


ARMS = {
    "generator alone": nothing,
    "measure, 8 folds": by_measure,
    "measure, 1 fold": lambda source: by_measure(source, folds=1),
    "measure, 8 folds, float32 products": lambda source: by_measure(source, gram_dtype=torch.float32),
    "numpy.cov over blocks": by_numpy,
    "IncrementalPCA": by_incremental_pca,
}


def run_arm(name, gigabytes, width):
    """Print seconds and peak memory of one arm as JSON; each arm needs its own process."""
    start, processor = time.perf_counter(), time.process_time()
    value = ARMS[name](blocks(gigabytes, width))
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak(), "value": value}))


def synthetic(gigabytes, width):
    rows, results = [], []
    for name in ARMS:
        amount = gigabytes / 100 if name == "IncrementalPCA" else gigabytes
        command = [sys.executable, __file__, "--arm", name, "--gigabytes", str(amount), "--width", str(width)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])  # the machine's description comes first
        amount = max(int(amount * 1e9 / (2 * width * BLOCK)), 1) * 2 * width * BLOCK / 1e9
        found |= {"arm": name, "gigabytes": amount, "rate": amount / found["seconds"]}
        results.append(found)
        busy = amount / found["processor"]
        rows.append([name, f"{amount:.3g}", f"{found['rate']:.3f}", f"{busy:.3f}", f"{found['peak']:.2f}"])
        print(rows[-1], flush=True)
    print(table(["", "GB of float16 rows", "GB/s", "GB per second of processor time", "peak memory, GB"], rows))
    return results


def write_file(path, rows, width):
    generator = np.random.default_rng(0)
    scale = np.arange(1, width + 1) ** -0.5
    values = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        values[start : start + size] = generator.standard_normal((size, width), dtype=np.float32) * scale
    values.flush()
    os.sync()


def forget(path):
    """Drop a file from the operating system's cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def whole_file(path):
    command = [sys.executable, "-m", "spectralmetrics", "measure", str(path)]
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    print(output)
    start = time.perf_counter()
    np.cov(np.load(path).astype(np.float64), rowvar=False)
    by_cov = time.perf_counter() - start
    print(f"the command {seconds:.1f} s, numpy.load and numpy.cov {by_cov:.1f} s")
    return {"command": seconds, "numpy": by_cov, "output": output}


def disk(path):
    forget(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        size = 0
        while chunk := file.read(2**24):
            size += len(chunk)
    rate = size / (time.perf_counter() - start) / 1e9
    forget(path)
    start = time.perf_counter()
    by_measure(path)
    measured = size / (time.perf_counter() - start) / 1e9
    print(f"the disk alone {rate:.2f} GB/s, measure of the same file {measured:.2f} GB/s")
    return {"gigabytes": size / 1e9, "disk": rate, "measure": measured}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=50)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the parts `file` and `disk`")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--parts", nargs="+", default=["synthetic", "file", "disk"])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm, options.gigabytes, options.width)
        return
    results = {}
    if "synthetic" in options.parts:
        results["synthetic"] = synthetic(options.gigabytes, options.width)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "embeddings.npy"
        if {"file", "disk"} & set(options.parts):
            write_file(path, options.rows, options.width)
        if "file" in options.parts:
            results["file"] = whole_file(path)
        if "disk" in options.parts:
            results["disk"] = disk(path)
    write_result("files", results)


if __name__ == "__main__":
    main()
