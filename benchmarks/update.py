"""One update of a streaming covariance: ours compared with BLAS, Delve, scikit-learn and FID's plain sums.

    python benchmarks/update.py [--widths 64 128 ...] [--rounds 9] [--rows 8192]

All arms run in turn in every round, each after a pause and one update that is not timed, since the threads of a
library spin for a while after a call and slow the next arm. Rates are 2·N·D² operations per second, also for
scipy's ``dsyrk`` and ``ssyrk``, which compute one triangle of the product alone. "By PyTorch" does without the
compiled accumulation. Medians over rounds, with the quartiles of the ratio to ``syrk``.
"""

import statistics
import time
import warnings

import numpy as np
import torch
from common import Parser, write_result
from delve.torch_utils import TorchCovarianceMatrix
from scipy.linalg.blas import dsyrk, ssyrk
from sklearn.decomposition import IncrementalPCA

import spectralmetrics as sm
from spectralmetrics.functional import compiled

PAUSE_SECONDS = 0.2
SLOW = {"IncrementalPCA": 512}  # the largest width at which an arm is run


def arms(rows, width):
    """name -> function of no argument that makes one update."""
    as_float64 = np.asfortranarray(rows.numpy().astype(np.float64).T)
    as_float32 = np.asfortranarray(rows.numpy().T)
    sums = {kind: np.zeros((width, width), dtype, order="F") for kind, dtype in (("d", "f8"), ("s", "f4"))}

    def syrk(function, values, kind):
        function(1.0, values, beta=1.0, c=sums[kind], overwrite_c=1)

    def ours(gram_dtype, instructions):
        metric = sm.CovarianceMetric(gram_dtype=gram_dtype)
        for _ in range(4):  # past the updates that move the origin
            metric.update(rows)

        def update():
            with compiled.using(instructions):
                metric.update(rows)

        return update

    best = compiled.instruction_set()
    delve = TorchCovarianceMatrix(device="cpu")
    peer = IncrementalPCA()
    plain = {"second": torch.zeros(width, width, dtype=torch.float64), "first": torch.zeros(width).double()}

    def fid():
        values = rows.double()
        plain["first"] += values.sum(0)
        plain["second"] += values.t().mm(values)

    return {
        "dsyrk": lambda: syrk(dsyrk, as_float64, "d"),
        "ours, float64": ours(torch.float64, best),
        "ours, float64, by PyTorch": ours(torch.float64, None),
        "ssyrk": lambda: syrk(ssyrk, as_float32, "s"),
        "ours, float32": ours(torch.float32, best),
        "ours, float32, by PyTorch": ours(torch.float32, None),
        "delve": lambda: delve.update(rows, False),
        "FID's sums": fid,
        "IncrementalPCA": lambda: peer.partial_fit(rows.numpy()),
    }


def seconds_of(function, repeats):
    time.sleep(PAUSE_SECONDS)
    function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="batches of 256 rows, which wait in a buffer")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    print(f"{'D':>5} {'rows':>6}  {'arm':<26} {'ms':>9} {'G/s':>7}  of syrk (quartiles)       of Delve's rate")
    for width in options.widths:
        torch.manual_seed(0)
        rows = torch.randn(256 if options.small else options.rows, width) + 1.0
        functions = arms(rows, width)
        functions = {name: f for name, f in functions.items() if width <= SLOW.get(name, width)}
        operations = 2 * rows.shape[0] * width**2
        times = {name: [] for name in functions}
        for _ in range(options.rounds):
            for name, function in functions.items():
                # About a tenth of a second each; small batches need enough updates to include their product.
                least = 16 if options.small else 1
                repeats = min(max(least, round(1e10 / operations)), 64)
                times[name].append(seconds_of(function, 1 if name == "IncrementalPCA" else repeats))
        for name, values in times.items():
            limit = times["ssyrk" if "32" in name else "dsyrk"]
            shares = [own / other for own, other in zip(limit, values, strict=True)]
            low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
            faster = statistics.median(d / v for d, v in zip(times["delve"], values, strict=True))
            rate = operations / statistics.median(values) / 1e9
            milliseconds = 1e3 * statistics.median(values)
            print(
                f"{width:>5} {rows.shape[0]:>6}  {name:<26} {milliseconds:>9.3f} {rate:>7.1f}"
                f"  {middle:>5.2f} ({low:.2f} … {high:.2f})       {faster:>6.2f}",
                flush=True,
            )
        results.append({"width": width, "rows": rows.shape[0], "seconds": times})
    write_result("update_small" if options.small else "update", results)


if __name__ == "__main__":
    main()
