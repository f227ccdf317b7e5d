"""Rows of layers' outputs: of feature maps, sequences, packed sequences, nested outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from spectralmetrics.layers import is_time_first
from spectralmetrics.probing.layout import FeatureDim, Found, dim_of
from spectralmetrics.probing.outputs import first_tensor, not_floating, padded_nested, up_to
from spectralmetrics.probing.parts import is_dtensor, part_of
from spectralmetrics.probing.sampling import draw  # noqa: F401  # where 0.1.0 had it
from spectralmetrics.sums import Observations
from spectralmetrics.sums.checks import check_positive_integer

FeatureMaps = Literal["positions", "mean", "max", "median", "flatten"]
Sequences = Literal["timesteps", "last", "mean", "flatten"]
Observes = Literal["outputs", "inputs", "gradients"]
Interpolation = Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"]

_LINEAR_MODES = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class ObservationRule:
    """The rule by which outputs or inputs become observations; see :class:`~spectralmetrics.LayerProbe`.

    >>> rule = ObservationRule()
    >>> rule.batch(nn.Conv2d(1, 3, 3), torch.zeros(8, 3, 4, 4)).observations(rule).rows().shape
    torch.Size([128, 3])
    """

    feature_maps: FeatureMaps = "positions"
    sequences: Sequences = "timesteps"
    max_map_size: int | None = 32
    interpolation: Interpolation = "bilinear"
    observe: Observes = "outputs"

    def __post_init__(self) -> None:
        for name, choices in (
            ("feature_maps", FeatureMaps),
            ("sequences", Sequences),
            ("interpolation", Interpolation),
            ("observe", Observes),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"expected {name} among {get_args(choices)}, got {value!r}")
        check_positive_integer("max_map_size", self.max_map_size, or_none=True)

    def batch(
        self,
        module: nn.Module | None,
        output: Any,
        mask: Tensor | None = None,
        time_first: bool = False,
        dims: FeatureDim | None = None,
    ) -> Batch:
        """The first floating tensor of an output, samples first; a ValueError if there is none.

        Args:
            module: the layer of the output; None for a tensor that is no layer's output: (N, D), (N, T, D) or
                (N, C, *spatial).
            output: a tensor, a packed sequence, or a nest of tuples, lists, mappings and dataclasses.
            mask: (N, T) boolean, True for valid steps; used where it fits, see :meth:`Batch.masked`.
            time_first: True if a sequence is (T, N, D); used where the layer's type does not decide it.
            dims: finds the dimension of the features; None goes by the layer alone.
        """
        values = output if type(output) is Tensor and output.is_floating_point() else first_tensor(output)
        if values is None:
            raise ValueError(not_floating(output))
        if isinstance(values, PackedSequence):
            padded, lengths = pad_packed_sequence(values._replace(data=values.data.detach()), batch_first=True)
            return Batch("sequence", padded, up_to(lengths, padded))
        # A DTensor here is whole: processes that share one pass a `Part` of it.
        is_plain = type(values) is Tensor or not is_dtensor(values)
        values = values.detach() if is_plain else part_of(values).local
        if dims is None and module is not None:
            dims = dim_of(module, of_inputs=self.observe == "inputs")
        if values.is_nested:
            values, valid, ragged = padded_nested(values)
            found = Found(values.ndim - 1)
            if values.ndim > 3 and dims is not None:
                found = dims.find(values)
            if found.dim in (0, ragged):  # a dimension with different sizes does not hold features
                found = Found(max({*range(1, values.ndim)} - {ragged}))
            if values.ndim == 3:
                return Batch("sequence", values.movedim(found.dim, 2), valid)
            batch = _samples_first(values, found, False, False)
            return replace(batch.with_steps(valid, batch.order.index(ragged)), order=())
        if values.ndim == 0:
            raise ValueError("expected an output with features, got a scalar")
        if dims is None:
            found, takes_sequences = Found(1 if values.ndim > 3 else values.ndim - 1), False
        else:
            found, takes_sequences = dims.find(values), dims.takes_sequences
            own = is_time_first(module)
            time_first = time_first if own is None else own
        batch = _samples_first(values, found, takes_sequences, time_first)
        return batch if mask is None else batch.masked(mask, time_first)


@dataclass(frozen=True)
class Batch:
    """An output with samples in its first dimension.

    Attributes:
        kind: ``"rows"`` (N, D), ``"maps"`` (N, C, *spatial) or ``"sequence"`` (N, T, D).
        values: the tensor.
        valid: boolean, True for valid steps, (N, T) for sequences and (N, *spatial) for maps; None if all are.
        labels: (N,) or, for sequences, (N, T); None if there are none.
        is_feature_map: True for maps of two or three spatial dimensions that came with their channels first:
            only these can be interpolated.
        guessed_dim: the dimension of the output taken for the features, if it was guessed.
        was_flat: True for a sequence that came as (N·T, D).
        order: for each dimension of ``values`` the dimension of the output, -1 if the output does not have it;
            (0, 1, 1) for flattened tokens, or (1, 0, 1) if time is first.
    """

    kind: Literal["rows", "maps", "sequence"]
    values: Tensor
    valid: Tensor | None = None
    labels: Tensor | None = None
    is_feature_map: bool = False
    guessed_dim: int | None = None
    was_flat: bool = False
    order: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        """The number of samples N."""
        return self.values.shape[0]

    def masked(self, mask: Tensor, time_first: bool = False) -> Batch:
        """The batch with the valid steps of a mask; unchanged if the mask does not fit.

        A mask fits sequences (N, T, D), (T, N, D) unless T = N, tokens flattened to (N·T, D), or to (T·N, D) if
        time is first, and outputs with N samples and one dimension T besides the features, such as the heads
        (N, H, T, d) of an attention. It never fits feature maps.
        """
        samples, steps = mask.shape
        values = self.values
        if self.kind == "rows" and len(values) == samples * steps and steps > 1:
            shape = (steps, samples) if time_first else (samples, steps)
            values = values.unflatten(0, shape)
            values = values.transpose(0, 1) if time_first else values
            flat = (1, 0, 1) if time_first else (0, 1, 1)
            valid = mask.to(values.device)
            return replace(self, kind="sequence", values=values, valid=valid, was_flat=True, order=flat)
        if self.kind == "sequence":
            order = self.order
            if values.shape[:2] == (steps, samples) and steps != samples:
                values = values.transpose(0, 1)  # time first, although the layer's type does not say so
                order = (*order[1::-1], *order[2:])
            elif values.shape[:2] != mask.shape:
                return self
            return replace(self, values=values, valid=mask.to(values.device), order=order)
        if self.kind == "maps" and not self.is_feature_map and len(values) == samples:
            fitting = [dim for dim, size in enumerate(values.shape[2:], 2) if size == steps]
            if len(fitting) == 1:
                return self.with_steps(mask, fitting[0])
        return self

    def with_steps(self, valid: Tensor, dim: int) -> Batch:
        """Maps with (N, T) flags of the steps along one of their spatial dimensions."""
        values = self.values
        sizes = [size if each == dim else 1 for each, size in enumerate(values.shape[2:], 2)]
        flags = valid.to(values.device).reshape(len(valid), *sizes)
        return replace(self, valid=flags.expand(len(valid), *values.shape[2:]))

    def first(self, num_samples: int) -> Batch:
        """The first samples only, with their mask and labels."""
        if num_samples >= self.num_samples:
            return self
        valid = None if self.valid is None else self.valid[:num_samples]
        labels = None if self.labels is None else self.labels[:num_samples]
        return replace(self, values=self.values[:num_samples], valid=valid, labels=labels)

    def limit(self, rule: ObservationRule) -> int | None:
        """The number of observations to draw from a large output that is not interpolated; None for all.

        It is the number of positions in feature maps of ``max_map_size`` in each extent. Gradients are never
        interpolated: their scale belongs to each position.
        """
        if self.kind != "maps" or rule.feature_maps != "positions" or rule.max_map_size is None:
            return None
        if self.is_feature_map and rule.observe != "gradients":
            return None
        spatial = self.values.shape[2:]
        most = rule.max_map_size ** max(len(spatial), 2)
        return self.num_samples * most if math.prod(spatial) > most else None

    def observations(self, rule: ObservationRule) -> Observations:
        """The observations of this batch."""
        if self.kind == "maps":
            return _observe_maps(self, rule)
        if self.kind == "sequence":
            return _observe_sequence(self.values, self.valid, rule.sequences)
        return Observations(self.values, valid=self.valid)

    def labelled(self) -> Observations | None:
        """The labelled observations: steps if each has a label, or else the mean of each sample."""
        if self.labels is None:
            return None
        observed = self.observations(_STEPS if self.labels.ndim == 2 else _MEANS)
        labels = self.labels.reshape(-1).to(observed.values.device)
        return Observations(observed.values, observed.feature_dim, observed.valid, labels=labels)


class Plain(NamedTuple):
    """The form of an output that was taken as it is, without a change of its layout or its values.

    Attributes:
        shape, dtype: of the output.
        dim: dimension of its features.
        width: number of its features.
        limit: largest number of observations to draw; None for all.
    """

    shape: torch.Size
    dtype: torch.dtype
    dim: int
    width: int
    limit: int | None

    @classmethod
    def of(cls, output: Any, batch: Batch, observations: Observations, limit: int | None) -> Plain | None:
        """The form of an output; None if it was not taken as it is, or its layout was guessed."""
        if type(output) is not Tensor or output.is_nested or batch.guessed_dim is not None:
            return None
        is_as_it_was = batch.values.shape == output.shape and batch.order == tuple(range(output.ndim))
        if not is_as_it_was or observations.values is not batch.values or observations.valid is not None:
            return None
        return cls(output.shape, output.dtype, observations.feature_dim, observations.num_features, limit)

    def is_like(self, output: Tensor) -> bool:
        """True if an output, of no subclass, would be taken in the same way."""
        return (
            not output.is_nested
            and output.layout == torch.strided
            and output.dtype == self.dtype
            and output.shape == self.shape
        )


_STEPS = ObservationRule()
_MEANS = ObservationRule(feature_maps="mean", sequences="mean")


def _samples_first(values: Tensor, found: Found, takes_sequences: bool, time_first: bool) -> Batch:
    dim = found.dim
    guessed_dim = dim if found.is_guess else None
    order = tuple(range(values.ndim))
    if values.ndim == 1:
        return Batch("rows", values[None], order=(-1, 0))
    if values.ndim == 2 and takes_sequences:
        return Batch("sequence", values[None], order=(-1, 0, 1))  # an unbatched sequence (T, D)
    if dim == 0:
        values, dim, order = values[None], 1, (-1, *order)  # an unbatched map (C, *spatial)
    if values.ndim == 2:
        return Batch("rows", values, order=order)
    if values.ndim == 3 and dim == 2:
        order = (1, 0, 2) if time_first else order
        values = values.transpose(0, 1) if time_first else values
        return Batch("sequence", values, guessed_dim=guessed_dim, order=order)
    is_feature_map = dim == 1 and values.ndim in (4, 5) and not found.is_guess
    order = (order[0], order[dim], *order[1:dim], *order[dim + 1 :])
    values = values.movedim(dim, 1)
    return Batch("maps", values, is_feature_map=is_feature_map, guessed_dim=guessed_dim, order=order)


def _observe_maps(batch: Batch, rule: ObservationRule) -> Observations:
    # Maps are pooled in full size; only maps that keep their positions are shrunk.
    maps, how = batch.values, rule.feature_maps
    valid = None if batch.valid is None else batch.valid.flatten(1)  # (N, positions)
    if how in ("mean", "max", "median"):
        flat = maps.flatten(2)  # (N, C, *spatial) -> (N, C, positions)
        if valid is not None:
            return Observations(_pool_valid(_in_full(flat), valid[:, None], how), valid=valid.any(1))
        if how == "mean":
            return Observations(_in_full(flat).mean(2))
        return Observations(flat.amax(2) if how == "max" else _lower_median(flat))
    size = rule.max_map_size
    is_shrunk = batch.is_feature_map and rule.observe != "gradients"
    if is_shrunk and size is not None and max(maps.shape[2:]) > size:
        maps = _shrink(maps, size, rule.interpolation)
    if how == "positions":
        return Observations(maps, feature_dim=1, valid=None if valid is None else valid.reshape(-1))
    if valid is None:
        return Observations(maps.flatten(1))
    cleared = torch.where(valid[:, None], maps.flatten(2), 0)
    return Observations(cleared.flatten(1), valid=valid.any(1))


def _pool_valid(flat: Tensor, valid: Tensor, how: str) -> Tensor:
    """Pool the valid positions only; ``flat`` is (N, C, positions) and ``valid`` (N, 1, positions)."""
    number = valid.sum(2)
    if how == "mean":
        return torch.where(valid, flat, 0).sum(2) / number.clamp(min=1)
    if how == "max":
        return torch.where(valid, flat, -torch.inf).amax(2)
    ordered = torch.where(valid, flat, torch.inf).sort(-1).values
    index = ((number - 1).clamp(min=0) // 2)[..., None].expand(-1, flat.shape[1], -1)
    middle = ordered.gather(2, index)[..., 0]
    return torch.where((flat.isnan() & valid).any(2), torch.nan, middle)


def _lower_median(flat: Tensor) -> Tensor:
    """As ``torch.median`` along the last dimension, which is not deterministic on CUDA."""
    ordered = flat.sort(-1).values  # NaN comes last, and makes the median NaN
    middle = ordered[..., (flat.shape[-1] - 1) // 2]
    return torch.where(ordered[..., -1].isnan(), torch.nan, middle)


def _shrink(maps: Tensor, size: int, mode: str) -> Tensor:
    rank = maps.ndim - 2
    if mode in _LINEAR_MODES.values() or mode == "linear" or (mode == "bicubic" and rank != 2):
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
    """Half-precision values as float32, so that their sums keep their digits."""
    return values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)
