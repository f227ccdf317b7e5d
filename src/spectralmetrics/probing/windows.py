"""What a layer has shown, set aside for a while: a window of a stage, or a stage that is not to be read."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torchmetrics import Metric

from spectralmetrics.metrics.overrides import count_of_updates, forget_value
from spectralmetrics.probing.collections import LayerMetrics

Taken: TypeAlias = list[tuple[Metric, dict[str, Any], int]]
"""Metrics, their states, and how often they were updated."""


def take_out(place: LayerMetrics, *, to_merge: bool = False) -> Taken:
    """The states of a layer's metrics, which are empty afterwards; how much is sampled goes on as before.

    Args:
        place: the layer.
        to_merge: leaves metrics of other libraries alone whose states torchmetrics refuses to merge.
    """
    leaders = [
        leader
        for leader in place.leaders
        if not (to_merge and (leader.full_state_update or leader.dist_sync_on_step))
    ]
    taken = [(leader, leader.metric_state, count_of_updates(leader)) for leader in leaders]
    with torch.inference_mode(False):  # states made inside could not be updated outside
        for leader in leaders:
            leader.reset()
    _share(place)
    return taken


def put_back(place: LayerMetrics, taken: Taken) -> None:
    """Put what was taken out in the place of the states."""
    for leader, state, updates in taken:
        for name, value in state.items():
            setattr(leader, name, value)
        count_of_updates(leader, updates)
    _share(place)


def merge_in(place: LayerMetrics, taken: Taken) -> None:
    """Add what was taken out to the states."""
    for leader, state, _ in taken:
        leader.merge_state(state)
    _share(place)


def _share(place: LayerMetrics) -> None:
    for member in place.members:
        forget_value(member)
    place.share_states()
