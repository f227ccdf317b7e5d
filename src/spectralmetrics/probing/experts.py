"""Experts of a mixture whose weights are stacked in one parameter: each is a layer of its own.

Such a module, as transformers has for Mixtral, Qwen3-MoE and most other mixtures, takes tokens and the experts
that each token goes to, and returns weighted sums, never the output of one expert. So (token, expert) pairs are
drawn, and the module's own forward runs once more on these, one expert for each token, with weight 1.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.layers import register_layer
from spectralmetrics.probing.beside import Labels, Masks
from spectralmetrics.probing.outputs import Routed, arguments_of
from spectralmetrics.probing.parts import LeftOut, Span, Split, is_dtensor, own_of, part_of, sent_rows
from spectralmetrics.probing.sampling import draw
from spectralmetrics.probing.selection import Selectors, named_modules, select_among, unwrap
from spectralmetrics.sums import Observations
from spectralmetrics.torch_private import bare_copy, waited

# Names of the second and the third argument of such a module's forward.
_INDEX = re.compile("ind|idx|expert")
_WEIGHT = re.compile("weight|score|prob")


class Expert(nn.Module):
    """Stands for one expert among the layers of a probe; it is part of no model and never runs.

    Args:
        whole: the module of all experts; not kept alive.
        index: the index of the expert, in the weights that this process has; None if another process has it.
    """

    def __init__(self, whole: nn.Module, index: int | None) -> None:
        super().__init__()
        self._whole = weakref.ref(whole)
        self.index = index

    @property
    def whole(self) -> nn.Module | None:
        """The module of all experts; None if it is gone."""
        return self._whole()

    @property
    def width(self) -> int:
        """The number of features of the expert's inputs and outputs; 0 if its weights do not show it."""
        return self._down()[0]

    @property
    def ceiling(self) -> int | None:
        """The largest rank of the expert's last matrix; None if the weights do not show it."""
        return min(self._down()) or None

    def _down(self) -> tuple[int, int]:
        """The number of output and input features of the expert's last matrix."""
        whole = self.whole
        last = getattr(whole, "down_proj", None)
        if not isinstance(last, Tensor) or last.ndim != 3 or getattr(whole, "has_post_expert_norm", False):
            return 0, 0
        _, first, second = last.shape
        return (second, first) if getattr(whole, "is_transposed", False) else (first, second)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """The expert's matrices, or the whole parameters if they are DTensors; they identify the expert."""
        for each in _stacked(self.whole):
            yield each if is_dtensor(each) else each.detach()[self.index or 0]


register_layer(Expert, dim=-1, in_features="width", out_features="width", ceiling=lambda expert: expert.ceiling)


def select_probed(
    model: nn.Module, layers: Selectors | None, exclude: Selectors | None, whole: set[nn.Module]
) -> dict[str, nn.Module]:
    """The layers of :func:`.select_layers`, with each expert of a mixture as a layer, also other processes'.

    The name of a module of experts selects all of them, ``"*.experts.[0-3]"`` some.
    Modules in ``whole`` are not split.
    """
    modules: dict[str, nn.Module] = {}
    parts: dict[str, list[str]] = {}
    for name, module in named_modules(unwrap(model)).items():
        modules[name] = module
        if module not in whole and (numbers := _numbers(module)):
            parts[name] = [f"{name}.{number}" for number, _ in numbers]
            modules.update((f"{name}.{number}", Expert(module, index)) for number, index in numbers)
    return select_among(model, modules, layers, exclude, parts)


def by_whole(layers: Mapping[str, nn.Module]) -> dict[nn.Module, Watched]:
    """Module of experts -> its probed experts."""
    by_module: dict[nn.Module, Watched] = {}
    for name, module in layers.items():
        if isinstance(module, Expert) and module.whole is not None:
            whole, _, number = name.rpartition(".")
            watched = by_module.setdefault(module.whole, Watched(whole))
            watched.number = max(watched.number, int(number) + 1)
            if not is_elsewhere(module):
                watched.experts[name] = module
    return by_module


def is_elsewhere(module: nn.Module) -> bool:
    """True if this is an expert that another process has."""
    return isinstance(module, Expert) and module.index is None


def _stacked(module: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of a module that hold a matrix for each of several experts."""
    own = [] if module is None else module.parameters(recurse=False)
    return [each for each in own if each.ndim == 3 and not isinstance(each, nn.UninitializedParameter)]


def _numbers(module: nn.Module) -> list[tuple[int, int | None]]:
    """The number of each expert and its index in this process' weights, None on other processes; or empty."""
    stacked = _stacked(module)
    if not stacked or len({len(each) for each in stacked}) > 1:
        return []
    names = arguments_of(module)
    if len(names) < 3 or not (_INDEX.search(names[1]) and _WEIGHT.search(names[2])):
        return []
    first = stacked[0]
    number = getattr(module, "num_experts", len(first))
    if is_dtensor(first) and 0 < number < len(first):  # experts are sharded, along the mesh's last dimension
        mesh: Any = first.device_mesh  # type: ignore[attr-defined]
        offset = mesh.get_local_rank(mesh.ndim - 1) * number
        here = range(offset, offset + number)
        return [(each, each - offset if each in here else None) for each in range(len(first))]
    return [(index, index) for index in range(len(first))]


@dataclass
class Pairs:
    """The tokens that one expert gets in one forward.

    Attributes:
        states: (T, D), all tokens.
        calls: the forward of the module.
        number: the number of the expert in the model.
        index: the index of the expert in the weights of this process.
    """

    states: Tensor
    calls: Calls
    number: int
    index: int

    @property
    def tokens(self) -> Tensor:
        """(n,), the indices of this expert's tokens."""
        return self.calls.tokens_of(self.number)

    @property
    def whole(self) -> Pairs | None:
        """The tokens that these were drawn from; None where none was drawn or no sum takes all rows."""
        whole = self.calls.whole
        return None if whole is None else Pairs(whole.states, whole, self.number, self.index)


class Calls:
    """One forward of a module of experts.

    Attributes:
        whole: the same with all tokens, if some were drawn before they travelled and a sum takes all rows.
    """

    whole: Calls | None = None

    def __init__(
        self, name: str, number: int, module: nn.Module, routed: Routed, masks: Masks, labels: Labels
    ) -> None:
        self.module = module
        self._number = number
        self.splits: tuple[Split, ...] = ()
        self.states = _plain(routed.states).detach()
        self.labels: Tensor | None = None
        self._index = _plain(routed.experts).detach()
        self._cast = routed.cast
        self._bare: nn.Module | None = None
        self._by_expert: list[Tensor] | None = None
        length, shape = len(self.states), tuple(self.states.shape)
        if masks.value is not None:
            fits = masks.value.numel() == length
            masks.note(name, shape, fits=fits)
            if fits:
                self._index = self._index.where(masks.value.reshape(-1, 1).to(self._index.device), -1)
        if labels.value is not None:
            fits = labels.value.numel() == length
            labels.note(name, shape, fits=fits)
            self.labels = labels.value.reshape(-1).to(self.states.device) if fits else None

    def tokens_of(self, number: int) -> Tensor:
        """(n,), the indices of an expert's tokens, in order; all experts together read the device once."""
        if self._by_expert is None:
            ordered, order = self._index.reshape(-1).sort(stable=True)
            numbers = torch.arange(self._number + 1, device=ordered.device, dtype=ordered.dtype)
            ends = torch.searchsorted(ordered, numbers).tolist()
            tokens = order // self._index.shape[1]
            self._by_expert = [tokens[start:end] for start, end in itertools.pairwise(ends)]
        return self._by_expert[number]

    def travel(self, split: Split, number: int, size: int | None, seed: int) -> None:
        """Send each token to the processes of its experts; all processes of a group call it together.

        Args:
            split: the group.
            number: the number of experts of each process.
            size: number of tokens to draw for each expert, over all processes; None: all.
            seed: seed of the random draws.
        """
        for each in self.splits:  # a process sends only its share of tokens that others have, too
            own = own_of(len(self._index), each)
            place = torch.arange(len(self._index), device=self._index.device)[:, None]
            self._index = self._index.where((place >= own.start) & (place < own.stop), -1)
        self.splits, self._by_expert, self.labels = (), None, None
        self._number = number * split.size
        tokens = [self.tokens_of(expert) for expert in range(number * split.size)]
        if size is not None:
            most, seed = Span(split.rank, split.rank + 1, split.size).of(size), seed + 1_000_003 * split.rank
            tokens = [_drawn(each, most, seed + expert) for expert, each in enumerate(tokens)]
        lengths = [len(each) for each in tokens]
        sent = torch.tensor(lengths, device=self.states.device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=split.group)
        counts = received.tolist()  # for each process in turn, for each of our experts
        rows = self.states[torch.cat(tokens)]
        by_process = [
            [sum(each[start : start + number]) for start in range(0, len(each), number)]
            for each in (counts, lengths)
        ]
        incoming, outgoing = by_process
        self.states = sent_rows(rows, incoming, outgoing, split.group)
        places = torch.arange(len(self.states), device=self.states.device).split(counts)
        first = split.rank * number
        nothing = self._index.new_empty(0)
        self._by_expert = [nothing] * first
        self._by_expert += [torch.cat(places[expert::number]) for expert in range(number)]

    def outputs(self, tokens: Tensor, index: int) -> Tensor:
        """(n, D), an expert's output for some tokens, or this process' summand of it."""
        states = self.states[tokens]
        if not len(tokens):
            return states
        if self._bare is None:
            self._bare = bare_copy(self.module, _of_this_process)
        experts = torch.full_like(tokens, index, dtype=self._index.dtype)[:, None]
        with _cast(states.device.type, self._cast):
            outputs: Tensor = self._bare(states, experts, states.new_ones(len(tokens), 1))
        return outputs


@dataclass(eq=False)
class Watched:
    """The probed experts of one module, for its hook.

    Attributes:
        name: the name of the module.
        experts: the experts of this process, by the names of their layers; kept alive.
        number: the number of experts, up to the last one that is probed.
        forwards: the number of forwards of the module so far.
    """

    name: str
    experts: dict[str, Expert] = field(default_factory=dict)
    number: int = 0
    forwards: int = 0

    def pairs(self, calls: Calls) -> list[tuple[str, Expert, Pairs]]:
        """The tokens of each expert in a forward, with the name of its layer."""
        return [
            (name, expert, Pairs(calls.states, calls, int(name.rpartition(".")[2]), expert.index or 0))
            for name, expert in self.experts.items()
        ]


def _drawn(tokens: Tensor, number: int, seed: int) -> Tensor:
    return draw(Observations(tokens[:, None]), number, seed).values[:, 0] if number else tokens[:0]


def _plain(values: Tensor) -> Tensor:
    """The plain tensor of a replicated DTensor."""
    if not is_dtensor(values):
        return values
    part = part_of(values)
    if not all(split.is_replicated for split in part.splits):
        raise LeftOut(f"tokens of experts that are placed as {part.words()} cannot be distinguished")
    return part.local


def _of_this_process(parameter: Any) -> Any:
    return waited(parameter.detach().to_local()) if is_dtensor(parameter) else parameter


@contextlib.contextmanager
def _cast(device: str, dtype: str) -> Iterator[None]:
    """Autocast as in the forward, without a change to the cast weights that it caches for training."""
    if not dtype:
        yield
        return
    caches, before = torch.is_autocast_cache_enabled(), torch.get_autocast_dtype(device)
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_dtype(device, getattr(torch, dtype))
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)
        torch.set_autocast_cache_enabled(caches)
