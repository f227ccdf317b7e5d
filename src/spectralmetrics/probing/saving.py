"""A probe's ``state_dict`` beside its metrics, so that an epoch can resume; its sharded state."""

from __future__ import annotations

import copy
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics.overrides import count_update, defaults
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.exchange import Agreement
from spectralmetrics.probing.facts import Place
from spectralmetrics.probing.processes import check_agreed
from spectralmetrics.probing.steps import Steps
from spectralmetrics.probing.windows import memory, take_over
from spectralmetrics.sums import Sum
from spectralmetrics.sums.merging import gather_objects


def save_progress(
    destination: dict[str, Any], prefix: str, places: Sequence[LayerMetrics], steps: Steps, order: Sequence[int]
) -> None:
    """Put into a state dict the progress of all layers, and the order of those that have run, by number."""
    rows = [
        [p.forwards, p.samples, p.epoch, bool(p.given_up or p.too_wide), p.ran, p.is_sketched] for p in places
    ]
    destination[prefix + "progress"] = torch.tensor(rows, dtype=torch.int64)
    destination[prefix + "forward_order"] = torch.tensor(list(order), dtype=torch.int64)
    counts = [list(each.values()) for each in _counters(steps)]
    destination[prefix + "steps"] = torch.tensor(counts, dtype=torch.int64)


def load_progress(
    state_dict: dict[str, Any], prefix: str, places: Sequence[LayerMetrics], steps: Steps, size: int | None
) -> list[int] | None:
    """Take the progress of all layers out of a state dict; return the order of layers, None if there is none.

    A layer that was sketched is from now on, with this size: the state may have no sketch of it.

    Raises:
        ValueError: if the state has another number of layers.
    """
    progress = state_dict.pop(prefix + "progress", None)
    order = state_dict.pop(prefix + "forward_order", None)
    counts = state_dict.pop(prefix + "steps", None)
    if progress is None:
        return None
    if progress.shape[0] != len(places):
        raise ValueError(
            f"expected the state of {len(places) // 2} probed layers, got a state of {progress.shape[0] // 2}"
        )
    for place, (forwards, samples, epoch, given_up, *more) in zip(places, progress.tolist(), strict=True):
        # Up to 0.2.0 there was no more.
        more += (forwards, False)[len(more) :]
        ran, is_sketched = more
        if is_sketched and size is not None and not place.is_sketched:
            place.sketch(size)
        place.forwards, place.samples, place.epoch, place.ran = forwards, samples, epoch, ran
        place.given_up = "before it was saved" if given_up else ""
    if counts is not None:  # 0.1.0 counted the forwards of each layer alone
        # Up to 0.2.0 there were two rows.
        for counter, numbers in zip(_counters(steps), counts.tolist(), strict=False):
            counter.update(zip(counter, numbers, strict=True))
    return [] if order is None else [int(index) for index in order.tolist()]


def _counters(steps: Steps) -> tuple[dict[str, int], ...]:
    return steps.counts, steps.epochs, steps.forwards, steps.alone


def give_to_leaders(state_dict: dict[str, Any], prefix: str, of_layer: LayerMetrics) -> None:
    """Rename saved states after the metrics that lead now; when the states were saved, others may have led."""
    for leader, *others in of_layer.templates.groups:
        for state in (*defaults(of_layer.leader_of[leader]), "draws", "deals") if others else ():
            for name in others:
                if (key := f"{prefix}{name}.{state}") in state_dict:
                    state_dict.setdefault(f"{prefix}{leader}.{state}", state_dict.pop(key))


@dataclass(eq=False, repr=False)
class Sharded:
    """A probe's state on all processes, for ``torch.distributed.checkpoint``, which saves its parts.

    The keys are the same for any probe on any number of processes: a fresh probe must name them before it reads
    anything. Each layer is in one bucket, by its name, and each process saves and loads some buckets.

    Args:
        places: (stage, layer) -> metrics of this process.
        agree: makes the agreement of the processes; None if there is one process only.
        steps: the steps of the model.
        order: the layers that have run here, in the order of their first run; written to.
        remembered: memory of the readers of windows, the same on all processes; written to.
        reset: forgets all observations.
    """

    places: Mapping[Place, LayerMetrics]
    agree: Callable[[], Agreement | None]
    steps: Steps
    order: list[str]
    remembered: dict[str, dict[str, Any]]
    reset: Callable[[], None]

    def state_dict(self) -> dict[str, bytes]:
        """This process' share of the sums of all processes, which call it together."""
        agreement = self.agree()
        rank, world = (0, 1) if agreement is None else (agreement.rank, agreement.world)
        buckets: dict[int, dict[Place, _Packed]] = {bucket: {} for bucket in range(rank, _BUCKETS, world)}
        if agreement is None:
            for place, of_layer in self.places.items():
                buckets[_bucket(place)][place] = _pack(of_layer)
        else:
            for reader in range(world):
                wanted = [place for place in agreement.places if _bucket(place) % world == reader]
                for batch in agreement.batches(among=wanted):
                    merged = agreement.exchange(batch, reader)
                    with agreement.holding(merged):
                        for place in merged:
                            buckets[_bucket(place)][place] = _pack(agreement.places[place])
            for place, of_layer in agreement.places.items():
                for name, states in _states_of_others(of_layer).items():  # on all processes, in one order
                    if _bucket(place) in buckets:
                        packed = buckets[_bucket(place)].setdefault(place, _Packed(None, {}, {}))
                        packed.others[name] = states
        progress = self._progress()
        gathered = [progress] if agreement is None else gather_objects(progress, agreement.group)
        order = self.order if agreement is None else agreement.layers
        sums = {
            f"sums.{bucket:02d}": _to_bytes({k: vars(v) for k, v in held.items()})
            for bucket, held in buckets.items()
        }
        return sums | {"progress": _to_bytes(_together(gathered, order))}

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        """Load this process' share; all processes call it together, and together hold the saved sums.

        Raises:
            ValueError: for sums of layers that no process probes, or of metrics with other settings.
        """
        agreement = self.agree()
        held: dict[Place, _Packed] = {}
        for key, saved in state_dict.items():
            if key.startswith("sums."):
                held |= {place: _Packed(**each) for place, each in _from_bytes(saved).items()}
        delivered = self._delivered(held, agreement)
        self.reset()
        error: BaseException | None = None
        try:
            for place, packed in delivered.items():
                _unpack(packed, self.places[place])
        except BaseException as raised:
            error = raised
            self.reset()
        if agreement is not None:
            check_agreed(error, agreement.group)
        elif error is not None:
            raise error
        self._go_on(_from_bytes(state_dict["progress"]), 1 if agreement is None else agreement.world)

    def _go_on(self, progress: Mapping[str, Any], world: int) -> None:
        """Restore the progress of the layers."""
        for place, of_layer in self.places.items():
            if place in progress["places"]:
                of_layer.forwards, samples, of_layer.epoch, of_layer.ran, batches = progress["places"][place]
                of_layer.samples = -(-samples // world)
                for name, numbers in batches.items():
                    leader = of_layer.leader_of.get(name)
                    if isinstance(leader, SpectralMetric):
                        leader._batches, leader._dealt = numbers
        own = {layer for _, layer in self.places}
        self.order[:] = [name for name in progress["order"] if name in own]
        for counter, numbers in zip(_counters(self.steps), progress["steps"], strict=True):
            counter.update(numbers)
        take_over(progress["memory"], self.remembered, self.steps)

    def _delivered(self, held: dict[Place, _Packed], agreement: Agreement | None) -> dict[Place, _Packed]:
        """Sums of this process' layers: loaded here, or by a process that does not probe the layer."""
        own = list(held), list(self.places)
        gathered = [own] if agreement is None else gather_objects(own, agreement.group)
        targets: dict[Place, int] = {}
        for rank, (loaded, _) in enumerate(gathered):
            for place in loaded:
                probing = [other for other, (_, probed) in enumerate(gathered) if place in probed]
                targets[place] = rank if rank in probing else min(probing, default=-1)
        if missing := sorted({layer for (_, layer), target in targets.items() if target < 0}):
            raise ValueError(
                "expected the sums of layers that this probe has on some process, got sums of"
                f" {', '.join(map(repr, missing))}"
            )
        if agreement is None:
            return held
        pairs = [(rank, place) for rank, (loaded, _) in enumerate(gathered) for place in loaded]
        to_send = [(rank, place) for rank, place in pairs if targets[place] != rank]
        delivered = {place: packed for place, packed in held.items() if targets[place] == agreement.rank}
        for rank, place in to_send:  # one at a time: they may be large
            sent = gather_objects(held[place] if rank == agreement.rank else None, agreement.group)
            if targets[place] == agreement.rank:
                delivered[place] = sent[rank]
        return delivered

    def _progress(self) -> dict[str, Any]:
        return {
            "places": {
                place: (
                    each.forwards,
                    each.samples,
                    each.epoch,
                    each.ran,
                    {name: (leader._batches, leader._dealt) for name, leader in _named_leaders(each)},
                )
                for place, each in self.places.items()
            },
            "steps": tuple(map(dict, _counters(self.steps))),
            "memory": memory(self.remembered, self.steps),
        }


_BUCKETS = 64


@dataclass
class _Packed:
    """The sums of one layer in one stage.

    Attributes:
        sketch_size: the columns of sketches of a layer that is too wide for a covariance; None for others.
        sums: leader -> states.
        others: metric of another library -> states.
    """

    sketch_size: int | None
    sums: dict[str, dict[str, Tensor]]
    others: dict[str, dict[str, Any]]


def _named_leaders(of_layer: LayerMetrics) -> list[tuple[str, SpectralMetric]]:
    return [(name, leader) for name, leader in of_layer.kept.items() if isinstance(leader, SpectralMetric)]


def _pack(of_layer: LayerMetrics) -> _Packed:
    sums = {
        name: {state: tensor.clone() for each in leader.sums for state, tensor in each.tensors().items()}
        for name, leader in _named_leaders(of_layer)
        if leader.has_observed()
    }
    return _Packed(of_layer.sketch_size, sums, {})


def _states_of_others(of_layer: LayerMetrics) -> dict[str, dict[str, Any]]:
    """The states of other libraries' metrics, which these metrics merge themselves."""
    merged: dict[str, dict[str, Any]] = {}
    for name, metric in of_layer.leader_of.items():
        if not isinstance(metric, SpectralMetric):
            with metric.sync_context():
                merged[name] = copy.deepcopy(metric.metric_state)
    return merged


def _unpack(packed: _Packed, of_layer: LayerMetrics) -> None:
    where = f"{of_layer.layer!r} in {of_layer.stage}"
    if packed.sketch_size is not None and not of_layer.is_sketched:
        of_layer.sketch(packed.sketch_size)
    for name, states in packed.sums.items():
        leader = of_layer.leader_of.get(name)
        if not isinstance(leader, SpectralMetric):
            raise ValueError(f"expected the sums of a metric of this probe for {where}, got sums of {name!r}")
        prototypes = leader.prototypes
        wanted = [state for each in prototypes for state in each.tensors()]
        if not set(wanted) >= set(states) >= set(prototypes[0].tensors()):
            raise ValueError(f"expected the states {wanted} of {name!r} for {where}, got {list(states)}")
        sums = leader.sums_of(states)
        for own, saved in zip(prototypes, sums, strict=True):
            if own.settings() != saved.settings():
                raise ValueError(
                    f"expected sums of {name!r} for {where} with {own.settings()}, got {saved.settings()}"
                )
        leader.replace_sums([_moved(each, leader._pinned_device) for each in sums])
        count_update(leader)
    for name, values in packed.others.items():
        metric = of_layer.leader_of.get(name)
        if metric is None:
            raise ValueError(f"expected states of a metric of this probe for {where}, got states of {name!r}")
        for state, value in values.items():
            setattr(metric, state, value)
        count_update(metric)


def _moved(sums: Sum, device: torch.device | None) -> Sum:
    return sums if device is None else sums.map(lambda tensor: tensor.to(device))


def _together(gathered: Sequence[dict[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The progress of all processes: the furthest of each layer, so that nothing is drawn twice."""
    places: dict[Place, tuple[int, int, int, int, dict[str, tuple[int, ...]]]] = {}
    for place in dict.fromkeys(place for each in gathered for place in each["places"]):
        of_processes = [each["places"][place] for each in gathered if place in each["places"]]
        forwards, samples, epochs, ran, batches = zip(*of_processes, strict=True)
        furthest = {
            name: tuple(map(max, zip(*(each[name] for each in batches), strict=True))) for name in batches[0]
        }
        places[place] = (max(forwards), sum(samples), max(epochs), max(ran), furthest)
    steps = [
        {stage: max(each["steps"][kind][stage] for each in gathered) for stage in gathered[0]["steps"][kind]}
        for kind in range(len(gathered[0]["steps"]))
    ]
    have_run = {layer for (_, layer), (forwards, *_) in places.items() if forwards}
    order = [name for name in order if name in have_run]
    return {"places": places, "steps": steps, "order": order, "memory": gathered[0]["memory"]}


def _bucket(place: Place) -> int:
    return zlib.crc32("/".join(place).encode()) % _BUCKETS


def _to_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _from_bytes(saved: bytes) -> Any:
    return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
