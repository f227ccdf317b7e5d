"""Moments of one partition of data in an engine, which merges the moments in its own reduction."""

from __future__ import annotations

from typing import Any

from spectralmetrics.files.fields import columns_of
from spectralmetrics.sums import Moments, Observations, accumulate, empty_moments

_ROWS = 65536


def moments_of(rows: Any) -> Moments:
    """The moments of the rows of one partition, for :func:`~spectralmetrics.functional.merge`.

    Sums of partitions are merged exactly, in any order and in any tree; partitions may be empty. They are
    small (8·D² bytes), can be pickled, and :func:`~spectralmetrics.measure` reads them.

    Args:
        rows: shape (N, D), floating: an array, a tensor, a data frame of numbers, or a series whose elements
            are vectors. Rows with NaN or infinities are left out and counted.

    Raises:
        TypeError: for anything else.
        ReadError: a ``ValueError``, for rows of another shape or dtype.

    >>> import torch
    >>> from functools import reduce
    >>> from spectralmetrics import measure, merge, moments_of
    >>> partitions = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).split(1000)
    >>> moments = reduce(merge, map(moments_of, partitions))
    >>> int(moments.count), int(measure(moments).values["intrinsic_dimension"])
    (4000, 8)
    """
    columns = columns_of(rows, "rows")
    if columns is None or not (columns.join or "" in columns.fields):
        raise TypeError(
            f"expected rows as an array, a tensor, a data frame or a series, got {type(rows).__name__}"
        )
    if columns.is_empty:
        fields = [each for each in columns.fields.values() if each.is_floating]
        widths = [each.shape[1] for each in fields if len(each.shape) == 2]
        return empty_moments(widths[0] if widths else len(fields) if columns.join else 0)
    field = columns.features(None, None)
    size, width = field.shape
    moments = empty_moments(width)
    for start in range(0, size, _ROWS):
        block = field.read(start, min(start + _ROWS, size))
        accumulate(moments, Observations(block.cpu()))
    return moments
