"""One table of layer types: the dimension of the features in inputs and outputs, and the weights' ceiling."""

from __future__ import annotations

import functools
import math
import numbers
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import nn

Features: TypeAlias = str | Callable[[Any], int]


@dataclass(frozen=True)
class LayerKind:
    """The layout of inputs and outputs of one type of layer.

    Attributes:
        dim: dimension of the features; ``"input"``: the same dimension as in the layer's input; a function of
            the layer where its settings decide, whose docstring the guide shows.
        spatial: number of dimensions behind the channels, where the type fixes it. Outputs with that many and
            the channels are one sample without a batch.
        in_spatial: the same for inputs; ``spatial`` unless given.
        takes_sequences: True if two dimensions are one sequence (T, D) without a batch.
        in_features: number of features of the input: an attribute, or a function of the layer.
        out_features: the same for the output.
        batch_first: True if sequences are (N, T, D), or a function of the layer.
        ceiling: function of the layer: the most directions that its weights allow its outputs.
        is_default: True if a probe takes it by default.
    """

    dim: int | Literal["input"] | Callable[[Any], int | Literal["input"]]
    spatial: int | None = None
    in_spatial: int | None = None
    takes_sequences: bool = False
    in_features: Features | None = None
    out_features: Features | None = None
    batch_first: bool | Callable[[Any], bool | None] | None = None
    ceiling: Callable[[Any], int | None] | None = None
    is_default: bool = False

    def dim_of(self, module: nn.Module) -> int | Literal["input"]:
        """The dimension of the features of one layer."""
        return self.dim(module) if callable(self.dim) else self.dim

    def features_of(self, module: nn.Module, *, of_inputs: bool) -> int | None:
        """The number of features that one layer takes or puts out; None if it is unknown, or not known yet."""
        features = self.in_features if of_inputs else self.out_features
        if features is None:
            return None
        number = features(module) if callable(features) else getattr(module, features, None)
        return number if isinstance(number, int) and number > 0 else None  # a lazy layer has 0


def register_layer(
    layer: type[nn.Module],
    *,
    dim: int | Literal["input"],
    in_features: Features | None = None,
    out_features: Features | None = None,
    batch_first: bool | None = None,
    ceiling: Callable[[Any], int | None] | None = None,
    default: bool = False,
) -> None:
    """Register the layout of your own layer type's outputs, for probes and projections.

    Subclasses are covered unless they are registered themselves. Register before you make the probe. For a
    type that is registered again, such as one of ``torch.nn``, the last registration holds.

    Args:
        layer: the type.
        dim: dimension of the features: 1 for ``(N, C, *spatial)``, -1 for (N, T, D) and (N, H, W, C);
            ``"input"`` for layers that leave every dimension where it is, such as activations.
        in_features: name of the attribute with the number of input features, or a function of the layer. It
            helps to find the features of layers beside it whose own type is not registered.
        out_features: the same for the output features.
        batch_first: False if the layer puts out sequences (T, N, D). None uses the layout of the module around.
        ceiling: function of a layer that returns the most directions its weights allow its outputs, or None.
        default: True if a probe takes these layers unless ``layers`` is given.

    Raises:
        TypeError: for anything but a subclass of ``torch.nn.Module``, or features or a ceiling of another type.
        ValueError: for another ``dim``, or a ``batch_first`` that is not True, False or None.

    >>> import torch
    >>> class Shift(nn.Module):  # of (N, C, L)
    ...     def forward(self, series):
    ...         return series.roll(1, -1)
    >>> register_layer(Shift, dim=1)
    >>> from spectralmetrics import LayerProbe
    >>> model = Shift()
    >>> probe = LayerProbe(model, layers=Shift)
    >>> _ = model(torch.randn(8, 3, 20))
    >>> probe["train", "Shift"]["saturation"].num_features
    3
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"expected layer to be a subclass of torch.nn.Module, got {layer!r}")
    is_number = isinstance(dim, numbers.Integral) and not isinstance(dim, bool)
    if dim != "input" and not (is_number and dim):
        raise ValueError(
            f"expected dim as the dimension of the features, 1 or -1 say, or 'input', got {dim!r}; dimension 0"
            " has the samples"
        )
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if not (features is None or isinstance(features, str) or callable(features)):
            raise TypeError(f"expected {name} as the name of an attribute or a function, got {features!r}")
    if not any(batch_first is each for each in (True, False, None)):
        raise ValueError(f"expected batch_first to be True, False or None, got {batch_first!r}")
    if ceiling is not None and not callable(ceiling):
        raise TypeError(f"expected ceiling to be a function of a layer or None, got {ceiling!r}")
    _KINDS[layer] = LayerKind(
        "input" if dim == "input" else int(dim),
        in_features=in_features,
        out_features=out_features,
        batch_first=batch_first,
        ceiling=ceiling,
        is_default=bool(default),
    )
    _KINDS_OF_TYPES.clear()


def kind_of(module: nn.Module | None) -> tuple[LayerKind | None, bool]:
    """The kind of a layer by its type, and True if the layer has the forward of that type.

    A subclass with a forward of its own may lay out its outputs otherwise. None for an unknown type.

    >>> kind_of(nn.Linear(3, 4))[0].out_features, kind_of(nn.Flatten())
    ('out_features', (None, False))
    """
    kind = type(module)
    if kind not in _KINDS_OF_TYPES:
        base = next((each for each in kind.__mro__ if each in _KINDS or _name(each) in _ELSEWHERE), None)
        if base is None:
            _KINDS_OF_TYPES[kind] = None, False
        else:
            known = _KINDS.get(base) or _ELSEWHERE[_name(base)]
            _KINDS_OF_TYPES[kind] = known, getattr(kind, "forward", None) is getattr(base, "forward", None)
    return _KINDS_OF_TYPES[kind]


def default_layers() -> tuple[type[nn.Module], ...]:
    """The types that are probed by default, including types of other packages that are imported.

    >>> nn.Linear in default_layers(), nn.ReLU in default_layers()
    (True, False)
    """
    own = (layer for layer, kind in _KINDS.items() if kind.is_default)
    others = (
        getattr(sys.modules.get(module), name, None)
        for (module, name), kind in _ELSEWHERE.items()
        if kind.is_default
    )
    return (*own, *(each for each in others if each is not None and each not in _KINDS))


def ceiling_of(module: nn.Module) -> int | None:
    """The largest rank that the weights of a layer allow; a bias moves the mean and adds no direction.

    >>> ceiling_of(nn.Conv2d(64, 128, 1)), ceiling_of(nn.ReLU())
    (64, None)
    """
    kind, has_type_forward = kind_of(module)
    if kind is None or kind.ceiling is None or not has_type_forward:
        return None  # a subclass' own forward may use more than the weights
    return kind.ceiling(module)


def is_time_first(module: nn.Module | None) -> bool | None:
    """True if a layer puts out (T, N, D), by its own flag or its attention's; None if it is unknown.

    >>> is_time_first(nn.LSTM(3, 4)), is_time_first(nn.Linear(3, 4))
    (True, None)
    """
    kind, _ = kind_of(module)
    if kind is None or kind.batch_first is None:
        return None
    batch_first = kind.batch_first(module) if callable(kind.batch_first) else kind.batch_first
    return None if batch_first is None else not batch_first


def has_inputs_first(module: nn.Module) -> bool:
    """True if the weight of a layer has the inputs in its first dimension.

    >>> has_inputs_first(nn.ConvTranspose1d(2, 3, 1)), has_inputs_first(nn.Conv1d(2, 3, 1))
    (True, False)
    """
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or _name(type(module)) == _CONV1D


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _of_linear(layer: nn.Linear) -> int | None:
    return min(layer.out_features, layer.in_features) or None


def _of_convolution(layer: Any) -> int | None:
    # Each group of outputs is a linear function of its own inputs at some or all of the kernel's positions.
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    ceiling: int = layer.groups * min(outputs, inputs * math.prod(layer.kernel_size))
    return ceiling or None


def _inputs_of_conv1d(layer: Any) -> int:
    # Not the attribute: reading a parametrised weight may change the state of its parametrisation.
    weight = dict(layer.named_parameters(recurse=False)).get("weight")  # (inputs, outputs)
    return int(getattr(layer, "nx", 0)) if weight is None else len(weight)


def _of_conv1d(layer: Any) -> int | None:
    return min(_inputs_of_conv1d(layer), layer.nf) or None


def _dim_of_norm(layer: Any) -> int | Literal["input"]:
    """Last; for a norm over several dimensions, such as (C, H, W), as in its input."""
    return -1 if len(layer.normalized_shape) == 1 else "input"


def _dim_of_prelu(layer: nn.PReLU) -> int | Literal["input"]:
    """Dimension 1; with a single parameter as in its input."""
    return 1 if layer.num_parameters > 1 else "input"


def _dim_of_glu(layer: nn.GLU) -> int:
    """Its `dim`, along which it halves the features."""
    return layer.dim


def _normalized(layer: Any) -> int:
    return int(layer.normalized_shape[-1])


def _of_recurrent(layer: nn.RNNBase) -> int:
    return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


def _attention(layer: Any) -> Any:
    """The attention whose layout a transformer's layer has, or a stack of such layers."""
    layer = layer.layers[0] if isinstance(layer, (nn.TransformerEncoder, nn.TransformerDecoder)) else layer
    return getattr(layer, "self_attn", None)


def _width_of_transformer(layer: Any) -> int:
    return int(getattr(_attention(layer), "embed_dim", 0))


def _batch_first(layer: Any) -> bool | None:
    return getattr(layer, "batch_first", None)


def _table() -> dict[type[nn.Module], LayerKind]:
    convolution = LayerKind(
        1, in_features="in_channels", out_features="out_channels", ceiling=_of_convolution, is_default=True
    )
    norm = LayerKind(1, in_features="num_features", out_features="num_features")
    pooling = (
        "MaxPool AvgPool AdaptiveAvgPool AdaptiveMaxPool FractionalMaxPool LPPool MaxUnpool"
        " ZeroPad ReflectionPad ReplicationPad ConstantPad CircularPad"
    )
    by_rank = {
        "Conv": convolution,
        "ConvTranspose": convolution,
        "InstanceNorm": norm,
        **dict.fromkeys(pooling.split(), LayerKind(1)),
    }
    sequence = functools.partial(LayerKind, -1, takes_sequences=True)
    recurrent = sequence(
        in_features="input_size", out_features=_of_recurrent, batch_first=_batch_first, is_default=True
    )
    table: dict[str, LayerKind] = {
        "Linear": LayerKind(
            -1, in_features="in_features", out_features="out_features", ceiling=_of_linear, is_default=True
        )
    }
    for name, kind in by_rank.items():
        for rank in (1, 2, 3):
            if hasattr(nn, f"{name}{rank}d"):
                table[f"{name}{rank}d"] = replace(kind, spatial=rank)
    table.update(dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent), RNNBase=replace(recurrent, is_default=False))
    table["MultiheadAttention"] = sequence(
        in_features="embed_dim", out_features="embed_dim", batch_first=_batch_first, is_default=True
    )
    table["Transformer"] = sequence(in_features="d_model", out_features="d_model", batch_first=_batch_first)
    for part in ("Encoder", "Decoder", "EncoderLayer", "DecoderLayer"):
        table[f"Transformer{part}"] = sequence(
            in_features=_width_of_transformer,
            out_features=_width_of_transformer,
            batch_first=lambda layer: _batch_first(_attention(layer)),
        )
    table["Bilinear"] = LayerKind(-1, in_features="in1_features", out_features="out_features")
    table.update(dict.fromkeys(("Embedding", "EmbeddingBag"), LayerKind(-1, out_features="embedding_dim")))
    table["RNNCellBase"] = LayerKind(-1, in_features="input_size", out_features="hidden_size")
    for name in ("LayerNorm", "RMSNorm"):
        table[name] = LayerKind(_dim_of_norm, in_features=_normalized, out_features=_normalized)
    table.update(dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), norm))
    table["GroupNorm"] = LayerKind(1, in_features="num_channels", out_features="num_channels")
    second = "LocalResponseNorm CrossMapLRN2d ChannelShuffle Upsample Dropout2d FeatureAlphaDropout"
    table.update(dict.fromkeys(second.split(), LayerKind(1)))
    table.update(Dropout1d=LayerKind(1, 1), Dropout3d=LayerKind(1, 3), Softmax2d=LayerKind(1, 2))
    table.update(dict.fromkeys(("PixelShuffle", "PixelUnshuffle"), LayerKind(1, 2)))
    table.update(Fold=LayerKind(1, 2, in_spatial=1), Unfold=LayerKind(1, 1, in_spatial=2))
    table["PReLU"] = LayerKind(_dim_of_prelu)
    table["GLU"] = LayerKind(_dim_of_glu)
    elementwise = (
        "AlphaDropout Dropout Identity CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU"
        " LogSigmoid LogSoftmax Mish RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmin Softplus Softshrink"
        " Softsign Tanh Tanhshrink Threshold"
    )
    table.update(dict.fromkeys(elementwise.split(), LayerKind("input")))
    return {getattr(nn, name): kind for name, kind in table.items() if hasattr(nn, name)}


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: weakref.WeakKeyDictionary[type[nn.Module], LayerKind] = weakref.WeakKeyDictionary(_table())
_CONV1D = ("transformers.pytorch_utils", "Conv1D")  # the linear layer of GPT-2
# Types of packages that may not be installed, by module and name.
_ELSEWHERE: dict[tuple[str, str], LayerKind] = {
    _CONV1D: LayerKind(
        -1, in_features=_inputs_of_conv1d, out_features="nf", ceiling=_of_conv1d, is_default=True
    ),
}
_KINDS_OF_TYPES: weakref.WeakKeyDictionary[type, tuple[LayerKind | None, bool]] = weakref.WeakKeyDictionary()

DEFAULT_LAYERS: tuple[type[nn.Module], ...] = tuple(kind for kind, each in _KINDS.items() if each.is_default)
"""Probed by default; their lazy forms are subclasses, and :func:`register_layer` adds others."""
