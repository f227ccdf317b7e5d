"""A spectrum for a page: dimensions at every position of its slider, and points to draw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectralmetrics.functional.dimension import Rule, check_rule
from spectralmetrics.functional.sketched import intrinsic_dimension
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.recording.report.encode import MISSING, UNKNOWN

Thresholds = npt.NDArray[np.float64]

STEPS_PER_DECADE = 4096
"""Resolution of the points of a spectrum: each is within 0.03 % of its eigenvalue."""
ZERO = 2**20
"""The point that stands for an eigenvalue of zero."""


def slider(recorded: list[float]) -> list[float]:
    """The thresholds that a page offers: hundredths from 0.5, thousandths from 0.97, 1, and recorded ones.

    >>> positions = slider([0.985, 0.9999])
    >>> positions[:3], positions[-3:]
    ([0.5, 0.51, 0.52], [0.999, 0.9999, 1.0])
    """
    hundredths = [number / 100 for number in range(50, 97)]
    thousandths = [number / 1000 for number in range(970, 1001)]
    return sorted({*hundredths, *thousandths, *recorded})


def dimensions(eigenvalues: Tensor, thresholds: Thresholds, rule: Rule = "explained") -> npt.NDArray[np.int64]:
    """The intrinsic dimension at many thresholds.

    Equal to :func:`spectralmetrics.functional.intrinsic_dimension` at each threshold, but found by bisection,
    since the cumulative sums rise.

    Args:
        eigenvalues: descending and finite, shape (D,).
        thresholds: shape (T,), each in (0, 1].
        rule: as in :func:`~spectralmetrics.functional.intrinsic_dimension`.

    Returns:
        Shape (T,).

    >>> dimensions(torch.tensor([4.0, 3.0, 2.0, 1.0]), np.array([0.4, 0.41, 0.85]))
    array([1, 2, 3])
    """
    check_rule(rule)
    values = eigenvalues.to(torch.float64).clamp(min=0)
    cumulative = values.cumsum(-1)
    total = cumulative[-1]
    if not total > 0:
        return np.zeros(len(thresholds), dtype=np.int64)
    shares = torch.from_numpy(thresholds)
    if rule == "delve":
        return torch.searchsorted(cumulative / values.sum(-1, keepdim=True), shares).numpy()
    limits = (shares - len(values) * torch.finfo(torch.float64).eps) * total
    return (torch.searchsorted(cumulative, limits) + 1).numpy()


class Bounds(NamedTuple):
    """Dimensions at the positions of the slider.

    Attributes:
        values: shape (T,); MISSING where a sketch gives no value.
        others: the other ends of the intervals, shape (T,); MISSING without one, UNKNOWN while a fold is empty.
    """

    values: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]


def bounds(spectrum: Spectrum, thresholds: Thresholds, rule: Rule) -> Bounds:
    """The dimensions of a spectrum that is kept as a covariance, as folds, or as a sketch."""
    if spectrum.sketch is not None:
        leading, total, width = spectrum.eigenvalues, spectrum.total_variance, spectrum.num_features
        estimates = [intrinsic_dimension(leading, total, width, each, rule) for each in thresholds.tolist()]
        known = [MISSING if each.value.isnan() else int(each.value) for each in estimates]
        return Bounds(np.array(known), np.array([int(each.low) for each in estimates]))
    values = dimensions(spectrum.eigenvalues, thresholds, rule)
    if spectrum.num_folds < 2:
        return Bounds(values, np.full_like(values, MISSING))
    held_out = spectrum.held_out()
    if held_out is None:
        return Bounds(values, np.full_like(values, UNKNOWN))
    return Bounds(values, dimensions(held_out.eigenvalues, thresholds, rule))


def positions(width: int, most: int) -> npt.NDArray[np.int64]:
    """The numbers, from 1, of the eigenvalues to draw of ``width``: all, or ``most``, evenly on a log axis.

    >>> positions(5, 10), positions(1000, 7)
    (array([1, 2, 3, 4, 5]), array([   1,    3,   10,   32,  100,  316, 1000]))
    """
    if width <= most:
        return np.arange(1, width + 1)
    return np.unique(np.geomspace(1, width, most).round().astype(np.int64))


def points(eigenvalues: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Eigenvalues relative to the largest, as steps of 1/4096 of a decade below it.

    Args:
        eigenvalues: descending, shape (D,).
        chosen: the numbers of the eigenvalues, counted from 1, shape (P,).

    Returns:
        Shape (P,): 0 for the largest, ``ZERO`` for zero.

    >>> points(np.array([2.0, 0.2, 0.0]), np.array([1, 2, 3]))
    array([      0,    4096, 1048576])
    """
    picked = eigenvalues[chosen - 1]
    steps = np.full(len(picked), ZERO)
    positive = picked > 0
    steps[positive] = np.rint(-np.log10(picked[positive] / eigenvalues[0]) * STEPS_PER_DECADE)
    capped: npt.NDArray[np.int64] = np.minimum(steps, ZERO)
    return capped
