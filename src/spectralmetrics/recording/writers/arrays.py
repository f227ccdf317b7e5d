"""Covariances, means and counts, from which any statistic can be rebuilt."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.recording.files import replacing, sweep
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import SpectralSum, Sum, kinds

FOLDER_NAME = "arrays"


class ArraysWriter(Writer):
    """One ``arrays/epoch-000003.npz`` per epoch, read with ``numpy.load(path, allow_pickle=False)``.

    For each stage and layer it holds, float64 unless said otherwise:

    - ``"{stage}/{layer}/covariance"``, (D, D), about the mean and divided by n;
    - ``"{stage}/{layer}/mean"``, (D,);
    - ``"{stage}/{layer}/count"``, (), int64: the number of observations n;
    - ``"{stage}/{layer}/non_finite"``, (), int64: the number left out for NaN or infinities;
    - ``"{stage}/{layer}/sample"``, (m, D), and ``".../sample_keys"``, (m,), where an embedding keeps a sample;
    - with labels of K classes (and g folds, or 1), ``".../class_counts"``, (g, K), int64,
      ``".../class_deviations"``,
      (g, K, D), the mean of each class about that of its fold, and ``".../labelled_covariances"``,
      ``"…_means"``, ``"…_counts"`` and ``"…_non_finites"`` of what has a label, as of folds:
    - with g folds, ``".../fold_covariances"``, (g, D·(D+1)/2), the upper triangles row by row,
      ``".../fold_means"``, (g, D), ``".../fold_counts"`` and ``".../fold_non_finites"``, (g,), int64.

    Covariances, means and counts of disjoint data merge exactly: with the difference d of two means,
    n Σ = n₁ Σ₁ + n₂ Σ₂ + (n₁ n₂ / n) d dᵀ. Needs 8·D² bytes on disk for each layer, stage and epoch,
    and with g folds g/2 times as much again.
    """

    name = "arrays"
    keeps_records = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._directory = directory

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        # One matrix in memory at a time: together they are as large as the probe's state.
        with (
            replacing(_path(self._directory, record.epoch)) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, array in _arrays(record):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max(saved_epochs(directory), default=None)

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        sweep(directory / FOLDER_NAME, "epoch-*.npz")
        for epoch, path in saved_epochs(directory).items():
            if after is None or epoch > after:
                path.unlink()


@dataclass(frozen=True)
class SavedLayer:
    """What an array file holds of one stage and layer."""

    stage: str
    layer: str
    sums: tuple[Sum, ...]

    @property
    def spectral(self) -> SpectralSum:
        """The sum from which the spectrum is read."""
        return next(each for each in self.sums if isinstance(each, SpectralSum))

    @property
    def covariance(self) -> torch.Tensor:
        """About the mean and divided by n, shape (D, D)."""
        return self.spectral.covariance()

    @property
    def mean(self) -> torch.Tensor:
        """Shape (D,)."""
        return self.spectral.mean()

    @property
    def count(self) -> int:
        """The number of observations n."""
        return int(self.spectral.num_observations)

    @property
    def non_finite(self) -> int:
        """The number of observations left out for NaN or infinities."""
        return int(self.spectral.num_left_out)

    def spectrum(self, center: bool = True) -> Spectrum:
        """The spectrum that the metrics of this layer have read."""
        others = [each for each in self.sums if each is not self.spectral]
        return Spectrum(self.spectral, center=center, others=others)


def saved_epochs(directory: Path) -> dict[int, Path]:
    """The array files of a run, by epoch, earliest first."""
    found = {}
    for path in (directory / FOLDER_NAME).glob("epoch-*.npz"):
        if match := re.fullmatch(r"epoch-(\d+)\.npz", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def saved_layers(path: Path) -> list[str]:
    """What an array file holds, as ``"{stage}/{layer}"``, in the order in which it was recorded.

    Raises:
        ValueError: if the file is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"expected {path} to be an array file of a recorder: {error}") from error
    own = {kind.arrays[0] for kind in kinds() if issubclass(kind, SpectralSum)}
    places = (name.removesuffix(".npy").rpartition("/") for name in names)
    return list(dict.fromkeys(place for place, _, array in places if array in own))


def read_layers(path: Path) -> Iterator[SavedLayer]:
    """The layers of one array file in the order in which they were recorded, one in memory at a time.

    Raises:
        ValueError: if the file is no array file of a recorder.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names: dict[str, list[str]] = {}
            for name in arrays.files:
                place, own = name.rsplit("/", 1)
                names.setdefault(place, []).append(own)
            for place, kept in names.items():
                stage, layer = place.split("/", 1)

                def read(own: str, place: str = place) -> torch.Tensor:
                    return torch.as_tensor(arrays[f"{place}/{own}"])

                found = [kind for kind in kinds() if set(kind.arrays) <= set(kept)]
                spectral = [kind for kind in found if issubclass(kind, SpectralSum)]
                own = [kind for kind in spectral if kind.describes_layer][-1:]  # the most detailed
                beside = [kind for kind in spectral if not kind.describes_layer]
                others = [kind for kind in found if not issubclass(kind, SpectralSum)]
                if spectral:
                    kinds_there = (*own, *beside, *others)
                    yield SavedLayer(stage, layer, tuple(kind.restored(read) for kind in kinds_there))
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected {path} to be an array file of a recorder: {error}") from error


def _arrays(record: Record) -> Iterator[tuple[str, npt.NDArray[np.float64 | np.int64]]]:
    for (stage, layer), sums in record.sums.items():
        for each in sums:
            for name, tensor in each.saved():
                yield f"{stage}/{layer}/{name}", tensor.cpu().numpy()


def _path(directory: Path, epoch: int) -> Path:
    return directory / FOLDER_NAME / f"epoch-{epoch:06d}.npz"
