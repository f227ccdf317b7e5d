"""Rate of the compiled sums, as a share of one core's peak of multiply-adds.

    python benchmarks/pieces.py [--widths 64 128 ...] [--rounds 9] [--rows 4096]

A loop in registers, compiled here for the instructions that the sums use, measures the peak. All run in one
thread, and time is processor time, so that other programs on the machine count little. Every round runs all
arms in turn. BLAS' ``dsyrk`` and ``ssyrk`` get rows that are converted already; ours convert and centre them,
too.
"""

import ctypes
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import numpy as np
import torch
from common import Parser, table, write_result
from scipy.linalg.blas import dsyrk, ssyrk

from spectralmetrics.functional import Observations, accumulate, compiled, empty_moments

LOOP = """
typedef REAL Vector __attribute__((vector_size(BYTES)));
extern "C" REAL multiply_add(long rounds) {
    Vector sums[CHAINS], factor = Vector{} + REAL(0.999), summand = Vector{} + REAL(1e-9);
    for (int i = 0; i < CHAINS; ++i) sums[i] = Vector{} + REAL(i);
    for (long round = 0; round < rounds; ++round)
_Pragma("GCC unroll 32")
        for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + summand;
    Vector total{};
    for (int i = 0; i < CHAINS; ++i) total += sums[i];
    REAL result = 0;
    for (int lane = 0; lane < BYTES / int(sizeof(REAL)); ++lane) result += total[lane];
    return result;
}
"""
VECTORS = {"avx2": ("-mavx2 -mfma", 32, 12), "avx512": ("-mavx512f -mprefer-vector-width=512", 64, 24)}
ROUNDS_OF_LOOP = 200_000
KINDS = {"float64": ("double", "f8", dsyrk), "float32": ("float", "f4", ssyrk)}


def peak_loop(instructions, real):
    """A function that runs the loop once, and its number of multiply-adds."""
    flags, size, chains = VECTORS[instructions]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(LOOP)
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        defined = [f"-DREAL={real}", f"-DBYTES={size}", f"-DCHAINS={chains}"]
        options = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", *flags.split()]
        subprocess.run([*compiler, *options, *defined, "-o", str(library), str(source)], check=True)
        loop = ctypes.CDLL(str(library)).multiply_add
    loop.restype, loop.argtypes = ctypes.c_double if real == "double" else ctypes.c_float, [ctypes.c_long]
    lanes = size // (8 if real == "double" else 4)
    return lambda: loop(ROUNDS_OF_LOOP), ROUNDS_OF_LOOP * chains * lanes


def arms_of(rows, loops):
    """name -> kind, function of no argument, and its multiply-adds."""
    number, width = rows.shape
    additions = number * width * (width + 1) // 2
    arms = {}
    for kind, (_, dtype, function) in KINDS.items():
        values = np.asfortranarray(rows.numpy().T.astype(dtype))
        total = np.zeros((width, width), dtype, order="F")
        moments = empty_moments(width)
        accumulate(moments, Observations(rows))

        def syrk(function=function, values=values, total=total):
            function(1.0, values, beta=1.0, c=total, overwrite_c=1)

        def ours(moments=moments, kind=kind):
            accumulate(moments, Observations(rows), getattr(torch, kind), recentre=False)

        arms[f"peak, {kind}"] = kind, *loops[kind]
        arms[f"ours, {kind}"] = kind, ours, additions
        arms[f"syrk, {kind}"] = kind, syrk, additions
    return arms


def seconds_of(function):
    start = time.thread_time()
    function()
    return time.thread_time() - start


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192, 256, 384, 512, 768, 1024, 2048])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    instructions = compiled.instruction_set()
    if instructions is None:
        sys.exit(f"the sums are not compiled here: {compiled.describe()}")
    torch.set_num_threads(1)
    loops = {kind: peak_loop(instructions, real) for kind, (real, *_) in KINDS.items()}
    results, lines = [], []
    for width in options.widths:
        torch.manual_seed(0)
        arms = arms_of(torch.randn(options.rows, width) + 1, loops)
        seconds = {name: [] for name in arms}
        for _, function, _ in arms.values():
            function()
        for _ in range(options.rounds):
            for name, (_, function, _) in arms.items():
                seconds[name].append(seconds_of(function))
        rates = {name: [arms[name][2] / value for value in values] for name, values in seconds.items()}
        shares = {
            name: [own / most for own, most in zip(values, rates[f"peak, {arms[name][0]}"], strict=True)]
            for name, values in rates.items()
            if not name.startswith("peak")
        }
        results.append({"width": width, "rows": options.rows, "seconds": seconds, "shares of peak": shares})
        lines.append(row_of(results[-1]))
        print(table(HEADS, lines[-1:]), flush=True)
    print(table(HEADS, lines))
    write_result("pieces", results)


HEADS = ["D", "rows", "ours, float64", "dsyrk", "ours, float32", "ssyrk"]


def row_of(result):
    """The cells of a width: median, least and most of the shares of the peak."""
    cells = [
        f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"
        for values in result["shares of peak"].values()
    ]
    return [result["width"], result["rows"], *cells]


if __name__ == "__main__":
    main()
