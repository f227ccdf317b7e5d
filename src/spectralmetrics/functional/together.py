"""Read the spectra of many layers at once: one batch for each width, and one transfer for each device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.sums import eigenvalues, eigenvectors
from spectralmetrics.sums.decomposition import side_by_side

Progress = Callable[[int, int], None]
"""Called with the number of spectra decomposed so far, and the number of all spectra to decompose."""

_HOST = torch.device("cpu")
# Memory for the matrices of a batch. LAPACK takes one after the other. A batch saves calls: a tenth to a half
# of the time up to 96 features. But its memory leaves the cache, which costs a tenth at 256.
_BATCH_BYTES = 2**18
_ACCELERATOR_BATCH_BYTES = 2**28

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Wanted(NamedTuple):
    """A spectrum and the part that will be read from it."""

    spectrum: Spectrum
    part: Literal["mean", "variances", "magnitudes", "largest", "zero_shares", "eigenvalues", "eigenvectors"]


def decompose_together(wanted: Iterable[Wanted], progress: Progress | None = None) -> None:
    """Read several spectra; small results are copied to the memory of the CPU.

    The number of reads from a device depends on the number of different widths there, not on the number of
    spectra.

    Args:
        wanted: spectra and parts to read; spectra may share their caches.
        progress: called after each batch. An exception raised there ends the work; finished decompositions are
            kept.
    """
    wanted = list(wanted)
    vectors = {each.spectrum.identity: each.spectrum for each in wanted if each.part == "eigenvectors"}
    values = {each.spectrum.identity: each.spectrum for each in wanted if each.part == "eigenvalues"}
    plain = [each for identity, each in values.items() if identity not in vectors]
    todo = [(each, True) for each in vectors.values() if not each.knows("eigenvectors")]
    todo += [(each, False) for each in plain if not each.knows("eigenvalues")]
    done = 0
    for (device, width, with_vectors), members in _grouped(todo, _kind).items():
        batches = _batches([spectrum for spectrum, _ in members], device, width)
        read = partial(_decompose, with_vectors=with_vectors)
        for size in side_by_side(read, batches, number=len(batches), width=width, device=device):
            done += size
            if progress is not None:
                progress(done, len(todo))
    _bring("eigenvalues", [*vectors.values(), *values.values()])
    for part in ("mean", "variances", "magnitudes", "largest", "zero_shares"):
        _bring(part, [each.spectrum for each in wanted if each.part == part])


def read_together(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """The numbers in these tensors, with one transfer for each device that they are on."""
    found: dict[int, list[Any]] = {}
    for indices in _grouped(range(len(tensors)), lambda index: tensors[index].device).values():
        numbers = iter(torch.cat([tensors[index].reshape(-1) for index in indices]).cpu().tolist())
        for index in indices:
            found[index] = [next(numbers) for _ in range(tensors[index].numel())]
    return [found[index] for index in range(len(tensors))]


def _kind(each: tuple[Spectrum, bool]) -> tuple[torch.device, int, bool]:
    spectrum, with_vectors = each
    return spectrum.home, spectrum.num_features, with_vectors


def _batches(spectra: Sequence[Spectrum], device: torch.device, width: int) -> list[Sequence[Spectrum]]:
    room = _BATCH_BYTES if device.type == "cpu" else _ACCELERATOR_BATCH_BYTES
    size = max(room // (8 * width**2), 1)
    return [spectra[start : start + size] for start in range(0, len(spectra), size)]


def _decompose(spectra: Sequence[Spectrum], with_vectors: bool) -> int:
    """Decompose a batch; return its size."""
    with contextlib.suppress(ValueError, RuntimeError):  # reading the spectrum that fails raises it again
        _learn(spectra, with_vectors)
    return len(spectra)


def _learn(spectra: Sequence[Spectrum], with_vectors: bool) -> None:
    matrices = (
        [] if len(spectra) == 1 else [matrix for each in spectra if (matrix := each.matrix()) is not None]
    )
    if len(matrices) < len(spectra):  # one by one: some sums have no matrix
        for each in spectra:
            at_home = each.at(None)
            _ = at_home.eigenvectors if with_vectors else at_home.eigenvalues
        return
    stacked = torch.stack(matrices)
    values, vectors = eigenvectors(stacked) if with_vectors else (eigenvalues(stacked), None)
    for index, each in enumerate(spectra):
        # Copies: a view would keep the whole batch alive as long as one layer is not updated.
        each.learn("eigenvalues", values[index].clone())
        if vectors is not None:
            each.learn("eigenvectors", vectors[index].clone())


def _bring(name: str, spectra: Iterable[Spectrum]) -> None:
    far = [
        each
        for each in {spectrum.identity: spectrum for spectrum in spectra}.values()
        if each.home != _HOST
        and not each.knows(name, _HOST)
        and (not name.startswith("eigen") or each.knows(name))
    ]
    for members in _grouped(far, lambda each: each.home).values():
        parts = [getattr(each.at(None), name) for each in members]
        brought = torch.cat(parts).to(_HOST).split([len(part) for part in parts])
        for each, part in zip(members, brought, strict=True):
            each.learn(name, part, _HOST)


def _grouped(members: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for each in members:
        groups.setdefault(key(each), []).append(each)
    return groups
