"""Exchange between processes through their store, in any order, and with a limit to each wait.

Collectives would pair numbers of different layers, or wait for a process that never runs a layer.
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
_LATER_PATIENCE = 1.0  # the same after one process has not come

_ALL, _SOME = b"all", b"some"

_PROBES: Counter[tuple[str, ...]] = Counter()  # a subject and names of layers -> probes so far


def key_of_probe(subject: str, layers: Collection[str]) -> str:
    """A key in the store for a new probe: the same on all processes, whatever other probes they have.

    Args:
        subject: name of the subject that is exchanged.
        layers: names of the layers, the same on all these processes.
    """
    _PROBES[kind := (subject, *sorted(layers))] += 1
    return f"spectralmetrics/{subject}/{zlib.crc32(repr(kind[1:]).encode())}/{_PROBES[kind]}"


class Gathered(NamedTuple):
    """The numbers of several processes.

    Attributes:
        by_rank: rank -> numbers, the earliest first.
        is_all: True if all processes sent theirs in time; the same on all of them.
    """

    by_rank: dict[int, list[int]]
    is_all: bool

    def up_to(self, rank: int) -> list[tuple[int, list[int]]]:
        """Ranks and numbers, up to and including a process."""
        ranks = list(self.by_rank)
        return [(each, self.by_rank[each]) for each in ranks[: ranks.index(rank) + 1]]


class Rendezvous:
    """Exchanges numbers about layers between processes.

    Args:
        layers: names of the layers, the same on all these processes.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self._patience = PATIENCE
        self._key = key_of_probe("numbers", layers)

    def gather(self, topic: str, numbers: Sequence[int], ranks: Sequence[int]) -> Gathered:
        """Send this process' numbers to some processes, and receive theirs.

        Args:
            topic: name of the topic; used for one exchange only.
            numbers: numbers of this process.
            ranks: the processes, including this one.

        Raises:
            RuntimeError, AttributeError: if there is no store.
        """
        store, key = default_store(), f"{self._key}/{topic}"
        keys = {rank: f"{key}/{rank}" for rank in ranks}
        decision = f"{key}/{','.join(map(str, ranks))}"
        turn = store.add(f"{key}/turn", 1)
        store.set(keys[dist.get_rank()], json.dumps([turn, *numbers]))
        if store.check([decision]) and store.get(decision) == _SOME:
            outcome = _SOME
        else:
            try:
                store.wait(list(keys.values()), timedelta(seconds=self._patience))
                outcome = _ALL
            except RuntimeError:  # such as a timeout
                outcome = _SOME
            # The first decision counts for all processes.
            outcome = store.compare_set(decision, "", outcome.decode())
        if outcome == _SOME:
            self._patience = _LATER_PATIENCE
        present = [rank for rank in ranks if outcome == _ALL or store.check([keys[rank]])]
        turns = sorted((*json.loads(store.get(keys[rank])), rank) for rank in present)
        return Gathered({rank: numbers for _, *numbers, rank in turns}, outcome == _ALL)
