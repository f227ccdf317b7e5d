"""The accumulation of :mod:`~spectralmetrics.sums.accumulate` compiled for x86-64.

Installing the package compiles ``csrc/`` if there is a C++ compiler, on Linux on x86-64; the library then
sums observations in the memory of the CPU, on processors with AVX2 or AVX-512. PyTorch does everything else,
with the same results up to rounding. Set ``SPECTRALMETRICS_COMPILED=0`` in the environment to use PyTorch
alone. :func:`describe` says which of the two is in use, and why.

>>> from spectralmetrics.functional import compiled
>>> compiled.instruction_set() in (None, "avx2", "avx512")
True
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spectralmetrics.sums.about_origin import DenseSums
from spectralmetrics.sums.arithmetic import workspace
from spectralmetrics.sums.library import find, is_switched_off

InstructionSet = Literal["avx2", "avx512"]
_NAMES: dict[InstructionSet, str] = {"avx2": "AVX2", "avx512": "AVX-512"}

# With fewer multiplications, waking another thread takes longer than it saves.
_LEAST_WORK_TO_SHARE = 2**20
# The fewest values for each thread that measures marginals, for the same reason.
_LEAST_VALUES_OF_A_THREAD = 2**16
_MOST_SLOTS = 48
_OF_NO_SUBCLASS = (Tensor, torch.nn.Parameter)


class _Job(ctypes.Structure):
    """Mirrors ``Job`` in csrc/accumulate.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "valid", "origin", "first", "second")),
        *((name, ctypes.c_void_p) for name in ("count", "non_finite", "workspace")),
        *((name, ctypes.c_int64) for name in ("samples", "positions", "features")),
        *((name, ctypes.c_int64) for name in ("sample_stride", "position_stride", "feature_stride")),
        *((name, ctypes.c_int32) for name in ("values_are_double", "products_are_float")),
        *((name, ctypes.c_int32) for name in ("threads", "instructions")),
    )


class _MarginalsJob(ctypes.Structure):
    """Mirrors ``MarginalsJob`` in csrc/accumulate.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "valid", "origin", "totals", "counts", "workspace")),
        *((name, ctypes.c_int64) for name in ("samples", "positions", "features")),
        *((name, ctypes.c_int64) for name in ("sample_stride", "position_stride", "feature_stride")),
        *((name, ctypes.c_int32) for name in ("values_are_double", "slots", "instructions")),
    )


def _library() -> ctypes.CDLL:
    library = find().library
    assert library is not None
    return library


@functools.cache
def _parallel() -> ctypes.c_void_p | None:
    """OpenMP's function that runs another one on several threads, the same threads that PyTorch uses."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        return None


@functools.cache
def _best_instructions() -> int:
    library = None if is_switched_off() else find().library
    return 0 if library is None else int(library.best_instructions())


_allowed = len(get_args(InstructionSet))


def instruction_set() -> InstructionSet | None:
    """The instructions that the compiled sums use on this machine; None where PyTorch does all.

    >>> with using(None):
    ...     print(instruction_set())
    None
    """
    sets: tuple[InstructionSet, ...] = get_args(InstructionSet)
    best = min(_best_instructions(), _allowed)
    return sets[best - 1] if best else None


def describe() -> str:
    """Say which code sums up observations in the memory of the CPU, and why.

    >>> with using(None):
    ...     print(describe())
    by PyTorch: `using(None)`
    """
    instructions = instruction_set()
    if instructions is not None:
        return f"compiled with {_NAMES[instructions]}"
    if not _allowed:
        why = "`using(None)`"
    elif is_switched_off():
        why = "SPECTRALMETRICS_COMPILED=0 is in the environment"
    else:
        why = find().why or "the processor has no AVX2 with FMA"
    return f"by PyTorch: {why}"


def fault() -> str:
    """Say what is wrong with the library that the install has made; empty if nothing is."""
    return describe() if not is_switched_off() and find().is_broken else ""


@contextlib.contextmanager
def using(instructions: InstructionSet | None) -> Iterator[None]:
    """Use at most these instructions inside; None leaves all work to PyTorch. For comparisons.

    Args:
        instructions: ``"avx512"``, ``"avx2"`` or None.
    """
    global _allowed
    before = _allowed
    _allowed = 0 if instructions is None else get_args(InstructionSet).index(instructions) + 1
    try:
        yield
    finally:
        _allowed = before


def takes(moments: DenseSums, values: Tensor, gram_dtype: torch.dtype) -> bool:
    """True if :func:`add` can be used for these values; they may have to be cast to float32 first.

    Args:
        moments: the sums so far.
        values: observations of any shape.
        gram_dtype: dtype of the products.
    """
    return (
        reads(values)
        # PyTorch scales float64 rows before it rounds them to float32; the library cannot.
        and not (values.dtype == torch.float64 and gram_dtype == torch.float32)
        and _are_as_made(moments)
    )


def is_there() -> bool:
    """True if a library was found and may be used."""
    return bool(_allowed and _best_instructions())


def reads(values: Tensor) -> bool:
    """True if the library can read these values where they are.

    Args:
        values: observations of any shape; half precision has to be cast to float32 first.
    """
    return is_there() and is_in_memory(values)


def is_in_memory(values: Tensor) -> bool:
    """True if values are in the memory of the CPU, at their address and strides."""
    return (
        # A subclass may hold its data elsewhere or not at all.
        type(values) in _OF_NO_SUBCLASS
        and values.is_cpu
        and values.layout == torch.strided
        and not values.is_neg()
        and not values._is_zerotensor()
    )


def _are_as_made(moments: DenseSums) -> bool:
    """True if the sums are as ``empty_moments`` makes them: the library writes to their memory unchecked."""
    width = moments.second.shape[-1]
    expected = (
        (moments.second, torch.float64, (width, width)),
        (moments.first, torch.float64, (width,)),
        (moments.origin, torch.float64, (width,)),
        (moments.count, torch.int64, ()),
        (moments.non_finite, torch.int64, ()),
    )
    return all(
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        for tensor, dtype, shape in expected
    )


def add(moments: DenseSums, values: Tensor, valid: Tensor | None, gram_dtype: torch.dtype) -> None:
    """Add observations to ``moments``, in place and about their origin.

    Args:
        moments: the sums so far.
        values: shape (samples, features, positions), float32 or float64, in any memory layout.
        valid: shape (samples * positions,), boolean, False for observations to skip; None if all count.
        gram_dtype: dtype of the products; not float32 for values in float64.
    """
    library = _library()
    valid = None if valid is None else valid.to("cpu", torch.bool).contiguous()
    job = _Job(
        **_layout(values, valid),
        origin=moments.origin.data_ptr(),
        first=moments.first.data_ptr(),
        second=moments.second.data_ptr(),
        count=moments.count.data_ptr(),
        non_finite=moments.non_finite.data_ptr(),
        products_are_float=gram_dtype == torch.float32,
        threads=torch.get_num_threads() if values.numel() * values.shape[1] > _LEAST_WORK_TO_SHARE else 1,
        instructions=min(_best_instructions(), _allowed),
    )
    memory = workspace(values, "panels", (library.workspace_bytes(ctypes.byref(job)),), torch.uint8)
    job.workspace = memory.data_ptr()
    library.accumulate(ctypes.byref(job), _parallel())


def _layout(values: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """The fields by which both jobs find observations in memory."""
    samples, features, positions = values.shape
    sample_stride, feature_stride, position_stride = values.stride()
    return {
        "values": values.data_ptr(),
        "valid": None if valid is None else valid.data_ptr(),
        "samples": samples,
        "positions": positions,
        "features": features,
        "sample_stride": sample_stride,
        "position_stride": position_stride,
        "feature_stride": feature_stride,
        "values_are_double": values.dtype == torch.float64,
    }


def measure(values: Tensor, valid: Tensor | None, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each feature of observations on its own.

    Args:
        values: shape (samples, features, positions), float32 or float64, in any memory layout.
        valid: shape (samples * positions,), boolean, False for observations to skip; None if all count.
        origin: shape (features,), float64.

    Returns:
        The numbers of observations counted, and left out for a NaN or an infinity, shape (2,), int64; and
        shape (5, features), float64: the sums of x - origin, of its squares, of abs(x) and of x != 0, and the
        largest abs(x).
    """
    library = _library()
    valid = None if valid is None else valid.to("cpu", torch.bool).contiguous()
    origin = origin.contiguous()
    samples, features, positions = values.shape
    slots = min(torch.get_num_threads(), values.numel() // _LEAST_VALUES_OF_A_THREAD, samples * positions)
    slots = max(min(slots, _MOST_SLOTS), 1)
    counts = torch.zeros(2, dtype=torch.int64, device="cpu")
    # The sums come first; the rest is memory of the threads.
    memory = torch.empty(1 + 2 * slots, 5, features, dtype=torch.float64, device="cpu")
    address = memory.data_ptr()
    job = _MarginalsJob(
        **_layout(values, valid),
        origin=origin.data_ptr(),
        totals=address,
        counts=counts.data_ptr(),
        workspace=address + 40 * features,
        slots=slots,
        instructions=min(_best_instructions(), _allowed),
    )
    library.measure(ctypes.byref(job), _parallel())
    return counts, memory[0]


def draw_places(total: int, number: int, seed: int, turn: int) -> Tensor:
    """The positions that :func:`~spectralmetrics.probing.sampling.draw` draws, shape (number,), int64.

    Args:
        total: the number of observations.
        number: number of observations to draw, at most ``total``.
        seed: the seed of ``torch.rand``.
        turn: position where the ring begins, below ``total``.
    """
    library = _library()
    places = torch.empty(number, dtype=torch.int64, device="cpu")
    library.draw_places(seed & 0xFFFFFFFF, total, number, turn, places.data_ptr())
    return places


def draw_rows(rows: Tensor, number: int, seed: int, turn: int) -> Tensor:
    """Copy the rows at :func:`draw_places` from a contiguous matrix that :func:`reads` accepts."""
    library = _library()
    total, width = rows.shape
    drawn = rows.new_empty((number, width))
    size = width * rows.element_size()
    library.draw_rows(seed & 0xFFFFFFFF, total, number, turn, rows.data_ptr(), size, drawn.data_ptr())
    return drawn
