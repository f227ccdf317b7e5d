"""Memory of a metric's state, and the peak of one update above it.

    python benchmarks/memory.py [--widths 64 ... 4096]

Each width runs in its own process. The peak is its resident memory during updates with a batch of 128 MB, less
its memory before the metric was made. Needs Linux.
"""

import multiprocessing
from pathlib import Path

import torch
from common import Parser, write_result

import spectralmetrics as sm

MEGABYTE = 2**20


def resident(field):
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` the peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(width, count, dtype, queue):
    rows = torch.ones(count, width).add_(torch.arange(width))
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # allocates the libraries' own buffers
    sm.CovarianceMetric(gram_dtype=dtype).update(rows[:64, :8])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    metric = sm.CovarianceMetric(gram_dtype=dtype)
    for _ in range(3):
        metric.update(rows)
    state = sum(value.nbytes for value in metric.metric_state.values())
    queue.put((state, resident("VmHWM") - before))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--bytes", type=int, default=128 * MEGABYTE, help="bytes of a batch in float32")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    print("    D    rows  products  state MB  update's peak above it MB  float64 copy of the batch MB")
    for width in options.widths:
        count = options.bytes // (4 * width)
        for dtype in (torch.float64, torch.float32):
            queue = context.Queue()
            worker = context.Process(target=measure, args=(width, count, dtype, queue))
            worker.start()
            state, peak = queue.get()
            worker.join()
            name = str(dtype).removeprefix("torch.")
            print(
                f"{width:>5} {count:>7}  {name:>8}  {state / MEGABYTE:>8.2f}"
                f"  {(peak - state) / MEGABYTE:>25.1f}  {8 * count * width / MEGABYTE:>28.0f}",
                flush=True,
            )
            results.append({"width": width, "rows": count, "products": name, "state": state, "peak": peak})
    write_result("memory", results)


if __name__ == "__main__":
    main()
