"""The states of many layers, merged across processes for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from spectralmetrics.functional.together import NO_GROUP
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.sums import run_together


def sharing_group(places: Sequence[LayerMetrics]) -> Any:
    """The process group that has the same merged states; NO_GROUP if there is none, or not one for all."""
    leaders = [leader for place in places for leader in place.spectral_leaders]
    groups = {leader.process_group for leader in leaders}
    if len(groups) != 1 or not all(
        each.sync_on_compute and each.distributed_available_fn() for each in leaders
    ):
        return NO_GROUP
    (group,) = groups
    return group if dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1 else NO_GROUP


@contextlib.contextmanager
def merged_states(places: Sequence[LayerMetrics]) -> Iterator[None]:
    """Inside, the states of these layers are those of all processes together, by two collectives."""
    groups: dict[Any, list[SpectralMetric]] = {}
    for leader in (leader for place in places for leader in place.spectral_leaders):
        if leader.sync_on_compute and leader.distributed_available_fn():
            groups.setdefault(leader.process_group, []).append(leader)
    local = [(leader, leader.metric_state) for leaders in groups.values() for leader in leaders]
    try:
        for group, leaders in groups.items():
            if dist.get_rank(group) >= 0:
                exchanges = [leader.exchanges(group) for leader in leaders]
                results = iter(run_together([e for each in exchanges for e in each], group))
                for leader, each in zip(leaders, exchanges, strict=True):
                    leader.absorb([next(results) for _ in each], group)
        for place in places:
            place.share_states()
        yield
    finally:
        for leader, state in local:
            for name, value in state.items():
                setattr(leader, name, value)
        for place in places:
            place.share_states()
