"""Saturation of all processes' data together: `torchrun --nproc-per-node=2 several_processes.py`."""

import torch
import torch.distributed as dist
from torch import nn

from spectralmetrics import EffectiveRankMetric, LayerProbe, SaturationMetric


def main() -> None:
    """Train a small network on data that differs between processes, and look at its layers."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), 1e-3)

    torch.manual_seed(1 + dist.get_rank())
    with LayerProbe(parallel, [SaturationMetric(), EffectiveRankMetric()]) as probe:
        for _ in range(50):
            inputs = torch.randn(64, 16)
            targets = inputs[:, :8].argmax(1) % 4
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(inputs), targets).backward()
            optimizer.step()
        values = probe.compute()  # on every process: the merge needs all of them
    if dist.get_rank() == 0:
        for name, value in values.items():
            print(f"{name}: {value.item():.3f}")
    dist.barrier()  # leave together
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
