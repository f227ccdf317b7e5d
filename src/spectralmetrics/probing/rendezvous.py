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

_ASKED: Counter[tuple[str, ...]] = Counter()  # names of layers -> how many have asked about them so far
_ALL, _SOME = b"all", b"some"


class Told(NamedTuple):
    """The answers of processes.

    Attributes:
        of: rank -> numbers.
        is_all: whether all have told theirs in time, on which they agree.
    """

    of: dict[int, list[int]]
    is_all: bool


class Rendezvous:
    """Numbers that processes tell each other about layers.

    Args:
        names: the layers, the same on all these processes, whatever other probes each of them has.
    """

    def __init__(self, names: Collection[str]) -> None:
        _ASKED[every := tuple(sorted(names))] += 1
        self._patience = PATIENCE
        self._key = f"spectralmetrics/told/{zlib.crc32(repr(every).encode())}/{_ASKED[every]}"

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
        store.set(keys[dist.get_rank()], json.dumps(list(numbers)))
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
        return Told({rank: json.loads(store.get(keys[rank])) for rank in there}, word == _ALL)
