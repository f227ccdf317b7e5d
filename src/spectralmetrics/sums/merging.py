"""Merge sums across processes in a fixed number of collectives.

What is merged is written as a generator that yields a float64 tensor and receives the sum of what all
processes yielded at that point, see :meth:`.Sum.exchange`. :func:`run_together` drives any number of them in
lockstep, so that the first yields of all layers and statistics travel in one all-reduce, and the second in
another: first a few numbers per sum to agree on its width, since a process that saw no rows does not know it,
then the sums.

>>> def average(value):
...     total = yield torch.tensor([value, 1.0], dtype=torch.float64)
...     return float(total[0] / total[1])
>>> exchange = together([average(2.0), average(4.0)])
>>> sent = next(exchange)
>>> try:
...     exchange.send(2 * sent)  # as if another process had sent the same
... except StopIteration as finished:
...     finished.value
[2.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.sums.sum import Exchange


def run_together(exchanges: Sequence[Exchange], group: Any = None) -> list[Any]:
    """Run exchanges in lockstep, one all-reduce for all of them per step; return what each returns.

    Args:
        exchanges: the same number in the same order on every process of the group.
        group: the process group; the default group if None.
    """
    everything = together(exchanges, communication_device(group))
    received: Tensor | None = None
    while True:
        try:
            packed = next(everything) if received is None else everything.send(received)
        except StopIteration as finished:
            results: list[Any] = finished.value
            return results
        dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        received = packed


def together(
    exchanges: Sequence[Exchange], device: torch.device | str = "cpu"
) -> Generator[Tensor, Tensor, list[Any]]:
    """Several exchanges as one, whose yields are all of theirs in one tensor.

    Args:
        exchanges: may end after different numbers of yields.
        device: of what is yielded; each exchange receives its part where it sent it from.
    """
    results: list[Any] = [None] * len(exchanges)
    waiting: dict[int, Tensor] = {}

    def advance(index: int, received: Tensor | None) -> None:
        exchange = exchanges[index]
        try:
            waiting[index] = next(exchange) if received is None else exchange.send(received)
        except StopIteration as finished:
            results[index] = finished.value
            waiting.pop(index, None)

    for index in range(len(exchanges)):
        advance(index, None)
    while waiting:
        order = sorted(waiting)
        sent = {index: waiting[index] for index in order}
        packed = yield torch.cat([sent[index].reshape(-1).to(device) for index in order])
        parts = torch.split(packed, [sent[index].numel() for index in order])
        for index, part in zip(order, parts, strict=True):
            advance(index, part.reshape(sent[index].shape).to(sent[index].device))
    return results


def agree(
    num_features: int, is_known: bool, rank: int, world_size: int
) -> Generator[Tensor, Tensor, int | None]:
    """The first step of an exchange: the width that all processes with data have; 0 if none has data.

    None if all know the result of an earlier exchange, which needs no other then.

    Raises:
        ValueError: if the widths differ.
    """
    header = torch.zeros(world_size, 2, dtype=torch.float64, device="cpu")
    header[rank] = torch.tensor([num_features, not is_known], dtype=torch.float64, device="cpu")
    header = (yield header).cpu()
    return agree_on_width(header[:, 0]) if header[:, 1].any() else None


def agree_on_width(widths: Tensor) -> int:
    """The width that all processes with data have; 0 if none has data.

    Args:
        widths: one number for each process, 0 where there is no data.

    Raises:
        ValueError: if they differ.
    """
    known = sorted({int(width) for width in widths if width > 0})
    if len(known) > 1:
        each = ", ".join(f"{int(width)} on process {rank}" for rank, width in enumerate(widths) if width > 0)
        raise ValueError(f"expected the same number of features on every process, got {each}")
    return known[0] if known else 0


def communication_device(group: Any) -> torch.device:
    """Where tensors must be that the processes of a group exchange."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
