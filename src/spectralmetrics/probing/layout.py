"""Which layers of a model put out sequences with time first, although their own type does not tell."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import nn

from spectralmetrics.probing.observations import is_time_first
from spectralmetrics.probing.selection import named_modules, unwrap


class Layout(NamedTuple):
    """What is known of the layout (N, T, D) or (T, N, D) of the layers' sequences.

    Attributes:
        time_first: layers that put out (T, N, D).
        unsure: layers of which nothing tells, in a model some part of which has time first.
    """

    time_first: frozenset[str]
    unsure: frozenset[str]


def find_layout(
    model: nn.Module, layers: Mapping[str, nn.Module], batch_first: bool | None, selected: Container[str]
) -> Layout:
    """The layout of layers whose own type does not tell.

    Args:
        model: that they are part of.
        layers: by qualified name.
        batch_first: what the user says; None goes by what encloses a layer.
        selected: layers whose output a function of the user's takes apart: these are taken by shape.

    >>> encoder = nn.TransformerEncoderLayer(8, 2)  # time first, as its type says
    >>> find_layout(encoder, {"linear1": encoder.linear1}, None, ()).time_first
    frozenset({'linear1'})
    """
    modules = named_modules(unwrap(model))
    root = unwrap(model)
    has_time_first = any(is_time_first(module) for module in modules.values())
    time_first, unsure = set(), set()
    for name, module in layers.items():
        if name in selected or is_time_first(module) is not None:
            continue
        if batch_first is not None:
            told: bool | None = not batch_first
        else:
            parts = name.split(".")[:-1]
            around = [modules.get(".".join(parts[:length])) for length in range(len(parts), 0, -1)]
            told = next((t for each in [*around, root] if (t := is_time_first(each)) is not None), None)
        if told:
            time_first.add(name)
        elif told is None and has_time_first:
            unsure.add(name)
    return Layout(frozenset(time_first), frozenset(unsure))
