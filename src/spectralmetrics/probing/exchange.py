"""The sums of many layers, merged across processes: matched by stage and layer, in any order of running.

The processes of a group first agree on which layers exist, see :func:`~.agreeing.agree_on_layers`. Then the
sums travel, some layers at a time: to the one process that reads them (:meth:`Agreement.read`), or to all.
Sums are never matched by position, since each process has an order of its own.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from spectralmetrics.functional.together import Progress
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics.sharing import stream_of
from spectralmetrics.probing import processes
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.facts import STAGES, LayerFacts, Place
from spectralmetrics.sums import Sum, run_together
from spectralmetrics.sums.merging import communication_device

T = TypeVar("T")

# The sums of layers that travel together; half of a dense matrix travels, since it is symmetric.
_BATCH_BYTES = 2**26
# A batch ends early if its decompositions cost this much, about a second: other processes do the rest.
_WORTH_SHARING = 5e9
# Merged sums of a probe up to this size are kept until there are new observations.
_KEPT_BYTES = 2**26
_LARGE = ("total", "eigenvectors")  # cached results of a decomposition that are as large as the sums


class Kept:
    """Merged sums that a process keeps, so that reading them again is cheap.

    Attributes:
        digest: the digest of the agreement whose sums have all been read; 0 while there is none.
        sums: the sums of the layers that this process has read, if all of them together are small.
        caches: the eigenvalues and other cached results of these layers.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything."""
        self.digest = 0
        self.sums: dict[Place, list[list[Sum]]] = {}
        self.caches: dict[Place, list[dict[Any, Any]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()  # a copy has read nothing


@dataclass(eq=False)
class Agreement:
    """The layers that the processes of a group have agreed on.

    Attributes:
        group: the process group.
        places: this process' metrics, and guests for the layers of others, in one order for all processes.
        widths: the widths of the sums of each leader; 0 where no process has data.
        facts: the facts of all layers.
        digest: the digest of the agreement.
        is_unchanged: True if all sums were read before and no process has new observations since then.
        kept: the merged sums that this process keeps.
        takes_all: True merges metrics of other groups, too, and metrics that are otherwise never merged.
        own: layers whose own sums this process reads.
        among: layers that are merged; None for all.
    """

    group: Any
    places: dict[Place, LayerMetrics]
    widths: dict[Place, tuple[int, ...]]
    facts: dict[str, LayerFacts]
    digest: int
    is_unchanged: bool
    kept: Kept
    takes_all: bool
    own: Collection[Place] = ()
    among: Container[Place] | None = None

    def __post_init__(self) -> None:
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._sizes = {place: self._bytes(place) for place in self.places if any(self.widths[place])}
        self._is_small = sum(self._sizes.values()) <= _KEPT_BYTES

    @property
    def layers(self) -> list[str]:
        """All layers, in one order for all processes."""
        return list(dict.fromkeys(layer for _, layer in self.places))

    def leaders(self, place: Place) -> list[SpectralMetric]:
        """The metrics whose sums are merged."""
        return [
            leader
            for leader in self.places[place].spectral_leaders
            if self.takes_all or (processes.is_merged(leader) and leader.process_group is self.group)
        ]

    def batches(
        self, stages: Container[str] = STAGES, *, among: Container[Place] | None = None, in_order: bool = False
    ) -> list[list[Place]]:
        """The layers with observations on some process, in batches that travel together.

        They are ``in_order`` as agreed. Otherwise the most expensive come first, in batches of about equal
        cost, since each batch is decomposed by another process.
        """
        among = self.among if among is None else among
        places = [each for each in self._sizes if each[0] in stages and (among is None or each in among)]
        costs = {place: self._cost(place) for place in places}
        most = math.inf if in_order else max(sum(costs.values()) / self.world, _WORTH_SHARING)
        batches: list[list[Place]] = []
        size = cost = 0.0
        for place in costs if in_order else sorted(costs, key=lambda each: (-costs[each], each)):
            size, cost = size + self._sizes[place], cost + costs[place]
            if not batches or size > _BATCH_BYTES or cost > most:
                batches.append([])
                size, cost = self._sizes[place], costs[place]
            batches[-1].append(place)
        return batches

    def exchange(self, batch: Sequence[Place], reader: int | None = None) -> dict[Place, list[list[Sum]]]:
        """The merged sums of each leader of some layers; nothing on a process that is not their reader."""
        leaders = [(place, leader) for place in batch for leader in self.leaders(place)]
        home = communication_device(self.group)
        sums = [
            [each if each.num_features else each.map(lambda tensor: tensor.to(home)) for each in leader.sums]
            for _, leader in leaders
        ]
        exchanges = [each.exchange(None, self.rank, self.world) for some in sums for each in some]
        results = iter(run_together(exchanges, self.group, reader))
        merged: dict[Place, list[list[Sum]]] = {place: [] for place in batch}
        for (place, _), some in zip(leaders, sums, strict=True):
            merged[place].append([next(results) for _ in some])
        return merged if reader is None or reader == self.rank else {}

    @contextlib.contextmanager
    def holding(self, merged: Mapping[Place, list[list[Sum]]]) -> Iterator[None]:
        """Inside, the metrics of some layers hold merged sums."""
        before = [(leader, leader.metric_state) for place in merged for leader in self.leaders(place)]
        try:
            for place, sums in merged.items():
                for leader, some in zip(self.leaders(place), sums, strict=True):
                    if all(each is not None for each in some):
                        leader.replace_sums(some)
            yield
        finally:
            for leader, state in before:
                for name, value in state.items():
                    setattr(leader, name, value)

    def read(
        self,
        read: Callable[[list[LayerMetrics], Progress], Mapping[Place, T]],
        progress: Progress | None,
        stages: Container[str],
        *,
        is_held: bool = False,
    ) -> dict[Place, T]:
        """Read each layer on one process, and return the results on all processes.

        Args:
            read: reads layers that hold merged sums; called with them and with a progress.
            progress: called with the number of layers that have been read, and of all layers.
            stages: the stages whose layers are read.
            is_held: True if all processes hold all merged sums already.
        """
        own = [place for place in self.own if place[0] in stages]
        batches = self.batches(stages)
        total, before = len(own) + sum(map(len, batches)), 0
        results: dict[Place, T] = {}

        def read_some(places: Sequence[Place], here: int) -> dict[Place, T]:
            def report(done: int, of: int) -> None:
                if progress is not None:
                    progress(before + min(done, here), total)

            some = dict(read([self.places[place] for place in places], report))
            report(here, here)
            return some

        with processes.uninterrupted():
            of_own: dict[Place, T] = {}
            if self.among is not None:
                of_own = processes.agreed(lambda: read_some(own, len(own)), [self.group])
            before += len(own)
            for start in range(0, len(batches), self.world):
                round_ = batches[start : start + self.world]
                here = sum(map(len, round_))
                merged: dict[Place, list[list[Sum]]] = {}
                for reader, batch in enumerate([] if is_held else round_):
                    if self.is_unchanged and self._is_small:
                        merged |= {place: self.kept.sums[place] for place in batch if reader == self.rank}
                    else:
                        merged |= self.exchange(batch, reader)
                own_batch = round_[self.rank] if self.rank < len(round_) else []
                error: BaseException | None = None
                payload = b""
                try:
                    with processes.interruptible(), self.holding(merged):
                        self._recall(merged)
                        payload = pickle.dumps(read_some(own_batch, here))
                except BaseException as raised:
                    error = raised
                finally:
                    self._keep(merged)
                del merged
                for each in processes.gather_agreed(payload, error, self.group):
                    results.update(pickle.loads(each) if each else {})
                before += here
        if not is_held:
            self.kept.digest = self.digest
        return results | of_own

    def iterate(
        self, read: Callable[[LayerMetrics], T], lock: contextlib.AbstractContextManager[Any]
    ) -> Iterator[tuple[str, T]]:
        """Read each layer while it holds merged sums; yield layers and results in the agreed order."""
        for batch in self.batches(in_order=True):
            processes.check_agreed(None, self.group)  # raises if a process has left the loop
            try:
                with processes.uninterrupted(), lock:
                    merged = self.exchange(batch)
                    with self.holding(merged):
                        results = [(place[1], read(self.places[place])) for place in reversed(batch)]
                    del merged
                while results:
                    yield results.pop()
            except BaseException as error:
                left = RuntimeError("the loop over the merged sums ended early")
                with contextlib.suppress(Exception):
                    processes.check_agreed(left if isinstance(error, GeneratorExit) else error, self.group)
                raise
        processes.check_agreed(None, self.group)

    def fetch(self, batch: Sequence[Place]) -> dict[Place, list[Sum]]:
        """The merged sums of some layers on the first process, see :meth:`.LayerMetrics.recorded_sums`."""
        merged = self.exchange(batch, reader=0)
        with self.holding(merged):
            return {place: self.places[place].recorded_sums() for place in merged}

    def _recall(self, merged: Mapping[Place, list[list[Sum]]]) -> None:
        """Use decompositions again that were made before an interrupt or for another question."""
        for place in merged:
            for leader, cache in zip(self.leaders(place), self.kept.caches.get(place, ()), strict=False):
                if live := leader.flush():
                    live.stream.cache.update(cache)

    def _keep(self, merged: Mapping[Place, list[list[Sum]]]) -> None:
        for place, sums in merged.items():
            streams = [stream_of([each for each in some if each is not None]) for some in sums]
            self.kept.caches[place] = [
                {
                    key: value
                    for key, value in (stream.cache if stream else {}).items()
                    if self._is_small or not any(part in _LARGE for part in (key, *key))
                }
                for stream in streams
            ]
            if self._is_small:
                self.kept.sums[place] = sums

    def _bytes(self, place: Place) -> int:
        """The bytes of a layer's sums while they travel."""
        return sum(
            8 * each.num_exchanged(width, self.world)
            for leader, width in zip(self.places[place].spectral_leaders, self.widths[place], strict=True)
            for each in leader.prototypes
            if width
        )

    def _cost(self, place: Place) -> float:
        """The cost of decompositions: D³ of a matrix, D·k² of a sketch."""
        return sum(
            float(width) * min(width, leader.sketch_size or width) ** 2
            for leader, width in zip(self.places[place].spectral_leaders, self.widths[place], strict=True)
        )
