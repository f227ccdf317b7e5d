"""Windows: the sums since a reader's last reading, while the probe keeps all sums.

The sums up to a reading are set aside before the next observation is added. They are merged with the later ones
as soon as the layer is read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torchmetrics import Metric

from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics.overrides import add_earlier, count_of_updates
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.steps import Steps

Taken: TypeAlias = list[tuple[Metric, dict[str, Any], int]]
"""Metrics, their states, and how often they were updated."""


def take_out(place: LayerMetrics, *, to_merge: bool = False) -> Taken:
    """Take the states out of a layer's metrics, which are empty afterwards; sampling goes on as before.

    ``to_merge`` leaves alone metrics of other libraries whose states torchmetrics refuses to merge.
    """
    leaders = [
        leader
        for leader in place.leaders
        if not (to_merge and (leader.full_state_update is not False or leader.dist_sync_on_step))
    ]
    taken = [(leader, _copied(leader.metric_state), count_of_updates(leader)) for leader in leaders]
    with torch.inference_mode(False):  # states made inside could not be updated outside
        for leader in leaders:
            repeats = leader._repeats if isinstance(leader, SpectralMetric) else None
            leader.reset()
            if repeats is not None:  # repeated inputs are counted over all observations
                leader._repeats = repeats
    place.note_other_states()
    return taken


def put_back(place: LayerMetrics, taken: Taken) -> None:
    """Replace the states by states that were taken out."""
    for leader, state, updates in taken:
        _set(leader, state, updates)
    place.note_other_states()


def merge_in(place: LayerMetrics, taken: Taken) -> None:
    """Add states that were taken out to the current ones, fold by fold; the former do not change."""
    for leader, state, updates in taken:
        before = count_of_updates(leader)
        if not updates:
            continue
        if not before:
            _set(leader, state, updates)
            continue
        if isinstance(leader, SpectralMetric):
            leader.take_in(state)
            count_of_updates(leader, before + updates)
        else:
            earlier = _copied(leader.metric_state)
            _set(leader, state, updates)
            add_earlier(leader, earlier, before)
    place.note_other_states()


def _set(leader: Metric, state: Mapping[str, Any], updates: int) -> None:
    for name, value in _copied(state).items():
        setattr(leader, name, value)
    count_of_updates(leader, updates)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors in new lists: torchmetrics empties the lists among states in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def check_places(own: LayerMetrics, other: LayerMetrics) -> None:
    """Raise a ValueError if another probe's sums of a layer cannot be added to this probe's."""
    (sketch, widths), (other_sketch, other_widths) = own.widths(), other.widths()
    fits = sketch == other_sketch or not any(widths) or not any(other_widths)
    pairs = zip(widths, other_widths, strict=True)
    if not fits or any(width and other_width and width != other_width for width, other_width in pairs):
        described = (
            f"{max(each)} features" + (f" in a sketch of {size} columns" if size else "")
            for size, each in ((sketch, widths), (other_sketch, other_widths))
        )
        raise ValueError(f"expected layer {own.layer!r} with {next(described)}, got {next(described)}")


def merge_places(own: LayerMetrics, other: LayerMetrics) -> None:
    """Add another probe's sums of a layer, which must fit; see :func:`check_places`."""
    if other.sketch_size is not None and not own.is_sketched:
        own.sketch(other.sketch_size)
    for leader, other_leader in zip(own.leaders, other.leaders, strict=True):
        if other_leader.update_count:
            merge = leader.merge_for_all if isinstance(leader, SpectralMetric) else leader.merge_state
            merge(other_leader)
    own.samples, own.forwards = own.samples + other.samples, own.forwards + other.forwards
    own.ran = max(own.ran, other.ran)


class LayerWindow:
    """The sums of one layer in one stage that each reader has yet to read.

    Args:
        place: the layer; it holds all sums after :meth:`join`.
    """

    def __init__(self, place: LayerMetrics) -> None:
        self._place = place
        self._earlier: Taken | None = None  # set aside while the layer holds the later sums
        self._pieces: list[Taken] = []  # the sums that some reader has yet to read, in order
        self._begins: dict[str, int] = {}  # reader -> the first piece that it has yet to read
        self._given: dict[str, Taken] = {}  # reader -> what it has yet to read before these

    def advance(self, reader: str) -> None:
        """Begin a reader's window here: its first, or the next after it has read everything."""
        self.join()
        self._place.before_update = self._cut
        self._begins[reader] = len(self._pieces)
        self._given.pop(reader, None)
        self._drop()

    def give(self, reader: str, taken: Taken) -> None:
        """Have a reader who begins here read this first, which the layer holds already."""
        self._given[reader] = taken

    def close(self, reader: str) -> None:
        """Forget a reader."""
        self.join()
        self._begins.pop(reader, None)
        self._given.pop(reader, None)
        self._drop()
        if not self._begins:
            self._place.before_update = None

    def join(self) -> None:
        """Merge the sums that were set aside, so that the layer holds all sums."""
        if self._earlier is None:
            return
        earlier, self._earlier = self._earlier, None
        place, piece = self._place, take_out(self._place, to_merge=True)
        whole = piece
        if any(updates for _, _, updates in earlier):
            put_back(place, earlier)
            merge_in(place, piece)
            whole = take_out(place, to_merge=True)
        if self._pieces and len(self._pieces) not in self._begins.values():  # no reader begins between the two
            put_back(place, self._pieces.pop())
            merge_in(place, piece)
            piece = take_out(place, to_merge=True)
        self._pieces.append(piece)
        put_back(place, whole)

    @contextlib.contextmanager
    def only(self, reader: str) -> Iterator[None]:
        """Inside, the layer holds only what a reader has yet to read."""
        self.join()
        whole = take_out(self._place, to_merge=True)
        try:
            given = [self._given[reader]] if reader in self._given else []
            for piece in [*given, *self._pieces[self._begins[reader] :]]:
                merge_in(self._place, piece)
            yield
        finally:
            put_back(self._place, whole)

    def _cut(self) -> None:
        """Set all sums aside; called before an observation is added."""
        if self._earlier is None:
            self._earlier = take_out(self._place, to_merge=True)

    def _drop(self) -> None:
        """Forget the pieces that all readers have read."""
        read = min(self._begins.values(), default=len(self._pieces))
        del self._pieces[:read]
        self._begins = {reader: begin - read for reader, begin in self._begins.items()}


class Windows:
    """The windows of all layers of a probe; the caller holds the lock of the probe's router."""

    def __init__(self, places: Mapping[tuple[str, str], LayerMetrics]) -> None:
        self._places = places
        self._windows: dict[tuple[str, str], LayerWindow] = {}

    def open(self, reader: str, stage: str) -> None:
        """Begin a reader's windows of a stage; a reader that has windows begins again."""
        for key, place in self._places.items():
            if key[0] == stage and key not in self._windows:
                self._windows[key] = LayerWindow(place)
        self.advance(reader, stage)

    def advance(self, reader: str, stage: str, layers: Iterable[str] | None = None) -> None:
        """Begin a reader's next window of these layers of a stage; None: of all layers."""
        for window in self._of(stage, layers):
            window.advance(reader)

    def readers(self) -> list[tuple[str, str]]:
        """Each reader with a stage that it reads; the same on all processes, in one order."""
        return sorted({(reader, key[0]) for key, window in self._windows.items() for reader in window._begins})

    def give(self, reader: str, taken: Mapping[tuple[str, str], Taken]) -> None:
        """Have a reader who begins here read this of some layers first, which they hold already."""
        for key, each in taken.items():
            self._windows[key].give(reader, each)

    def close(self, reader: str, stage: str) -> None:
        """Forget a reader in a stage."""
        for window in self._of(stage):
            window.close(reader)

    def join(self) -> None:
        """Merge the sums that were set aside, so that the probe holds all sums."""
        for window in self._windows.values():
            window.join()

    def forget(self) -> None:
        """Begin new windows for all readers, such as after other states have been loaded."""
        for window in self._windows.values():
            for reader in list(window._begins):
                window.advance(reader)

    @contextlib.contextmanager
    def only(self, reader: str, stage: str) -> Iterator[None]:
        """Inside, the probe holds only the sums of a stage that a reader has yet to read."""
        with contextlib.ExitStack() as stack:
            for window in self._of(stage):
                stack.enter_context(window.only(reader))
            yield

    def _of(self, stage: str, layers: Iterable[str] | None = None) -> list[LayerWindow]:
        chosen = None if layers is None else set(layers)
        return [
            window
            for (each_stage, layer), window in self._windows.items()
            if each_stage == stage and (chosen is None or layer in chosen)
        ]


def save_remembered(
    destination: dict[str, Any], prefix: str, remembered: Mapping[str, Any], steps: Steps
) -> None:
    """Put the memory of the readers of windows, and the step of the optimiser, into a state dict."""
    if remembered:
        text = json.dumps(memory(remembered, steps)).encode()
        destination[prefix + "remembered"] = torch.tensor(list(text), dtype=torch.uint8)


def load_remembered(
    state_dict: dict[str, Any], prefix: str, remembered: dict[str, dict[str, Any]], steps: Steps
) -> None:
    """Take the memory of the readers of windows out of a state dict; readers without an entry begin again."""
    saved = state_dict.pop(prefix + "remembered", None)
    if saved is not None:
        take_over(json.loads(bytes(saved.tolist())), remembered, steps)


def save_updates(destination: dict[str, Any], start: str, place: LayerMetrics) -> None:
    """Put into a state dict how often metrics of other libraries were updated, which weighs merges."""
    for name, leader in _others(place):
        destination[f"{start}{name}.update_count"] = torch.tensor(count_of_updates(leader))


def load_updates(state_dict: dict[str, Any], start: str, place: LayerMetrics) -> None:
    """Take out of a state dict what :func:`save_updates` put there; up to 0.2.0 there was nothing."""
    for name, leader in _others(place):
        if (saved := state_dict.pop(f"{start}{name}.update_count", None)) is not None:
            count_of_updates(leader, int(saved))


def _others(place: LayerMetrics) -> list[tuple[str, Any]]:
    """The metrics of other libraries; metrics of this package show by their sums if they have data."""
    return [(name, leader) for name, leader in place.kept.items() if not isinstance(leader, SpectralMetric)]


def memory(remembered: Mapping[str, Any], steps: Steps) -> dict[str, Any]:
    """The memory of the readers of windows, and the step of the optimiser, for JSON."""
    return {"step": steps.step, "readers": remembered}


def take_over(saved: Mapping[str, Any], remembered: dict[str, dict[str, Any]], steps: Steps) -> None:
    """Restore the result of :func:`memory`; readers without an entry begin again."""
    steps.step = saved["step"]
    for reader in {*remembered, *saved["readers"]}:
        own = remembered.setdefault(reader, {})
        own.clear()  # the reader holds this dict
        own.update(saved["readers"].get(reader, {}))
