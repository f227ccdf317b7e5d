"""The heavy tail of a spectrum: a power law fitted by maximum likelihood, with its lower end."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.functional.dimension import finite_eigenvalues

FEWEST_VALUES = 10
"""The fewest positive eigenvalues to which a power law is fitted."""


class PowerLawTail(NamedTuple):
    """A power law fitted to the largest eigenvalues.

    Attributes:
        alpha: the exponent of the density, shape (), float64.
        x_min: the eigenvalue from which on the power law holds, shape (), float64.
        error: the standard error of ``alpha``, shape (), float64.
        distance: the Kolmogorov distance between the tail and the power law, in [0, 1], shape (), float64.
        tail: the number of eigenvalues in the tail, shape (), int64.
    """

    alpha: Tensor
    x_min: Tensor
    error: Tensor
    distance: Tensor
    tail: Tensor


def power_law_tail(eigenvalues: Tensor) -> PowerLawTail:
    r"""The power law :math:`p(\lambda) \propto \lambda^{-\alpha}` of the largest eigenvalues.

    For each eigenvalue as the lower end :math:`x_{\min}`, the exponent is the maximum-likelihood estimate from
    the m eigenvalues from there on,

    .. math:: \alpha = 1 + m \Big/ \sum_i \log \frac{\lambda_i}{x_{\min}},
              \qquad \sigma_\alpha = \frac{\alpha - 1}{\sqrt m},

    and the lower end is the one whose tail has the smallest Kolmogorov distance from its power law (Clauset,
    Shalizi and Newman, arXiv:0706.1062). This is the α of heavy-tailed weight matrices (Martin and Mahoney,
    arXiv:1810.01075); :func:`power_law_exponent` fits another one, of eigenvalues over their rank. The standard
    error ignores that the lower end is estimated, too.

    Args:
        eigenvalues: shape (D,), in any order; zero and negative ones are left out.

    Returns:
        All NaN, with a tail of 0, where fewer than 10 eigenvalues are positive or all of these are equal.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for another shape, or an eigenvalue that is not finite.

    >>> uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    >>> fit = power_law_tail(uniform ** (-1 / 1.5))  # quantiles of the density with exponent 2.5
    >>> round(float(fit.alpha), 2), float(fit.distance) < 0.01
    (2.5, True)
    """
    values = finite_eigenvalues(eigenvalues)
    if values.ndim != 1:
        raise ValueError(f"expected eigenvalues of shape (D,), got shape {tuple(values.shape)}")
    *fit, tail = _best_fit(np.sort(values[values > 0].cpu().numpy()))
    alpha, x_min, error, distance = torch.tensor(fit, dtype=torch.float64, device=values.device)
    return PowerLawTail(alpha, x_min, error, distance, torch.tensor(tail, device=values.device))


def _best_fit(values: np.ndarray) -> tuple[float, float, float, float, int]:
    """The fit to positive, ascending values."""
    total = len(values)
    best = (math.nan, math.nan, math.nan, math.nan, 0)
    if total < FEWEST_VALUES:
        return best
    # About the largest: equal digits of large logarithms would be lost where values lie close together.
    largest = values[-1]
    logs = np.log(values) - np.log(largest)
    near = values > largest / 2
    logs[near] = np.log1p((values[near] - largest) / largest)
    # The first of equal values is their lower end, and gives all of them their rank in the distribution.
    ranks = np.searchsorted(values, values, side="left")
    above = np.cumsum(logs[::-1])[::-1]
    least = math.inf
    for start in np.unique(ranks)[:-1]:
        size = total - start
        excess = above[start] - size * logs[start]
        if excess <= 0:
            continue
        alpha = 1 + size / excess
        expected = -np.expm1((1 - alpha) * (logs[start:] - logs[start]))
        distance = float(np.abs(expected - (ranks[start:] - start) / size).max())
        if distance < least:
            least = distance
            best = (alpha, float(values[start]), (alpha - 1) / math.sqrt(size), distance, int(size))
    return best
