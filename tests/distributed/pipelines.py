"""Gradients under torch's pipeline schedules, including those that run a stage's backward in two parts."""

import copy

import torch
import torch.distributed as dist
from torch import nn

import spectralmetrics as sm
from tests.distributed.spread import Stage
from tests.metrics.properties import assert_same

WIDTH = 6


class Block(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.up, self.relu, self.down = nn.Linear(WIDTH, 8), nn.ReLU(inplace), nn.Linear(8, WIDTH)

    def forward(self, x):
        return x + self.down(self.relu(self.up(x)))


def loss_of(output, target):
    return (output - target).pow(3).mean()


def schedules(rank, world):
    """(schedule, numbers of this process' stages, number of all stages) for each schedule."""
    from torch.distributed import pipelining

    several, folded = [rank, rank + world], [rank, 2 * world - 1 - rank]
    known = [
        ("ScheduleGPipe", [rank], world),
        ("Schedule1F1B", [rank], world),
        ("ScheduleLoopedBFS", several, 2 * world),
        ("ScheduleInterleaved1F1B", several, 2 * world),
        ("ScheduleInterleavedZeroBubble", several, 2 * world),
    ]
    if hasattr(
        pipelining, "ScheduleDualPipeV"
    ):  # torch 2.8 has none, and its ZBV fails over gloo even without a probe
        known += [("ScheduleZBVZeroBubble", folded, 2 * world), ("ScheduleDualPipeV", folded, 2 * world)]
    return [(getattr(pipelining, name), *rest) for name, *rest in known]


def expected_of(blocks, batches, micro):
    """Layer -> its gradients in one process, micro-batch by micro-batch."""
    whole = Stage(copy.deepcopy(blocks), range(len(blocks)))
    rows, outputs = {}, {}
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    for batch, target in batches:
        for part, its in zip(batch.chunk(micro), target.chunk(micro), strict=True):
            found = torch.autograd.grad(loss_of(whole(part), its), list(outputs.values()))
            for name, gradient in zip(outputs, found, strict=True):
                rows.setdefault(name, []).append(gradient.flatten(0, -2))
    return {name: torch.cat(each) for name, each in rows.items()}


def gradients_in_pipelines_count_once(rank, world):
    """Each schedule gives the counts and second moments of one process, and trains as without a probe."""
    if world == 1:
        return
    from torch.distributed.pipelining import PipelineStage

    micro = 2 * world
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 2 * micro, 3, WIDTH, generator=draw).double() for _ in range(2)]
    for kind, mine, number in schedules(rank, world):
        torch.manual_seed(3)
        blocks = [Block(inplace=False).double() for _ in range(number)]
        rows = expected_of(blocks, batches, micro)
        trained = []
        for probed in (False, True):
            torch.manual_seed(3)
            blocks = [Block(inplace=True).double() for _ in range(number)]
            parts = [Stage(blocks, [each]) for each in mine]
            own = nn.ModuleDict({str(each): blocks[each] for each in mine})
            probe = None
            if probed:
                model = nn.ModuleDict({"blocks": own})
                probe = sm.LayerProbe(model, sm.CovarianceMetric(center=False), observe="gradients")
            stages = [
                PipelineStage(part, each, number, torch.device("cpu"))
                for part, each in zip(parts, mine, strict=True)
            ]
            given = stages if len(stages) > 1 else stages[0]
            schedule = kind(given, n_microbatches=micro, loss_fn=loss_of, scale_grads=False)
            for batch, target in batches:
                first = [batch] if 0 in mine else []
                last = {"target": target} if number - 1 in mine else {}
                schedule.step(*first, **last)
            trained.append([each.grad for each in own.parameters()])
        assert all(map(torch.equal, *trained))
        moments = probe.covariances("train", center=False)
        with probe.merged():
            counts = {name: int(probe["train", name]["covariance"].count) for name in probe.layers}
        assert counts == {name: len(each) for name, each in rows.items()}, kind
        for name, each in rows.items():
            assert_same(moments[name], each.T @ each / len(each), 1e-12)
        probe.remove()
        dist.barrier()


SCENARIOS = [gradients_in_pipelines_count_once]
