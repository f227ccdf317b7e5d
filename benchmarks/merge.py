"""Merging ResNet-18's layers across processes: the fused path and torchmetrics' own, in turn in one run.

    python benchmarks/merge.py [--processes 2 4] [--rounds 7]

Both arms end with the merged sums of 21 layers and 3 metrics on every process; neither decomposes them.
The stock arm does what torchmetrics does for a metric with three states that are reduced by sums: it gathers
each state of each metric and adds them up.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchmetrics
from common import Parser, write_result

import spectralmetrics as sm

# Output channels of ResNet-18's convolutions and classifier.
WIDTHS = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5 + [1000]
METRICS = (sm.SaturationMetric, sm.CovarianceTraceMetric, sm.EffectiveRankMetric)


class Stock(torchmetrics.Metric):
    """A covariance as three sums that torchmetrics reduces."""

    full_state_update = False

    def __init__(self, width):
        super().__init__()
        self.add_state("second", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("first", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows):
        rows = rows.double()
        self.second += rows.T @ rows
        self.first += rows.sum(0)
        self.count += len(rows)

    def compute(self):
        return self.second


def process(rank, world, folder, rounds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)  # the same network on each process, as in a training
    model = torch.nn.ModuleList(torch.nn.Linear(4, width) for width in WIDTHS)
    probe = sm.LayerProbe(model, [metric() for metric in METRICS])
    stock = [Stock(width) for width in WIDTHS for _ in METRICS]
    counts = {"fused": 0, "stock": 0}

    def fill(seed):
        torch.manual_seed(100 * seed + rank)
        for index, layer in enumerate(model):
            rows = layer(torch.randn(64, 4)).detach()
            for metric in stock[3 * index : 3 * index + 3]:
                metric.update(rows)
        for layer in probe.layers:  # add the rows that wait, since the stock arm has added its rows
            int(next(iter(probe["train", layer].values(copy_state=False))).count)

    def fused():
        with probe._merged_states("compute", ["train"]):
            pass

    def one_by_one():
        for metric in stock:
            metric.sync()
            metric.unsync()

    def counted(name, arm):
        kept = {key: getattr(dist, key) for key in ("all_reduce", "reduce", "all_gather", "barrier")}
        for key, function in kept.items():

            def count(*args, _function=function, **kwargs):
                counts[name] += 1
                return _function(*args, **kwargs)

            setattr(dist, key, count)
        arm()
        for key, function in kept.items():
            setattr(dist, key, function)

    fill(0)
    counted("fused", fused)
    counted("stock", one_by_one)
    seconds = {"fused": [], "stock": []}
    for index in range(rounds):
        fill(index + 1)  # new rows make earlier merged sums invalid
        for name, arm in (("fused", fused), ("stock", one_by_one)):
            dist.barrier()
            start = time.perf_counter()
            arm()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps({"seconds": seconds, "collectives": counts}))
    dist.destroy_process_group()


def main():
    parser = Parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    results = []
    print(f"{'processes':>9}  {'arm':>6}  {'collectives':>11}  {'median s':>9}  {'min':>7}  {'max':>7}  ratio")
    for world in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, args=(world, folder, options.rounds), nprocs=world)
            result = json.loads(Path(folder, "result.json").read_text())
        medians = {name: statistics.median(times) for name, times in result["seconds"].items()}
        ratio = statistics.median(
            stock / fused
            for stock, fused in zip(result["seconds"]["stock"], result["seconds"]["fused"], strict=True)
        )
        for name, times in result["seconds"].items():
            print(
                f"{world:>9}  {name:>6}  {result['collectives'][name]:>11}  {medians[name]:>9.4f}"
                f"  {min(times):>7.4f}  {max(times):>7.4f}  {ratio if name == 'stock' else 1:.1f}"
            )
        results.append({"processes": world, "stock over fused, median": ratio, **result})
    write_result("merge", results)


if __name__ == "__main__":
    main()
