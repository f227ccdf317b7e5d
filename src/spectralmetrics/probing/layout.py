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
        is_last: whether its own features are the last dimension, and not the second.
        width: the number of them; None if it is not known.
    """

    is_last: bool
    width: int | None


_Known: TypeAlias = dict[tuple[int, bool], list[Clue]]
"""What modules tell, by their ``id`` and whether of inputs."""


class Found(NamedTuple):
    """The dimension of the features of one tensor.

    Attributes:
        dim: not negative; 0 for a single sample without a batch.
        is_guess: whether nothing told for sure.
    """

    dim: int
    is_guess: bool = False


@dataclass
class FeatureDim:
    """Finds the dimension of the features in what one layer puts out, or takes.

    Attributes:
        dim: as the layer's type, or what comes before it in an ``nn.Sequential``, tells; None if neither does.
        spatial: see :class:`~spectralmetrics.layers.LayerKind`.
        takes_sequences: likewise.
        clues: where ``dim`` is None, what the layers around it tell, the closest first, in groups: those inside
            it, those beside it, those beside what encloses it, and so on.
        sequences_by_default: whether three dimensions are (N, T, D) where clues leave a doubt.

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
    _decided: dict[int, int] = field(default_factory=dict)  # dimensions of an output -> the one of the features

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
            # A layer whose width only one of the two has: where its own features are, or moved by a function.
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
    told = _told(module, of_inputs)
    return told if isinstance(told, FeatureDim) else FeatureDim(clues=[_clues(module, of_inputs, {})])


def find_dims(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch_first: bool | None = None,
    *,
    of_inputs: bool = False,
) -> dict[str, FeatureDim]:
    """Finds the features of a model's layers: by their types, or else by the layers around them.

    Args:
        model: the model that they are part of.
        layers: layers by qualified name.
        batch_first: True or False says that three dimensions are a sequence where nothing tells for sure.
        of_inputs: True for the inputs of the layers, in place of their outputs.

    >>> model = nn.Sequential(nn.Conv1d(3, 16, 5), nn.GELU())
    >>> find_dims(model, {"1": model[1]})["1"].dim
    1
    """
    root = unwrap(model)
    modules = {**named_modules(root), "": root}
    times = Counter(id(module) for name, module in modules.items() if name)
    known: _Known = {}
    found = {}
    for name, module in layers.items():
        path = "" if module is root else name
        told = _told(module, of_inputs)
        if told == "input" and times[id(module)] == 1:
            told = _before(path, modules)
        if isinstance(told, FeatureDim):
            found[name] = told
        else:
            clues = list(_surroundings(path, modules, of_inputs, known))
            found[name] = FeatureDim(clues=clues, sequences_by_default=batch_first is not None)
    return found


def widths_around(model: nn.Module, name: str) -> list[list[int]]:
    """The numbers of features of the layers around one, the closest first, in the groups of ``clues``."""
    root = unwrap(model)
    modules = {**named_modules(root), "": root}
    around = _surroundings(name if name in modules else "", modules, False, {})
    return [[clue.width for clue in group if clue.width is not None] for group in around]


def _told(module: nn.Module, of_inputs: bool) -> FeatureDim | Literal["input"] | None:
    """The layout by a layer's type; ``"input"`` if dimensions stay where they are, None if it says nothing."""
    module = unwrap(module)
    if _is_plain_sequence(module):
        parts = list(module.children())
        # The last that does more than to leave dimensions where they are; of inputs the first.
        for part in parts if of_inputs else reversed(parts):
            if (told := _told(part, of_inputs)) != "input":
                return told
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
    """The layer before another in an ``nn.Sequential``, which calls one after another."""
    while path:
        outer, _, own = path.rpartition(".")
        if not _is_plain_sequence(modules[outer]):
            return None
        earlier, _ = _beside(modules[outer], own)
        for each in earlier:
            if (told := _told(each, False)) != "input":
                return told
        path = outer
    return None


def _surroundings(
    path: str, modules: Mapping[str, nn.Module], of_inputs: bool, known: _Known
) -> Iterator[list[Clue]]:
    """Clues from inside a layer, from beside it, from beside what encloses it, and so on."""
    yield _clues(modules[path], of_inputs, known)
    while path:
        path, _, own = path.rpartition(".")
        earlier, later = _beside(modules[path], own)
        told = [clue for each in earlier for clue in _clues(each, False, known)]
        # The next layer takes what this one puts out; one that is used more than once may also come after.
        told += [
            clue for of_inputs in (True, False) for each in later for clue in _clues(each, of_inputs, known)
        ]
        yield list(dict.fromkeys(told))


def _beside(outer: nn.Module, own: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The parts of a module that come before one of them, the closest first, and those that come after."""
    children = children_of(outer)
    parts = [unwrap(part) if part is not None else nn.Identity() for part in children.values()]
    index = list(children).index(own)
    return parts[:index][::-1], parts[index + 1 :]


def _clues(module: nn.Module, of_inputs: bool, known: _Known) -> list[Clue]:
    """Hints of the layers inside a module, itself if it is one: of outputs the last first.

    Each is asked once; what it tells is kept in ``known``.
    """
    key = id(module), of_inputs
    if key not in known:
        kind, _ = kind_of(module)
        if kind is not None:
            dim = kind.dim_of(module)
            told = [Clue(dim == -1, kind.features_of(module, of_inputs=of_inputs))] if dim in (1, -1) else []
        else:
            parts = [unwrap(part) for part in module.children()]
            told = [
                clue
                for part in (parts if of_inputs else reversed(parts))
                for clue in _clues(part, of_inputs, known)
            ]
        known[key] = list(dict.fromkeys(told))
    return known[key]


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class Layout(NamedTuple):
    """The layout of the layers' outputs.

    Attributes:
        dims: where the features of each layer are, but for those of which a function returns a part.
        time_first: layers whose sequences are (T, N, D).
        unsure: layers of which nothing tells, in a model some part of which has time first.
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
    """The layout of layers, by what they are and by what is around them.

    Args:
        model: the model that they are part of.
        layers: layers by qualified name.
        batch_first: what the user says; None goes by what encloses a layer.
        selected: layers whose output a function of the user's takes apart: these are taken by shape.
        of_inputs: True for the inputs of the layers, in place of their outputs.

    >>> encoder = nn.TransformerEncoderLayer(8, 2)  # time first, as its type says
    >>> find_layout(encoder, {"linear1": encoder.linear1}, None, ()).time_first
    frozenset({'linear1'})
    """
    modules = named_modules(unwrap(model))
    root = unwrap(model)
    has_time_first = any(is_time_first(module) for module in modules.values())
    time_first, unsure = set(), set()
    layers = {name: module for name, module in layers.items() if name not in selected}
    for name, module in layers.items():
        if (own := is_time_first(module)) is not None:
            told: bool | None = own
        elif batch_first is not None:
            told = not batch_first
        else:
            parts = name.split(".")[:-1]
            around = [modules.get(".".join(parts[:length])) for length in range(len(parts), 0, -1)]
            told = next((t for each in [*around, root] if (t := is_time_first(each)) is not None), None)
        if told:
            time_first.add(name)
        elif told is None and has_time_first:
            unsure.add(name)
    dims = find_dims(model, layers, batch_first, of_inputs=of_inputs)
    return Layout(dims, frozenset(time_first), frozenset(unsure))
