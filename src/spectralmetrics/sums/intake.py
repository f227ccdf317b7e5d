"""Intakes of batches: small batches wait for a larger product, and the origin follows the data."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectralmetrics.sums import accelerated
from spectralmetrics.sums.accelerated import Centring
from spectralmetrics.sums.accumulate import accumulate
from spectralmetrics.sums.compiled import DenseSums, is_in_memory
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.precision import has_fast_float64
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
    waiting_bytes: ClassVar[int | None] = None
    """The most bytes of waiting rows; None: no limit."""

    def __init__(self, gram_dtype: torch.dtype | None) -> None:
        self._gram_dtype = gram_dtype
        self._origin_is_near = False  # known to lie near the data
        self._origin_is_float32 = False  # known to be exact in float32
        self._accumulations = 0
        self._centring: Centring | None = None  # on an accelerator, while the origin stays
        self._buffer: Tensor | None = None  # (WAITING_ROWS, D), or as many as there is memory for
        self._buffer_is_float64 = False
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
        values = observations.values
        dtype, dim = values.dtype, observations.feature_dim
        width = values.shape[dim]
        count = values.numel() // width
        room, buffer = WAITING_ROWS, self._buffer
        if self.waiting_bytes is not None:
            room = min(self.waiting_bytes // (8 * width), room)
        few = (count <= 256 or count <= min(width, WAITING_ROWS // 2)) and count <= room
        if not few or observations.valid is not None or not self._accumulations:
            return False
        if buffer is None:
            # Half precision is exact in float32.
            kept = dtype if dtype == torch.float64 else torch.float32
            buffer = self._buffer = torch.empty((room, width), dtype=kept, device=values.device)
            self._buffer_is_float64, self._buffer_device = dtype == torch.float64, values.device
        elif (dtype == torch.float64) != self._buffer_is_float64 or self._buffer_device != values.device:
            return False
        # Buffers that were emptied together would all be full again in the same step of a training.
        limit = room - int(self.phase * room * _WAITING_RANGE) if self._is_in_step else room
        if self.waiting + count > limit:
            self.flush(sums)
            self._is_in_step = False
        start, size = self.waiting, values.nbytes
        self.waiting += count
        is_copied = size <= _FEW_BYTES and dtype == buffer.dtype and dim == -1
        if is_copied and is_in_memory(values) and values.is_contiguous():
            ctypes.memmove(buffer.data_ptr() + start * width * values.itemsize, values.data_ptr(), size)
            return True
        moved = values.movedim(dim, -1)
        buffer[start : self.waiting].view(moved.shape).copy_(moved)
        return True

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
