"""Pictures of records: their rows and titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectralmetrics.findings import tail_of
from spectralmetrics.plotting import literal, plot_heatmap, plot_profile
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.files import replacing
from spectralmetrics.recording.record import RecordKey, Row, Settings
from spectralmetrics.table import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_profile(
    rows: Sequence[Row], statistic: str, settings: Mapping[str, Settings], facts: Mapping[str, LayerFacts] = {}
) -> Figure:
    """Draw one epoch of a statistic, all stages together, with the task's own numbers in the title."""
    own = [row for row in rows if row.statistic == statistic and row.is_of_layer]
    profiles: dict[str, dict[str, float]] = {}
    bands: dict[str, dict[str, tuple[float, float]]] = {}
    for row in own:
        profiles.setdefault(row.stage, {})[row.layer] = row.value
        if row.low is not None and row.high is not None:
            bands.setdefault(row.stage, {})[row.layer] = (row.low, row.high)
    task = [literal(f"{row.stage} {row.statistic} {row.value:.4g}".strip()) for row in rows if not row.layer]
    title = ", ".join([title_of(statistic, settings), str(own[0].key), *task])
    metric = settings.get(statistic, {}).get("metric")
    tail: list[str] = []
    ceilings: dict[str, int] = {}
    if metric == "saturation" and not any(each.of_gradients for each in facts.values()):
        evaluated = profiles.get("eval", {})
        tail = tail_of(evaluated) if all(0 <= value <= 1 for value in evaluated.values()) else []
    if metric == "intrinsic_dimension":
        known = {name: each.ceiling for name, each in facts.items() if each.ceiling is not None}
        refuted = {row.layer for row in own if row.value > known.get(row.layer, math.inf)}
        ceilings = {name: ceiling for name, ceiling in known.items() if name not in refuted}
    drawn = plot_profile(profiles, statistic=statistic, title=title, tail=tail, bands=bands, ceilings=ceilings)
    return drawn[0]


def draw_heatmap(
    rows: Sequence[Row],
    statistic: str,
    stage: str,
    settings: Mapping[str, Settings],
    places: Mapping[RecordKey, int],
    by_step: bool = False,
) -> Figure:
    """Draw all epochs or steps of a statistic in one stage; for the places see :meth:`.SavedRun.places`."""
    profiles: dict[int, dict[str, float]] = {}
    for row in rows:
        is_one = row.statistic == statistic and row.stage == stage and row.is_of_layer
        if is_one and row.key in places:
            profiles.setdefault(places[row.key], {})[row.layer] = row.value
    title = f"{title_of(statistic, settings)}, {literal(stage)}{', by step' if by_step else ''}"
    return plot_heatmap(profiles, statistic=statistic, title=title)[0]


def title_of(statistic: str, settings: Mapping[str, Settings]) -> str:
    """The title of a picture, with the threshold where there is one.

    >>> title_of("saturation", {"saturation": {"threshold": 0.99}})
    'Saturation at 99 % of variance'
    """
    name = literal(statistic.replace("_", " "))
    name = name[:1].upper() + name[1:]
    threshold = settings.get(statistic, {}).get("threshold")
    return name if threshold is None else f"{name} at {percent(threshold)} of variance"


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
