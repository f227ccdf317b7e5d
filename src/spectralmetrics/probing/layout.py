"""The layout of layers' outputs: the dimension of the features, and sequences with time first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from spectralmetrics.layers import is_time_first, kind_of
from spectralmetrics.probing.selection import named_modules, unwrap
from spectralmetrics.torch_private import children_of


class Clue(NamedTuple):
    """A hint that a layer gives about the outputs of others around it.

    Attributes:
        is_last: True if its own features are the last dimension, False if they are the second.
        width: the number of features; None if it is not known.
    """

    is_last: bool
    width: int | None


_Cache: TypeAlias = dict[tuple[int, bool], list[Clue]]
"""Clues of modules, by their ``id`` and True for inputs."""


class Found(NamedTuple):
    """The dimension of the features of one tensor.

    Attributes:
        dim: not negative; 0 for a single sample without a batch.
        is_guess: True if neither a layer's type nor clues decide it.
    """

    dim: int
    is_guess: bool = False


@dataclass
class FeatureDim:
    """Finds the dimension of the features in the outputs of one layer, or in its inputs.

    Attributes:
        dim: the dimension by the layer's type, or by the layer before it in an ``nn.Sequential``; else None.
        spatial: see :class:`~spectralmetrics.layers.LayerKind`.
        takes_sequences: likewise.
        clues: where ``dim`` is None, clues of the layers around it, the closest first, in groups: layers inside
            it, beside it, beside the module around it, and so on.
        sequences_by_default: True if three dimensions are (N, T, D) where clues leave a doubt.

    >>> import torch
    >>> FeatureDim(clues=[[Clue(is_last=False, width=16)]]).find(torch.zeros(8, 16, 50))
    Found(dim=1, is_guess=False)
    >>> FeatureDim(clues=[[Clue(is_last=False, width=16)]]).find(torch.zeros(8, 50, 16))
    Found(dim=2, is_guess=False)
    """

    dim: int | None = None
    spatial: int | None = None
    takes_sequences: bool = False
    clues: list[list[Clue]] = field(default_factory=list)
    sequences_by_default: bool = False
    _decided: dict[int, int] = field(default_factory=dict)  # number of dimensions -> dimension of the features

    def find(self, values: Tensor) -> Found:
        """The dimension of the features of a tensor with at least one."""
        ndim = values.ndim
        if ndim == 1:
            return Found(0)
        if self.dim is not None:
            if ndim - 1 == self.spatial:
                return Found(0)  # (C, *spatial)
            return Found(self.dim % ndim if -ndim <= self.dim < ndim else ndim - 1)
        if ndim == 2:
            return Found(1)
        found = self._by_clues(values)
        if not found.is_guess:
            self._decided[ndim] = found.dim
        elif ndim in self._decided:
            return Found(self._decided[ndim])
        elif self.sequences_by_default and ndim == 3:
            return Found(2)
        return found

    def _by_clues(self, values: Tensor) -> Found:
        second, last = values.shape[1], values.shape[-1]
        at = {True: values.ndim - 1, False: 1}
        for group in self.clues:
            # Only one of the two dimensions has this width: as in that layer, or moved there by a function.
            for is_moved in (False, True):
                for is_last, width in group:
                    here, there = (last, second) if is_last is not is_moved else (second, last)
                    if width == here != there:
                        return Found(at[is_last is not is_moved])
        every = [clue for group in self.clues for clue in group]
        fitting = [clue for clue in every if clue.width == second] or every
        if not fitting:
            return Found(1 if values.ndim > 3 else 2, is_guess=True)
        is_last = fitting[0].is_last
        if values.ndim == 3 and 0 < values.stride(1) < values.stride(2):  # a transposed tensor
            return Found(at[not is_last], is_guess=True)
        return Found(at[is_last], is_guess=any(clue.is_last is not is_last for clue in fitting))


class At(FeatureDim):
    """Features whose dimension has been found."""

    def __init__(self, found: Found, takes_sequences: bool) -> None:
        super().__init__(takes_sequences=takes_sequences)
        self._found = found

    def find(self, values: Tensor) -> Found:
        """See :class:`.FeatureDim`."""
        return self._found


def dim_of(module: nn.Module, *, of_inputs: bool = False) -> FeatureDim:
    """Finds the features of a layer by its own type.

    >>> import torch
    >>> dim_of(nn.Conv1d(3, 16, 5)).find(torch.zeros(8, 16, 50))
    Found(dim=1, is_guess=False)
    """
    by_type = _by_type(module, of_inputs)
    return by_type if isinstance(by_type, FeatureDim) else FeatureDim(clues=[_clues(module, of_inputs, {})])


def find_dims(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch_first: bool | None = None,
    *,
    of_inputs: bool = False,
) -> dict[str, FeatureDim]:
    """Finds the features of a model's layers: by their types, or else by the layers around them.

    ``batch_first``, True or False, takes three dimensions for a sequence where the layout is in doubt.

    >>> model = nn.Sequential(nn.Conv1d(3, 16, 5), nn.GELU())
    >>> find_dims(model, {"1": model[1]})["1"].dim
    1
    """
    root = unwrap(model)
    modules = {**named_modules(root), "": root}
    times = Counter(id(module) for name, module in modules.items() if name)
    cache: _Cache = {}
    dims = {}
    for name, module in layers.items():
        path = "" if module is root else name
        by_type = _by_type(module, of_inputs)
        if by_type == "input" and times[id(module)] == 1:
            by_type = _before(path, modules)
        if isinstance(by_type, FeatureDim):
            dims[name] = by_type
        else:
            clues = list(_surroundings(path, modules, of_inputs, cache))
            dims[name] = FeatureDim(clues=clues, sequences_by_default=batch_first is not None)
    return dims


def widths_around(model: nn.Module, name: str) -> list[list[int]]:
    """The numbers of features of the layers around one, the closest first, in the groups of ``clues``."""
    root = unwrap(model)
    modules = {**named_modules(root), "": root}
    around = _surroundings(name if name in modules else "", modules, False, {})
    return [[clue.width for clue in group if clue.width is not None] for group in around]


def _by_type(module: nn.Module, of_inputs: bool) -> FeatureDim | Literal["input"] | None:
    """The layout by a layer's type; ``"input"`` if it keeps its input's layout, None if it is not known."""
    module = unwrap(module)
    if _is_plain_sequence(module):
        parts = list(module.children())
        # The last part that does not keep its input's layout decides; for inputs the first.
        for part in parts if of_inputs else reversed(parts):
            if (by_type := _by_type(part, of_inputs)) != "input":
                return by_type
        return "input"
    kind, has_its_forward = kind_of(module)
    if kind is None or not has_its_forward:
        return None
    dim = kind.dim_of(module)
    if isinstance(dim, str):
        return dim
    spatial = kind.in_spatial if of_inputs and kind.in_spatial else kind.spatial
    return FeatureDim(dim, spatial, kind.takes_sequences)


def _before(path: str, modules: Mapping[str, nn.Module]) -> FeatureDim | Literal["input"] | None:
    """The layout by the layers before another in an ``nn.Sequential``, which calls one after another."""
    while path:
        outer, _, own = path.rpartition(".")
        if not _is_plain_sequence(modules[outer]):
            return None
        earlier, _ = _beside(modules[outer], own)
        for each in earlier:
            if (by_type := _by_type(each, False)) != "input":
                return by_type
        path = outer
    return None


def _surroundings(
    path: str, modules: Mapping[str, nn.Module], of_inputs: bool, cache: _Cache
) -> Iterator[list[Clue]]:
    """Clues from inside a layer, from beside it, from beside the module around it, and so on."""
    yield _clues(modules[path], of_inputs, cache)
    while path:
        path, _, own = path.rpartition(".")
        earlier, later = _beside(modules[path], own)
        clues = [clue for each in earlier for clue in _clues(each, False, cache)]
        # The next layer's inputs are this layer's outputs. A layer used more than once may also run after it.
        clues += [
            clue for of_inputs in (True, False) for each in later for clue in _clues(each, of_inputs, cache)
        ]
        yield list(dict.fromkeys(clues))


def _beside(outer: nn.Module, own: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The parts of a module before one of them, the closest first, and the parts after it."""
    children = children_of(outer)
    parts = [unwrap(part) if part is not None else nn.Identity() for part in children.values()]
    index = list(children).index(own)
    return parts[:index][::-1], parts[index + 1 :]


def _clues(module: nn.Module, of_inputs: bool, cache: _Cache) -> list[Clue]:
    """Clues of the layers inside a module, or of the module if it is a layer; for outputs the last first.

    They are found once for each module and kept in ``cache``.
    """
    key = id(module), of_inputs
    if key not in cache:
        kind, _ = kind_of(module)
        if kind is not None:
            dim = kind.dim_of(module)
            clues = [Clue(dim == -1, kind.features_of(module, of_inputs=of_inputs))] if dim in (1, -1) else []
        else:
            parts = [unwrap(part) for part in module.children()]
            clues = [
                clue
                for part in (parts if of_inputs else reversed(parts))
                for clue in _clues(part, of_inputs, cache)
            ]
        cache[key] = list(dict.fromkeys(clues))
    return cache[key]


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class Layout(NamedTuple):
    """The layout of the layers' outputs.

    Attributes:
        dims: layer -> finder of its features; without layers whose output a user's function selects.
        time_first: layers whose sequences are (T, N, D).
        unsure: layers that may be either, in a model that has some layer with time first.
    """

    dims: dict[str, FeatureDim]
    time_first: frozenset[str]
    unsure: frozenset[str]


def find_layout(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch_first: bool | None,
    selected: Container[str],
    *,
    of_inputs: bool = False,
) -> Layout:
    """The layout of layers, by their types and by the layers around them.

    None for ``batch_first`` goes by the modules around a layer. Where a user's function selects from a layer's
    output, only the shape decides.

    >>> encoder = nn.TransformerEncoderLayer(8, 2)  # time first, as its type says
    >>> find_layout(encoder, {"linear1": encoder.linear1}, None, ()).time_first
    frozenset({'linear1'})
    """
    modules = named_modules(unwrap(model))
    root = unwrap(model)
    model_has_time_first = any(is_time_first(module) for module in modules.values())
    time_first, unsure = set(), set()
    layers = {name: module for name, module in layers.items() if name not in selected}
    for name, module in layers.items():
        if (own := is_time_first(module)) is not None:
            has_time_first: bool | None = own
        elif batch_first is not None:
            has_time_first = not batch_first
        else:
            parts = name.split(".")[:-1]
            around = [modules.get(".".join(parts[:length])) for length in range(len(parts), 0, -1)]
            flags = (is_time_first(each) for each in [*around, root])
            has_time_first = next((flag for flag in flags if flag is not None), None)
        if has_time_first:
            time_first.add(name)
        elif has_time_first is None and model_has_time_first:
            unsure.add(name)
    dims = find_dims(model, layers, batch_first, of_inputs=of_inputs)
    return Layout(dims, frozenset(time_first), frozenset(unsure))
