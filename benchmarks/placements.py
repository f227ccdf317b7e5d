"""What observing sharded layers takes: collectives and bytes of each step, measured and by formula.

    python benchmarks/placements.py measure [--processes 2 4] [--rows-per-feature 0.25]
    python benchmarks/placements.py paper [--processes 8] [--rows-per-feature 1] [--every 100]

Let W processes share a layer of D features, of whose N rows the probe observes k: all, or rows_per_feature * D.
With e bytes for each value, each process sends in one forward

    0                          for a replicated output, and for one whose samples or positions are sharded
    k D e (W - 1) / W^2        for a column-parallel layer (features are sharded), in one all-to-all
    k D e (W - 1) / W          for a row-parallel layer (sums are yet to be reduced), in one all-to-all

`measure` counts what a block of tensor-parallel layers sends through gloo and compares it with that. It also
takes the time of a step with and without the probe. `paper` multiplies it for Llama-3-8B and 70B, with the
memory of the sums and the time of each process for products, at the speeds that the options say.
"""

import argparse
import math
import os
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spectralmetrics as sm

WIDTH, INNER, SAMPLES, STEPS = 256, 768, 4, 128


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def formula(kind, rows, width, processes, item):
    """Bytes that one process sends in one forward of a layer."""
    own = {"column": rows * width / processes, "row": rows * width, "replicated": 0}[kind]
    return own * item * (processes - 1) / processes


def of_process(rank, world, folder, options):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(SAMPLES, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))
    sent, original = [], dist.all_to_all_single

    def counted(output, values, output_sizes, input_sizes, group=None):
        sent.append(sum(size for other, size in enumerate(input_sizes) if other != rank))
        return original(output, values, output_sizes, input_sizes, group=group)

    for drawn in (None, options.rows_per_feature):
        seconds, probes = {}, []
        for name in ("without", "with"):
            torch.manual_seed(0)
            model = FeedForward()
            parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            if name == "with":
                layers = [nn.Linear, nn.LayerNorm]
                probes.append(
                    sm.LayerProbe(model, sm.SaturationMetric(), layers=layers, rows_per_feature=drawn)
                )
            for step in range(options.steps + 2):
                if step == 2:
                    dist.barrier()
                    start = time.perf_counter()
                if step == options.steps + 1:
                    dist.all_to_all_single = counted
                model(x).square().mean().backward()
            seconds[name] = (time.perf_counter() - start) / options.steps
            dist.all_to_all_single = original
        if rank == 0:
            total = SAMPLES * STEPS
            counts = {
                "up": (total if drawn is None else min(math.ceil(drawn * INNER), total), INNER, "column"),
                "down": (total if drawn is None else min(math.ceil(drawn * WIDTH), total), WIDTH, "row"),
            }
            expected = sum(formula(kind, rows, width, world, 4) for rows, width, kind in counts.values())
            print(
                f"{world} processes, rows_per_feature={drawn}: {len(sent)} collectives, {sum(sent):,} bytes"
                f" sent by one process, formula {expected:,.0f}; step {1e3 * seconds['without']:.1f} ms without"
                f" and {1e3 * seconds['with']:.1f} ms with the probe",
                flush=True,
            )
        sent.clear()
    os._exit(0)


def measure(options):
    for world in options.processes or [2, 4]:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(of_process, (world, folder, options), nprocs=world, start_method="spawn")


# Width, blocks, keys and values, inner width, from the models' configuration files.
MODELS = {"Llama-3-8B": (4096, 32, 1024, 14336), "Llama-3-70B": (8192, 80, 1024, 28672)}


def paper(options):
    rows = []
    (world,) = options.processes or [8]
    for name, (width, blocks, keys, inner) in MODELS.items():
        layers = {"q": ("column", width), "k": ("column", keys), "v": ("column", keys), "o": ("row", width)}
        layers |= {"gate": ("column", inner), "up": ("column", inner), "down": ("row", width)}
        for sketch in (None, options.sketch):
            sent = flops = state = calls = 0
            for kind, features in layers.values():
                if sketch is None and features > 8192:
                    continue  # left out, as max_features says
                drawn = math.ceil(options.rows_per_feature * min(features, options.most_rows))
                drawn = min(drawn, options.most_rows)
                columns = features if sketch is None else min(sketch, features)
                sent += blocks * formula(kind, drawn, features, world, 2)
                flops += blocks * (2 if sketch is None else 4) * drawn / world * features * columns
                state += blocks * 8 * features * columns
                calls += blocks
            seconds = sent / (options.gigabytes * 1e9) + flops / (options.teraflops * 1e12)
            seconds += calls * options.latency * 1e-6
            rows.append(
                [
                    name,
                    "covariances" if sketch is None else f"sketches of {sketch}",
                    str(calls),
                    f"{sent / 1e9:.2f} GB",
                    f"{state / 2**30:.1f} GiB",
                    f"{seconds:.2f} s",
                    f"{seconds * options.forwards / options.every:.0f} s",
                ]
            )
    head = ["Model", "Kept", "Collectives", "Sent by one process", "Sums on each process", "Observed forward"]
    drawn = f"{options.rows_per_feature} rows per feature (at most {options.most_rows})"
    print(f"{world} processes, {drawn}, bfloat16")
    print(table([*head, f"{options.forwards:,} forwards, 1 in {options.every}"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "paper"])
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--rows-per-feature", type=float, default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--most-rows", type=int, default=8192, help="tokens of one forward")
    parser.add_argument("--sketch", type=int, default=256)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--forwards", type=int, default=10_000, help="in an epoch")
    parser.add_argument("--gigabytes", type=float, default=200, help="that one process sends in a second")
    parser.add_argument("--teraflops", type=float, default=25, help="of float32 products in a second")
    parser.add_argument("--latency", type=float, default=30, help="of one collective, in microseconds")
    options = parser.parse_args()
    options.rows_per_feature = options.rows_per_feature or (0.25 if options.what == "measure" else 1.0)
    {"measure": measure, "paper": paper}[options.what](options)


if __name__ == "__main__":
    main()
