"""Cost of merging across processes: memory above the states, and collectives and bytes for many processes.

    python benchmarks/processes.py memory [--processes 4] [--width 2048] [--layers 8] [--folds 1]
    python benchmarks/processes.py traffic [--processes 8 64 256]

Memory is the resident set of each process, sampled twice a millisecond, less its size before the call. Traffic
is what one process sends and receives in its collectives when all have observed the same layers. The other
processes do not run, but each collective is counted as if they did.
"""

import ctypes
import pickle
import shutil
import tempfile
import threading
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Parser
from torch.testing._internal.distributed.fake_pg import FakeStore

import spectralmetrics as sm
from spectralmetrics.probing import processes


def record(probe):
    """Write one record with arrays: each layer's sums go to the first process."""
    told = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    with sm.Recorder(told[0], probe, ["csv", "arrays"]) as recorder:
        recorder.record(reset=False)
    if dist.get_rank() == 0:
        shutil.rmtree(told[0])


CALLS = {
    "compute": lambda probe: probe.compute("train"),
    "summary": lambda probe: probe.summary("train"),
    "iter_merged": lambda probe: [None for _ in probe.iter_merged("train")],
    "record": record,
}


def probe_of(width, layers, folds, rank):
    """A probe of a stack of layers, with observations."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(4, width) for _ in range(layers))
    probe = sm.LayerProbe(model, [sm.SaturationMetric(), sm.EffectiveRankMetric()], folds=folds)
    torch.manual_seed(rank)
    with torch.no_grad():
        for layer in model:
            for _ in range(folds):
                layer(torch.randn(200, 4))
    for layer in probe.layers:  # waiting rows join the sums
        probe.sums("train", layer)
    return model, probe


def resident():
    """Resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def of_process(rank, folder, options):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.processes[0]
    )
    _, small = probe_of(16, 2, options.folds, rank)
    for call in CALLS.values():  # libraries allocate their own memory first
        call(small)
    small.remove()
    model, probe = probe_of(options.width, options.layers, options.folds, rank)
    for name, call in CALLS.items():
        with torch.no_grad():
            model[0](torch.randn(1, 4))  # a new row makes cached results invalid
        probe.sums("train", "0")
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # memory left by an earlier call would hide the memory of this one
        dist.barrier()
        before = peak = resident()
        is_over = threading.Event()

        def watch(is_over=is_over):
            nonlocal peak
            while not is_over.wait(0.0005):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        call(probe)
        seconds = time.perf_counter() - start
        is_over.set()
        watcher.join()
        told = [None] * options.processes[0]
        dist.all_gather_object(told, (peak - before) / 2**20)
        if rank == 0:
            print(f"{name:>12}  {max(told):>8.0f} MiB above, the most of all processes  {seconds:>6.1f} s")
    dist.destroy_process_group()


def memory(options):
    one = 8 * options.width**2 * options.folds / 2**20
    world = options.processes[0]
    print(f"states {one * options.layers:.0f} MiB on each of {world} processes, {one:.0f} MiB a layer")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(of_process, (folder, options), nprocs=options.processes[0], start_method="fork")


def traffic(options):
    print(f"{'processes':>9}  {'layers':>16}  {'collectives':>11}  {'MiB':>7}  {'of states':>9}  seconds")
    for world in options.processes:
        for width, layers in ((512, 24), (2048, 8)):
            dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
            _, probe = probe_of(width, layers, 1, 0)
            probe._identity._announced = None  # no other process runs
            seen = []
            kept = {name: getattr(dist, name) for name in ("all_reduce", "reduce")}
            gather = processes.gather_objects

            def gather_objects(value, group=None, world=world, seen=seen):
                # The sizes, and the bytes: values of all layers, shared out among the processes.
                seen.extend([8 * world, len(pickle.dumps(value)) * min(world, 8)])
                return [value] + [(None, b"")] * (world - 1)

            for name, function in kept.items():

                def count(tensor, *arguments, function=function, seen=seen, **options):
                    seen.append(tensor.numel() * tensor.element_size())
                    return function(tensor, *arguments, **options)

                setattr(dist, name, count)
            processes.gather_objects = gather_objects
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    probe.compute("train")
            finally:
                processes.gather_objects = gather
                for name, function in kept.items():
                    setattr(dist, name, function)
                dist.destroy_process_group()
            states = 8 * width**2 * layers
            print(
                f"{world:>9}  {layers:>5} x {width:>4} wide  {len(seen):>11}  {sum(seen) / 2**20:>7.1f}"
                f"  {sum(seen) / states:>9.2f}  {time.perf_counter() - start:.1f}"
            )


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["memory", "traffic"])
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folds", type=int, default=1)
    options = parser.parse_args()
    options.processes = options.processes or ([4] if options.what == "memory" else [8, 64, 256])
    {"memory": memory, "traffic": traffic}[options.what](options)


if __name__ == "__main__":
    main()
