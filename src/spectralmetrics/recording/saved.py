"""A recorded run as its directory holds it: the one reader of records, arrays and the manifest."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import Interval, MarginalMetric, SpectralMetric
from spectralmetrics.metrics import statistics as all_statistics
from spectralmetrics.monitoring import Alarm
from spectralmetrics.probing.facts import Key, LayerFacts, as_text, from_text
from spectralmetrics.probing.movers import HistoryRow
from spectralmetrics.recording.manifest import Manifest, read_alarms, read_manifest, rebuild_metrics
from spectralmetrics.recording.record import Record, RecordKey, Row, Settings, tidy_rows
from spectralmetrics.recording.writers.arrays import SavedLayer, read_layers, saved_layers, saved_records
from spectralmetrics.recording.writers.csv import RECORDS, read_rows
from spectralmetrics.recording.writers.history_file import read_history
from spectralmetrics.sums import Marginals


class SavedRun:
    """A recorded run; an access to a part reads it.

    Attributes:
        arrays: key of a record -> its array file, earliest first.

    Raises:
        ValueError: on access, if a file is damaged or was not written by a recorder.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.arrays: dict[RecordKey, Path] = saved_records(self.directory)

    def check(self, *, rows: bool = False, arrays: bool = False) -> None:
        """Raise a FileNotFoundError unless the needed rows or arrays exist, or at least one of both."""
        missing = ""
        if arrays and not self.arrays:
            missing = "a run recorded with the writer 'arrays'"
        elif rows and not self.has_table:
            missing = f"a run with a {RECORDS}"
        elif not self.has_table and not self.arrays:
            missing = f"a run with a {RECORDS} or arrays"
        if missing:
            is_run = self.has_table or self.arrays
            has = f", which has {RECORDS if self.has_table else 'arrays'} only" if is_run else ""
            has = has if self.directory.is_dir() else ", which is no directory"
            raise FileNotFoundError(f"expected {missing}, got {self.directory}{has}")
        if not self.records:
            raise ValueError(f"expected records in {self.directory}, got none")

    @cached_property
    def alarms(self) -> list[Alarm]:
        """The alarms of a monitor while the run was recorded."""
        return read_alarms(self.directory)

    @cached_property
    def history(self) -> dict[str, list[HistoryRow]]:
        """Stage -> rows of each layer and recorded forward; empty without the writer "history".

        The numbers of the forwards rise over all processes that made the run.
        """
        return read_history(self.directory)

    @property
    def has_table(self) -> bool:
        """True if there is a ``records.csv``."""
        return (self.directory / RECORDS).exists()

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of ``records.csv``; none without one."""
        return read_rows(self.directory / RECORDS)

    @cached_property
    def records(self) -> list[RecordKey]:
        """The keys of all records, earliest first."""
        return sorted({row.key for row in self.rows} | set(self.arrays), key=lambda key: key.order)

    def last_of(self, epoch: int | None = None, *, arrays: bool = False) -> RecordKey:
        """The last record of an epoch, or of all; with ``arrays`` the last that has some.

        Raises:
            ValueError: if there is none.
        """
        keys = list(self.arrays) if arrays else self.records
        matching = [key for key in keys if epoch is None or key.epoch == epoch]
        if not matching:
            epochs = list(dict.fromkeys(key.epoch for key in keys))
            is_whole = len(epochs) > 1 and epochs == list(range(epochs[0], epochs[-1] + 1))
            known = f"{epochs[0]} to {epochs[-1]}" if is_whole else ", ".join(map(str, epochs))
            verb = "has arrays" if arrays else "was recorded"
            raise ValueError(f"expected an epoch of {self.directory} that {verb}, {known}, got {epoch!r}")
        return matching[-1]

    @property
    def has_epochs(self) -> bool:
        """True if the end of an epoch was recorded; False if only steps were."""
        return any(key.step is None for key in self.records)

    def places(self, by_step: bool = False) -> dict[RecordKey, int]:
        """The places of records over time: the last record of each epoch, or each record at its step.

        Args:
            by_step: True gives steps; a step that several epochs have gets its last record.
        """
        if by_step:
            by_number = {key.step: key for key in self.records if key.step is not None}
            return {key: step for step, key in by_number.items()}
        return {key: epoch for epoch, key in {key.epoch: key for key in self.records}.items()}

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the recorder."""
        return read_manifest(self.directory)

    @property
    def statistics(self) -> dict[str, Settings]:
        """Name of a statistic -> its settings."""
        return self.manifest.statistics

    @cached_property
    def facts(self) -> dict[str, LayerFacts]:
        """Name of a layer -> its type and ceiling; empty for a run of 0.1.0."""
        return {name: LayerFacts.restored(each) for name, each in self.manifest.layers.items()}

    def untrained(self, key: RecordKey, layers: Iterable[str]) -> dict[str, bool]:
        """Layer -> True if its weights were as initialised at a record; layers not tested are left out."""
        trained = {name: self.manifest.trained[name] for name in layers if name in self.manifest.trained}
        return {name: since is None or key.order < since.order for name, since in trained.items()}

    def layers_in(self, key: RecordKey) -> list[tuple[str, str]]:
        """(stage, layer) of all arrays in a record, in the order in which they were recorded."""
        return saved_layers(self.arrays[key]) if key in self.arrays else []

    def layers(self, key: RecordKey, stage: str | None = None) -> Iterator[SavedLayer]:
        """The layers that have arrays in a record, of one stage or of all; one in memory at a time."""
        for layer in read_layers(self.arrays[key], self._needs_vectors):
            if stage in (None, layer.stage):
                yield layer

    @cached_property
    def _needs_vectors(self) -> bool:
        """True if, as in the recording, an embedding's eigenvectors give the eigenvalues for all metrics."""
        kinds = all_statistics()
        names = (each.get("metric") for each in self.statistics.values())
        return any(kinds[name].needs_eigenvectors for name in names if name in kinds)

    @property
    def where(self) -> list[tuple[str, str]]:
        """(stage, layer) of everything that belongs to a layer, in forward order."""
        rows = [(row.stage, row.layer) for row in self.rows if row.is_of_layer]
        saved = [place for key in self.arrays for place in self.layers_in(key)]
        return list(dict.fromkeys([*rows, *saved]))

    def rebuilt(
        self, key: RecordKey, metrics: Mapping[str, SpectralMetric], failures: Failures
    ) -> tuple[dict[Key, Tensor], dict[Key, Interval]]:
        """Values of a record from its arrays, and the intervals of statistics that have one."""
        values: dict[Key, Tensor] = {}
        intervals: dict[Key, Interval] = {}
        for layer in self.layers(key):
            if layer.is_empty:
                continue
            of_layer = {}
            # Eigenvectors first: they come with the eigenvalues that the other metrics read.
            for name in sorted(metrics, key=lambda each: not metrics[each].needs_eigenvectors):
                with failures.of(key, layer, repr(name)):
                    of_layer[name] = _value_from(metrics[name], layer.spectrum(metrics[name].center))
            for name in [each for each in metrics if each in of_layer]:
                metric, place = metrics[name], (name, layer.stage, layer.layer)
                values[place] = of_layer[name]
                spectrum = layer.spectrum(metric.center)
                if metric.has_interval and (spectrum.num_folds > 1 or spectrum.sketch is not None):
                    intervals[place] = metric.interval_of(spectrum)
        return values, intervals

    def record(self, key: RecordKey) -> Record:
        """A record as the files hold it: numbers if there is a table or arrays, the rest if there are arrays.

        With a table, ``values`` has only the values that are not single numbers; the first access rebuilds all.
        """
        rows = [row for row in self.rows if row.key == key]
        values: _SavedValues | dict[str, Tensor] = {}
        if key in self.arrays:
            numbers = {row.statistic for row in rows}
            settings = {name: each for name, each in self.statistics.items() if name not in numbers}
            values = _SavedValues(self, key, rebuild_metrics(settings))
            if not rows:
                rows = tidy_rows(key, values.by_key(), values.intervals)
        facts, untrained = self.facts, self.untrained(key, self.facts)
        return Record(key.epoch, values, rows, {}, self.statistics, facts, key.step, untrained=untrained)


class Failures:
    """Parts of a run that cannot be read, collected for one warning that names them."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, list[RecordKey]]] = {}
        self._errors: dict[str, tuple[str, Exception]] = {}

    @contextlib.contextmanager
    def of(self, key: RecordKey, layer: SavedLayer, what: str) -> Iterator[None]:
        """Inside, an exception leaves out a part of a layer."""
        try:
            yield
        except Exception as error:  # of a damaged file, of a sketch, or of a user's own statistic
            words = str(error) or type(error).__name__
            part = f"{what} of {layer.layer!r} in {layer.stage}"
            self._parts.setdefault(words, {}).setdefault(part, []).append(key)
            self._errors.setdefault(what, (f"{part}, {key}: {words}", error))

    def check(self, what: str) -> None:
        """Raise a ValueError for the first failure of a part that no layer could give."""
        if what in self._errors:
            words, error = self._errors[what]
            raise ValueError(words) from error

    def warn(self, *, stacklevel: int = 2) -> None:
        """Warn of all parts that were left out, if there are any."""
        if self._parts:
            words = [
                f"{', '.join(f'{part}, {_when(keys)}' for part, keys in parts.items())} ({why})"
                for why, parts in self._parts.items()
            ]
            warnings.warn(f"left out {'; '.join(words)}", UserWarning, stacklevel=stacklevel + 1)


def _when(keys: Sequence[RecordKey]) -> str:
    return str(keys[0]) if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"


class _SavedValues(Mapping[str, Tensor]):
    """``"{statistic}/{stage}/{layer}"`` -> value; the first access rebuilds all values from the arrays."""

    def __init__(self, run: SavedRun, key: RecordKey, metrics: dict[str, SpectralMetric]) -> None:
        self._run = run
        self._key = key
        self._metrics = metrics
        self._keys = list(as_text({(name, *place): None for place in run.layers_in(key) for name in metrics}))
        self._values: dict[Key, Tensor] = {}
        self.intervals: dict[Key, Interval] = {}

    def by_key(self) -> dict[Key, Tensor]:
        """(statistic, stage, layer) -> value."""
        if not self._values:
            failures = Failures()
            self._values, self.intervals = self._run.rebuilt(self._key, self._metrics, failures)
            failures.warn(stacklevel=3)
        return self._values

    def __getitem__(self, key: str) -> Tensor:
        return self.by_key()[from_text(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _value_from(metric: SpectralMetric, spectrum: Spectrum) -> Tensor:
    """The value of a metric; raises a ValueError if a sum that it needs was not recorded."""
    needed = [*metric.other_sums()]
    if isinstance(metric, MarginalMetric):
        needed += [] if metric.can_read_matrix else [metric.spectral_sum()]
    elif isinstance(spectrum.sums, Marginals):
        raise ValueError(f"expected a covariance for {metric.short_name!r}; only marginals were recorded")
    for each in needed:
        if not spectrum.has(type(each)):
            raise ValueError(f"expected {each.described} for {metric.short_name!r}; none was recorded")
    return metric.value_of(spectrum)


def read_records(directory: str | Path) -> list[dict[str, Any]]:
    """The numbers of a run, as it recorded them with the writer ``"csv"``.

    Args:
        directory: the directory of the run.

    Returns:
        One dict for each row of ``records.csv``, with its columns: epoch, stage, layer, statistic, value, … The
        layer ``"mean"`` is the mean over all layers; scalars that the task added have the layer ``""``.
        ``pandas.DataFrame(read_records(directory))`` makes a table of them.

    Raises:
        FileNotFoundError: if the directory has no ``records.csv``.
        ValueError: if that is not a table of records.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = tempfile.mkdtemp()
    >>> with LayerProbe(model) as probe, Recorder(directory, probe) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     _ = recorder.record()
    >>> [(row["layer"], row["statistic"]) for row in read_records(directory)]
    [('0', 'saturation'), ('mean', 'saturation')]
    """
    run = SavedRun(directory)
    if not run.has_table:
        run.check(rows=True)
    return [row._asdict() for row in run.rows]


def run_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ between the directories; with a number if paths are equal.

    >>> run_names([Path("/runs/mnist"), Path("/runs/cifar")])
    ['mnist', 'cifar']
    >>> run_names([Path("/a/demo"), Path("/b/demo")])
    ['a/demo', 'b/demo']
    """
    parts = [Path(os.path.abspath(path)).parts for path in directories]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]
