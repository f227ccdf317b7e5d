"""Agreement of several processes on layers and settings, and merged sums that the first of them fetches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from spectralmetrics.metrics.sharing import group_object
from spectralmetrics.probing import processes
from spectralmetrics.probing.alike import Alike, Settings
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.exchange import Agreement, Kept
from spectralmetrics.probing.facts import LayerFacts, Place
from spectralmetrics.probing.rendezvous import Identity, Weights, digest_of
from spectralmetrics.sums import Sum
from spectralmetrics.sums.merging import gather_objects


class Catalogue(NamedTuple):
    """The layers of one process, as it sends them to the others.

    Attributes:
        call: the call that reads, with the arguments that must be the same on all processes.
        metrics: the stages to read and the metrics; the same on all processes.
        layers: layer -> its facts, in the order of registration.
        order: layers that have run, in the order of their first run.
        places: (stage, layer) -> columns of its sketches or None, and the width of each leader's sums, 0
            without data.
        ran: the layers whose metrics are all of other libraries, and have seen something.
        settings: the probe's settings if processes share its layers, see :class:`.Alike`; otherwise None.
    """

    call: str
    metrics: tuple[object, ...]
    layers: dict[str, LayerFacts]
    order: tuple[str, ...]
    places: dict[Place, tuple[int | None, tuple[int, ...]]]
    ran: tuple[Place, ...] = ()
    settings: Settings | None = None


def agree_on_layers(
    group: Any,
    describe: Callable[[], Catalogue],
    own: Mapping[Place, LayerMetrics],
    guest: Callable[[str, str], LayerMetrics],
    kept: Kept,
    identity: Identity,
    alike: Alike,
    *,
    takes_all: bool = False,
    keeps_own: bool = False,
) -> Agreement:
    """Agree with the other processes of a group on which layers exist, and on their order.

    It takes one collective if all processes have seen the same, and three otherwise. The first call takes two
    more if weights differ.

    Args:
        group: the process group.
        describe: makes this process' catalogue; an exception in it is raised on all processes.
        own: the metrics of this process' layers.
        guest: makes the metrics of a layer that this process does not have or has not observed.
        kept: see :class:`Agreement`.
        identity: compared once with the other processes'.
        alike: the settings that must be equal on processes that share layers.
        takes_all: see :class:`Agreement`.
        keeps_own: True if processes keep their own sums of layers that all have; these need not fit together.

    Raises:
        RuntimeError: if a process has no probe.
        ValueError: on all processes, if layers do not fit together; it names layers and processes.
    """
    identity.check_presence(group)
    error: BaseException | None = None
    catalogue, number, call, changed = None, 0, 0, [True]
    weights: dict[str, Weights] = {}
    try:
        weights = identity.weights()
        catalogue = describe()
        # What is kept of merged sums serves other calls, too.
        known = list(catalogue.layers.items()), catalogue._replace(call="", layers={})
        number = processes.digest(repr(known))
        call = processes.digest(catalogue.call)
        changed = [place.note_reading(group_object(group)) for place in own.values()]  # since the last reading
    except BaseException as raised:
        error = raised
    flags = [number, call, digest_of(weights), any(changed), kept.digest != number, error is not None]
    try:
        high, low = processes.extremes(flags, group)
    except BaseException:
        kept.forget()  # by now it may be out of date
        raise
    any_changed, any_unread, has_failed = high[3:]
    if any_changed:
        kept.forget()
    if has_failed:
        processes.gather_agreed(None, error, group)
    assert catalogue is not None
    is_same = high[:2] == low[:2]
    ranks = dist.get_process_group_ranks(group)
    catalogues = [catalogue] * len(ranks) if is_same else gather_objects(catalogue, group)
    common = set(catalogue.places).intersection(*(each.places for each in catalogues))
    processes.check_calls([each.call for each in catalogues], group)
    _check(dict(zip(ranks, catalogues, strict=True)), common if keeps_own else ())
    if not keeps_own:
        of_processes = [weights] * len(ranks) if high[2] == low[2] else gather_objects(weights, group)
        identity.compare(dict(zip(ranks, of_processes, strict=True)))
    order = agreed_order(catalogues)
    facts = {layer: each for other in reversed(catalogues) for layer, each in other.layers.items()}
    stages = dict.fromkeys(stage for other in catalogues for stage, _ in other.places)
    ran = {place for each in catalogues for place in each.ran}
    places, widths = {}, {}
    for place in ((stage, layer) for stage in stages for layer in order):
        forms = [each.places[place] for each in catalogues if place in each.places]
        with_data = [(columns, sizes) for columns, sizes in forms if any(sizes)]
        sketch = with_data[0][0] if with_data else None
        widths[place] = tuple(max(sizes) for sizes in zip(*(sizes for _, sizes in forms), strict=True))
        own_form = catalogue.places.get(place)
        if own_form is None or (with_data and not any(own_form[1]) and own_form[0] != sketch):
            # Without observations this process takes over the others' kind of sum.
            places[place] = guest(*place)
            if sketch is not None and not places[place].is_sketched:
                places[place].sketch(sketch)
        else:
            places[place] = own[place]
        places[place].ran_elsewhere |= place in ran and not keeps_own
    by_rank = zip(ranks, catalogues, strict=True)
    settings = {rank: each.settings for rank, each in by_rank if each.settings is not None}
    if settings and dist.get_world_size(group) == dist.get_world_size():
        alike.renew(settings)
    return Agreement(
        group,
        places,
        widths,
        facts | catalogue.layers,
        number,
        not (any_changed or any_unread),
        kept,
        takes_all,
        *((own.keys(), places.keys() - common) if keeps_own else ()),
    )


def agreed_order(catalogues: Sequence[Catalogue]) -> list[str]:
    """All layers in one order: the first process' order, into which the others' layers are inserted.

    Layers that ran come first, each before the layer that its process ran next, or else last. The rest follows
    in the order of registration.

    >>> one = Catalogue("", (), dict.fromkeys("ab"), ("a", "b"), {})
    >>> other = Catalogue("", (), dict.fromkeys("axby"), ("a", "x", "b", "y"), {})
    >>> agreed_order([one, other])
    ['a', 'x', 'b', 'y']
    """
    order: list[str] = []
    for names in [each.order for each in catalogues] + [tuple(each.layers) for each in catalogues]:
        after = len(order)
        for name in reversed(names):
            if name in order:
                after = order.index(name)
            else:
                order.insert(after, name)
    return order


def _check(catalogues: Mapping[int, Catalogue], exempt: Container[Place]) -> None:
    """Raise a ValueError, the same on all processes, if catalogues differ in other layers than the exempt."""
    first, *others = catalogues
    metrics = {rank: each.metrics for rank, each in catalogues.items()}
    rank = next((rank for rank in others if metrics[rank] != metrics[first]), None)
    if rank is not None:
        mine, other = (
            ", ".join(str(part) for part in metrics[one] if part not in metrics[another])
            for one, another in ((first, rank), (rank, first))
        )
        raise ValueError(
            "expected all processes to read the same stages of probes with the same metrics, got"
            f" {mine or 'less'} on process {first} and {other or 'less'} on process {rank}"
        )
    wrong = []
    for place in dict.fromkeys(place for each in catalogues.values() for place in each.places):
        forms = {rank: each.places[place] for rank, each in catalogues.items() if place in each.places}
        with_data = {rank: form for rank, form in forms.items() if any(form[1])}
        if place in exempt or len(set(with_data.values())) < 2:
            continue
        # A metric without observations, such as one for labels, has the width 0.
        by_leader = zip(*(widths for _, widths in with_data.values()), strict=True)
        sketches = {sketch for sketch, _ in with_data.values()}
        if len(sketches) < 2 and all(len({*widths} - {0}) < 2 for widths in by_leader):
            continue
        stage, layer = place
        described = ", ".join(
            f"{max(widths)}{'' if sketch is None else f' (in a sketch of {sketch} columns)'} on process {rank}"
            for rank, (sketch, widths) in with_data.items()
        )
        wrong.append(f"layer {layer!r} in {stage}: {described}")
    if wrong:
        raise ValueError(
            "expected the same number of features and the same kind of sum on every process, got"
            f" {'; '.join(wrong)}; names must mean one layer on all processes"
        )


_ENOUGH = -1  # stands for the number of a batch: none is needed any more


class MergedSums(Mapping[Place, Sequence[Sum]]):
    """The merged sums of layers, which a group's first process fetches from the others, some layers at a time.

    The first process reads them as a mapping, and holds only the batch that it fetched last. Meanwhile all
    other processes are in :meth:`serve`.

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
            return self._agreement.places[place].recorded_sums()
        if self._is_over:
            raise RuntimeError(
                f"expected the sums of layer {place[1]!r} to be read before `write` returns: on several"
                " processes they are fetched from the others"
            )
        if place not in self._held:
            self._held = {}  # makes room for the next batch
            number = self._numbers[place]
            with processes.uninterrupted():
                self._share(number)
                self._held = self._agreement.fetch(self._batches[number])
        return self._held[place]

    def serve(self) -> None:
        """Send the batches that the reader fetches, until its own call or an exception ends this everywhere."""
        error: BaseException | None = None
        while not self._is_over:
            number = self._share(_ENOUGH, error)
            if number == _ENOUGH:
                return
            try:
                self._agreement.fetch(self._batches[number])
                with processes.interruptible():
                    pass  # raises a pending interrupt, which is sent before the next batch
            except BaseException as raised:
                error = raised

    def close(self) -> None:
        """Drop the sums that are held, and fetch no more."""
        self._is_over = True
        self._held = {}

    def _share(self, number: int, error: BaseException | None = None) -> int:
        """The number of the batch that the reader needs, on all processes."""
        (number, has_failed), _ = processes.extremes([number, error is not None], self._agreement.group)
        if has_failed:
            self.close()
            processes.gather_agreed(None, error, self._agreement.group)
        return number
