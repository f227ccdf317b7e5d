"""Covariances, means and counts, from which any statistic can be rebuilt."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.recording.files import replacing, sweep
from spectralmetrics.recording.record import Record, RecordKey
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import SpectralSum, Sum, kinds

FOLDER_NAME = "arrays"
# True: names of eigenvalues about the mean; False: about zero.
_EIGENVALUES = {True: "eigenvalues", False: "second_moment_eigenvalues"}
# Part of a spectrum -> what the name of its array begins with.
_PREFIXES = {"eigenvalues": "", "held_out": "held_out_", "others": "left_out_"}


class ArraysWriter(Writer):
    """One ``arrays/epoch-000003.npz`` per epoch, read with ``numpy.load(path, allow_pickle=False)``.

    For each stage and layer it holds, float64 unless said otherwise:

    - ``"{stage}/{layer}/covariance"``, (D, D), about the mean and divided by n;
    - ``"{stage}/{layer}/mean"``, (D,);
    - ``"{stage}/{layer}/count"``, (), int64: the number of observations n;
    - ``"{stage}/{layer}/non_finite"``, (), int64: the number left out for NaN or infinities. If all were, the
      covariance and the mean are zero;
    - ``"{stage}/{layer}/eigenvalues"``, (D,), descending, if a statistic has read them; (k,) for a sketch. For
      the second moment about zero, ``".../second_moment_eigenvalues"``;
    - ``"{stage}/{layer}/sample"``, (m, D), and ``".../sample_keys"``, (m,), where an embedding keeps a sample;
    - with labels of K classes (and g folds, or 1), ``".../class_counts"``, (g, K), int64,
      ``".../class_deviations"``,
      (g, K, D), the mean of each class about the mean of its fold, and ``".../labelled_covariances"``,
      ``"…_means"``, ``"…_counts"`` and ``"…_non_finites"`` of rows with a label, laid out as for folds:
    - with g folds, ``".../fold_covariances"``, (g, D·(D+1)/2), the upper triangles row by row,
      ``".../fold_means"``, (g, D), ``".../fold_counts"`` and ``".../fold_non_finites"``, (g,), int64, and the
      eigenvalues behind the intervals: ``".../held_out_eigenvalues"``, (D,), and
      ``".../left_out_eigenvalues"``, (g, D), of all folds but one.

    Covariances, means and counts of disjoint data merge exactly: with the difference d of two means,
    n Σ = n₁ Σ₁ + n₂ Σ₂ + (n₁ n₂ / n) d dᵀ. Needs 8·D² bytes on disk for each layer, stage and epoch,
    and with g folds g/2 times as much again.

    Args:
        every_step: keep records at steps, too, as ``arrays/epoch-000003-step-000012000.npz``.
    """

    name = "arrays"
    keeps_records = True

    def __init__(self, *, every_step: bool = False) -> None:
        if not isinstance(every_step, bool):
            raise TypeError(f"expected every_step to be True or False, got {every_step!r}")
        self.at_steps = every_step

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._directory = directory

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        # One matrix in memory at a time: together they are as large as the probe's state.
        with (
            replacing(_path(self._directory, record.key)) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for stage, layer in record.sums:
                _write_layer(archive, record, stage, layer)

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max((key.epoch for key in saved_records(directory)), default=None)

    @classmethod
    def last_record(cls, directory: Path) -> RecordKey | None:
        """See :class:`Writer`."""
        return max(saved_records(directory), key=lambda key: key.order, default=None)

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        cls.discard_after(directory, None if after is None else RecordKey(after))

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """See :class:`Writer`."""
        sweep(directory / FOLDER_NAME, "epoch-*.npz")
        for key, path in saved_records(directory).items():
            if after is None or key.order > after.order:
                path.unlink()


class SavedLayer:
    """One stage and layer of an array file; an access reads the arrays.

    Eigenvalues that were not saved come with eigenvectors if the metrics of the record needed those.

    Raises:
        ValueError: on access to damaged arrays; names the file and the layer.
    """

    def __init__(
        self, stage: str, layer: str, file: zipfile.ZipFile, names: list[str], needs_vectors: bool
    ) -> None:
        self.stage = stage
        self.layer = layer
        self._file = file
        self._names = names
        self._needs_vectors = needs_vectors
        self._cache: dict[Any, Any] = {}

    @cached_property
    def sums(self) -> tuple[Sum, ...]:
        """The sums, the spectral one first."""
        for name in self._names:
            with self._array(name):
                pass  # opening it checks its name: a damaged name would hide the array
        present = [kind for kind in kinds() if set(kind.arrays) <= set(self._names)]
        spectral = [kind for kind in present if issubclass(kind, SpectralSum)]
        own = [kind for kind in spectral if kind.describes_layer][-1:]  # the most detailed
        beside = [kind for kind in spectral if not kind.describes_layer]
        others = [kind for kind in present if not issubclass(kind, SpectralSum)]
        if not spectral:
            raise self._error(f"there are only {', '.join(self._names)}")
        return tuple(kind.restored(self._read) for kind in (*own, *beside, *others))

    def _read(self, name: str) -> Tensor:
        with self._array(name) as entry:
            array = np.lib.format.read_array(entry, allow_pickle=False)
            if entry.read(1):  # which also checks the sum of all bytes
                raise ValueError("there is more than the array")
            return torch.as_tensor(array)

    @contextlib.contextmanager
    def _array(self, name: str) -> Iterator[IO[bytes]]:
        """An array's bytes; any error of damaged bytes becomes a ValueError."""
        try:
            with self._file.open(f"{self.stage}/{self.layer}/{name}.npy") as entry:
                yield entry
        except Exception as error:  # damaged bytes raise any kind of error
            raise self._error(f"{name} cannot be read, {str(error) or type(error).__name__}") from error

    def _error(self, why: str) -> ValueError:
        what = f"{self._file.filename} to hold layer {self.layer!r} in {self.stage}"
        return ValueError(f"expected {what}: {why}; restore the file")

    @property
    def spectral(self) -> SpectralSum:
        """The sum from which the spectrum is read."""
        return next(each for each in self.sums if isinstance(each, SpectralSum))

    @property
    def is_empty(self) -> bool:
        """True if all observations were left out for NaN or infinities; False for damaged arrays."""
        with contextlib.suppress(ValueError):
            return not int(self.spectral.num_observations)
        return False

    def spectrum(self, center: bool = True) -> Spectrum:
        """The spectrum that the metrics of this layer read, with the saved eigenvalues."""
        others = [each for each in self.sums if each is not self.spectral]
        spectrum = Spectrum(self.spectral, center=center, cache=self._cache, others=others)
        name = _EIGENVALUES[center]
        if not spectrum.knows("eigenvalues"):
            if name in self._names:
                spectrum.learn("eigenvalues", self._read(name))
            elif self._needs_vectors:
                spectrum.eigenvectors  # noqa: B018
        for part in ("held_out", "others"):
            if _PREFIXES[part] + name in self._names and not spectrum.knows(part):
                spectrum.learn(part, self._read(_PREFIXES[part] + name))
        return spectrum


def saved_records(directory: Path) -> dict[RecordKey, Path]:
    """The array files of a run, earliest first."""
    paths = {}
    for path in (directory / FOLDER_NAME).glob("epoch-*.npz"):
        if match := re.fullmatch(r"epoch-(\d+)(?:-step-(\d+))?\.npz", path.name):
            paths[RecordKey(int(match[1]), int(match[2]) if match[2] else None)] = path
    return dict(sorted(paths.items(), key=lambda each: each[0].order))


def saved_layers(path: Path) -> list[tuple[str, str]]:
    """(stage, layer) of all arrays in a file, in the order in which they were recorded.

    Raises:
        ValueError: if the file is not an archive.
    """
    with _opened(path) as file:
        return list(_names_in(file))


def read_layers(path: Path, needs_vectors: bool = False) -> Iterator[SavedLayer]:
    """The layers of one array file in the order in which they were recorded; each reads its arrays on access.

    The file stays open as long as one of its layers lives.

    Raises:
        ValueError: if the file is not an archive.
    """
    file = _opened(path)
    for (stage, layer), names in _names_in(file).items():
        yield SavedLayer(stage, layer, file, names, needs_vectors)


def _write_layer(archive: zipfile.ZipFile, record: Record, stage: str, layer: str) -> None:
    """Write the arrays of a layer, and release it before the next layer's sums are fetched."""
    for name, tensor in _entries(record, stage, layer):
        with archive.open(f"{stage}/{layer}/{name}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, np.asanyarray(tensor.cpu()), allow_pickle=False)


def _entries(record: Record, stage: str, layer: str) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a layer, one in memory at a time."""
    for each in record.sums[stage, layer]:
        is_empty = isinstance(each, SpectralSum) and not int(each.num_observations)
        for name, tensor in each.saved():
            yield name, tensor.nan_to_num() if is_empty else tensor
    spectrum = record.spectrum(stage, layer)
    for (part, center), value in ({} if spectrum is None else spectrum.known()).items():
        yield _PREFIXES[part] + _EIGENVALUES[center], value


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        file = zipfile.ZipFile(path)
        if _entries_counted(path) not in (None, len(file.filelist)):
            raise ValueError("its table of contents is damaged")
        return file
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damaged bytes raise any kind of error
        raise ValueError(f"expected {path} to be an array file of a recorder: {error}") from error


def _entries_counted(path: Path) -> int | None:
    """The number of entries that the end of an archive states; None if it is too large or has a comment."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read()
    number = int.from_bytes(end[10:12], "little")
    return number if end.startswith(b"PK\5\6") and number < 0xFFFF else None


def _names_in(archive: zipfile.ZipFile) -> dict[tuple[str, str], list[str]]:
    """(stage, layer) -> names of its arrays."""
    names: dict[tuple[str, str], list[str]] = {}
    for entry in archive.namelist():
        place, _, name = entry.removesuffix(".npy").rpartition("/")
        stage, _, layer = place.partition("/")
        names.setdefault((stage, layer), []).append(name)
    return names


def _path(directory: Path, key: RecordKey) -> Path:
    step = "" if key.step is None else f"-step-{key.step:09d}"
    return directory / FOLDER_NAME / f"epoch-{key.epoch:06d}{step}.npz"
