"""Merge sums and samples across processes in a fixed number of collectives.

What is merged is written as a generator that yields a float64 tensor and receives the sum of what all
processes yielded at that point. :func:`run_together` drives any number of them in lockstep, so that the
first yields of all layers and statistics travel in one all-reduce, and the second in another:

1. a few numbers per state to agree on its width: a process that saw no rows does not know it;
2. the packed upper triangles of the scatter matrices. Each process writes its count, origin and first
   moment into a row of its own of a small table that travels along, from which every process adds the
   spread between processes. With so many processes that the tables would weigh, they agree on an origin
   in one more all-reduce instead, and memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.functional.moments import Moments, empty_moments, rebase
from spectralmetrics.functional.reservoir import Reservoir

Exchange = Generator[Tensor, Tensor, Any]

# Above this number of processes the tables of origins are replaced by one more all-reduce.
MOST_PROCESSES_WITH_TABLES = 64


def run_together(exchanges: Sequence[Exchange], group: Any = None) -> list[Any]:
    """Run exchanges in lockstep, one all-reduce for all of them per step; return what each returns.

    Args:
        exchanges: the same number in the same order on every process of the group.
        group: the process group; the default group if None.
    """
    results: list[Any] = [None] * len(exchanges)
    device = _communication_device(group)
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
        packed = torch.cat([waiting[index].reshape(-1).to(device) for index in order])
        dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        parts = torch.split(packed, [waiting[index].numel() for index in order])
        for index, part in zip(order, parts, strict=True):
            sent = waiting[index]
            advance(index, part.reshape(sent.shape).to(sent.device))
    return results


def exchange_moments(
    local: Moments | None, known: Moments | None, rank: int, world_size: int
) -> Generator[Tensor, Tensor, Moments | None]:
    """The moments of all processes' observations, as an exchange for :func:`run_together`.

    Args:
        local: this process' sums, or None if it saw no rows.
        known: the result of an earlier exchange, if nothing has been added on this process since. It is
            returned if all processes have one.
        rank: of this process in the group.
        world_size: of the group.

    Returns:
        The merged moments, the same on all processes; None if none saw rows.

    Raises:
        ValueError: on every process, if the widths differ between processes.
    """
    header = torch.zeros(world_size, 2, dtype=torch.float64)
    header[rank, 0] = 0 if local is None else local.num_features
    header[rank, 1] = known is None
    header = (yield header).cpu()
    if not header[:, 1].any():
        return known
    num_features = _agree_on_width(header[:, 0])
    if num_features == 0:
        return None
    mine = empty_moments(num_features) if local is None else local
    if world_size <= MOST_PROCESSES_WITH_TABLES:
        merged = yield from _exchange_with_tables(mine, rank, world_size)
    else:
        merged = yield from _exchange_with_common_origin(mine)
    return merged


def exchange_reservoirs(
    local: Reservoir | None, capacity: int, num_features: int | None, rank: int, world_size: int
) -> Generator[Tensor, Tensor, Reservoir | None]:
    """The sample of all processes' rows, as an exchange for :func:`run_together`.

    The keys of all samples are shared first; then each row that is kept travels once, from the one process
    that has it.

    Returns:
        The merged sample, the same on all processes; None if none saw rows.
    """
    header = torch.zeros(world_size, capacity + 1, dtype=torch.float64)
    if local is None:
        header[rank, 1:] = torch.inf
    else:
        header[rank, 0] = num_features or 0
        header[rank, 1:] = local.keys
    header = (yield header).cpu()
    width = _agree_on_width(header[:, 0])
    if width == 0:
        return None
    smallest = torch.topk(header[:, 1:].flatten(), capacity, largest=False, sorted=True)
    owner, place = smallest.indices // capacity, smallest.indices % capacity
    rows = torch.zeros(capacity, width, dtype=torch.float64)
    if local is not None:
        rows = rows.to(local.rows.device)
        mine = (owner == rank).to(rows.device)
        rows[mine] = local.rows[place.to(rows.device)[mine]]
    rows = yield rows
    return Reservoir(smallest.values.to(rows.device), rows)


def _exchange_with_tables(local: Moments, rank: int, world_size: int) -> Generator[Tensor, Tensor, Moments]:
    features, device = local.num_features, local.second.device
    count = local.count.to(torch.float64)
    upper = _upper_triangle(features, device)
    # The scatter about the local mean needs no common origin.
    offset = local.first / count.clamp(min=1)
    scatter = torch.addr(local.second, local.first, offset, alpha=-1)
    table = torch.zeros(world_size, 2 * features + 1, dtype=torch.float64, device=device)
    table[rank] = torch.cat([count[None], local.origin, offset])
    packed = torch.cat([local.non_finite.to(torch.float64)[None], table.flatten(), scatter[upper]])
    packed = yield packed
    non_finite, tables, scatters = torch.split(packed, [1, table.numel(), packed.numel() - 1 - table.numel()])
    counts, origins, offsets = torch.split(tables.reshape(world_size, -1), [1, features, features], dim=1)
    total = counts.sum()
    # A mean is kept as origin plus offset: their sum would lose the digits of data far from zero.
    largest = counts.argmax()
    origin = origins[largest]
    share = counts / total.clamp(min=1)
    origin = origin + (share * ((origins - origin) + offsets)).sum(0)
    deviations = (origins - origin) + offsets
    second = torch.zeros_like(local.second)
    second[upper] = scatters
    second.addmm_((counts * deviations).t(), deviations)
    return Moments(
        count=total.to(torch.int64),
        non_finite=non_finite[0].to(torch.int64),
        origin=origin,
        first=(counts * deviations).sum(0),
        second=second,
    )


def _exchange_with_common_origin(local: Moments) -> Generator[Tensor, Tensor, Moments]:
    features, device = local.num_features, local.second.device
    count = local.count.to(torch.float64)
    # The origin need only lie near the data, so this mean may be rounded; what follows is exact about it.
    sums = yield torch.cat([count[None], count * local.origin + local.first])
    origin = sums[1:] / sums[0].clamp(min=1)
    moved = rebase(local, origin)
    upper = _upper_triangle(features, device)
    packed = yield torch.cat(
        [count[None], local.non_finite.to(torch.float64)[None], moved.first, moved.second[upper]]
    )
    second = torch.zeros_like(local.second)
    second[upper] = packed[2 + features :]
    return Moments(
        count=packed[0].to(torch.int64),
        non_finite=packed[1].to(torch.int64),
        origin=origin,
        first=packed[2 : 2 + features],
        second=second,
    )


def _upper_triangle(features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(features, features, device=device)
    return rows, columns


def _agree_on_width(widths: Tensor) -> int:
    known = sorted({int(width) for width in widths if width > 0})
    if len(known) > 1:
        each = ", ".join(f"{int(width)} on process {rank}" for rank, width in enumerate(widths) if width > 0)
        raise ValueError(f"expected the same number of features on every process, got {each}")
    return known[0] if known else 0


def _communication_device(group: Any) -> torch.device:
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
