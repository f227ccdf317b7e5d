"""Add rows to dense moments on an accelerator, in few launches and without reading values back.

Small kernels cost an accelerator the time that the host takes to launch them. While the origin stays, rows
are centred, checked, masked and multiplied in at most 15 launches up to D = 1024. Values that depend on the
origin alone are computed once, when it moves.

Products are float64 where the device multiplies float64 as fast as float32, and float32 elsewhere, see
:func:`.products_dtype`. A device without float64 (MPS) only multiplies; the CPU's memory holds the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums import fused
from spectralmetrics.sums.about_origin import DenseSums
from spectralmetrics.sums.arithmetic import ROWS_PER_FLOAT32_SUM, are_finite, full_precision, power_of_two_scale
from spectralmetrics.sums.observations import Observations, as_maps

# Rows up to this width take one product. Wider rows take several, without the part below the diagonal.
_WIDTH_OF_ONE_PRODUCT = 1024
_WIDTH_OF_A_FLOAT64_PART = 512
# Memory for centred rows, and for float32 products of few rows each, which are then summed in float64.
_WORKSPACE_BYTES = 2**26
_FLOAT64_WORKSPACE_BYTES = 2**27
_PRODUCT_BYTES = 2**27


class Centring(NamedTuple):
    """The origin of sums on the device of the rows, valid until it moves.

    Attributes:
        shift: −scale · origin, shape (D,), of the dtype of the products.
        scale: a power of two that brings deviations near one, shape (), likewise; 1 for float64.
        zero: shape (), likewise.
        unit: 1 / scale, shape (), float64, on the device of the sums.
        weight: the square of ``unit``, likewise.
    """

    shift: Tensor
    scale: Tensor
    zero: Tensor
    unit: Tensor
    weight: Tensor

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """True if it is made for rows on this device and products of this dtype."""
        return self.shift.device == device and self.shift.dtype == dtype


def centring(moments: DenseSums, device: torch.device, dtype: torch.dtype) -> Centring:
    """Prepare to centre a device's rows on the origin of sums.

    With float32 products, the origin must be exact in float32. Deviations may then grow to 1e18 times their
    present size before their squares overflow; reading the sums reports that.
    """
    with torch.inference_mode(False), torch.no_grad():
        if dtype == torch.float64:
            one = moments.origin.new_ones(())
            return Centring(moments.origin.neg(), one, one.new_zeros(()), one, one)
        largest = moments.second.diagonal().amax() / moments.count.clamp(min=1)
        scale = power_of_two_scale(largest.sqrt().to(torch.float32))
        scale32, unit = scale.to(torch.float32), scale.reciprocal()
        shift = (moments.origin.to(torch.float32) * scale32).neg_()
        shift = shift.to(device)
        return Centring(shift, scale32.to(device), shift.new_zeros(()), unit, unit.square())


def add(moments: DenseSums, observations: Observations, centre: Centring) -> None:
    """Add observations to ``moments``, in place and about their origin.

    Args:
        moments: the sums so far, on the device of the observations; with float32 products, the CPU may hold
            them instead.
        observations: observations on an accelerator, in float32 or half precision if the products are float32.
        centre: the centring on the origin of these sums.
    """
    values, valid = observations.values.detach(), observations.valid
    dim, total = observations.feature_dim, observations.num_observations
    with torch.inference_mode(False), torch.no_grad(), full_precision(values.device.type):
        limit = _rows_of_a_piece(observations.num_features, centre.shift.dtype)
        if fused.takes(values):
            for maps, chosen in fused.cut(as_maps(values, dim), valid, limit):
                _add_maps(moments, maps, chosen, centre)
            return
        moved = values.movedim(dim, -1)
        if total <= limit:
            _add_piece(moments, moved, valid, centre)
            return
        rows = moved.reshape(-1, moved.shape[-1])
        for start in range(0, total, limit):
            chosen = None if valid is None else valid[start : start + limit]
            _add_piece(moments, rows[start : start + limit], chosen, centre)


def _rows_of_a_piece(features: int, dtype: torch.dtype) -> int:
    if dtype == torch.float64:
        return max(_FLOAT64_WORKSPACE_BYTES // (8 * features), 1)
    products = features * min(features, _WIDTH_OF_ONE_PRODUCT) * 4
    limit = min(_WORKSPACE_BYTES // (4 * features), ROWS_PER_FLOAT32_SUM * (_PRODUCT_BYTES // products))
    return max(limit, ROWS_PER_FLOAT32_SUM)


def _add_maps(moments: DenseSums, maps: Tensor, valid: Tensor | None, centre: Centring) -> None:
    """Add values of shape (samples, D, positions), in one pass before the products."""
    samples, features, positions = maps.shape
    total = samples * positions
    rows = _workspace(total, features, centre)
    number, sums = fused.centre(fused.judge(maps, valid), centre.shift, centre.scale, rows[:total])
    home = moments.second.device
    kept, left_out = number.to(home)
    moments.count.add_(kept)
    moments.non_finite.add_(left_out)
    moments.first.addcmul_(sums.to(home), centre.unit)
    _add_products(moments, rows, centre.weight)


def _add_piece(moments: DenseSums, values: Tensor, valid: Tensor | None, centre: Centring) -> None:
    """Add values of shape (..., D)."""
    features = values.shape[-1]
    total = values.numel() // features
    # Check rows before centring them: a row that overflows in centring held no NaN.
    kept = are_finite(values)
    if valid is not None:
        kept = kept & valid.reshape(kept.shape)
    rows = _workspace(total, features, centre)
    # scale · (x − o): a power of two adds no rounding error to the difference.
    scaled = torch.addcmul(centre.shift, values, centre.scale)
    torch.where(kept, scaled, centre.zero, out=rows[:total].view(values.shape))
    number = kept.sum()
    offered = total if valid is None else valid.sum()
    sums = rows.sum(0, dtype=_sum_dtype(moments, values.device))
    home = moments.second.device
    if home != values.device:
        number, sums = number.to(home), sums.to(home)
        offered = offered.to(home) if isinstance(offered, Tensor) else offered
    moments.count.add_(number)
    moments.non_finite.add_(offered - number)
    moments.first.addcmul_(sums, centre.unit)
    _add_products(moments, rows, centre.weight)


def _workspace(total: int, features: int, centre: Centring) -> Tensor:
    """Memory for centred rows; rows beyond ``total`` are zero."""
    dtype, whole = centre.shift.dtype, total
    if dtype == torch.float32 and total > ROWS_PER_FLOAT32_SUM:
        whole = -(-total // ROWS_PER_FLOAT32_SUM) * ROWS_PER_FLOAT32_SUM
    rows = torch.empty((whole, features), dtype=dtype, device=centre.shift.device)
    if whole > total:
        rows[total:].zero_()
    return rows


def _add_products(moments: DenseSums, rows: Tensor, weight: Tensor) -> None:
    """Add the products of scaled rows (n, D) to the second moment."""
    features = rows.shape[1]
    if rows.dtype == torch.float64:
        width = features if features <= _WIDTH_OF_ONE_PRODUCT else _WIDTH_OF_A_FLOAT64_PART
        for start in range(0, features, width):
            stop = start + width
            moments.second[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:])
        return
    home = moments.second.device
    stacked = rows.unflatten(0, (-1, min(ROWS_PER_FLOAT32_SUM, len(rows))))  # (n, D) -> (n / 256, 256, D)
    for start in range(0, features, _WIDTH_OF_ONE_PRODUCT):
        stop = min(start + _WIDTH_OF_ONE_PRODUCT, features)
        products = torch.bmm(stacked[..., start:stop].mT, stacked[..., start:])
        several = len(products) > 1
        product = products.sum(0, dtype=_sum_dtype(moments, rows.device)) if several else products[0]
        moments.second[start:stop, start:].addcmul_(product.to(home), weight)


def _sum_dtype(moments: DenseSums, device: torch.device) -> torch.dtype:
    return torch.float64 if moments.second.device == device else torch.float32
