"""Which rows a layer's output stands for: feature maps, sequences, packed sequences, nested outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from spectralmetrics.functional.moments import Observations

FeatureMaps = Literal["positions", "mean", "max", "median", "flatten"]
Sequences = Literal["timesteps", "last", "mean", "flatten"]
Interpolation = Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"]

_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
# Spatial dimensions of the maps that these modules put out, channels first.
_MAP_LAYERS: dict[type[nn.Module], int] = {
    layer: rank
    for rank, layers in {
        1: (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
        2: (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        3: (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
    }.items()
    for layer in layers
} | {
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}
# Features come last, whatever the number of dimensions.
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)
_TIME_FIRST = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class ObservationRule:
    """How the outputs of layers become observations; see :class:`~spectralmetrics.LayerProbe`.

    >>> rule = ObservationRule()
    >>> rule.batch(nn.Conv2d(1, 3, 3), torch.zeros(8, 3, 4, 4)).observations(rule).rows().shape
    torch.Size([128, 3])
    """

    feature_maps: FeatureMaps = "positions"
    sequences: Sequences = "timesteps"
    max_map_size: int | None = 32
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name, choices in (
            ("feature_maps", FeatureMaps),
            ("sequences", Sequences),
            ("interpolation", Interpolation),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"expected {name} among {get_args(choices)}, got {value!r}")
        if self.max_map_size is not None and self.max_map_size < 1:
            raise ValueError(f"expected max_map_size to be positive or None, got {self.max_map_size!r}")

    def batch(self, module: nn.Module, output: Any, mask: Tensor | None = None) -> Batch:
        """The first floating tensor of an output, samples first.

        Args:
            module: the layer that put it out, whose type tells maps from sequences.
            output: a tensor, a packed sequence, or a nest of tuples, lists, mappings and dataclasses.
            mask: (N, T) boolean, True for valid steps; used where it fits a sequence of that shape.

        Raises:
            ValueError: if there is no floating tensor in the output.
        """
        values = first_tensor(output)
        if values is None:
            raise ValueError(f"expected a floating tensor in the output, got {type(output).__name__}")
        if isinstance(values, PackedSequence):
            padded, lengths = pad_packed_sequence(values._replace(data=values.data.detach()), batch_first=True)
            steps = torch.arange(padded.shape[1])
            return Batch("sequence", padded, (steps < lengths[:, None]).to(padded.device))
        values = values.detach()
        kind, values = _samples_first(module, values)
        fits = kind == "sequence" and mask is not None and mask.shape == values.shape[:2]
        return Batch(kind, values, mask.to(values.device) if fits and mask is not None else None)


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
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, PackedSequence):  # itself a tuple
        return output if output.data.is_floating_point() else None
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name, None) for field in dataclasses.fields(output))
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def draw(observations: Observations, number: int, seed: int) -> Observations:
    """At most ``number`` of the observations, each with the same probability; the global state is left alone.

    One observation is drawn from each of ``number`` strata of equal length, so that neighbouring positions of
    one map, which resemble each other, seldom come together.

    >>> draw(Observations(torch.arange(10.0)[:, None]), 5, seed=0).num_observations
    5
    """
    total = observations.num_observations
    if total <= number:
        return observations
    device = observations.values.device
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.rand(number, generator=generator, device=device, dtype=torch.float64)
    strata = torch.arange(number, device=device, dtype=torch.float64)
    index = ((strata + offsets) * (total / number)).to(torch.int64).clamp_(max=total - 1)
    return observations.take(index)


def _samples_first(module: nn.Module, values: Tensor) -> tuple[Literal["rows", "maps", "sequence"], Tensor]:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    rank = next((rank for layer, rank in _MAP_LAYERS.items() if isinstance(module, layer)), None)
    if rank is not None and values.ndim == rank + 1 and not isinstance(module, nn.BatchNorm1d):
        values = values[None]  # an unbatched map (C, *spatial)
    if values.ndim == 0:
        raise ValueError("expected an output with features, got a scalar")
    if values.ndim == 1:
        return "rows", values[None]
    if values.ndim == 2 and isinstance(module, nn.RNNBase):
        return "sequence", values[None]  # an unbatched sequence (T, D)
    if values.ndim == 2:
        return "rows", values
    if values.ndim == 3 and rank is None:
        time_first = isinstance(module, _TIME_FIRST) and not module.batch_first
        return "sequence", values.transpose(0, 1) if time_first else values
    if rank is None and isinstance(module, _FEATURES_LAST):
        return "maps", values.movedim(-1, 1)
    return "maps", values


def _observe_maps(maps: Tensor, rule: ObservationRule) -> Observations:
    if rule.max_map_size is not None and max(maps.shape[2:]) > rule.max_map_size:
        maps = _shrink(maps, rule.max_map_size, rule.interpolation)
    if rule.feature_maps == "positions":
        return Observations(maps, feature_dim=1)
    flat = maps.flatten(2)  # (N, C, *spatial) -> (N, C, positions)
    if rule.feature_maps == "mean":
        return Observations(_in_full(flat).mean(2))
    if rule.feature_maps == "max":
        return Observations(flat.amax(2))
    if rule.feature_maps == "median":
        return Observations(flat.median(2).values)
    return Observations(flat.flatten(1))


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


def sample_size(rows_per_feature: float, num_features: int) -> int:
    """⌈r·D⌉, the largest number of observations drawn from one output.

    >>> sample_size(0.5, 3)
    2
    """
    return math.ceil(rows_per_feature * num_features)
