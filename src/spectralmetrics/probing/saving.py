"""What a probe's ``state_dict`` holds beside the metrics, so that an epoch can resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.steps import Steps


def save_progress(
    destination: dict[str, Any],
    prefix: str,
    places: Sequence[LayerMetrics],
    steps: Steps,
    order: Sequence[int],
) -> None:
    """Put the progress of all layers into a state dict.

    Args:
        destination: the state dict.
        prefix: of its keys.
        places: all layers in all stages.
        steps: of the model.
        order: the layers that have run, by number, in the order of their first run.
    """
    rows = [[p.forwards, p.samples, p.epoch, bool(p.given_up or p.too_wide)] for p in places]
    destination[prefix + "progress"] = torch.tensor(rows, dtype=torch.int64)
    destination[prefix + "forward_order"] = torch.tensor(list(order), dtype=torch.int64)
    counts = [list(each.values()) for each in (steps.counts, steps.epochs)]
    destination[prefix + "steps"] = torch.tensor(counts, dtype=torch.int64)


def load_progress(
    state_dict: dict[str, Any], prefix: str, places: Sequence[LayerMetrics], steps: Steps
) -> list[int] | None:
    """Take the progress of all layers out of a state dict; return the order of the layers, None if it has none.

    Raises:
        ValueError: for the state of another number of layers.
    """
    progress = state_dict.pop(prefix + "progress", None)
    order = state_dict.pop(prefix + "forward_order", None)
    counts = state_dict.pop(prefix + "steps", None)
    if progress is None:
        return None
    if progress.shape[0] != len(places):
        raise ValueError(
            f"expected the state of {len(places) // 2} probed layers, got that of {progress.shape[0] // 2}"
        )
    for place, (forwards, samples, epoch, given_up) in zip(places, progress.tolist(), strict=True):
        place.forwards, place.samples, place.epoch = forwards, samples, epoch
        place.given_up = "before it was saved" if given_up else ""
    if counts is not None:  # 0.1.0 counted the forwards of each layer alone
        for kept, numbers in zip((steps.counts, steps.epochs), counts.tolist(), strict=True):
            kept.update(zip(kept, numbers, strict=True))
    return [] if order is None else [int(index) for index in order.tolist()]
