"""The intakes and the cache of sums, shared by all metrics that share the sums."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.sums import Intake, Observations, SpectralSum, Sum
from spectralmetrics.sums.observations import detached

# A stream is found by the tensor that anchors its sums, and lives as long as this tensor. There is no other
# way: the metrics of a compute group share sums because torchmetrics sets the state tensors of one metric on
# the others, one by one and by reference. Only the tensor shows which metrics share.
_STREAMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def group_object(group: Any) -> Any:
    """The process group itself; None stands for the current default group."""
    return dist.group.WORLD if group is None else group


def stream_of(sums: Sequence[Sum]) -> Stream | None:
    """The stream of these sums; None while they have no width."""
    if not sums or not sums[0].num_features:
        return None
    return Stream.of(sums[0].anchor)


def spectrum_of(sums: Sequence[Sum]) -> Spectrum | None:
    """The spectrum of sums on the CPU, with all earlier readings; None if the first sum has no spectrum."""
    stream = stream_of(sums)
    if stream is None or not isinstance(sums[0], SpectralSum):
        return None
    return Spectrum(sums[0], others=sums[1:], cache=stream.cache, device=torch.device("cpu"))


class Stream:
    """The intakes of sums, and a cache of readings.

    It must not hold the sums themselves, or it would keep them alive for ever.

    Attributes:
        cache: readings since the last observation, such as decompositions, see
            :class:`~.functional.Spectrum`.
        noted: a note of a reader of the sums since then.
    """

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}
        self._merged: MutableMapping[Any, list[Sum]] | None = None
        self.noted: Any = None
        self._intakes: dict[type[Sum], Intake] = {}
        self._keeps_rows = True
        self._may_wait = False  # True if rows may wait in an intake

    @property
    def merged(self) -> MutableMapping[Any, list[Sum]]:
        """Process group -> sums of all processes, exchanged since the last observation; gone with the group."""
        if self._merged is None:
            self._merged = weakref.WeakKeyDictionary()
        return self._merged

    @staticmethod
    def of(anchor: Tensor) -> Stream:
        """The stream of the sums that a tensor anchors."""
        stream: Stream | None = _STREAMS.get(anchor)
        if stream is None:
            stream = _STREAMS[anchor] = Stream()
        return stream

    def begin(self, sums: Sequence[Sum], gram_dtype: torch.dtype | None, phase: float) -> None:
        """Prepare for the first observations of sums that have just been made."""
        self._intakes = {type(each): each.intake(gram_dtype) for each in sums}
        self._keeps_rows = any(intake.keeps_rows for intake in self._intakes.values())
        for intake in self._intakes.values():
            intake.phase = phase

    def add(
        self,
        sums: Sequence[Sum],
        observations: Observations,
        everything: Observations | None,
        batch: int,
        gram_dtype: torch.dtype | None,
        phase: float,
        home: torch.device | None,
    ) -> None:
        """Add observations to each sum; intakes of sums that were made elsewhere are prepared first.

        Args:
            sums: the sums of this stream.
            observations: observations that fit them.
            everything: observations for sums that take all rows; None: the same.
            batch: number of the batch.
            gram_dtype: dtype of products; None chooses by the device of the observations.
            phase: the phase of the intakes.
            home: the device of the sums, if the observations are on another device without float64.
        """
        if not self._intakes:
            self.begin(sums, gram_dtype, phase)
            for made in sums:
                self._intakes[type(made)].meet(made)
        self._may_wait = True
        if self._keeps_rows:
            observations = detached(observations)
        for each in sums:
            intake, chosen = self._intakes[type(each)], observations
            if everything is not None:
                chosen = everything if each.takes_all_rows else observations
                if chosen.values.numel() == 0:  # none was drawn
                    continue
            if home is not None and not intake.reaches_other_devices:
                chosen = chosen.to(home)
            intake.add(each, chosen, batch)
        self.forget()

    def flush(self, sums: Sequence[Sum]) -> None:
        """Add the rows that wait."""
        if not self._may_wait:
            return
        for each in sums:
            intake = self._intakes.get(type(each))
            if intake is not None and intake.flush(each):
                self.forget()
        self._may_wait = False

    def forget(self) -> None:
        """Forget all readings: there are more observations now."""
        if self.cache:
            self.cache = {}
        self._merged = self.noted = None
