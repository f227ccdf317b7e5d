"""One pass over rows on a GPU in place of ten, by kernels in Triton, which comes with CUDA builds of PyTorch.

Elsewhere PyTorch does the same, see :mod:`~spectralmetrics.sums.measuring` and
:mod:`~spectralmetrics.sums.accelerated`: one kernel for each operation, which reads the previous one's result.
Set ``SPECTRALMETRICS_COMPILED=0`` in the environment to use PyTorch alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums.library import is_switched_off
from spectralmetrics.sums.observations import as_maps

# Values in a program's tile, and the number of programs that keep a GPU busy.
_TILE = 1024
_PROGRAMS = 1024


class Judged(NamedTuple):
    """The observations that count.

    Attributes:
        maps: the values, (samples, features, positions).
        kept: flags of the observations that count, shape (samples * positions,), int8.
        counts: numbers of observations counted and left out by each program, shape (programs, 2), int64.
    """

    maps: Tensor
    kept: Tensor
    counts: Tensor


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why the kernels cannot be used on a device; None if they can.

    >>> why_not(torch.device("cpu"))
    'they are for GPUs'
    """
    if device.type != "cuda":
        return "they are for GPUs"
    if is_switched_off():
        return "SPECTRALMETRICS_COMPILED=0 is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        row = torch.ones(2, 3, device=device)
        row[0, 0] = torch.nan
        counts, totals = measure(as_maps(row, 1), None, torch.zeros(3, dtype=torch.float64, device=device))
        if counts.tolist() != [1, 1] or totals.sum().item() != 15.0:
            return f"a trial gave {totals.tolist()}"
    except Exception as error:  # from a compiler, a driver or another version
        return f"a trial ended with {type(error).__name__}: {error}"
    return None


def describe(device: torch.device) -> str:
    """The implementation of the sums on a device, in words.

    >>> describe(torch.device("cpu"))
    'by PyTorch: they are for GPUs'
    """
    reason = why_not(device)
    return "kernels in Triton" if reason is None else f"by PyTorch: {reason}"


def takes(values: Tensor) -> bool:
    """True if the kernels can read these values where they are."""
    return (
        values.device.type == "cuda"
        and type(values) in (Tensor, torch.nn.Parameter)
        and values.layout == torch.strided
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and not values.is_neg()
        and values.numel() > 0
        and why_not(values.device) is None
    )


def cut(maps: Tensor, valid: Tensor | None, limit: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut maps into pieces of at most about ``limit`` observations, each with its part of ``valid``.

    Args:
        maps: shape (samples, features, positions).
        valid: shape (samples * positions,), boolean; None if all count.
        limit: number of observations, at least 1.
    """
    done = 0
    for samples in maps.split(max(limit // maps.shape[2], 1)):
        for piece in samples.split(limit, 2) if samples.shape[2] > limit else (samples,):
            number = piece.shape[0] * piece.shape[2]
            yield piece, None if valid is None else valid[done : done + number]
            done += number


def judge(maps: Tensor, valid: Tensor | None) -> Judged:
    """Find the observations that count.

    Args:
        maps: shape (samples, features, positions), in any memory layout.
        valid: shape (samples * positions,), boolean; None if all count.
    """
    from spectralmetrics.sums import kernels

    samples, features, positions = maps.shape
    rows, width = _tile(maps)
    rows, width = max(rows // 2, 1), 2 * width
    chunks = -(-positions // rows)
    kept = torch.empty(samples * positions, dtype=torch.int8, device=maps.device)
    counts = torch.empty(samples * chunks, 2, dtype=torch.int64, device=maps.device)
    flags = kept if valid is None else valid.to(maps.device).contiguous().view(torch.uint8)
    with _on(maps.device):
        kernels.judge[(samples * chunks,)](
            maps, flags, kept, counts, features, positions, chunks, *maps.stride(),
            valid is not None, rows, width,
        )  # fmt: skip
    return Judged(maps, kept, counts)


def measure(maps: Tensor, valid: Tensor | None, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each feature of observations on its own, like :func:`.compiled.measure`.

    Args:
        maps: shape (samples, features, positions), in any memory layout.
        valid: shape (samples * positions,), boolean; None if all count.
        origin: shape (features,), float64, on the same device.
    """
    from spectralmetrics.sums import kernels

    judged = judge(maps, valid)
    grid, parts, sizes = _cut(maps, 5)
    with _on(maps.device):
        kernels.measure[grid](maps, judged.kept, origin.contiguous(), parts, *sizes)
        return _finished(parts, judged.counts, 4, has_largest=True)


def centre(judged: Judged, shift: Tensor, scale: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write rows ``scale · x + shift``, and zeros for rows left out.

    Args:
        judged: the observations.
        shift: shape (features,), of the dtype of ``out``.
        scale: shape (), likewise.
        out: shape (samples * positions, features), float32 or float64, contiguous.

    Returns:
        The numbers of rows counted and left out, shape (2,), int64, and the sum of the rows, shape (features,),
        float64.
    """
    from spectralmetrics.sums import kernels

    maps = judged.maps
    grid, parts, sizes = _cut(maps, 1)
    with _on(maps.device):
        kernels.centre[grid](maps, judged.kept, shift, scale, out, parts, *sizes)
        counts, sums = _finished(parts, judged.counts, 1, has_largest=False)
    return counts, sums[0]


def write_forward(
    counts: Tensor,
    totals: Tensor,
    largest: Tensor,
    origin: Tensor,
    row: Tensor,
    numbers: tuple[int, int] | None,
) -> None:
    """Write a forward's row of a history.

    Args:
        counts: the counts of the marginals, shape (2,), int64.
        totals: shape (4, D), contiguous.
        largest: shape (D,).
        origin: shape (D,).
        row: a row of the ring, shape (8,).
        numbers: numbers of the forward and the optimiser's step; None adds more of the row's forward.
    """
    from spectralmetrics.sums import kernels

    forward, step = numbers or (0, 0)
    with _on(row.device):
        kernels.write_forward[(1,)](
            totals, largest, counts, origin, row, len(largest), forward, step, numbers is None, 1024
        )


def _finished(parts: Tensor, counts: Tensor, sums: int, has_largest: bool) -> tuple[Tensor, Tensor]:
    from spectralmetrics.sums import kernels

    programs, rows, features = parts.shape
    out = torch.empty(rows, features, dtype=torch.float64, device=parts.device)
    number = torch.empty(2, dtype=torch.int64, device=parts.device)
    width = 32
    kernels.finish[(-(-features // width), rows)](
        parts, counts, out, number, features, programs, len(counts), sums, has_largest, width, 32
    )
    return number, out


def _tile(maps: Tensor) -> tuple[int, int]:
    """The numbers of rows and features of a program's tile: larger along the contiguous dimension."""
    _, features, positions = maps.shape
    if maps.stride(1) == 1 or positions == 1:
        width = min(64, _power_of_two(features))
        return _TILE // width, width
    rows = min(128, _power_of_two(positions))
    return rows, _TILE // rows


def _cut(maps: Tensor, sums: int) -> tuple[tuple[int, int], Tensor, tuple[int, ...]]:
    """The grid of programs that share maps, memory for each program's sums, and the arguments of a kernel."""
    samples, features, positions = maps.shape
    rows, width = _tile(maps)
    blocks = -(-features // width)
    wanted = max(_PROGRAMS // (samples * blocks), 1)
    chunk = math.ceil(positions / wanted / rows) * rows
    chunks = math.ceil(positions / chunk)
    programs = samples * chunks
    parts = torch.empty(programs, sums, features, dtype=torch.float64, device=maps.device)
    return (programs, blocks), parts, (features, positions, chunks, chunk, *maps.stride(), rows, width)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make a device current inside: Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        yield
        return
    with torch.cuda.device(device):
        yield
