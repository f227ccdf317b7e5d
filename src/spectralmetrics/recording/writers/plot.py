"""Pictures of records, and the writer that draws each epoch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmetrics.extras import from_extra
from spectralmetrics.findings import tail_of
from spectralmetrics.plotting import (
    literal,
    plot_covariance,
    plot_embedding,
    plot_layers,
    plot_profile,
    plot_spectrum,
)
from spectralmetrics.probing.facts import STAGES, LayerFacts, from_text
from spectralmetrics.recording.files import replacing, sweep
from spectralmetrics.recording.record import Record, Row, Settings
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.table import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER_NAME = "plots"


class PlotWriter(Writer):
    """A PNG per statistic and epoch in the folder ``plots``; extra ``spectralmetrics[plot]``.

    Numbers are drawn as a profile over the layers, ``saturation-epoch-000003.png``, with the threshold and the
    task's own numbers in the title. Spectra, covariances and embeddings are drawn layer by layer for each
    stage, ``spectrum-train-epoch-000003.png``. Heat maps over all epochs are drawn by ``spectralmetrics plot``.

    Args:
        dpi: dots per inch.

    Raises:
        ValueError: for ``dpi`` that is not a positive integer.
        ModuleNotFoundError: without matplotlib.
    """

    name = "plot"

    def __init__(self, dpi: int = 120) -> None:
        with from_extra("plot", "the plot writer needs matplotlib"):
            import matplotlib  # noqa: F401
        check_positive_integer("dpi", dpi)
        self.dpi = dpi

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._folder = directory / FOLDER_NAME

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        self._draw(record)

    def restore(self, record: Record) -> None:
        """Draw the pictures that are missing."""
        self._draw(record, missing_only=True)

    def _draw(self, record: Record, missing_only: bool = False) -> None:
        for name, draw in _pictures(record).items():
            path = self._folder / f"{name}-epoch-{record.epoch:06d}.png"
            if not (missing_only and path.exists()) and (figure := draw()) is not None:
                save_figure(figure, path, self.dpi)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return any(_files(directory))

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        sweep(directory / FOLDER_NAME, "*-epoch*.png")
        for path, epoch in _files(directory).items():
            if after is None or epoch > after:
                path.unlink()
        if after is None:
            for stage in STAGES:
                for path in (directory / FOLDER_NAME).glob(f"*-{stage}-epochs.png"):
                    path.unlink()


def _pictures(record: Record) -> dict[str, Callable[[], Figure | None]]:
    """Pictures to draw, by name; values that are not numbers are read only when they are drawn."""
    pictures: dict[str, Callable[[], Figure | None]] = {
        statistic: functools.partial(draw_profile, record.rows, statistic, record.statistics, record.layers)
        for statistic in dict.fromkeys(row.statistic for row in record.rows if row.layer)
    }
    numbers = set(pictures)
    of_stage: dict[tuple[str, str], dict[str, str]] = {}
    for key in record.values:
        statistic, stage, layer = from_text(key)
        # Values of another library's metrics may be of any shape.
        if layer and statistic not in numbers and "metric" in record.statistics.get(statistic, {}):
            of_stage.setdefault((statistic, stage), {})[layer] = key
    for (statistic, stage), keys in of_stage.items():
        pictures[f"{statistic}-{stage}"] = functools.partial(_draw_layers, record, statistic, stage, keys)
    return pictures


def _draw_layers(record: Record, statistic: str, stage: str, keys: Mapping[str, str]) -> Figure | None:
    """One small picture per layer; None for values of a shape that no picture shows."""
    given = {layer: record.values.get(key) for layer, key in keys.items()}
    values = {layer: value for layer, value in given.items() if value is not None and value.ndim in (1, 2)}
    if not values:
        return None
    draw: Any = plot_spectrum
    if next(iter(values.values())).ndim == 2:
        is_embedding = record.statistics[statistic].get("metric") == "embedding"
        draw = plot_embedding if is_embedding else plot_covariance
    title = f"{title_of(statistic, record.statistics)}, {literal(stage)}, epoch {record.epoch}"
    return plot_layers(values, draw, title=title)[0]


def _files(directory: Path) -> dict[Path, int]:
    paths = (directory / FOLDER_NAME).glob("*-epoch-*.png")
    return {path: int(match[1]) for path in paths if (match := re.search(r"-(\d{6,})\.png$", path.name))}


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
