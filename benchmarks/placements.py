"""Cost of observing sharded layers: collectives and bytes of each step, measured and by formula.

    python benchmarks/placements.py measure [--processes 2 4] [--rows-per-feature 0.25]
    python benchmarks/placements.py experts [--processes 1 2] [--rows-per-feature 0.25]
    python benchmarks/placements.py paper [--processes 8] [--rows-per-feature 1] [--every 100]

Let W processes share a layer of D features. The probe observes k of its N rows: all, or rows_per_feature * D.
With e bytes for each value, each process sends in one forward

    0                          for a replicated output, and for one whose samples or positions are sharded
    k D e (W - 1) / W^2        for a column-parallel layer (features are sharded), in one all-to-all
    k D e (W - 1) / W          for a row-parallel layer (sums are yet to be reduced), in one all-to-all, and
                               for each expert whose weights are cut

and in one backward (observing gradients) the same for a column-parallel layer, and nothing for a row-parallel
layer: its summands all have the gradient of their sum. Settings and checksums, which are compared once, take
some hundred bytes a layer and are not counted.

`measure` counts what a block of tensor-parallel layers sends through gloo, and compares it with the formula. It
also times a step with and without the probe. `experts` does the same for experts whose weights are stacked in
one parameter and cut along their inner features; on one process it shows the cost of running them again.
`paper` applies the formula to Llama-3-8B and 70B, with the memory of the sums and the time of each process for
products, at the speeds that the options give.
"""

import math
import os
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Parser, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
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


class Experts(nn.Module):
    """Experts as in transformers; each process has some inner features of each expert."""

    def __init__(self, mesh, number=8, top_k=2):
        super().__init__()
        self.num_experts, self.top_k = number, top_k
        own = INNER // (1 if mesh is None else mesh.size())
        for name, shape, dim in (("gate_up_proj", (2 * own, WIDTH), 1), ("down_proj", (WIDTH, own), 2)):
            values = torch.randn(number, *shape) / shape[1] ** 0.5
            values = values if mesh is None else DTensor.from_local(values, mesh, [Shard(dim)])
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        up, down = (local(each) for each in (self.gate_up_proj, self.down_proj))
        found = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            token, place = torch.where(top_k_index == number)
            gate, value = (hidden_states[token] @ up[number].T).chunk(2, -1)
            rows = (nn.functional.silu(gate) * value) @ down[number].T
            found = found.index_add(0, token, rows * top_k_weights[token, place, None])
        return found


def local(values):
    return values.to_local() if isinstance(values, DTensor) else values


class Mixture(nn.Module):
    def __init__(self, mesh):
        super().__init__()
        self.experts = Experts(mesh)

    def forward(self, x):
        x = x.flatten(0, 1)
        scores = x[:, : self.experts.num_experts].softmax(-1)
        weights, index = scores.topk(self.experts.top_k, -1)
        return self.experts(x, index, weights)


def formula(kind, rows, width, processes, item):
    """Bytes that one process sends in one forward of a layer."""
    own = {"column": rows * width / processes, "row": rows * width, "replicated": 0}[kind]
    return own * item * (processes - 1) / processes


def counting(rank, sent):
    """An all-to-all that counts the values it sends to other processes."""
    original = dist.all_to_all_single

    def counted(output, values, output_sizes, input_sizes, group=None):
        sent.append(sum(size for other, size in enumerate(input_sizes) if other != rank))
        return original(output, values, output_sizes, input_sizes, group=group)

    return counted


def block(mesh):
    model = FeedForward()
    if mesh is not None:
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def rows_of(mesh, what, observe, drawn):
    """(rows, width, kind) of each layer in one step."""
    total = SAMPLES * STEPS

    def least(number, width):
        return number if drawn is None else min(math.ceil(drawn * width), number)

    if what == "experts":
        with torch.no_grad():
            x = inputs().flatten(0, 1)
            index = x[:, :8].topk(2, -1).indices
        return [(least(int((index == number).sum()), WIDTH), WIDTH, "row") for number in range(8)]
    down = "row" if observe == "outputs" else "replicated"
    return [(least(total, INNER), INNER, "column"), (least(total, WIDTH), WIDTH, down)]


def inputs():
    return torch.randn(SAMPLES, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))


def of_process(rank, world, folder, options):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mesh = None
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
    x, is_experts = inputs(), options.what == "experts"
    cases = [("outputs", None), ("outputs", options.rows_per_feature)]
    if not is_experts:
        cases += [("gradients", None), ("gradients", options.rows_per_feature)]
    original, sent = dist.all_to_all_single, []
    for observe, drawn in cases:
        seconds = {}
        for name in ("without", "with"):
            torch.manual_seed(rank)
            model = Mixture(mesh) if is_experts else block(mesh)
            if name == "with":
                probe = sm.LayerProbe(
                    model,
                    sm.SaturationMetric(),
                    layers="experts" if is_experts else [nn.Linear, nn.LayerNorm],
                    rows_per_feature=drawn,
                    observe=observe,
                )
            for step in range(options.steps + 2):
                if step == 2:
                    if world > 1:
                        dist.barrier()
                    start = time.perf_counter()
                if step == options.steps + 1:
                    dist.all_to_all_single = counting(rank, sent)
                model(x).square().mean().backward()
            seconds[name] = (time.perf_counter() - start) / options.steps
            dist.all_to_all_single = original
        del probe
        if rank == 0:
            counts = rows_of(mesh, options.what, observe, drawn)
            expected = sum(formula(kind, rows, width, world, 4) for rows, width, kind in counts)
            print(
                f"{world} processes, {observe}, rows_per_feature={drawn}: {len(sent)} collectives,"
                f" {sum(sent):,} bytes sent by one process, formula {expected:,.0f}; step"
                f" {1e3 * seconds['without']:.1f} ms without and {1e3 * seconds['with']:.1f} ms with the probe",
                flush=True,
            )
        sent.clear()
    os._exit(0)


def measure(options):
    for world in options.processes or ([1, 2] if options.what == "experts" else [2, 4]):
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
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["measure", "experts", "paper"])
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--rows-per-feature", type=float, default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--most-rows", type=int, default=8192, help="most tokens of one forward to observe")
    parser.add_argument("--sketch", type=int, default=256)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--forwards", type=int, default=10_000, help="forwards in an epoch")
    parser.add_argument("--gigabytes", type=float, default=200, help="that a process sends in a second")
    parser.add_argument("--teraflops", type=float, default=25, help="teraflops of float32 products")
    parser.add_argument("--latency", type=float, default=30, help="latency of one collective, in microseconds")
    options = parser.parse_args()
    options.rows_per_feature = options.rows_per_feature or (1.0 if options.what == "paper" else 0.25)
    (paper if options.what == "paper" else measure)(options)


if __name__ == "__main__":
    main()
