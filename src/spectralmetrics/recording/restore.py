"""A record as the files of a run hold it, for writers that did not show it while it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from spectralmetrics.metrics import Interval, SpectralMetric
from spectralmetrics.recording.manifest import Manifest
from spectralmetrics.recording.recompute import rebuild_layers, rebuild_metrics
from spectralmetrics.recording.record import Record, tidy_rows
from spectralmetrics.recording.writers.arrays import saved_epochs, saved_layers
from spectralmetrics.recording.writers.csv import FILE_NAME, read_rows


def saved_record(directory: Path, epoch: int, manifest: Manifest) -> Record:
    """What the files hold of a record: numbers if there is a table or arrays, the rest if there are arrays.

    Args:
        directory: of the run.
        epoch: of the record.
        manifest: of the run.

    Returns:
        The record. With a table, its ``values`` are those that are no single numbers, rebuilt when one is read.

    Raises:
        ValueError: if the table or the arrays cannot be read.
    """
    table = directory / FILE_NAME
    rows = [row for row in read_rows(table) if row.epoch == epoch] if table.exists() else []
    values: _SavedValues | dict[str, Tensor] = {}
    if (arrays := saved_epochs(directory).get(epoch)) is not None:
        numbers = {row.statistic for row in rows}
        settings = {name: each for name, each in manifest.statistics.items() if name not in numbers}
        metrics = rebuild_metrics(settings)
        values = _SavedValues(arrays, metrics)
        if not rows:
            rows = tidy_rows(epoch, values.by_parts(), values.intervals)
    return Record(epoch, values, rows, statistics=manifest.statistics, layers=manifest.facts)


class _SavedValues(Mapping[str, Tensor]):
    """``"{statistic}/{stage}/{layer}"`` -> value, all of them rebuilt from the arrays when one is read."""

    def __init__(self, arrays: Path, metrics: dict[str, SpectralMetric]) -> None:
        self._arrays = arrays
        self._metrics = metrics
        self._keys = [f"{name}/{key}" for key in saved_layers(arrays) for name in metrics]
        self._values: dict[tuple[str, str, str], Tensor] = {}
        self.intervals: dict[tuple[str, str, str], Interval] = {}

    def by_parts(self) -> dict[tuple[str, str, str], Tensor]:
        """(statistic, stage, layer) -> value."""
        if not self._values:
            self._values, self.intervals = rebuild_layers(self._arrays, self._metrics)
        return self._values

    def __getitem__(self, key: str) -> Tensor:
        statistic, stage, layer = key.split("/", 2)
        return self.by_parts()[statistic, stage, layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
