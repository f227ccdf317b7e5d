"""The state of a probe of all processes as one, so that a training can go on from it exactly.

It has the merged sums of all layers, what the readers of windows have yet to read, and the progress of each
process, which decides what is drawn next. The first process saves it. After loading, the sums of each layer
belong to one process, and each process draws as it would have. Among another number of processes, each goes on
from the furthest, so that nothing is drawn twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.probing.facts import STAGES, Place, module_key
from spectralmetrics.probing.probe import LayerProbe
from spectralmetrics.probing.processes import agreed, gather_agreed, is_first, is_merged, is_one_of_several
from spectralmetrics.probing.windows import Taken, merge_in, take_out
from spectralmetrics.sums.merging import gather_objects

WholeState: TypeAlias = dict[str, Any]
"""The state dict of each process, with merged sums; each sum is in one state dict only.

``"probe"`` is the first process' state dict, ``"others"`` the others' state dicts, ``"layers"`` the layers of
each, and ``"windows"`` has by reader and stage the first two of these for rows that the reader has yet to read.
"""
STATES = ("probe", "others", "layers", "windows")
"""The keys of a whole state."""
_Layers: TypeAlias = Sequence[Sequence[str]]  # of each process
_State: TypeAlias = dict[str, Any]
_Share: TypeAlias = dict[Place, list[_State]]  # by reader and stage, and all: states that are added up
_ALL = ("", "")
_PROGRESS = (".draws", ".deals")  # among a metric's saved states
_SAMPLES = 1  # the column of the progress of layers


def whole_state(probe: LayerProbe, without: Collection[str] = ()) -> WholeState | None:
    """The observations of all processes on the first one, None on the others; all processes call it.

    Args:
        probe: a persistent probe.
        without: stages whose observations are left out.
    """
    layers = gather_objects(list(probe._layers))
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
    if not is_first(None):
        return None
    return {"probe": states[0], "others": states[1:], "layers": layers, "windows": windows}


def load_whole_state(probe: LayerProbe, saved: WholeState | None) -> list[str]:
    """Go on from what :func:`whole_state` gave; all processes call it, with a probe that has observed nothing.

    Args:
        probe: a persistent probe, with the readers of windows that go on.
        saved: counts on the first process; an earlier release saved ``"probe"`` alone.

    Returns:
        On the first process, the layers and metrics that the state has nothing of.

    Raises:
        ValueError: for layers that no process probes, or metrics that the probe lacks; for what
            ``load_state_dict`` raises.
    """
    layers = gather_objects(list(probe._layers))
    dealt: list[_Share] = []
    lacking: list[str] = []
    error: BaseException | None = None
    try:
        if saved is not None and is_first(None):
            dealt, lacking = _dealt(saved, layers), _lacking(saved, layers, probe)
    except Exception as raised:
        error = raised
    # The first one's share is most of it, and stays where it is.
    of_others = gather_agreed(dealt[1:], error, None)[0]
    mine = dealt[0] if is_first(None) else of_others[dist.get_rank() - 1]
    agreed(lambda: _load(probe, mine), [None] if is_one_of_several() else [])
    return lacking


def _states(probe: LayerProbe, layers: _Layers) -> list[_State]:
    """The states of all processes on the first one; its own, in the place of the first, on the others."""
    with probe.merged():
        state = {key: _copied(value) for key, value in probe.state_dict().items()}
    if not is_one_of_several():
        return [state]
    rank = dist.get_rank()
    for (stage, layer), place in probe._places.items():
        for name, leader in place.kept.items():
            if not (isinstance(leader, SpectralMetric) and is_merged(leader)):
                continue  # it holds what this process has observed
            sharing = dist.get_process_group_ranks(leader.process_group)
            if any(layer in layers[other] for other in sharing if other < rank):
                start = f"{_start(stage, layer)}{name}."
                for key in [key for key in state if key.startswith(start) and not key.endswith(_PROGRESS)]:
                    del state[key]
    others = gather_objects(state if rank else None)[1:]
    return [state, *others] if rank == 0 else [state]


def _copied(value: Any) -> Any:
    return [each.clone() for each in value] if isinstance(value, list) else value.clone()


def _start(stage: str, layer: str) -> str:
    """The beginning of a layer's keys in a probe's state dict."""
    return f"metrics.{module_key(stage, layer)}."


def _dealt(saved: WholeState, layers: _Layers) -> list[_Share]:
    """The share of each process in what was saved."""
    if "layers" not in saved:  # of an earlier release, by the first process
        state = saved["probe"]
        memory = {key: value for key, value in state.items() if key == "remembered"}
        return [{_ALL: [state if rank == 0 else memory]} for rank in range(len(layers))]
    before = saved["layers"]
    windows = {
        (reader, stage): each
        for reader, of_reader in saved["windows"].items()
        for stage, each in of_reader.items()
    }
    found: list[_Share] = [{} for _ in layers]
    for key, each in {**windows, _ALL: saved}.items():
        states = [each["probe"], *each["others"]]
        shares = [[state] for state in states] if before == layers else _regrouped(states, before, layers)
        for own, share in zip(found, shares, strict=True):
            own[key] = share
    return found


def _lacking(saved: WholeState, layers: _Layers, probe: LayerProbe) -> list[str]:
    """The layers of these processes, and the metrics of the probe, that a state has nothing of.

    Raises:
        ValueError: for a metric of the state that the probe lacks.
    """
    if "layers" not in saved:  # of an earlier release, which did not say
        return []
    keys = (key for state in (saved["probe"], *saved["others"]) for key in state)
    names = {parts[2] for key in keys if (parts := key.split("."))[0] == "metrics"}
    groups = [set(group) for place in probe._places.values() for group in place.templates.groups]
    if missing := sorted(names.difference(*groups)):
        raise ValueError(
            f"expected the state of metrics that this probe has, got a state of {', '.join(map(repr, missing))}"
        )
    known = {layer for own in saved["layers"] for layer in own}
    new = [layer for own in layers for layer in own if layer not in known]
    return list(
        dict.fromkeys([*new, *(name for group in groups if not names & group for name in sorted(group))])
    )


def _load(probe: LayerProbe, share: _Share) -> None:
    windows = {reader: share[reader] for reader in probe._windows.readers() if reader in share}
    kept = {reader: _taken(probe, states) for reader, states in windows.items()}
    _hold(probe, share[_ALL])
    for (reader, stage), taken in kept.items():
        probe._windows.give(reader, {place: each for place, each in taken.items() if place[0] == stage})


def _hold(probe: LayerProbe, states: Sequence[_State]) -> None:
    """Give a probe the sums of some states, added up."""
    first, *more = states
    added = [_taken(probe, [state]) for state in more]
    probe.load_state_dict(first, strict="progress" in first)
    for each in added:
        for place, taken in each.items():
            merge_in(probe._places[place], taken)


def _taken(probe: LayerProbe, states: Sequence[_State]) -> dict[Place, Taken]:
    """The sums of some states, added up; the probe holds nothing afterwards."""
    _hold(probe, states)
    found = {place: take_out(each, to_merge=True) for place, each in probe._places.items()}
    probe.reset()
    return found


def _regrouped(states: Sequence[_State], before: _Layers, layers: _Layers) -> list[list[_State]]:
    """For processes with these layers, states to add up: together they are what others have saved.

    Args:
        states: the state dict of each process that has saved.
        before: the layers of each of these.
        layers: the layers of each process now.

    Raises:
        ValueError: for a layer that no process has now.
    """
    known = {layer for own in before for layer in own}
    if missing := sorted(known - {layer for own in layers for layer in own}):
        raise ValueError(
            "expected the state of layers that this probe has on some process, got a state of"
            f" {', '.join(map(repr, missing))}"
        )
    shares: list[list[_State]] = []
    for rank, own in enumerate(layers):
        progress = _progress(states, before, layers, own)
        # Of each layer the first process that has it takes the sums of all.
        taken = {layer for layer in own if not any(layer in others for others in layers[:rank])}
        share: list[_State] = []
        for state, its in zip(states, before, strict=True):
            part = {
                key: value
                for stage in STAGES
                for layer in taken.intersection(its)
                for key, value in state.items()
                if key.startswith(_start(stage, layer)) and not key.endswith(_PROGRESS)
            }
            if part or not share:
                share.append(part | progress)
        shares.append(share)
    return shares


def _progress(states: Sequence[_State], before: _Layers, layers: _Layers, own: Sequence[str]) -> _State:
    """The progress for a process with these layers: the furthest of all, so that nothing is drawn twice."""
    found: _State = {}
    for key, value in ((key, value) for state in states for key, value in state.items()):
        if key.endswith(_PROGRESS) and any(
            key.startswith(_start(stage, name)) for stage in STAGES for name in own
        ):
            found[key] = max(value, found.get(key, value))
    progress = []
    for stage, layer in ((stage, layer) for stage in STAGES for layer in own):
        rows = [
            state["progress"][STAGES.index(stage) * len(its) + its.index(layer)]
            for state, its in zip(states, before, strict=True)
            if layer in its
        ]
        progress.append(torch.stack(rows or [torch.zeros_like(states[0]["progress"][0])]).amax(0))
        samples = sum(int(row[_SAMPLES]) for row in rows)
        progress[-1][_SAMPLES] = math.ceil(samples / sum(layer in others for others in layers))
    found["progress"] = torch.stack(progress)
    found["steps"] = torch.stack([state["steps"] for state in states]).amax(0)
    order = dict.fromkeys(
        its[number]
        for state, its in zip(states, before, strict=True)
        for number in state["forward_order"].tolist()
    )
    found["forward_order"] = torch.tensor([own.index(name) for name in order if name in own], dtype=torch.int64)
    return found | {key: value for key, value in states[0].items() if key == "remembered"}
