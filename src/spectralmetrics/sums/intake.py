"""Intakes of batches: small batches wait for a larger product, and the origin follows the data."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectralmetrics.sums import accelerated
from spectralmetrics.sums.about_origin import DenseSums
from spectralmetrics.sums.accelerated import Centring
from spectralmetrics.sums.accumulate import accumulate
from spectralmetrics.sums.arithmetic import has_fast_float64
from spectralmetrics.sums.compiled import is_in_memory
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.sum import Intake

WAITING_ROWS = 2048
"""Rows of the buffer of small batches: a product of each is not worth its pass over the D x D sum."""
_FEW_BYTES = 2**16  # up to so many are copied without PyTorch, whose call takes a few microseconds
_WAITING_RANGE = 7 / 8  # the first flush may come earlier by up to this share of the buffer


class DenseIntake(Intake):
    """Adds batches to dense moments.

    Args:
        gram_dtype: dtype of the products; None: see :func:`products_dtype`.
    """

    reaches_other_devices = True
    keeps_rows = False
    waiting_bytes: ClassVar[int | None] = None
    """The most bytes of waiting rows; None: no limit."""

    def __init__(self, gram_dtype: torch.dtype | None) -> None:
        self._gram_dtype = gram_dtype
        self._origin_is_near = False  # known to lie near the data
        self._origin_is_float32 = False  # known to be exact in float32
        self._accumulations = 0
        self._centring: Centring | None = None  # on an accelerator, while the origin stays
        self._width = 0  # of the rows; 0 while it is unknown
        self._room = WAITING_ROWS  # of the buffer
        self._most = 0  # rows of a batch that waits
        self._buffer: Tensor | None = None  # (room, D)
        self._buffer_dtype = torch.float32
        self._buffer_device: torch.device | None = None
        self._is_in_step = True  # fills at the same time as the buffers of other streams: all begin empty
        self.waiting = 0

    def add(self, sums: DenseSums, observations: Observations, batch: int) -> None:
        """See :class:`.Intake`."""
        if not self._wait(sums, observations):
            self._accumulate(sums, observations)
            if self._accumulations == 1:
                self.meet(sums)

    def flush(self, sums: DenseSums) -> bool:
        """See :class:`.Intake`."""
        if not self.waiting:
            return False
        assert self._buffer is not None
        rows, self.waiting = self._buffer[: self.waiting], 0
        self._is_in_step = True
        self._accumulate(sums, Observations(rows))
        return True

    def meet(self, sums: DenseSums) -> None:
        """Read whether the origin lies near the data: then updates need not move it."""
        self._accumulations = max(self._accumulations, 1)
        self._origin_is_near = int(sums.count) > 0
        exact = sums.origin.to(torch.float32).to(torch.float64) == sums.origin
        self._origin_is_float32 = self._origin_is_near and bool(exact.all())

    def _wait(self, sums: DenseSums, observations: Observations) -> bool:
        """Put a small batch into the buffer; False if the batch has to be added at once."""
        if observations.valid is not None or not self._accumulations:
            return False
        values, dim = observations.values, observations.feature_dim
        if not self._width:
            self._make_room(values.shape[dim])
        count = values.numel() // self._width
        if count > self._most:
            return False
        is_as_kept = values.dtype == self._buffer_dtype
        buffer = self._buffer
        if buffer is None:
            buffer = self._make_buffer(values)
        elif values.device != self._buffer_device or not (
            is_as_kept or torch.float64 not in (values.dtype, self._buffer_dtype)
        ):
            return False
        start, stop = self.waiting, self.waiting + count
        # Buffers that were emptied together would all be full again in the same step of a training.
        limit = self._room - int(self.phase * self._room * _WAITING_RANGE) if self._is_in_step else self._room
        if stop > limit:
            self.flush(sums)
            self._is_in_step = False
            start, stop = 0, count
        self.waiting = stop
        size = values.nbytes
        if is_as_kept and dim == -1 and size <= _FEW_BYTES and is_in_memory(values) and values.is_contiguous():
            ctypes.memmove(buffer.data_ptr() + start * (size // count), values.data_ptr(), size)
            return True
        moved = values.movedim(dim, -1)
        buffer[start:stop].view(moved.shape).copy_(moved)
        return True

    def _make_room(self, width: int) -> None:
        """Decide, for rows of a width, how many there is memory for, and how many of one batch may wait."""
        self._width = width
        if self.waiting_bytes is not None:
            self._room = min(self.waiting_bytes // (8 * width), WAITING_ROWS)
        self._most = min(max(256, min(width, WAITING_ROWS // 2)), self._room)

    def _make_buffer(self, values: Tensor) -> Tensor:
        # Half precision is exact in float32.
        self._buffer_dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        self._buffer_device = values.device
        self._buffer = torch.empty((self._room, self._width), dtype=self._buffer_dtype, device=values.device)
        return self._buffer

    def _accumulate(self, sums: Any, observations: Observations) -> None:
        device, is_float64 = observations.values.device, observations.values.dtype == torch.float64
        gram_dtype = self._gram_dtype or products_dtype(device)
        milestone = self._reaches_milestone()
        rounded = gram_dtype == torch.float32 and not is_float64
        recentre = milestone or not self._origin_is_near or (rounded and not self._origin_is_float32)
        # float64 products are made on the device of the sums.
        on_device = rounded or (gram_dtype == torch.float64 and sums.second.device == device)
        if on_device and not recentre and device.type != "cpu":
            if self._centring is None or not self._centring.serves(device, gram_dtype):
                self._centring = accelerated.centring(sums, device, gram_dtype)
            accelerated.add(sums, observations, self._centring)
            return
        accumulate(sums, observations.to(sums.second.device), gram_dtype, recentre=recentre)
        if recentre:
            self._centring = None
            self._origin_is_float32 = self._origin_is_float32 and not is_float64

    def _reaches_milestone(self) -> bool:
        """Count an accumulation; True if it should move the origin to the data."""
        # The first rows may be unlike the rest, and features drift in training. Milestones become ever rarer.
        self._accumulations += 1
        return self._accumulations <= 4 or self._accumulations.bit_count() == 1


def products_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of products of rows on a device.

    float64 on the CPU and on devices that multiply float64 as fast as float32: it is right to the last digits,
    and on an H100 even faster than float32 products whose sums are kept short. float32 on other accelerators,
    which have little or no arithmetic in float64 (consumer GPUs: 1/64 of the speed in float32). The sums are
    float64 all the same.

    >>> products_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float64 if device.type == "cpu" or has_fast_float64(device) else torch.float32
