"""Masks of padding for models of Hugging Face, put in place by hooks.

A model with one sequence has one mask. An encoder-decoder model has two: the encoder's layers see the source
sequence, the decoder's the target, and the keys and values of cross-attention, which lie in the decoder, are
made of the encoder's output and see the source again. As both sequences may have the same length, the shape of
a mask does not decide where it belongs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.selection import named_modules
from spectralmetrics.torch_private import untraced

IGNORED_LABEL = -100  # what PyTorch's cross entropy and the collators of transformers leave out


@dataclass
class _Call:
    """The masks and marks of one call of the model."""

    source: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)  # what the encoder puts out, as the decoder gets it


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
        self._calls: list[_Call] = []
        self._masks: list[Tensor | None] = []  # the innermost is in force
        self._context = contextlib.ExitStack()
        parts = _encoder_and_decoder(model)
        self._has_decoder = parts is not None
        self._handles = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            model.register_forward_hook(self._leave_model, always_call=True),
        ]
        if parts is None:
            return
        encoder, decoder = parts
        self._handles += [
            encoder.register_forward_pre_hook(self._enter_encoder, with_kwargs=True),
            encoder.register_forward_hook(self._leave_encoder, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
        ]
        of_encoder = set(encoder.modules())
        modules = named_modules(model)
        for name in probe.layers:
            if (layer := modules[name]) not in of_encoder and layer is not model:
                self._handles += [
                    layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
                    layer.register_forward_hook(self._leave_layer, always_call=True),
                ]

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

    @untraced
    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(self._source_mask(kwargs))
        if (outputs := kwargs.get("encoder_outputs")) is not None:
            call.states += _first(outputs)
        self._calls.append(call)
        self._push(self._target_mask(kwargs) if self._has_decoder else call.source)

    @untraced
    def _leave_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._calls:
            self._calls.pop()
            self._pop()

    @untraced
    def _enter_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # It has its own when it is called by itself, as generation calls it.
        own = _mask(kwargs.get("attention_mask"))
        self._push(self._calls[-1].source if own is None and self._calls else own)

    @untraced
    def _leave_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pop()
        if self._calls:
            self._calls[-1].states += _first(output)

    @untraced
    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states")  # which may have been projected to the decoder's width
        if self._calls and isinstance(states, Tensor):
            self._calls[-1].states.append(states)

    @untraced
    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else next(iter(kwargs.values()), None)
        call = self._calls[-1] if self._calls else _Call()
        of_source = isinstance(values, Tensor) and any(_is_same(values, states) for states in call.states)
        self._push(call.source if of_source else self._masks[-1] if self._masks else None)

    @untraced
    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pop()

    def _push(self, mask: Tensor | None) -> None:
        before = self._masks[-1] if self._masks else None
        self._masks.append(mask)
        if mask is not before:
            self._put_in_force()

    def _pop(self) -> None:
        if self._masks:
            gone = self._masks.pop()
            if gone is not (self._masks[-1] if self._masks else None):
                self._put_in_force()

    def _put_in_force(self) -> None:
        # One at a time, since inside a mask there is no way of having none.
        self._context.close()
        if self._masks and (mask := self._masks[-1]) is not None:
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


def _first(output: Any) -> list[Tensor]:
    """The last hidden state, which comes first in whatever an encoder returns."""
    try:
        value = output if isinstance(output, Tensor) else output[0]
    except (KeyError, IndexError, TypeError):
        return []
    return [value] if isinstance(value, Tensor) else []


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.shape == right.shape and left.data_ptr() == right.data_ptr())
