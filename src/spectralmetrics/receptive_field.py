"""Receptive fields of layers, read from one forward pass.

A receptive field is followed through the operations themselves, so that any forward written in PyTorch works,
with skip connections and control flow: every tensor carries the extent of the input that one of its positions
sees, convolutions and pools widen it, a sum or a concatenation of paths keeps the smallest and the largest.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spectralmetrics.probing.selection import Selectors, select_layers

Extent: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class ReceptiveField:
    """The part of the input that one position of a layer's output sees, in positions along each spatial axis.

    Attributes:
        smallest: the extent along the path through the network that sees least.
        largest: the extent along the path that sees most; equal to ``smallest`` without skip connections and
            branches. ``inf`` where an operation such as a global pool sees all of any input.
    """

    smallest: Extent
    largest: Extent


def receptive_fields(
    model: nn.Module, example: Tensor, layers: Selectors | None = None
) -> dict[str, ReceptiveField]:
    """The receptive field of every layer's output, in the order of the forward pass.

    A convolution or pool of kernel size k and dilation d, whose input positions lie j input pixels apart,
    widens the field by (k − 1)·d·j; a stride multiplies j, a transposed one divides it. Where paths join, the
    smallest and the largest field go on.

    Args:
        model: any module whose forward takes ``example``. It runs once in evaluation mode without gradients,
            and is left as it was.
        example: one input, ``(N, C, *spatial)`` with one to three spatial axes, as large as the inputs that the
            network is used on, since adaptive pools depend on the size.
        layers: as in :class:`LayerProbe`; None takes the layers that a probe takes.

    Returns:
        Layer name -> field of its output, for layers that were called and whose output depends on ``example``.
        A layer that is called several times has the field of its last call.

    Raises:
        TypeError: for a model that is not a module, or an example that is not a tensor.
        ValueError: if the example has no spatial axis.

    Operations that mix positions in other ways (attention, a reshape of positions into features, a mean over
    them) count as seeing everything. Observers such as a probe see this forward, too: pause them.

    >>> model = nn.Sequential(
    ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
    ... )
    >>> {name: field.largest for name, field in receptive_fields(model, torch.zeros(1, 1, 28, 28)).items()}
    {'0': (3, 3), '3': (8, 8), '4': (12, 12)}
    """
    if not isinstance(model, nn.Module) or not isinstance(example, Tensor):
        raise TypeError(
            "expected a torch.nn.Module and an example that it takes, a tensor, got"
            f" {type(model).__name__} and {type(example).__name__}"
        )
    if example.ndim < 3:
        raise ValueError(
            f"expected an example of shape (N, C, *spatial), as the model takes it, got {tuple(example.shape)}"
        )
    axes = example.ndim - 2
    follower = _Follower(axes)
    follower.fields[example] = _Field((1,) * axes, (1,) * axes, (Fraction(1),) * axes)
    fields: dict[str, ReceptiveField] = {}

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            field = follower.joined(output)
            if field is not None:
                fields.pop(name, None)
                fields[name] = ReceptiveField(_plain(field.smallest), _plain(field.largest))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in select_layers(model, layers).items():
            stack.enter_context(module.register_forward_hook(read(name)))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        with torch.no_grad(), follower:
            model(example)
    return fields


def border_layer(
    fields: Mapping[str, ReceptiveField],
    input_size: int | Sequence[int],
    *,
    paths: Literal["largest", "smallest"] = "largest",
) -> str | None:
    """The first layer whose receptive field exceeds the input along every spatial axis.

    From there on, a layer sees nothing of the input that the layers before it could not see together:
    low-saturation tails are expected to begin there (`arXiv:2106.12307 <https://arxiv.org/abs/2106.12307>`_).

    Args:
        fields: from :func:`receptive_fields`.
        input_size: extent of the input, one number or one per axis.
        paths: with skip connections, take the path that sees most (``"largest"``) or least (``"smallest"``).

    Returns:
        The layer's name; None if every layer sees only a part of the input.

    Raises:
        TypeError: for fields of another kind.
        ValueError: for other ``paths``, an extent that is not a positive integer, or a number of axes that the
            fields do not have.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 8, 3))
    >>> fields = receptive_fields(model, torch.zeros(1, 1, 16, 16))
    >>> border_layer(fields, 8), border_layer(fields, 16)
    ('2', None)
    """
    if paths not in ("largest", "smallest"):
        raise ValueError(f"expected paths to be 'largest' or 'smallest', got {paths!r}")
    if not isinstance(fields, Mapping) or not all(isinstance(each, ReceptiveField) for each in fields.values()):
        raise TypeError(f"expected fields as receptive_fields returns them, got {fields!r}")
    given = list(input_size) if isinstance(input_size, Sequence) else [input_size]
    if not all(isinstance(size, numbers.Integral) and size > 0 for size in given):
        raise ValueError(f"expected input_size as a positive integer, or one for each axis, got {input_size!r}")
    for name, field in fields.items():
        extent = getattr(field, paths)
        sizes = given if isinstance(input_size, Sequence) else given * len(extent)
        if len(sizes) != len(extent):
            raise ValueError(f"expected an input size of {len(extent)} axes, got {input_size!r}")
        if all(seen > size for seen, size in zip(extent, sizes, strict=True)):
            return name
    return None


@dataclass(frozen=True)
class _Field:
    """The receptive field of a tensor, with the distance of neighbouring positions in input positions.

    ``channels`` is the dimension of the channels; None until a convolution has shown it.
    """

    smallest: Extent
    largest: Extent
    jump: tuple[Fraction, ...]
    channels: int | None = None

    def widen(self, reach: Sequence[int], stride: Sequence[Fraction]) -> _Field:
        """The field behind an operation that sees ``reach`` positions besides one and moves by ``stride``."""

        def grow(extent: Extent) -> Extent:
            return tuple(float(e + r * j) for e, r, j in zip(extent, reach, self.jump, strict=True))

        jump = tuple(j * s for j, s in zip(self.jump, stride, strict=True))
        return _Field(grow(self.smallest), grow(self.largest), jump, self.channels)

    def see_all(self, axes: Sequence[bool]) -> _Field:
        """The field behind an operation that sees the whole of the given axes."""

        def grow(extent: Extent) -> Extent:
            return tuple(math.inf if all_ else e for e, all_ in zip(extent, axes, strict=True))

        return replace(self, smallest=grow(self.smallest), largest=grow(self.largest))


class _Follower(TorchFunctionMode):
    """Gives every output of an operation the field of its inputs."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.fields: MutableMapping[Tensor, _Field] = WeakTensorKeyDictionary()

    def joined(self, value: object) -> _Field | None:
        """The smallest and the largest field of all tensors in a value."""
        fields = [field for tensor in _tensors(value) if (field := self.fields.get(tensor)) is not None]
        if not fields:
            return None
        return _Field(
            tuple(map(min, zip(*(field.smallest for field in fields), strict=True))),
            tuple(map(max, zip(*(field.largest for field in fields), strict=True))),
            # Paths that join have the same positions, unless one is pooled to a single position and broadcast.
            tuple(map(min, zip(*(field.jump for field in fields), strict=True))),
            fields[0].channels,
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        field = self.joined((args, kwargs))  # before an operation in place replaces the field of its input
        result = func(*args, **kwargs)
        if field is not None:
            source = next(t for t in _tensors((args, kwargs)) if t in self.fields)
            for tensor in _tensors(result):
                self.fields[tensor] = self._behind(func, field, source, tensor, args, kwargs)
        return result

    def _behind(
        self,
        func: Callable[..., Any],
        field: _Field,
        source: Tensor,
        result: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> _Field:
        """The field of an operation's result, from the field of its inputs."""
        name = getattr(func, "__name__", "").removesuffix("_with_indices")

        def argument(index: int, key: str, default: Any) -> tuple[int, ...]:
            value = args[index] if len(args) > index else kwargs.get(key)
            value = default if value is None else value
            return tuple(value) if isinstance(value, Sequence) else (value,) * self.axes

        if result.ndim != self.axes + 2 or source.ndim != self.axes + 2:
            return field.see_all([True] * self.axes)
        before, after = source.shape[2:], result.shape[2:]
        resized = [Fraction(b, a) if a else Fraction(1) for b, a in zip(before, after, strict=True)]
        if field.channels is not None and _MOVES_DIMENSIONS.fullmatch(name) and args:
            sizes = func(torch.empty([*range(1, source.ndim + 1)], device="meta"), *args[1:], **kwargs).shape
            return replace(field, channels=sizes.index(field.channels + 1))
        if name == "linear" and field.channels is not None:
            is_mixed = field.channels != source.ndim - 1  # the last dimension has positions
            return field.see_all([is_mixed and axis == self.axes - 1 for axis in range(self.axes)])
        if _CONVOLUTION.fullmatch(name):
            field = replace(field, channels=1)
            kernel = (args[1] if len(args) > 1 else kwargs["weight"]).shape[2:]
            transposed = "transpose" in name
            dilation = argument(7 if transposed else 5, "dilation", 1)
            reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
            stride = argument(3, "stride", 1)
            if transposed:
                # An output position sees the input positions whose kernels cover it.
                seen = [(r + s) // s - 1 for r, s in zip(reach, stride, strict=True)]
                return field.widen(seen, [Fraction(1, s) for s in stride])
            return field.widen(reach, [Fraction(s) for s in stride])
        if _POOL.fullmatch(name):
            first = 2 if name.startswith("lp") else 1  # lp pools take the norm's order first
            kernel = argument(first, "kernel_size", 1)
            stride = argument(first + 1, "stride", kernel) or kernel
            dilation = argument(4, "dilation", 1) if name.startswith("max") else (1,) * self.axes
            reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
            return field.widen(reach, [Fraction(s) for s in stride])
        if _ADAPTIVE_POOL.fullmatch(name):
            # Windows that do not divide the input overlap by one position at either end.
            windows = [r if r.denominator == 1 else math.ceil(r) + 1 for r in resized]
            window = [min(int(w), b) for w, b in zip(windows, before, strict=True)]
            return field.widen([w - 1 for w in window], resized).see_all([a == 1 for a in after])
        if name in ("interpolate", "upsample"):
            mode = args[3] if len(args) > 3 else kwargs.get("mode", "nearest")
            around = 3 if mode == "bicubic" else 1 if "linear" in mode else 0
            return field.widen([around] * self.axes, resized)
        if name == "pixel_shuffle":
            return field.widen([0] * self.axes, resized)
        if name == "pixel_unshuffle":
            return field.widen([int(r) - 1 for r in resized], resized)
        if name == "__getitem__" and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            # The strides of a view tell the steps of its slices.
            pairs = list(zip(result.stride()[2:], source.stride()[2:], strict=True))
            field = field.widen([0] * self.axes, [Fraction(a, b) if a and b else Fraction(1) for a, b in pairs])
        number = sum(tensor in self.fields for tensor in _tensors(args))
        mixes = _MIXES_POSITIONS.fullmatch(name) or (_PRODUCT.fullmatch(name) and number > 1)
        return field.see_all([bool(mixes) or (b > 1 and a == 1) for b, a in zip(before, after, strict=True)])


_CONVOLUTION = re.compile(r"conv(_transpose)?[123]d")
_POOL = re.compile(r"(max|avg|lp)_pool[123]d")
_ADAPTIVE_POOL = re.compile(r"adaptive_(max|avg)_pool[123]d")
_PRODUCT = re.compile(r"matmul|__matmul__|bmm|baddbmm|einsum")
"""Products mix positions if both factors come from the input; one with a weight acts on features."""
_MOVES_DIMENSIONS = re.compile(r"permute|transpose|movedim|moveaxis|swapaxes|swapdims")
_MIXES_POSITIONS = re.compile(
    r"scaled_dot_product_attention|multi_head_attention_forward|lstm|gru|rnn_(tanh|relu)|cumsum"
    r"|fft_r?fft[2n]?|roll|flip|sort|grid_sample|fractional_max_pool[23]d|max_unpool[123]d"
)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _plain(extent: Extent) -> Extent:
    return tuple(int(e) if float(e).is_integer() else e for e in extent)
