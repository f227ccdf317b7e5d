"""Saturation of all processes' data together: `torchrun --nproc-per-node=2 several_processes.py`."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from spectralmetrics import EffectiveRankMetric, LayerProbe, SaturationMetric


def train_and_look() -> None:
    """Train a small network on digits, each process on its own part, and probe its layers."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    inputs, targets = torch.tensor(pixels[own] / 16, dtype=torch.float32), torch.tensor(digits[own])

    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), 1e-3)
    for _ in range(20):
        for batch in torch.randperm(len(inputs) // 64 * 64).split(64):  # as many batches on every process
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(inputs[batch]), targets[batch]).backward()
            optimizer.step()

    with LayerProbe(parallel, [SaturationMetric(), EffectiveRankMetric()]) as probe, torch.no_grad():
        parallel.eval()
        parallel(inputs)
        values = probe.compute()  # call it on every process, since the merge needs all
        count = int(probe["eval", "0"]["saturation"].count)
    lines = [f"{name}: {value.item():.3f}" for name, value in values.items()] if dist.get_rank() == 0 else []
    lines.append(f"process {dist.get_rank()} has seen {count} digits\n")
    print("\n".join(lines), end="", flush=True)  # at once, or the lines of several processes mix


def main() -> None:
    """Join the other processes, train, and leave together with them."""
    dist.init_process_group("gloo")
    train_and_look()
    dist.barrier()
    # The model is deleted by now. Deleted later, it could wait for a thread of gloo for ever.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
