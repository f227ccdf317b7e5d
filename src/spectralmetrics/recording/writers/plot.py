"""Pictures of each epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectralmetrics.plotting import plot_covariance, plot_embedding, plot_layers, plot_spectrum
from spectralmetrics.recording.pictures import draw_profile, save_figure, title_of
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer

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
        ModuleNotFoundError: without matplotlib.
    """

    name = "plot"

    def __init__(self, dpi: int = 120) -> None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'the plot writer needs matplotlib: pip install "spectralmetrics[plot]"'
            ) from error
        self.dpi = dpi

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._folder = directory / FOLDER_NAME

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        for name, draw in _pictures(record).items():
            save_figure(draw(), self._folder / f"{name}-epoch-{record.epoch:06d}.png", self.dpi)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return any(_files(directory))

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        for path, epoch in _files(directory).items():
            if after is None or epoch > after:
                path.unlink()
        if after is None:
            for stage in ("train", "eval"):
                for path in (directory / FOLDER_NAME).glob(f"*-{stage}-epochs.png"):
                    path.unlink()


def _pictures(record: Record) -> dict[str, Callable[[], Figure]]:
    pictures: dict[str, Callable[[], Figure]] = {
        statistic: functools.partial(draw_profile, record.rows, statistic, record.statistics)
        for statistic in dict.fromkeys(row.statistic for row in record.rows if row.layer)
    }
    of_stage: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in record.values.items():
        if value.ndim not in (1, 2) or key.count("/") < 2:
            continue
        statistic, stage, layer = key.split("/", 2)
        if "metric" in record.statistics.get(statistic, {}):  # of another library's values nothing is known
            of_stage.setdefault((statistic, stage), {})[layer] = value
    for (statistic, stage), values in of_stage.items():
        draw: Any = plot_spectrum
        if next(iter(values.values())).ndim == 2:
            is_embedding = record.statistics[statistic].get("metric") == "embedding"
            draw = plot_embedding if is_embedding else plot_covariance
        title = f"{title_of(statistic, record.statistics)}, {stage}, epoch {record.epoch}"
        pictures[f"{statistic}-{stage}"] = functools.partial(_draw_layers, values, draw, title)
    return pictures


def _draw_layers(values: dict[str, Tensor], draw: Callable[..., Any], title: str) -> Figure:
    return plot_layers(values, draw, title=title)[0]


def _files(directory: Path) -> dict[Path, int]:
    found = {}
    for path in (directory / FOLDER_NAME).glob("*-epoch-*.png"):
        number = path.stem.rpartition("-")[2]
        if number.isdecimal() and len(number) >= 6:
            found[path] = int(number)
    return found
