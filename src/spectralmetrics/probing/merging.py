"""The sums of many layers, merged across processes: matched by stage and layer, whatever each process has run.

The processes of a group first agree on which layers there are (:func:`agree_on_layers`). Then the sums travel,
some layers at a time: to the one process that reads them (:meth:`Agreement.read`), or to all. Nothing is
matched by its place in an order, since each process has an order of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from spectralmetrics.functional.together import Progress
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics.stream import group_object, stream_of
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.probing.identity import Identity, Weights, digest_of
from spectralmetrics.sums import Sum, run_together
from spectralmetrics.sums.merging import communication_device, gather_objects

T = TypeVar("T")

NO_GROUP: Any = object()
"""In the place of a process group: this process does all by itself."""

Place: TypeAlias = tuple[str, str]
"""Stage and layer."""

STAGES = ("train", "eval")

# The sums of layers that travel together; a dense matrix is symmetric and travels as half of that.
_BATCH_BYTES = 2**26
# A batch ends early where its decompositions cost that much, about a second, to leave some for other processes.
_WORTH_SHARING = 5e9
# Of a probe whose sums are no larger than that, the merged ones are kept until there are new observations.
_KEPT_BYTES = 2**26
_LARGE = ("total", "eigenvectors")  # what a decomposition leaves behind that is as large as the sums


class Catalogue(NamedTuple):
    """What one process tells the others.

    Attributes:
        call: what is asked for, and of which metrics; the same on all processes.
        layers: in the order of registration, with what is known of each.
        order: those that have run, in the order of their first run.
        places: (stage, layer) -> columns of its sketches or None, and the width of each leader's sums, 0
            without data.
    """

    call: tuple[object, ...]
    layers: dict[str, LayerFacts]
    order: tuple[str, ...]
    places: dict[Place, tuple[int | None, tuple[int, ...]]]


class Kept:
    """What a process keeps of merged sums, so that reading them again is cheap.

    Attributes:
        digest: of the agreement for which everything was read; empty while there is none.
        sums: of the layers that this process has read, if all of them together are small.
        caches: their eigenvalues and the like.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything."""
        self.digest = 0
        self.sums: dict[Place, list[list[Sum]]] = {}
        self.caches: dict[Place, list[dict[Any, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.forget()


def merging_group(places: Iterable[LayerMetrics]) -> Any:
    """The process group in which all metrics of these layers are merged; NO_GROUP without one for all."""
    groups = {
        each.process_group if _is_merged(each) else NO_GROUP for place in places for each in place.leaders
    }
    if len(groups) != 1:
        return NO_GROUP
    (group,) = groups
    return group if group is not NO_GROUP and has_others(group) else NO_GROUP


def merging_groups(places: Iterable[LayerMetrics]) -> list[Any]:
    """The process groups in which metrics of these layers are merged, in the order of the metrics."""
    leaders = [each for place in places for each in place.leaders if _is_merged(each)]
    return [group for group in dict.fromkeys(each.process_group for each in leaders) if has_others(group)]


def has_others(group: Any) -> bool:
    """Whether this process is in the group, and not alone."""
    return dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def _is_merged(metric: Any) -> bool:
    return bool(metric.sync_on_compute and metric.distributed_available_fn())


class Agreement:
    """What the processes of a group have agreed on.

    Args:
        group: the process group.
        places: of this process, and guests for those of others, in one order for all processes.
        widths: of the sums of each leader; 0 where no process has data.
        facts: of all layers.
        digest: of what has been agreed on.
        is_known: whether all has been read before, and no process has new observations since.
        kept: by this process, of what has not changed since.
        takes_all: whether metrics of other groups are merged, too, and those that are else merged in none.
        partial: layers that some process does not have.
    """

    def __init__(
        self,
        group: Any,
        places: dict[Place, LayerMetrics],
        widths: dict[Place, tuple[int, ...]],
        facts: dict[str, LayerFacts],
        digest: int,
        is_known: bool,
        kept: Kept,
        takes_all: bool,
        partial: frozenset[Place],
    ) -> None:
        self.partial = partial
        self._takes_all = takes_all
        self.group = group
        self.places = places
        self.facts = facts
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._widths = widths
        self._digest = digest
        self._kept = kept
        self._is_known = is_known
        self._sizes = {place: self._bytes(place) for place in places if any(widths[place])}
        self._is_small = sum(self._sizes.values()) <= _KEPT_BYTES

    @property
    def layers(self) -> list[str]:
        """All layers, in one order for all processes."""
        return list(dict.fromkeys(layer for _, layer in self.places))

    def leaders(self, place: Place) -> list[SpectralMetric]:
        """Whose sums are merged."""
        return [
            leader
            for leader in self.places[place].spectral_leaders
            if self._takes_all or (_is_merged(leader) and leader.process_group is self.group)
        ]

    def batches(
        self,
        stages: Container[str] = STAGES,
        *,
        among: Container[Place] | None = None,
        in_order: bool = False,
    ) -> list[list[Place]]:
        """The layers of which some process has observations, those that travel together together.

        Args:
            stages: whose layers.
            among: these only; None for all.
            in_order: whether in the agreed order. Otherwise the dearest come first, so that the batches of a
                round cost about the same.
        """
        places = [each for each in self._sizes if each[0] in stages and (among is None or each in among)]
        costs = {place: self._cost(place) for place in places}
        most = max(sum(costs.values()) / self.world, _WORTH_SHARING)
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
                self.places[place].share_states()
            yield
        finally:
            for leader, state in before:
                for name, value in state.items():
                    setattr(leader, name, value)
            for place in merged:
                self.places[place].share_states()

    def read(
        self,
        read: Callable[[list[LayerMetrics], Progress], Mapping[Place, T]],
        progress: Progress | None,
        stages: Container[str],
        *,
        is_held: bool = False,
    ) -> dict[Place, T]:
        """What one process reads of each layer, on all of them.

        Args:
            read: of layers that hold merged sums; told how far it is.
            progress: told how many layers have been read, and of how many.
            stages: whose layers.
            is_held: whether all processes hold all merged sums already.

        Raises:
            BaseException: what ``read`` or ``progress`` raise on this process, and a RuntimeError for what they
                raise on another.
        """
        batches = self.batches(stages)
        total, before = sum(map(len, batches)), 0
        found: dict[Place, T] = {}
        for start in range(0, len(batches), self.world):
            round_ = batches[start : start + self.world]
            here = sum(map(len, round_))

            def tell(done: int, of: int, before: int = before, here: int = here) -> None:
                if progress is not None:
                    progress(before + min(done, here), total)

            mine: dict[Place, list[list[Sum]]] = {}
            for reader, batch in enumerate(round_):
                if is_held:
                    continue
                if self._is_known and self._is_small:
                    mine |= {place: self._kept.sums[place] for place in batch if reader == self.rank}
                else:
                    mine |= self.exchange(batch, reader)
            of_mine = round_[self.rank] if self.rank < len(round_) else []
            error: BaseException | None = None
            payload = b""
            try:
                with self.holding(mine):
                    self._recall(mine)
                    payload = pickle.dumps(dict(read([self.places[place] for place in of_mine], tell)))
                    tell(here, here)
            except BaseException as raised:
                error = raised
            finally:
                self._keep(mine)
            del mine
            for each in gather_agreed(payload, error, self.group):
                found.update(pickle.loads(each) if each else {})
            before += here
        if not is_held:
            self._kept.digest = self._digest
        return found

    def iterate(
        self, read: Callable[[LayerMetrics], T], lock: contextlib.AbstractContextManager[Any]
    ) -> Iterator[tuple[str, T]]:
        """What each process reads of each layer that holds merged sums, in the agreed order.

        Args:
            read: of one layer.
            lock: held while sums are exchanged.
        """
        for batch in self.batches(in_order=True):
            check_agreed(None, self.group)  # that nobody has left
            with lock:
                merged = self.exchange(batch)
                with self.holding(merged):
                    found = [(place[1], read(self.places[place])) for place in reversed(batch)]
                del merged
            try:
                while found:
                    yield found.pop()
            except GeneratorExit:
                with contextlib.suppress(Exception):
                    check_agreed(RuntimeError("the loop over the merged sums ended early"), self.group)
                raise
        check_agreed(None, self.group)

    def _recall(self, merged: Mapping[Place, list[list[Sum]]]) -> None:
        """Spare what has been decomposed before an interrupt, or for another question."""
        for place in merged:
            for leader, cache in zip(self.leaders(place), self._kept.caches.get(place, ()), strict=False):
                if stream := stream_of(leader.sums):
                    stream.cache.update(cache)

    def _keep(self, merged: Mapping[Place, list[list[Sum]]]) -> None:
        for place, sums in merged.items():
            streams = [stream_of([each for each in some if each is not None]) for some in sums]
            self._kept.caches[place] = [
                {
                    key: value
                    for key, value in (stream.cache if stream else {}).items()
                    if self._is_small or not any(part in _LARGE for part in (key, *key))
                }
                for stream in streams
            ]
            if self._is_small:
                self._kept.sums[place] = sums

    def _bytes(self, place: Place) -> int:
        """What the sums of a layer take while they travel."""
        return sum(
            8 * each.num_exchanged(width, self.world)
            for leader, width in zip(self.places[place].spectral_leaders, self._widths[place], strict=True)
            for each in leader.prototypes
            if width
        )

    def _cost(self, place: Place) -> float:
        """Of decompositions: D³ of a matrix, D·k² of a sketch."""
        return sum(
            float(width) * min(width, leader.sketch_size or width) ** 2
            for leader, width in zip(self.places[place].spectral_leaders, self._widths[place], strict=True)
        )


def gather_agreed(value: T, error: BaseException | None, group: Any) -> list[T]:
    """What each process has; or, if one has raised, an error on all.

    Args:
        value: of this process.
        error: that this process has raised.
        group: the process group.
    """
    described = None if error is None else f"{type(error).__name__}: {error}".removesuffix(": ")
    told = gather_objects((described, value), group)
    if error is not None:
        raise error
    raised = [f"process {rank} raised {words}" for rank, (words, _) in enumerate(told) if words is not None]
    if raised:
        raise RuntimeError("; ".join(raised))
    return [each for _, each in told]


def check_agreed(error: BaseException | None, group: Any) -> None:
    """Raise an error on all processes if one has one; one collective if none has."""
    flag = torch.tensor([error is not None], dtype=torch.int64, device=communication_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if flag.item():
        gather_agreed(None, error, group)


def agree_on_layers(
    group: Any,
    describe: Callable[[], Catalogue],
    own: Mapping[Place, LayerMetrics],
    guest: Callable[[str, str], LayerMetrics],
    kept: Kept,
    identity: Identity,
    *,
    takes_all: bool = False,
    keeps_own: bool = False,
) -> Agreement:
    """Agree with the other processes of a group on the layers that there are, and on their order.

    One collective where all have seen the same; three otherwise, and two more the first time, where weights
    differ.

    Args:
        group: the process group.
        describe: gives what this process has; what it raises is raised on all.
        own: the layers of this process.
        guest: makes the metrics of a layer that this process does not have, or has no observations of.
        kept: what this process keeps of merged sums.
        identity: of this process' layers, compared with those of others once.
        takes_all: see :class:`Agreement`.
        keeps_own: whether each process keeps its own of layers that all have, which then need not fit together.

    Raises:
        RuntimeError: if a process has no probe.
        ValueError: on all processes, for what does not fit together, with layers and processes.
    """
    identity.check_presence(group)
    error: BaseException | None = None
    catalogue, digest, changed = None, 0, True
    weights: dict[str, Weights] = {}
    try:
        weights = identity.weights()
        catalogue = describe()
        described = repr((catalogue.call, list(catalogue.layers.items()), catalogue.order, catalogue.places))
        digest = int.from_bytes(hashlib.sha256(described.encode()).digest()[:7], "little")
        changed = _note_reading(own.values(), group)
    except BaseException as raised:
        error = raised
    own_weights = digest_of(weights)
    flags = [digest, -digest, own_weights, -own_weights, changed, kept.digest != digest, error is not None]
    agreed = torch.tensor(flags, dtype=torch.int64, device=communication_device(group))
    try:
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    except BaseException:
        kept.forget()  # by now it may be out of date
        raise
    high, low, *of_weights, any_changed, any_unread, has_failed = agreed.tolist()
    if any_changed:
        kept.forget()
    if has_failed:
        gather_agreed(None, error, group)
    assert catalogue is not None
    alike = high == -low
    catalogues = [catalogue] * dist.get_world_size(group) if alike else gather_objects(catalogue, group)
    common = set(catalogue.places).intersection(*(each.places for each in catalogues))
    _check(catalogues, common if keeps_own else ())
    if not keeps_own:
        identity.compare([weights] if sum(of_weights) == 0 else gather_objects(weights, group))
    order = agreed_order(catalogues)
    facts = {layer: each for other in reversed(catalogues) for layer, each in other.layers.items()}
    stages = dict.fromkeys(stage for other in catalogues for stage, _ in other.places)
    places, widths = {}, {}
    for place in ((stage, layer) for stage in stages for layer in order):
        known = [other.places[place] for other in catalogues if place in other.places]
        seen = [(sketch, its) for sketch, its in known if any(its)]
        sketch = seen[0][0] if seen else None
        widths[place] = tuple(max(column) for column in zip(*(its for _, its in known), strict=True))
        mine = catalogue.places.get(place)
        if mine is None or (seen and not any(mine[1]) and mine[0] != sketch):
            # Without observations it takes over the others' kind of sum.
            places[place] = guest(*place)
            if sketch is not None and not places[place].is_sketched:
                places[place].sketch(sketch)
        else:
            places[place] = own[place]
    return Agreement(
        group,
        places,
        widths,
        facts | catalogue.layers,
        digest,
        not (any_changed or any_unread),
        kept,
        takes_all,
        frozenset(places.keys() - common),
    )


def agreed_order(catalogues: Sequence[Catalogue]) -> list[str]:
    """All layers in one order: that of the first process, in which each other process puts its own.

    Those that ran come first, each behind what it ran behind; then the rest as they are registered.

    >>> one = Catalogue((), dict.fromkeys("ab"), ("a", "b"), {})
    >>> other = Catalogue((), dict.fromkeys("axb"), ("a", "x"), {})
    >>> agreed_order([one, other])
    ['a', 'x', 'b']
    """
    order: list[str] = []
    for names in [each.order for each in catalogues] + [tuple(each.layers) for each in catalogues]:
        before = len(order)
        for name in names:
            if name in order:
                before = order.index(name) + 1
            else:
                order.insert(before, name)
                before += 1
    return order


def _check(catalogues: Sequence[Catalogue], but: Container[Place]) -> None:
    """Raise a ValueError, the same on all processes, for what does not fit together but for these layers."""
    calls = [each.call for each in catalogues]
    if any(call != calls[0] for call in calls):
        rank = next(rank for rank, call in enumerate(calls) if call != calls[0])
        mine, other = (
            ", ".join(str(part) for part in call if part not in others)
            for call, others in ((calls[0], calls[rank]), (calls[rank], calls[0]))
        )
        raise ValueError(
            "expected all processes to read the same stages of probes with the same metrics, got"
            f" {mine or 'less'} on process 0 and {other or 'less'} on process {rank}"
        )
    wrong = []
    for place in dict.fromkeys(place for each in catalogues for place in each.places):
        known = {rank: each.places[place] for rank, each in enumerate(catalogues) if place in each.places}
        seen = {rank: its for rank, its in known.items() if any(its[1])}
        if place in but or len({(sketch, its) for sketch, its in seen.values()}) < 2:
            continue
        # A metric that has seen nothing, such as one for labels, says nothing of the width.
        columns = zip(*(its for _, its in seen.values()), strict=True)
        if len({sketch for sketch, _ in seen.values()}) < 2 and all(len({*each} - {0}) < 2 for each in columns):
            continue
        stage, layer = place
        told = ", ".join(
            f"{max(its)}{'' if sketch is None else f' (in a sketch of {sketch} columns)'} on process {rank}"
            for rank, (sketch, its) in seen.items()
        )
        wrong.append(f"layer {layer!r} in {stage}: {told}")
    if wrong:
        raise ValueError(
            "expected the same number of features and the same kind of sum on every process, got"
            f" {'; '.join(wrong)}; names must mean one layer on all processes"
        )


def _note_reading(places: Iterable[LayerMetrics], group: Any) -> bool:
    """Whether this process has other observations than when it was asked last."""
    changed = [place.note_reading(group_object(group)) for place in places]
    return any(changed)
