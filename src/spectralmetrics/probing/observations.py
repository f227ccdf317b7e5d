"""Which rows a layer's output stands for: feature maps, sequences, packed sequences, nested outputs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence, pad_sequence

from spectralmetrics.probing.sampling import draw  # noqa: F401  # where 0.1.0 had it
from spectralmetrics.sums import Observations
from spectralmetrics.sums.checks import check_positive_integer

FeatureMaps = Literal["positions", "mean", "max", "median", "flatten"]
Sequences = Literal["timesteps", "last", "mean", "flatten"]
Interpolation = Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"]

_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
# Spatial dimensions of the maps that these modules put out, channels first.
_MAP_LAYERS: dict[type[nn.Module], int] = {
    getattr(nn, f"{name}{rank}d"): rank
    for rank in (1, 2, 3)
    for name in (
        "Conv",
        "ConvTranspose",
        "MaxPool",
        "AvgPool",
        "AdaptiveAvgPool",
        "AdaptiveMaxPool",
        "LPPool",
        "InstanceNorm",
        "ZeroPad",
        "ReflectionPad",
        "ReplicationPad",
        "ConstantPad",
        "CircularPad",
    )
}
# Channels are the second dimension, whatever the number of dimensions.
_CHANNELS_SECOND = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.PReLU,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Upsample,
)
# Features come last, whatever the number of dimensions; the attributes that say how many go in and out.
_FEATURES_LAST: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Bilinear: ("in1_features", "out_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.LayerNorm: ("normalized_shape", "normalized_shape"),
    nn.RMSNorm: ("normalized_shape", "normalized_shape"),
}
_RECURRENT_OR_ATTENTION = (nn.RNNBase, nn.MultiheadAttention)
# Whose outputs of two dimensions are no rows (N, D), but maybe an unbatched map or sequence.
_OF_UNBATCHED_RANK_TWO = (nn.Sequential, *_RECURRENT_OR_ATTENTION, *_MAP_LAYERS)
_ROWS_OF_TWO_DIMENSIONS: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ObservationRule:
    """How what layers put out, or take in, becomes observations; see :class:`~spectralmetrics.LayerProbe`.

    >>> rule = ObservationRule()
    >>> rule.batch(nn.Conv2d(1, 3, 3), torch.zeros(8, 3, 4, 4)).observations(rule).rows().shape
    torch.Size([128, 3])
    """

    feature_maps: FeatureMaps = "positions"
    sequences: Sequences = "timesteps"
    max_map_size: int | None = 32
    interpolation: Interpolation = "bilinear"
    of_inputs: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("feature_maps", FeatureMaps),
            ("sequences", Sequences),
            ("interpolation", Interpolation),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"expected {name} among {get_args(choices)}, got {value!r}")
        check_positive_integer("max_map_size", self.max_map_size, or_none=True)

    def batch(
        self, module: nn.Module | None, output: Any, mask: Tensor | None = None, time_first: bool = False
    ) -> Batch:
        """The first floating tensor of an output, samples first.

        Args:
            module: the layer that put it out, whose type tells the order of dimensions; None for a tensor that
                is no layer's output: (N, D), (N, T, D) or (N, C, *spatial).
            output: a tensor, a packed sequence, or a nest of tuples, lists, mappings and dataclasses.
            mask: (N, T) boolean, True for valid steps; used where it fits a sequence of that shape.
            time_first: whether a sequence is (T, N, D), where the layer's type does not tell.

        Raises:
            ValueError: if there is no floating tensor in the output.
        """
        values = output if type(output) is Tensor and output.is_floating_point() else first_tensor(output)
        if values is None:
            raise ValueError(f"expected a floating tensor in the output, got {type(output).__name__}")
        if isinstance(values, PackedSequence):
            padded, lengths = pad_packed_sequence(values._replace(data=values.data.detach()), batch_first=True)
            return Batch("sequence", padded, _up_to(lengths, padded))
        values = values.detach()
        if values.is_nested:
            parts = values.unbind()  # (T_i, D) each
            padded = pad_sequence(list(parts), batch_first=True)
            return Batch(
                "sequence", padded, _up_to(torch.tensor([len(part) for part in parts], device="cpu"), padded)
            )
        if values.ndim == 2 and _puts_out_rows(type(module)):
            return Batch("rows", values)
        kind, values = _samples_first(module, values, time_first, self.of_inputs)
        if kind != "sequence" or mask is None:
            return Batch(kind, values)
        samples, steps = values.shape[:2]
        if mask.shape == (steps, samples) and steps != samples:
            values = values.transpose(0, 1)  # time first, although the layer's type does not tell
        elif mask.shape != (samples, steps):
            return Batch(kind, values)
        return Batch(kind, values, mask.to(values.device))


@dataclass(frozen=True)
class Batch:
    """An output with samples in its first dimension.

    Attributes:
        kind: ``"rows"`` (N, D), ``"maps"`` (N, C, *spatial) or ``"sequence"`` (N, T, D).
        values: the tensor.
        valid: for sequences, (N, T) boolean, True for valid steps; None if all are.
    """

    kind: Literal["rows", "maps", "sequence"]
    values: Tensor
    valid: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """The number of samples N."""
        return self.values.shape[0]

    def first(self, num_samples: int) -> Batch:
        """The first samples only."""
        if num_samples >= self.num_samples:
            return self
        valid = None if self.valid is None else self.valid[:num_samples]
        return Batch(self.kind, self.values[:num_samples], valid)

    def observations(self, rule: ObservationRule) -> Observations:
        """The observations that this batch stands for."""
        if self.kind == "maps":
            return _observe_maps(self.values, rule)
        if self.kind == "sequence":
            return _observe_sequence(self.values, self.valid, rule.sequences)
        return Observations(self.values)


def first_tensor(output: Any) -> Tensor | PackedSequence | None:
    """The first floating tensor in a nest of tuples, lists, mappings and dataclasses; None if there is none.

    >>> first_tensor({"ids": torch.zeros(2, dtype=torch.int64), "hidden": (torch.ones(3),)})
    tensor([1., 1., 1.])
    """
    return _first_tensor(output, ())


def _first_tensor(output: Any, inside: tuple[Any, ...]) -> Tensor | PackedSequence | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, PackedSequence):  # itself a tuple
        return output if output.data.is_floating_point() else None
    # A compiler does not know how to compare tuples by identity, and what it traces ends.
    if not torch.compiler.is_compiling() and any(output is outer for outer in inside):
        return None  # a nest that holds itself
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name, None) for field in dataclasses.fields(output))
    inside = (*inside, output)
    for part in parts:
        found = _first_tensor(part, inside)
        if found is not None:
            return found
    return None


def _puts_out_rows(kind: type) -> bool:
    """Whether two dimensions of an output are (N, D) for sure."""
    if kind not in _ROWS_OF_TWO_DIMENSIONS:
        _ROWS_OF_TWO_DIMENSIONS[kind] = not issubclass(kind, _OF_UNBATCHED_RANK_TWO)
    return _ROWS_OF_TWO_DIMENSIONS[kind]


def _samples_first(
    module: nn.Module | None, values: Tensor, time_first: bool, of_inputs: bool
) -> tuple[Literal["rows", "maps", "sequence"], Tensor]:
    module = _deciding(module)
    rank = next((rank for layer, rank in _MAP_LAYERS.items() if isinstance(module, layer)), None)
    if rank is not None and values.ndim == rank + 1:
        values = values[None]  # an unbatched map (C, *spatial)
    if values.ndim == 0:
        raise ValueError("expected an output with features, got a scalar")
    if values.ndim == 1:
        return "rows", values[None]
    if values.ndim == 2 and isinstance(module, _RECURRENT_OR_ATTENTION):
        return "sequence", values[None]  # an unbatched sequence (T, D)
    if values.ndim == 2:
        return "rows", values
    if values.ndim == 3 and rank is None and not isinstance(module, _CHANNELS_SECOND):
        own = is_time_first(module)
        return "sequence", values.transpose(0, 1) if (time_first if own is None else own) else values
    if values.shape[-1] == _own_width(module, of_inputs):
        return "maps", values.movedim(-1, 1)
    return "maps", values


def _deciding(module: nn.Module | None) -> nn.Module | None:
    """The module inside a sequential one whose type tells the layout of its output: the last that does."""
    if not isinstance(module, nn.Sequential):
        return module
    telling = (*_MAP_LAYERS, *_CHANNELS_SECOND, *_FEATURES_LAST, *_RECURRENT_OR_ATTENTION)
    for inner in reversed(module):
        found = _deciding(inner)
        if isinstance(found, telling):
            return found
    return None


def _own_width(module: nn.Module | None, of_inputs: bool) -> int | None:
    """The size of the last dimension of the output, or input, of a layer whose features come last."""
    for layer, attributes in _FEATURES_LAST.items():
        if isinstance(module, layer):
            width = getattr(module, attributes[0 if of_inputs else 1])
            return int(width if isinstance(width, int) else width[-1])
    return None


def is_time_first(module: nn.Module | None) -> bool | None:
    """Whether a layer puts out (T, N, D): it says so, or the attention inside it does; None if nothing tells.

    >>> is_time_first(nn.LSTM(3, 4)), is_time_first(nn.Linear(3, 4))
    (True, None)
    """
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    if isinstance(module, (*_RECURRENT_OR_ATTENTION, nn.Transformer)):
        return not module.batch_first
    return None


def _up_to(lengths: Tensor, padded: Tensor) -> Tensor:
    """(N, T) boolean, True for the first steps of each sequence."""
    steps = torch.arange(padded.shape[1], device=lengths.device)
    return (steps < lengths[:, None]).to(padded.device)


def _observe_maps(maps: Tensor, rule: ObservationRule) -> Observations:
    # Each map is pooled as it is; only what keeps its positions is shrunk.
    if rule.feature_maps in ("mean", "max", "median"):
        flat = maps.flatten(2)  # (N, C, *spatial) -> (N, C, positions)
        if rule.feature_maps == "mean":
            return Observations(_in_full(flat).mean(2))
        return Observations(flat.amax(2) if rule.feature_maps == "max" else _lower_median(flat))
    if rule.max_map_size is not None and max(maps.shape[2:]) > rule.max_map_size:
        maps = _shrink(maps, rule.max_map_size, rule.interpolation)
    return (
        Observations(maps, feature_dim=1) if rule.feature_maps == "positions" else Observations(maps.flatten(1))
    )


def _lower_median(flat: Tensor) -> Tensor:
    """As ``torch.median`` along the last dimension, which has no deterministic way on CUDA."""
    ordered = flat.sort(-1).values  # NaN comes last, and makes the median NaN
    middle = ordered[..., (flat.shape[-1] - 1) // 2]
    return torch.where(ordered[..., -1].isnan(), torch.nan, middle)


def _shrink(maps: Tensor, size: int, mode: str) -> Tensor:
    rank = maps.ndim - 2
    if rank > 3:
        raise ValueError(f"expected maps of at most 3 spatial dimensions to interpolate, got {rank}")
    if mode in _LINEAR_MODES.values() or (mode == "bicubic" and rank != 2):
        mode = _LINEAR_MODES[rank]
    target = [min(extent, size) for extent in maps.shape[2:]]
    return nn.functional.interpolate(_in_full(maps), size=target, mode=mode)


def _observe_sequence(values: Tensor, valid: Tensor | None, how: Sequences) -> Observations:
    # (N, T, D)
    if how == "timesteps":
        return Observations(values, valid=None if valid is None else valid.reshape(-1))
    if valid is None:
        if how == "last":
            return Observations(values[:, -1])
        return Observations(_in_full(values).mean(1) if how == "mean" else values.flatten(1))
    present = valid.any(1)
    if how == "last":
        steps = values.shape[1]
        last = steps - 1 - valid.flip(1).to(torch.uint8).argmax(1)
        index = last[:, None, None].expand(-1, 1, values.shape[2])
        return Observations(values.gather(1, index)[:, 0], valid=present)
    cleared = torch.where(valid[:, :, None], _in_full(values), 0)
    if how == "mean":
        return Observations(cleared.sum(1) / valid.sum(1).clamp(min=1)[:, None], valid=present)
    return Observations(cleared.flatten(1), valid=present)


def _in_full(values: Tensor) -> Tensor:
    """Half-precision values in float32, so that sums of them keep their digits."""
    return values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)
