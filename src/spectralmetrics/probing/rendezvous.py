"""Processes tell each other something through their store, in any order, and without waiting for ever.

Collectives would pair what two processes tell of different layers, or wait for one that never runs a layer.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from spectralmetrics.torch_private import default_store

PATIENCE = 15.0  # seconds for which a process may run a layer later than another
_LATER_PATIENCE = 1.0  # the same once one has not come

_ALL, _SOME = b"all", b"some"

_PROBES: Counter[tuple[str, ...]] = Counter()  # a subject and names of layers -> probes so far


def key_of_probe(subject: str, layers: Collection[str]) -> str:
    """A key for what a new probe tells in the store: alike on all processes, whatever others each of them has.

    Args:
        subject: of what is told.
        layers: names, the same on all these processes.
    """
    _PROBES[place := (subject, *sorted(layers))] += 1
    return f"spectralmetrics/{subject}/{zlib.crc32(repr(place[1:]).encode())}/{_PROBES[place]}"


class Told(NamedTuple):
    """The answers of processes.

    Attributes:
        of: rank -> numbers, the earliest first.
        is_all: whether all have told theirs in time, on which they agree.
    """

    of: dict[int, list[int]]
    is_all: bool

    def up_to(self, rank: int) -> list[tuple[int, list[int]]]:
        """The ranks and numbers up to those of a process, which come last."""
        ranks = list(self.of)
        return [(each, self.of[each]) for each in ranks[: ranks.index(rank) + 1]]


class Rendezvous:
    """Numbers that processes tell each other about layers.

    Args:
        layers: names, the same on all these processes.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self._patience = PATIENCE
        self._key = key_of_probe("told", layers)

    def ask(self, topic: str, numbers: Sequence[int], ranks: Sequence[int]) -> Told:
        """Tell this process' numbers to some processes, and hear theirs.

        Args:
            topic: that the numbers are about; told once.
            numbers: this process'.
            ranks: the processes, this one among them.

        Raises:
            RuntimeError, AttributeError: where there is no store.
        """
        store, key = default_store(), f"{self._key}/{topic}"
        keys = {rank: f"{key}/{rank}" for rank in ranks}
        decision = f"{key}/{','.join(map(str, ranks))}"
        turn = store.add(f"{key}/turn", 1)
        store.set(keys[dist.get_rank()], json.dumps([turn, *numbers]))
        if store.check([decision]) and store.get(decision) == _SOME:
            word = _SOME
        else:
            try:
                store.wait(list(keys.values()), timedelta(seconds=self._patience))
                word = _ALL
            except RuntimeError:  # as a timeout is one
                word = _SOME
            # The first to decide does so for all.
            word = store.compare_set(decision, "", word.decode())
        if word == _SOME:
            self._patience = _LATER_PATIENCE
        there = [rank for rank in ranks if word == _ALL or store.check([keys[rank]])]
        turns = sorted((*json.loads(store.get(keys[rank])), rank) for rank in there)
        return Told({rank: numbers for _, *numbers, rank in turns}, word == _ALL)
