"""Receptive fields followed through the operations of a forward, whatever PyTorch it is written in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spectralmetrics.receptive_field.axes import Axis, Way, adaptive, moved, resized, transposed, window


@dataclass(frozen=True)
class Field:
    """The receptive field of a tensor: its axes along the path that sees least, and along all paths together.

    ``dims`` are the dimensions of the tensor along these axes; None until a convolution has shown them.
    """

    smallest: tuple[Axis, ...]
    largest: tuple[Axis, ...]
    dims: tuple[int, ...] | None = None

    def each(self, change: Callable[[Axis, int], Axis]) -> Field:
        """The field with every axis changed, by its number."""
        smallest, largest = (
            tuple(map(change, axes, range(len(axes)))) for axes in (self.smallest, self.largest)
        )
        return replace(self, smallest=smallest, largest=largest)

    def everything(self) -> Field:
        """The field behind an operation that sees all positions, and leaves no dimension for each axis."""
        return replace(self.each(lambda axis, _: axis.everything()), dims=None)


class Follower(TorchFunctionMode):
    """Gives every output of an operation the field of its inputs."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.axes = example.ndim - 2
        self.fields: MutableMapping[Tensor, Field] = WeakTensorKeyDictionary()
        self.fields[example] = Field((Axis(),) * self.axes, (Axis(),) * self.axes)

    def joined(self, value: object, aligned: bool = True) -> Field | None:
        """The field of all tensors in a value together; aligned ones have the same positions."""
        fields = [self.fields[tensor] for tensor in self._followed(value)]
        if not fields:
            return None
        least, most = partial(Axis.either, pick=min), Axis.union if aligned else partial(Axis.either, pick=max)
        return Field(
            tuple(reduce(least, paths) for paths in zip(*(field.smallest for field in fields), strict=True)),
            tuple(reduce(most, paths) for paths in zip(*(field.largest for field in fields), strict=True)),
            fields[0].dims,
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        call = _Call(func, args, kwargs or {})
        sources = self._followed((args, kwargs))
        if not sources or call.is_a(_MAKES_NEW):
            return call(*args)
        dims = self._dims(sources[0])
        is_aligned = not call.is_a(_CONCATENATION) or call.argument(1, "dim", 0) % sources[0].ndim not in dims
        # Before an operation in place replaces the field of its input.
        field = self.joined(sources, is_aligned)
        assert field is not None
        result = call(*args)
        if call.name == "__setitem__":
            sizes = [[each.shape[dim] for dim in dims if dim < each.ndim] for each in (*sources, args[0])]
            fits = all(each == sizes[0] for each in sizes)
            self.fields[args[0]] = field if fits else field.everything()
        for number, tensor in enumerate(_tensors(result)):
            self.fields[tensor] = self._behind(call, field, sources[0], tensor, number)
        return result

    def _followed(self, value: object) -> list[Tensor]:
        """The tensors in a value that depend on the input; those with most dimensions come first."""
        return sorted((t for t in _tensors(value) if t in self.fields), key=Tensor.dim, reverse=True)

    def _dims(self, tensor: Tensor) -> tuple[int, ...]:
        field = self.fields.get(tensor)
        return (field and field.dims) or tuple(range(2, self.axes + 2))

    def _behind(self, call: _Call, field: Field, source: Tensor, result: Tensor, number: int) -> Field:
        """The field of an operation's result, from the field of its inputs."""
        if source.ndim < self.axes + 2:
            return field.everything()
        dims = self._dims(source)
        if call.is_a(_MOVES_DIMENSIONS):
            if field.dims is None or not call.args:
                return field
            sizes = call(torch.empty([*range(1, source.ndim + 1)], device="meta"), *call.args[1:]).shape
            return replace(field, dims=tuple(sizes.index(dim + 1) for dim in dims))
        if call.is_a(_MOVES_POSITIONS) and call.args:
            return self._moved(call, field, source, number)
        if result.ndim != source.ndim:
            return field.everything()
        ways = _ways(call, source, result)
        sizes = [(source.shape[dim], result.shape[dim]) for dim in dims]
        mixes = call.is_a(_MIXES_POSITIONS) or (call.is_a(_PRODUCT) and len(self._followed(call.args)) > 1)
        mixed = 1 if call.is_a(_CONVOLUTION) else None  # the dimension of features
        if call.is_a(_LINEAR) and field.dims is not None:
            mixed = source.ndim - 2 if call.args and call.args[0] is not source else source.ndim - 1

        def behind(axis: Axis, which: int) -> Axis:
            dim, (before, after) = dims[which], sizes[which]
            if mixes or dim == mixed or (before > 1 and after == 1 and ways is None):
                return axis.everything()
            if call.is_a(_ADAPTIVE_POOL) and after == 1:
                return axis.everything()
            return axis if ways is None or dim < 2 else axis.through(*ways[dim - 2])

        field = field.each(behind)
        return replace(field, dims=dims) if call.is_a(_CONVOLUTION) else field

    def _moved(self, call: _Call, field: Field, source: Tensor, number: int) -> Field:
        """The field behind an operation that only moves values: it moves the numbers of positions, too."""
        dims: list[int] = []
        ways: list[Way | None] = []
        for dim in self._dims(source):
            shape = [1] * source.ndim
            shape[dim] = source.shape[dim]
            numbers = torch.arange(source.shape[dim], device="cpu" if source.is_meta else source.device)
            numbers = numbers.view(shape).expand(source.shape).contiguous()
            result = list(_tensors(call(numbers, *call.args[1:])))[number]
            along = [d for d in range(result.ndim) if (result.diff(dim=d) != 0).any()]
            if not result.numel():
                return field
            if result.dtype != numbers.dtype:  # a view of the bits
                return field.everything()
            if not along and result.ndim == source.ndim:
                along = [dim]
            if len(along) != 1 or along[0] in dims:
                return field.everything()
            dims.append(along[0])
            seen = result.movedim(along[0], 0).flatten(1)[:, 0].tolist()
            step = seen[1] - seen[0] if len(seen) > 1 else 1
            steady = step > 0 and seen == list(range(seen[0], seen[0] + step * len(seen), step))
            ways.append(moved(seen[0], step) if steady else None)

        def behind(axis: Axis, which: int) -> Axis:
            way = ways[which]
            return axis.everything() if way is None else axis.through(*way)

        field = field.each(behind)
        return field if field.dims is None and result.ndim == source.ndim else replace(field, dims=tuple(dims))


class _Call:
    """A function of torch with its arguments."""

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", "").removesuffix("_with_indices")

    def __call__(self, *args: Any) -> Any:
        return self.func(*args, **self.kwargs)

    def is_a(self, kind: re.Pattern[str]) -> bool:
        return kind.fullmatch(self.name) is not None

    def argument(self, index: int, key: str, default: Any) -> Any:
        value = self.args[index] if len(self.args) > index else self.kwargs.get(key)
        return default if value is None else value


def _ways(call: _Call, source: Tensor, result: Tensor) -> list[Way] | None:
    """Ways of the dimensions from the third on; None if the call does not go through windows."""
    before, after = source.shape[2:], result.shape[2:]

    def each(index: int, key: str, default: Any) -> tuple[Any, ...]:
        value = call.argument(index, key, default)
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values if len(values) == len(before) else values * len(before)

    if call.is_a(_CONVOLUTION):
        kernel = call.argument(1, "weight", None).shape[2:]
        stride = each(3, "stride", 1)
        if "transpose" in call.name:
            return list(map(transposed, kernel, stride, each(4, "padding", 0), each(7, "dilation", 1)))
        dilation, padding = each(5, "dilation", 1), each(4, "padding", 0)
        if padding[0] == "same":
            padding = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
        elif padding[0] == "valid":
            padding = (0,) * len(kernel)
        return list(map(window, kernel, stride, padding, dilation))
    if call.is_a(_POOL):
        is_lp = call.name.startswith("lp")  # takes the norm's order first, and no padding
        kernel = each(1 + is_lp, "kernel_size", 1)
        stride = each(2 + is_lp, "stride", kernel) or kernel
        padding = (0,) * len(kernel) if is_lp else each(3, "padding", 0)
        dilation = each(4, "dilation", 1) if call.name.startswith("max") else (1,) * len(kernel)
        return list(map(window, kernel, stride, padding, dilation))
    if call.is_a(_ADAPTIVE_POOL):
        return list(map(adaptive, before, after))
    if call.name == "pad":
        starts = [*call.argument(1, "pad", ())[::2], *[0] * len(before)][: len(before)]
        return [moved(-start, 1) for start in reversed(starts)]
    ratios = [Fraction(b, a or 1) for b, a in zip(before, after, strict=True)]
    if call.name in ("interpolate", "upsample"):
        scale = call.argument(2, "scale_factor", None)
        mode = call.argument(3, "mode", "nearest")
        if mode == "area":
            return list(map(adaptive, before, after))
        if scale is not None and not call.argument(5, "recompute_scale_factor", False):
            scales = scale if isinstance(scale, Sequence) else [scale] * len(before)
            ratios = [1 / Fraction(each).limit_denominator(1000) for each in scales]
        return [resized(ratio, mode, call.argument(6, "antialias", False)) for ratio in ratios]
    if call.name == "pixel_shuffle":
        return [resized(ratio, "nearest", antialias=False) for ratio in ratios]
    if call.name == "pixel_unshuffle":
        return [window(int(ratio), int(ratio), 0) for ratio in ratios]
    return None


_MAKES_NEW = re.compile(r".*_like|new_.*")
_CONVOLUTION = re.compile(r"conv(_transpose)?[123]d")
_POOL = re.compile(r"(max|avg|lp)_pool[123]d")
_ADAPTIVE_POOL = re.compile(r"adaptive_(max|avg)_pool[123]d")
_CONCATENATION = re.compile(r"cat|concat|concatenate")
_LINEAR = re.compile(r"linear|matmul|__matmul__")
_PRODUCT = re.compile(r"matmul|__matmul__|bmm|baddbmm|einsum")
"""Products mix positions if both factors come from the input; one with a weight acts on features."""
_MOVES_DIMENSIONS = re.compile(r"permute|transpose|movedim|moveaxis|swapaxes|swapdims")
_MOVES_POSITIONS = re.compile(
    r"__getitem__|narrow|split|split_with_sizes|chunk|tensor_split|index_select|view|reshape|flatten|unflatten|(un)?squeeze"
)
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
