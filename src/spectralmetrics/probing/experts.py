"""Experts of a mixture whose weights are stacked in one parameter: each is a layer of its own.

Such a module, as transformers has for Mixtral, Qwen3-MoE and most other mixtures, takes tokens and the experts
that each token goes to, and returns weighted sums. The output of one expert is never seen. So (token, expert)
pairs are drawn, and the module's own forward runs once more on these, one expert for each token, with weight 1.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralmetrics.layers import register_layer
from spectralmetrics.probing.labelling import Labels
from spectralmetrics.probing.masking import Masks
from spectralmetrics.probing.parts import LeftOut, is_dtensor, part_of
from spectralmetrics.probing.routed import Routed, arguments_of
from spectralmetrics.probing.selection import Selectors, named_modules, select_among, unwrap
from spectralmetrics.torch_private import bare_copy, waited

# What the second and the third argument of such a module's forward are called.
_INDEX = re.compile("ind|idx|expert")
_WEIGHT = re.compile("weight|score|prob")


class Expert(nn.Module):
    """Stands for one expert among the layers of a probe; it is part of no model and never runs.

    Args:
        whole: the module of all experts; not kept alive.
        index: of the expert, in the weights that this process has.
    """

    def __init__(self, whole: nn.Module, index: int) -> None:
        super().__init__()
        self._whole = weakref.ref(whole)
        self.index = index

    @property
    def whole(self) -> nn.Module | None:
        """The module of all experts, if it is there."""
        return self._whole()

    @property
    def width(self) -> int:
        """The number of features that the expert takes and puts out; 0 if its weights do not tell."""
        return self._down()[0]

    @property
    def ceiling(self) -> int | None:
        """The rank that the last of its matrices can have; None if its weights do not tell."""
        return min(self._down()) or None

    def _down(self) -> tuple[int, int]:
        """Features out and in of the last of its matrices."""
        whole = self.whole
        last = getattr(whole, "down_proj", None)
        if not isinstance(last, Tensor) or last.ndim != 3 or getattr(whole, "has_post_expert_norm", False):
            return 0, 0
        _, first, second = last.shape
        return (second, first) if getattr(whole, "is_transposed", False) else (first, second)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """Its matrices, or, of weights that are sharded, all that there is; to tell it from others."""
        for each in _stacked(self.whole):
            yield each if is_dtensor(each) else each.detach()[self.index]


register_layer(Expert, dim=-1, in_features="width", out_features="width", ceiling=lambda expert: expert.ceiling)


def select_probed(
    model: nn.Module, layers: Selectors | None, exclude: Selectors | None, whole: set[nn.Module]
) -> dict[str, nn.Module]:
    """The layers of :func:`.select_layers`, where each expert of a mixture is one.

    Args:
        model: likewise.
        layers: likewise; who names a module of experts means each of them, ``"*.experts.[0-3]"`` some.
        exclude: likewise.
        whole: modules that are not taken apart.
    """
    modules: dict[str, nn.Module] = {}
    parts: dict[str, list[str]] = {}
    for name, module in named_modules(unwrap(model)).items():
        modules[name] = module
        if module not in whole and (found := _numbers(module)):
            parts[name] = [f"{name}.{number}" for number, _ in found]
            modules.update((f"{name}.{number}", Expert(module, index)) for number, index in found)
    return select_among(model, modules, layers, exclude, parts)


def by_whole(layers: Mapping[str, nn.Module]) -> dict[nn.Module, dict[str, Expert]]:
    """Module of experts -> those that are probed, by the names of their layers."""
    found: dict[nn.Module, dict[str, Expert]] = {}
    for name, module in layers.items():
        if isinstance(module, Expert) and module.whole is not None:
            found.setdefault(module.whole, {})[name] = module
    return found


def _stacked(module: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of a module that hold a matrix for each of several experts."""
    own = [] if module is None else module.parameters(recurse=False)
    return [each for each in own if each.ndim == 3 and not isinstance(each, nn.UninitializedParameter)]


def _numbers(module: nn.Module) -> list[tuple[int, int]]:
    """The number of each expert that this process has, and its index in the weights here; empty for none."""
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
        return [(offset + index, index) for index in range(number)]
    return [(index, index) for index in range(len(first))]


@dataclass
class Pairs:
    """The tokens that one expert gets in one forward.

    Attributes:
        states: (T, D), of all tokens.
        calls: of the forward.
        number: of the expert in the model.
        index: of the expert in the weights of this process.
    """

    states: Tensor
    calls: Calls
    number: int
    index: int

    @property
    def tokens(self) -> Tensor:
        """(n,), which of the tokens."""
        return self.calls.tokens_of(self.number)

    @property
    def labels(self) -> Tensor | None:
        """(T,), of all tokens; None without."""
        return self.calls.labels

    def outputs(self, tokens: Tensor) -> Tensor:
        """(n, D), what the expert puts out for some tokens, or the summand of it that this process has."""
        return self.calls.outputs(tokens, self.index)


class Calls:
    """One forward of a module of experts.

    Args:
        name: of the module.
        module: the module.
        routed: what it is called with.
        masks: laid beside the model.
        labels: likewise.
    """

    def __init__(self, name: str, module: nn.Module, routed: Routed, masks: Masks, labels: Labels) -> None:
        self.module = module
        self.states = routed.states.detach()
        self.labels: Tensor | None = None
        self._index = routed.experts.detach()
        self._cast = routed.cast
        self._bare: nn.Module | None = None
        self._by_expert: list[Tensor] | None = None
        number, shape = len(self.states), tuple(self.states.shape)
        if masks.value is not None:
            fits = masks.value.numel() == number
            masks.note(name, shape, fits=fits)
            if fits:
                self._index = self._index.where(masks.value.reshape(-1, 1).to(self._index.device), -1)
        if labels.value is not None:
            fits = labels.value.numel() == number
            labels.note(name, shape, fits=fits)
            self.labels = labels.value.reshape(-1).to(self.states.device) if fits else None

    def tokens_of(self, number: int) -> Tensor:
        """(n,), the tokens of an expert, in their order; one reading of the device for all experts."""
        if self._by_expert is None:
            ordered, order = self._index.reshape(-1).sort(stable=True)
            most = int(ordered[-1]) + 2 if len(ordered) else 1
            ends = torch.searchsorted(ordered, torch.arange(most, device=ordered.device)).tolist()
            tokens = order // self._index.shape[1]
            self._by_expert = [tokens[start:end] for start, end in itertools.pairwise(ends)]
        return self._by_expert[number] if number < len(self._by_expert) else self._index.new_empty(0)

    def outputs(self, tokens: Tensor, index: int) -> Tensor:
        """See :meth:`Pairs.outputs`."""
        states = self.states[tokens]
        if not len(tokens):
            return states
        if self._bare is None:
            self._bare = bare_copy(self.module, _of_this_process)
        experts = torch.full_like(tokens, index, dtype=self._index.dtype)[:, None]
        with _cast(states.device.type, self._cast):
            found: Tensor = self._bare(states, experts, states.new_ones(len(tokens), 1))
        return found


class Watched:
    """The experts of one module that are probed, for its hook.

    Args:
        experts: by the names of their layers; kept alive.
    """

    def __init__(self, experts: Mapping[str, Expert]) -> None:
        self._experts = dict(experts)
        self._name = next(iter(experts)).rpartition(".")[0]

    def shown(
        self, module: nn.Module, routed: Routed, masks: Masks, labels: Labels
    ) -> Iterator[tuple[str, Expert, Pairs]]:
        """What each expert gets in a forward, with the name of its layer."""
        routed = Routed(_plain(routed.states), _plain(routed.experts), routed.cast)
        calls = Calls(self._name, module, routed, masks, labels)
        for name, expert in self._experts.items():
            number = int(name.rpartition(".")[2])
            yield name, expert, Pairs(calls.states, calls, number, expert.index)

    @property
    def names(self) -> Mapping[str, Expert]:
        """The experts by the names of their layers."""
        return self._experts


def _plain(values: Tensor) -> Tensor:
    """What is replicated on all processes, as this one has it."""
    if not is_dtensor(values):
        return values
    part = part_of(values)
    if not all(split.is_replicated for split in part.splits):
        raise LeftOut(f"tokens of experts that are placed as {part.words()} cannot be told apart")
    return part.local


def _of_this_process(parameter: Any) -> Any:
    return waited(parameter.detach().to_local()) if is_dtensor(parameter) else parameter


@contextlib.contextmanager
def _cast(device: str, dtype: str) -> Iterator[None]:
    """Autocast as it was in the forward; leaves alone what it keeps of the weights for training."""
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
