"""Runs as they lie in their directories, and the layers, stages and epochs that they have in common."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.record import Row, Settings
from spectralmetrics.recording.writers.arrays import saved_epochs
from spectralmetrics.recording.writers.csv import FILE_NAME, read_rows
from spectralmetrics.tail import MEAN_LAYER


@dataclass(frozen=True)
class Run:
    """A run, read but for its arrays.

    Attributes:
        name: by which the page tells it from the others.
        rows: of ``records.csv``; empty without one.
        files: epoch -> array file.
        saved: epoch -> (stage, layer) of all that the array file holds.
        settings: name of a statistic -> its settings.
        facts: name of a layer -> its type and ceiling; empty for a run of an earlier release.
    """

    name: str
    rows: list[Row]
    files: dict[int, Path] = field(default_factory=dict)
    saved: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)
    facts: dict[str, LayerFacts] = field(default_factory=dict)

    @property
    def epochs(self) -> list[int]:
        """Those recorded, earliest first."""
        return sorted({row.epoch for row in self.rows} | set(self.files))

    @property
    def where(self) -> list[tuple[str, str]]:
        """(stage, layer) of everything that belongs to a layer, in forward order."""
        saved = [key for keys in self.saved.values() for key in keys]
        rows = [(row.stage, row.layer) for row in self.rows if row.layer not in ("", MEAN_LAYER)]
        return list(dict.fromkeys([*rows, *saved]))


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs of some directories.

    Raises:
        FileNotFoundError: if a directory holds no run.
        ValueError: if one holds no record, or a file in it cannot be read.
    """
    return [_read(path, name) for path, name in zip(directories, run_names(directories), strict=True)]


def _read(directory: Path, name: str) -> Run:
    files = saved_epochs(directory)
    table = directory / FILE_NAME
    if not files and not table.exists():
        raise FileNotFoundError(f"expected a run with a {FILE_NAME} or arrays, got {directory}")
    rows = read_rows(table) if table.exists() else []
    if not rows and not files:
        raise ValueError(f"expected records in {table}, got none")
    saved = {epoch: _saved_in(path) for epoch, path in files.items()}
    manifest = read_manifest(directory)
    return Run(name, rows, files, saved, manifest.statistics, manifest.facts)


def _saved_in(path: Path) -> list[tuple[str, str]]:
    """From the table of contents, without reading a matrix."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"expected {path} to be an array file of a recorder: {error}") from error
    ending = "/covariance.npy"
    keys = [name.removesuffix(ending).partition("/") for name in names if name.endswith(ending)]
    return [(stage, layer) for stage, _, layer in keys]


def run_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the directories apart; a number where they are the same.

    >>> run_names([Path("/runs/mnist"), Path("/runs/cifar")])
    ['mnist', 'cifar']
    >>> run_names([Path("/a/demo"), Path("/b/demo")])
    ['a/demo', 'b/demo']
    """
    parts = [path.resolve().parts for path in directories]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.resolve().name} ({number})" for number, path in enumerate(directories, 1)]


def in_order(sequences: Iterable[Iterable[str]]) -> list[str]:
    """All names of several sequences, each new one behind the one that it follows in its own.

    >>> in_order([["a", "c"], ["a", "b", "c", "d"]])
    ['a', 'b', 'c', 'd']
    """
    merged: list[str] = []
    known: set[str] = set()
    for sequence in sequences:
        place = 0
        for name in sequence:
            if name in known:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                known.add(name)
                place += 1
    return merged
