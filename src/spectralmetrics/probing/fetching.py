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
_ENOUGH = -1  # in the place of the number of a batch


class MergedSums(Mapping[Place, Sequence[Sum]]):
    """The merged sums of layers, which a group's first process asks the others for, some layers at a time.

    It reads them as a mapping, and holds those that it has asked for last. Meanwhile all others are in
    :meth:`serve`.

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
            self._held = {}  # to have room for the next
            number = self._numbers[place]
            with uninterrupted():
                self._tell(number)
                self._held = self._agreement.fetch(self._batches[number], _READER)
        return self._held[place]

    def serve(self) -> None:
        """Send what the reader asks for, until it says that it has read enough, which it does here.

        Raises:
            BaseException: what this process has raised meanwhile, or a RuntimeError for what another has.
        """
        error: BaseException | None = None
        while not self._is_over:
            number = self._tell(_ENOUGH, error)
            if number == _ENOUGH:
                return
            try:
                self._agreement.fetch(self._batches[number], _READER)
                with interruptible():
                    pass  # an interrupt that has come is raised, and told before the next batch
            except BaseException as raised:
                error = raised

    def close(self) -> None:
        """Hold nothing any more."""
        self._is_over = True
        self._held = {}

    def _tell(self, number: int, error: BaseException | None = None) -> int:
        """The number of the batch that the reader asks for, on all processes."""
        group = self._agreement.group
        flags = torch.tensor([number, error is not None], dtype=torch.int64, device=communication_device(group))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        number, has_failed = flags.tolist()
        if has_failed:
            self.close()
            gather_agreed(None, error, group)
        return number
