"""Merged sums that the first process of a group fetches from the others when it reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from spectralmetrics.probing.exchange import Agreement, Place
from spectralmetrics.probing.processes import gather_agreed, interruptible, uninterrupted
from spectralmetrics.sums import Sum
from spectralmetrics.sums.merging import communication_device

_READER = 0  # the rank in the group
_ENOUGH = -1  # stands for the number of a batch: none is needed any more


class MergedSums(Mapping[Place, Sequence[Sum]]):
    """The merged sums of layers, which a group's first process fetches from the others, some layers at a time.

    The reader uses them as a mapping, and holds only the batch that it fetched last. Meanwhile all other
    processes are in :meth:`serve`.

    Args:
        agreement: the agreement of the processes.
        places: the layers, in the order of the mapping.
    """

    def __init__(self, agreement: Agreement, places: Collection[Place]) -> None:
        self._agreement = agreement
        self._places = dict.fromkeys(places)
        self._batches = agreement.batches(in_order=True)
        self._numbers = {place: number for number, batch in enumerate(self._batches) for place in batch}
        self._held: dict[Place, list[Sum]] = {}
        self._is_over = False

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __contains__(self, place: object) -> bool:
        return place in self._places

    def __getitem__(self, place: Place) -> list[Sum]:
        if place not in self._places:
            raise KeyError(place)
        if place in self._agreement.own:
            return self._agreement.places[place].sums()
        if self._is_over:
            raise RuntimeError(
                f"expected the sums of layer {place[1]!r} to be read before `write` returns: on several"
                " processes they are fetched from the others"
            )
        if place not in self._held:
            self._held = {}  # makes room for the next batch
            number = self._numbers[place]
            with uninterrupted():
                self._share(number)
                self._held = self._agreement.fetch(self._batches[number], _READER)
        return self._held[place]

    def serve(self) -> None:
        """Send the batches that the reader fetches; the reader's own call ends this on all processes.

        Raises:
            BaseException: an exception on this process meanwhile, or a RuntimeError for one on another process.
        """
        error: BaseException | None = None
        while not self._is_over:
            number = self._share(_ENOUGH, error)
            if number == _ENOUGH:
                return
            try:
                self._agreement.fetch(self._batches[number], _READER)
                with interruptible():
                    pass  # raises a pending interrupt, which is sent before the next batch
            except BaseException as raised:
                error = raised

    def close(self) -> None:
        """Drop the sums that are held, and fetch no more."""
        self._is_over = True
        self._held = {}

    def _share(self, number: int, error: BaseException | None = None) -> int:
        """The number of the batch that the reader needs, on all processes."""
        group = self._agreement.group
        flags = torch.tensor([number, error is not None], dtype=torch.int64, device=communication_device(group))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        number, has_failed = flags.tolist()
        if has_failed:
            self.close()
            gather_agreed(None, error, group)
        return number
