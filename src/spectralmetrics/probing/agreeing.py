"""Agreement of several processes on their layers, the order of these, and the settings of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from spectralmetrics.metrics.stream import group_object
from spectralmetrics.probing.alike import Alike, Settings
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.exchange import Agreement, Kept, Place
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.probing.identity import Identity, Weights, digest, digest_of
from spectralmetrics.probing.processes import check_calls, gather_agreed
from spectralmetrics.sums.merging import communication_device, gather_objects


class Catalogue(NamedTuple):
    """The layers of one process, as it tells the others.

    Attributes:
        call: the call that reads, with the arguments that must be the same on all processes.
        metrics: the stages that are read, and of which metrics; the same on all processes.
        layers: in the order of registration, with what is known of each.
        order: those that have run, in the order of their first run.
        places: (stage, layer) -> columns of its sketches or None, and the width of each leader's sums, 0
            without data.
        settings: of a probe that shares layers with other processes, see :class:`.Alike`; None for any other.
    """

    call: str
    metrics: tuple[object, ...]
    layers: dict[str, LayerFacts]
    order: tuple[str, ...]
    places: dict[Place, tuple[int | None, tuple[int, ...]]]
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
    """Agree with the other processes of a group on the layers that there are, and on their order.

    One collective where all have seen the same; three otherwise, and two more the first time, where weights
    differ.

    Args:
        group: the process group.
        describe: gives what this process has; what it raises is raised on all.
        own: the layers of this process.
        guest: makes the metrics of a layer that this process does not have, or has no observations of.
        kept: what this process keeps of merged sums.
        identity: the identity of this process' layers, compared with those of others once.
        alike: the settings that processes must have in common where they share layers.
        takes_all: see :class:`Agreement`.
        keeps_own: whether each process keeps its own of layers that all have, which then need not fit together.

    Raises:
        RuntimeError: if a process has no probe.
        ValueError: on all processes, for what does not fit together, with layers and processes.
    """
    identity.check_presence(group)
    error: BaseException | None = None
    catalogue, number, call, changed = None, 0, 0, True
    weights: dict[str, Weights] = {}
    try:
        weights = identity.weights()
        catalogue = describe()
        # What is kept of merged sums serves other calls, too.
        number = digest(repr((list(catalogue.layers.items()), catalogue._replace(call="", layers={}))))
        call = digest(catalogue.call)
        changed = _note_reading(own.values(), group)
    except BaseException as raised:
        error = raised
    own_weights = digest_of(weights)
    flags = [number, -number, call, -call, own_weights, -own_weights]
    flags += [changed, kept.digest != number, error is not None]
    agreed = torch.tensor(flags, dtype=torch.int64, device=communication_device(group))
    try:
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    except BaseException:
        kept.forget()  # by now it may be out of date
        raise
    *of_catalogue, high, low, any_changed, any_unread, has_failed = agreed.tolist()
    if any_changed:
        kept.forget()
    if has_failed:
        gather_agreed(None, error, group)
    assert catalogue is not None
    is_same = sum(of_catalogue) == 0
    ranks = dist.get_process_group_ranks(group)
    catalogues = [catalogue] * len(ranks) if is_same else gather_objects(catalogue, group)
    common = set(catalogue.places).intersection(*(each.places for each in catalogues))
    check_calls([each.call for each in catalogues], group)
    _check(dict(zip(ranks, catalogues, strict=True)), common if keeps_own else ())
    if not keeps_own:
        of_processes = [weights] * len(ranks) if high == -low else gather_objects(weights, group)
        identity.compare(dict(zip(ranks, of_processes, strict=True)))
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
    settings = [each.settings for each in catalogues if each.settings is not None]
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
    """All layers in one order: that of the first process, in which each other process puts its own.

    Those that ran come first, each before what its process ran next, or else last; then the rest as they are
    registered.

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


def _check(catalogues: Mapping[int, Catalogue], but: Container[Place]) -> None:
    """Raise a ValueError, the same on all processes, for what does not fit together but for these layers."""
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
        known = {rank: each.places[place] for rank, each in catalogues.items() if place in each.places}
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
    """True if this process has other observations than when it was asked last."""
    changed = [place.note_reading(group_object(group)) for place in places]
    return any(changed)
