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

from spectralmetrics.functional.moments import covariance, mean
from spectralmetrics.functional.reservoir import Reservoir
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.recording.files import replacing
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer

FOLDER_NAME = "arrays"


class ArraysWriter(Writer):
    """One ``arrays/epoch-000003.npz`` per epoch, read with ``numpy.load(path, allow_pickle=False)``.

    For each stage and layer it holds, float64 unless said otherwise:

    - ``"{stage}/{layer}/covariance"``, (D, D), about the mean and divided by n;
    - ``"{stage}/{layer}/mean"``, (D,);
    - ``"{stage}/{layer}/count"``, (), int64: the number of observations n;
    - ``"{stage}/{layer}/non_finite"``, (), int64: the number left out for NaN or infinities;
    - ``"{stage}/{layer}/sample"``, (m, D), and ``".../sample_keys"``, (m,), where an embedding keeps a sample.

    Covariances, means and counts of disjoint data merge exactly: with the difference d of two means,
    n Σ = n₁ Σ₁ + n₂ Σ₂ + (n₁ n₂ / n) d dᵀ. Needs 8·D² bytes on disk for each layer, stage and epoch.
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
        for epoch, path in saved_epochs(directory).items():
            if after is None or epoch > after:
                path.unlink()


@dataclass(frozen=True)
class SavedLayer:
    """What an array file holds of one stage and layer."""

    stage: str
    layer: str
    covariance: torch.Tensor
    mean: torch.Tensor
    count: int
    sample: Reservoir | None
    non_finite: int = 0

    def spectrum(self, center: bool = True) -> Spectrum:
        """The spectrum that the metrics of this layer have read."""
        return Spectrum.of_covariance(self.covariance, self.mean, self.count, center=center)


def saved_epochs(directory: Path) -> dict[int, Path]:
    """The array files of a run, by epoch, earliest first."""
    found = {}
    for path in (directory / FOLDER_NAME).glob("epoch-*.npz"):
        if match := re.fullmatch(r"epoch-(\d+)\.npz", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_layers(path: Path) -> Iterator[SavedLayer]:
    """The layers of one array file in the order in which they were recorded, one in memory at a time.

    Raises:
        ValueError: if the file is no array file of a recorder.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                if not name.endswith("/covariance"):
                    continue
                key = name.removesuffix("/covariance")
                stage, layer = key.split("/", 1)
                sample = None
                if f"{key}/sample" in arrays.files:
                    keys, rows = arrays[f"{key}/sample_keys"], arrays[f"{key}/sample"]
                    sample = Reservoir(torch.from_numpy(keys), torch.from_numpy(rows))
                yield SavedLayer(
                    stage,
                    layer,
                    torch.from_numpy(arrays[name]),
                    torch.from_numpy(arrays[f"{key}/mean"]),
                    int(arrays[f"{key}/count"]),
                    sample,
                    int(arrays[f"{key}/non_finite"]) if f"{key}/non_finite" in arrays.files else 0,
                )
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected {path} to be an array file of a recorder: {error}") from error


def _arrays(record: Record) -> Iterator[tuple[str, npt.NDArray[np.float64 | np.int64]]]:
    for (stage, layer), moments in record.moments.items():
        key = f"{stage}/{layer}"
        yield f"{key}/covariance", covariance(moments).cpu().numpy()
        yield f"{key}/mean", mean(moments).cpu().numpy()
        yield f"{key}/count", moments.count.cpu().numpy()
        yield f"{key}/non_finite", moments.non_finite.cpu().numpy()
        if (stage, layer) in record.samples:
            sample = record.samples[stage, layer]
            yield f"{key}/sample", sample.rows.cpu().numpy()
            yield f"{key}/sample_keys", sample.keys.cpu().numpy()


def _path(directory: Path, epoch: int) -> Path:
    return directory / FOLDER_NAME / f"epoch-{epoch:06d}.npz"
