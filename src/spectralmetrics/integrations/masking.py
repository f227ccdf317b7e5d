"""Masks of padding for models of Hugging Face, put in place by hooks.

A model with one sequence has one mask. An encoder-decoder model has two: the encoder's layers see the source
sequence, the decoder's the target, and the keys and values of cross-attention, which lie in the decoder, are
made of the encoder's output and see the source again. As both sequences may have the same length, the shape of
a mask does not decide where it belongs.

A model of text and images, or sounds, has one mask, too, which is that of the text. Its hooks follow the other
inputs from module to module: the rows of a call are those of its first tensor, and so are those of its outputs.
A tensor that was made between modules has the rows of the call in which it was made. A model of sounds, whose
mask is that of samples, makes one of fewer frames and gives it to its transformer, where it holds.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.selection import named_modules
from spectralmetrics.torch_private import untraced

SOUNDS = "input_values"  # a model of sounds makes a mask for the shorter sequence of features
IGNORED_LABEL = -100  # what PyTorch's cross entropy and the collators of transformers leave out


@dataclass
class _Call:
    """A call of the model or of a module in it.

    Attributes:
        mask: the mask of its rows; None if all are valid.
        source: the mask of the source, in an encoder-decoder model.
        tokens: what the model was called with where it has other inputs beside them.
        others: names of these inputs.
        known: memory of a tensor -> the mask of its rows, and the tensor, so that no other gets its memory.
    """

    mask: Tensor | None = None
    source: Tensor | None = None
    tokens: Tensor | None = None
    others: frozenset[str] = frozenset()
    known: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def know(self, values: Any, mask: Tensor | None) -> None:
        """Note that the tensors in a nest have rows of a mask."""
        self.known.update((_memory(each), (mask, each)) for each in _floating(values))


class Masking:
    """The hooks on one model.

    Args:
        probe: the probe whose layers are masked.
        model: the model that it probes, without wrappers.
        attention_mask: name of the argument for the mask of the only sequence, or of the source.
        decoder_attention_mask: name of the argument for the mask of the target; None masks no target.
    """

    def __init__(
        self, probe: LayerProbe, model: nn.Module, attention_mask: str, decoder_attention_mask: str | None
    ) -> None:
        self._probe = probe
        self._source = attention_mask
        self._target = decoder_attention_mask
        self._labels: Any = None  # of the batch whose loss is computed
        self._has_warned = False
        self._calls: list[_Call] = []  # the innermost is in force
        self._context = contextlib.ExitStack()
        parts = _encoder_and_decoder(model)
        self._has_decoder = parts is not None
        self._handles: list[Any] = []
        self._watched: dict[nn.Module, list[str]] = {}  # with the names of their arguments
        self._watch(model, self._enter_model)
        if parts is None:
            return
        encoder, decoder = parts
        self._watch(encoder, self._enter_encoder)
        self._handles.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        of_encoder, of_decoder = set(encoder.modules()), set(decoder.modules())
        modules = named_modules(model)
        for name in probe.layers:
            if (layer := modules[name]) not in of_encoder and layer is not model:
                self._watch(layer, self._enter_part, keeps=layer not in of_decoder)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def labelled(self, labels: Any) -> Iterator[None]:
        """Inside, a target has these labels if the model is called without labels: its caller has the loss."""
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def _watch(self, module: nn.Module, enter: Any, keeps: bool = True) -> None:
        """Put hooks on a module; with ``keeps`` its outputs are followed, which stay until its caller ends."""
        leave = self._leave_and_keep if keeps else self._leave
        self._handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        self._watched[module] = _parameters(module)

    def _follow(self, module: nn.Module) -> None:
        """Watch the parts of a module that is given tensors with rows of different masks, from now on."""
        for part in module.children():
            if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
                self._follow(part)
            elif part not in self._watched and not isinstance(part, torch.jit.ScriptModule):
                self._watch(part, self._enter_part)

    @untraced
    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source, others = self._source_mask(kwargs), _beside_tokens(kwargs)
        call = _Call(self._target_mask(kwargs) if self._has_decoder else source, source)
        if (outputs := kwargs.get("encoder_outputs")) is not None:
            call.know(_first(outputs), source)
        if others:
            call.tokens, call.others = kwargs.get("input_ids"), frozenset(others)
            call.know(others, None)
        if others or (source is not None and SOUNDS in kwargs):
            self._follow(module)
        self._push(call)

    @untraced
    def _enter_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # It has its own when it is called by itself, as generation calls it.
        own = _mask(kwargs.get("attention_mask"))
        caller = self._calls[-1] if self._calls else _Call()
        call = replace(caller, mask=caller.source if own is None else own, known={})
        if call.mask is not None and SOUNDS in dict(self._tensors(module, args, kwargs)):
            self._follow(module)
        self._push(call)

    @untraced
    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states")  # which may have been projected to the decoder's width
        if self._calls and isinstance(states, Tensor) and self._find(states) is None:
            self._calls[-1].know(states, self._calls[-1].source)

    @untraced
    def _enter_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._calls:
            self._push(_Call())
            return
        caller = self._calls[-1]
        tensors = self._tensors(module, args, kwargs)
        name, first = tensors[0] if tensors else ("", None)
        mask = self._rows_of(name, first, kwargs)
        tokens = first if name == "input_ids" else caller.tokens
        call = replace(caller, mask=mask, tokens=tokens, known={})
        is_mixed = mask is not None and name == SOUNDS
        for each in _floating((args, kwargs)):
            found = self._find(each)
            rows = mask if each is first else found[0] if found else caller.mask
            if found is None and mask is not caller.mask:
                call.know(each, rows)
            is_mixed |= rows is not mask
        if is_mixed:
            self._follow(module)
        self._push(call)

    def _rows_of(self, name: str, values: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask of the rows of a call inside a call of the model, by the first tensor and its name."""
        caller = self._calls[-1]
        if values is None:
            return caller.mask
        own, above = kwargs.get("attention_mask"), caller.mask
        if isinstance(own, Tensor) and above is not None and own.shape == values.shape[:2] != above.shape:
            return _mask(own)  # of a sequence that the model has made of the given one
        if found := self._find(values):
            return found[0]
        if name in caller.others or isinstance(values._base, nn.Parameter):  # queries, the same for each sample
            return None
        if name == "input_ids" and caller.tokens is not None and _memory(values) != _memory(caller.tokens):
            return _mask(own)  # other tokens, such as those of an answer
        return caller.mask

    def _tensors(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """The tensors among the arguments of a call, with their names; "" for one without a name."""
        names = self._watched[module][: len(args)]
        named = itertools.chain(itertools.zip_longest(names, args, fillvalue=""), kwargs.items())
        return [(name, value) for name, value in named if isinstance(value, Tensor)]

    def _find(self, values: Tensor) -> tuple[Tensor | None, Tensor] | None:
        memory = _memory(values)
        return next((call.known[memory] for call in reversed(self._calls) if memory in call.known), None)

    @untraced
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pop()

    @untraced
    def _leave_and_keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        gone = self._pop()
        if gone is None or not self._calls:
            return
        caller = self._calls[-1]
        for each in _floating(output):
            mask = gone.known.get(_memory(each), (gone.mask, each))[0]
            if mask is not caller.mask:
                caller.know(each, mask)

    def _push(self, call: _Call) -> None:
        before = self._calls[-1].mask if self._calls else None
        self._calls.append(call)
        if call.mask is not before:
            self._put_in_force()

    def _pop(self) -> _Call | None:
        gone = self._calls.pop() if self._calls else None
        if gone is not None and gone.mask is not (self._calls[-1].mask if self._calls else None):
            self._put_in_force()
        return gone

    def _put_in_force(self) -> None:
        # One at a time, since inside a mask there is no way of having none.
        self._context.close()
        if self._calls and (mask := self._calls[-1].mask) is not None:
            self._context.enter_context(self._probe.mask(mask))

    def _source_mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        value, tokens = kwargs.get(self._source), kwargs.get("input_ids")
        if not isinstance(value, Tensor) or value.ndim == 2:
            return _mask(value)
        if isinstance(tokens, Tensor) and value.ndim > 2 and value.shape == tokens.shape:
            return _mask(value.flatten(0, -2))  # choices of a sample, which a model takes as samples
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"{self._source} of shape {tuple(value.shape)} does not say which tokens (N, T) are padding:"
                " all steps are counted; give the callback attention_mask=None if that is right"
            )
        return None

    def _target_mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        if self._target is None:
            return None
        own, inputs = _mask(kwargs.get(self._target)), kwargs.get("decoder_input_ids")
        labels = kwargs.get("labels")
        if labels is None and inputs is not None:
            labels = self._labels
        if own is not None or not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
            return own
        if inputs is not None and inputs.shape != labels.shape:
            return None
        # A decoder looks back only: what comes after the last label reaches neither the loss nor another step.
        # An ignored label before that is no padding.
        return (labels != IGNORED_LABEL).flip(1).cumsum(1).flip(1) > 0


def _encoder_and_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = []
    for name in ("get_encoder", "get_decoder"):
        part = getattr(model, name, lambda: None)()
        if not isinstance(part, nn.Module) or part is model:
            return None
        found.append(part)
    return found[0], found[1]


def _mask(value: Any) -> Tensor | None:
    return value != 0 if isinstance(value, Tensor) and value.ndim == 2 else None


def _beside_tokens(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs beside the tokens, such as images: floating tensors but embeddings, masks and labels."""
    if not any(isinstance(kwargs.get(name), Tensor) for name in ("input_ids", "inputs_embeds")):
        return {}
    return {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 1
        and not name.startswith("decoder_")  # of the target
        and name != "inputs_embeds"
        and not any(word in name for word in ("mask", "label"))
    }


def _parameters(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # it is not written in Python
        return []


def _first(output: Any) -> Any:
    """The last hidden state, which comes first in whatever an encoder returns."""
    try:
        return output if isinstance(output, Tensor) else output[0]
    except (KeyError, IndexError, TypeError):
        return None


def _floating(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, (tuple, list, Mapping)):
        for each in nest.values() if isinstance(nest, Mapping) else nest:
            yield from _floating(each)


def _memory(values: Tensor) -> int:
    """A number that a tensor shares with its views."""
    try:
        return values.untyped_storage().data_ptr() or id(values)
    except (NotImplementedError, RuntimeError):  # of a tensor that has no storage of its own
        return id(values)
