"""The process groups in which a probe's metrics are merged, and errors that all processes of a group get."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.sums.merging import communication_device, gather_objects

T = TypeVar("T")

NO_GROUP: Any = object()
"""In the place of a process group: this process does all by itself."""


def merging_group(places: Iterable[LayerMetrics]) -> Any:
    """The process group in which all metrics of these layers are merged; NO_GROUP without one for all."""
    groups = {each.process_group if is_merged(each) else NO_GROUP for place in places for each in place.leaders}
    if len(groups) != 1:
        return NO_GROUP
    (group,) = groups
    return group if group is not NO_GROUP and has_others(group) else NO_GROUP


def merging_groups(places: Iterable[LayerMetrics]) -> list[Any]:
    """The process groups in which metrics of these layers are merged, in the order of the metrics."""
    leaders = [each for place in places for each in place.leaders if is_merged(each)]
    return [group for group in dict.fromkeys(each.process_group for each in leaders) if has_others(group)]


def merges_nothing(places: Iterable[LayerMetrics]) -> bool:
    """Whether each process keeps all metrics of these layers for itself."""
    return not any(is_merged(each) for place in places for each in place.leaders)


def has_others(group: Any) -> bool:
    """Whether this process is in the group, and not alone."""
    return dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def is_merged(metric: Any) -> bool:
    """Whether a metric is merged across processes when it is computed."""
    return bool(metric.sync_on_compute and metric.distributed_available_fn())


def gather_agreed(value: T, error: BaseException | None, group: Any) -> list[T]:
    """What each process has; or, if one has raised, an error on all.

    Args:
        value: of this process.
        error: that this process has raised.
        group: the process group.
    """
    described = None if error is None else f"{type(error).__name__}: {error}".removesuffix(": ")
    told = gather_objects((described, value), group)
    if error is not None:
        raise error
    raised = [f"process {rank} raised {words}" for rank, (words, _) in enumerate(told) if words is not None]
    if raised:
        raise RuntimeError("; ".join(raised))
    return [each for _, each in told]


def check_agreed(error: BaseException | None, group: Any) -> None:
    """Raise an error on all processes if one has one; one collective if none has."""
    flag = torch.tensor([error is not None], dtype=torch.int64, device=communication_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if flag.item():
        gather_agreed(None, error, group)
