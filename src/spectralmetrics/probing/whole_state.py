"""The state of a probe of all processes as one, so that a training can go on from it exactly.

It has the merged sums of all layers, what the readers of windows have yet to read, and the progress of each
process, which decides what is drawn next. The first process saves it. After loading, the sums of each layer
belong to one process, and each process draws as it would have. Among another number of processes, each goes on
from the furthest, so that nothing is drawn twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.probing.exchange import STAGES
from spectralmetrics.probing.identity import is_first, is_one_of_several
from spectralmetrics.probing.keys import module_key
from spectralmetrics.probing.probe import LayerProbe
from spectralmetrics.probing.processes import agreed, gather_agreed, is_merged
from spectralmetrics.probing.windows import Taken, take_out
from spectralmetrics.sums.merging import gather_objects

WholeState: TypeAlias = dict[str, Any]
"""The state dict of each process, with merged sums, of which each is in one state dict alone.

``"probe"`` is that of the first process, ``"others"`` those of the others, ``"layers"`` the layers of each, and
``"windows"`` has by reader and stage the first two of these for what that reader has yet to read.
"""
STATES = ("probe", "others", "layers", "windows")
"""The keys of a whole state."""
_State: TypeAlias = dict[str, Any]
_PROGRESS = ("draws", "deals")  # among a metric's saved states


def whole_state(probe: LayerProbe, without: Iterable[str] = ()) -> WholeState | None:
    """What all processes have observed, on the first one, and None on the others; all processes call it.

    Args:
        probe: a persistent probe.
        without: stages whose observations are left out.
    """
    layers = gather_objects(list(probe._layers)) if is_one_of_several() else [list(probe._layers)]
    with probe._without(without):
        states = _states(probe, layers)
    windows: dict[str, dict[str, WholeState]] = {}
    for reader, stage in probe._windows.readers():
        others = [each for each in STAGES if each != stage]
        with probe._only(reader, stage), probe._without(others):
            found = _states(probe, layers)
        for state, whole in zip(found, states, strict=True):
            for key, value in state.items():  # a reader that has yet to read all of it keeps no second copy
                if isinstance(value, Tensor) and key in whole and torch.equal(value, whole[key]):
                    state[key] = whole[key]
        windows.setdefault(reader, {})[stage] = {"probe": found[0], "others": found[1:]}
    if not is_first():
        return None
    return {"probe": states[0], "others": states[1:], "layers": layers, "windows": windows}


def load_whole_state(probe: LayerProbe, saved: WholeState | None) -> None:
    """Go on from what :func:`whole_state` gave; all processes call it, with a probe that has observed nothing.

    Args:
        probe: a persistent probe, with the readers of windows that go on.
        saved: counts on the first process; an earlier release saved ``"probe"`` alone.

    Raises:
        ValueError: for layers that no process probes; for what ``load_state_dict`` raises.
    """
    layers = gather_objects(list(probe._layers)) if is_one_of_several() else [list(probe._layers)]
    dealt: list[dict[tuple[str, str], _State]] = []
    error: BaseException | None = None
    try:
        dealt = _dealt(saved, layers) if saved is not None and is_first() else []
    except Exception as raised:
        error = raised
    if is_one_of_several():
        # The first one's share is most of it, and stays where it is.
        of_others = gather_agreed(dealt[1:], error, None)[0]
        mine = dealt[0] if is_first() else of_others[dist.get_rank() - 1]
    elif error is not None:
        raise error
    else:
        (mine,) = dealt
    agreed(lambda: _load(probe, mine), [None] if is_one_of_several() else [])


def _states(probe: LayerProbe, layers: Sequence[Sequence[str]]) -> list[_State]:
    """The states of all processes on the first one; its own, in the place of the first, on the others."""
    with probe.merged():
        state = {key: _copied(value) for key, value in probe.state_dict().items()}
    if not is_one_of_several():
        return [state]
    rank = dist.get_rank()
    for row, ((stage, layer), place) in enumerate(probe._places.items()):
        for column, (name, leader) in enumerate(place.kept.items()):
            sharing = dist.get_process_group_ranks(leader.process_group) if is_merged(leader) else [rank]
            if any(layer in layers[other] for other in sharing if other < rank):
                start = f"{_start(stage, layer)}{name}."
                for key in [key for key in state if key.startswith(start) and not key.endswith(_PROGRESS)]:
                    del state[key]
                state["updates"][row, column] = 0
    others = gather_objects(state if rank else None)[1:]
    return [state, *others] if rank == 0 else [state]


def _copied(value: Any) -> Any:
    return [each.clone() for each in value] if isinstance(value, list) else value.clone()


def _start(stage: str, layer: str) -> str:
    """The beginning of a layer's keys in a probe's state dict."""
    return f"metrics.{module_key(stage, layer)}."


def _dealt(saved: WholeState, layers: Sequence[Sequence[str]]) -> list[dict[tuple[str, str], _State]]:
    """For each process (reader, stage) -> its state dict, and under two empty names that of all."""
    before = saved.get("layers", layers[:1])
    windows = {
        (reader, stage): each
        for reader, of_it in saved.get("windows", {}).items()
        for stage, each in of_it.items()
    }
    found: list[dict[tuple[str, str], _State]] = [{} for _ in layers]
    for key, each in {**windows, ("", ""): saved}.items():
        states = [each["probe"], *each.get("others", ())]
        for own, state in zip(
            found, states if before == layers else _regrouped(states, before, layers), strict=True
        ):
            own[key] = state
    return found


def _load(probe: LayerProbe, states: Mapping[tuple[str, str], _State]) -> None:
    whole = states["", ""]
    kept: dict[tuple[str, str], dict[tuple[str, str], Taken]] = {}
    for reader, stage in probe._windows.readers():
        if (reader, stage) in states:
            probe.load_state_dict(states[reader, stage])
            with probe._router.lock:
                kept[reader, stage] = {
                    key: take_out(place, to_merge=True)
                    for key, place in probe._places.items()
                    if key[0] == stage
                }
            probe.reset()
    probe.load_state_dict(whole)
    for (reader, _), of_layers in kept.items():
        probe._windows.give(reader, of_layers)


def _regrouped(
    states: Sequence[_State], before: Sequence[Sequence[str]], layers: Sequence[Sequence[str]]
) -> list[_State]:
    """The states of processes that have these layers, of those of others: all together have what was saved."""
    known = {layer for own in before for layer in own}
    if missing := sorted(known - {layer for own in layers for layer in own}):
        raise ValueError(
            "expected the state of layers that this probe has on some process, got that of"
            f" {', '.join(map(repr, missing))}"
        )
    found: list[_State] = []
    for rank, own in enumerate(layers):
        state: _State = {}
        for layer in own:
            takes_sums = not any(layer in others for others in layers[:rank])
            for stage in STAGES:
                for each, _ in _having(states, before, layer):
                    for key, value in each.items():
                        if not key.startswith(_start(stage, layer)):
                            continue
                        if key.endswith(_PROGRESS):
                            state[key] = max(value, state.get(key, value))
                        elif takes_sums:
                            state.setdefault(key, value)
        found.append(state | _progress(states, before, layers, own))
    return found


def _having(
    states: Sequence[_State], before: Sequence[Sequence[str]], layer: str
) -> list[tuple[_State, Sequence[str]]]:
    return [(state, own) for state, own in zip(states, before, strict=True) if layer in own]


def _progress(
    states: Sequence[_State],
    before: Sequence[Sequence[str]],
    layers: Sequence[Sequence[str]],
    own: Sequence[str],
) -> _State:
    """How far a process with these layers is: as the furthest, so that nothing is drawn twice."""
    first = states[0]
    found = {key: first[key] for key in ("remembered",) if key in first}
    for name in ("progress", "updates"):
        rows = []
        for stage, layer in ((stage, layer) for stage in STAGES for layer in own):
            of_layer = [
                state[name][STAGES.index(stage) * len(its) + its.index(layer)]
                for state, its in _having(states, before, layer)
                if name in state
            ]
            rows.append(torch.stack(of_layer).amax(0) if of_layer else torch.zeros_like(first[name][0]))
            if name == "progress" and of_layer:
                samples = sum(int(row[1]) for row in of_layer)
                rows[-1][1] = math.ceil(samples / sum(layer in others for others in layers))
        found[name] = torch.stack(rows)
    found["steps"] = torch.stack([state["steps"] for state in states]).amax(0)
    order = dict.fromkeys(
        its[index]
        for state, its in zip(states, before, strict=True)
        for index in state["forward_order"].tolist()
    )
    found["forward_order"] = torch.tensor(
        [own.index(layer) for layer in order if layer in own], dtype=torch.int64
    )
    return found
