"""The spectra of many layers at once: a batch for each width, and one reading for each device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.sums import eigenvalues, eigenvectors

Progress = Callable[[int, int], None]
"""Called with the number of spectra that have been decomposed, and of all that will be."""

_HOST = torch.device("cpu")
# Memory for the matrices of a batch. LAPACK takes one after the other: what a batch saves are calls, up to 96
# features a tenth to a half of the time, and what it costs is memory that leaves the cache, a tenth at 256.
_BATCH_BYTES = 2**18
_ACCELERATOR_BATCH_BYTES = 2**28

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Wanted(NamedTuple):
    """A spectrum and what will be read of it."""

    spectrum: Spectrum
    part: Literal["mean", "variances", "magnitudes", "largest", "zero_shares", "eigenvalues", "eigenvectors"]


def decompose_together(wanted: Iterable[Wanted], progress: Progress | None = None) -> None:
    """Read several spectra; what is small is brought to the memory of the CPU.

    How often a device is read depends on the number of different widths there, and not on that of the spectra.

    Args:
        wanted: what to read; spectra may share their caches.
        progress: told after each batch. An exception raised there ends the work; what has been decomposed is
            kept.
    """
    wanted = list(wanted)
    vectors = {each.spectrum.identity: each.spectrum for each in wanted if each.part == "eigenvectors"}
    values = {each.spectrum.identity: each.spectrum for each in wanted if each.part == "eigenvalues"}
    plain = [each for identity, each in values.items() if identity not in vectors]
    todo = [(each, True) for each in vectors.values() if not each.knows("eigenvectors")]
    todo += [(each, False) for each in plain if not each.knows("eigenvalues")]
    done = 0
    for batch, with_vectors in _batches(todo):
        with contextlib.suppress(ValueError, RuntimeError):  # to be said by whoever reads the one that fails
            _decompose(batch, with_vectors)
        done += len(batch)
        if progress is not None:
            progress(done, len(todo))
    _bring("eigenvalues", [*vectors.values(), *values.values()])
    for part in ("mean", "variances", "magnitudes", "largest", "zero_shares"):
        _bring(part, [each.spectrum for each in wanted if each.part == part])


def read_together(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The integers in these tensors, with one reading for each device that they are on."""
    found: dict[int, list[int]] = {}
    for places in _grouped(range(len(tensors)), lambda place: tensors[place].device).values():
        numbers = iter(torch.cat([tensors[place].reshape(-1) for place in places]).cpu().tolist())
        for place in places:
            found[place] = [next(numbers) for _ in range(tensors[place].numel())]
    return [found[place] for place in range(len(tensors))]


def _batches(todo: Iterable[tuple[Spectrum, bool]]) -> Iterator[tuple[list[Spectrum], bool]]:
    groups = _grouped(todo, lambda each: (each[0].home, each[0].num_features, each[1]))
    for (device, width, with_vectors), members in groups.items():
        room = _BATCH_BYTES if device.type == "cpu" else _ACCELERATOR_BATCH_BYTES
        size = max(room // (8 * width**2), 1)
        for start in range(0, len(members), size):
            yield [spectrum for spectrum, _ in members[start : start + size]], with_vectors


def _decompose(spectra: Sequence[Spectrum], with_vectors: bool) -> None:
    matrices = (
        [] if len(spectra) == 1 else [matrix for each in spectra if (matrix := each.matrix()) is not None]
    )
    if len(matrices) < len(spectra):  # one by one: of some sums there is no matrix
        for each in spectra:
            here = each.at(None)
            _ = here.eigenvectors if with_vectors else here.eigenvalues
        return
    stacked = torch.stack(matrices)
    found, directions = eigenvectors(stacked) if with_vectors else (eigenvalues(stacked), None)
    for place, each in enumerate(spectra):
        # Copies: a view would keep the whole batch alive as long as one layer is not updated.
        each.learn("eigenvalues", found[place].clone())
        if directions is not None:
            each.learn("eigenvectors", directions[place].clone())


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
