r"""Statistics of single features: scale, spread, and dead, dormant and outlier features.

Each function reads one number for each feature, shape (..., D): its variance, its mean square
:math:`E[x_j^2]`, its mean magnitude :math:`E|x_j|`, its largest magnitude, or its share of zeros.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from spectralmetrics.sums.arithmetic import power_of_two_below
from spectralmetrics.sums.checks import check_real


def root_mean_square(second_moments: Tensor) -> Tensor:
    r"""The scale of the features, :math:`\sqrt{\frac{1}{D} \sum_j E[x_j^2]}`.

    Args:
        second_moments: the mean square of each feature, shape (..., D).

    Returns:
        Shape (...), float64.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> root_mean_square(torch.tensor([1.0, 7.0]))
    tensor(2., dtype=torch.float64)
    """
    squares, unit = _in_units("second moments", second_moments)
    return (squares.mean(-1) * unit[..., 0]).sqrt()


def spread(variances: Tensor, second_moments: Tensor) -> Tensor:
    r"""The share of the features' mean square that varies between observations.

    .. math:: \operatorname{tr} \Sigma / E\|x\|^2

    It is near 0 where all inputs give about the same output.

    Args:
        variances: the variances of each feature, shape (..., D).
        second_moments: the mean square of each feature, shape (..., D).

    Returns:
        Shape (...), float64; 0 where all features are zero.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> spread(torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0]))
    tensor(0.2000, dtype=torch.float64)
    """
    squares, unit = _in_units("second moments", second_moments)
    variance, energy = (_features("variances", variances) / unit).sum(-1), squares.sum(-1)
    return variance / torch.where(energy > 0, energy, 1.0)


def signal_to_noise(mean: Tensor, variances: Tensor) -> Tensor:
    r"""The squared mean of the features divided by their variance.

    .. math:: \|\mu\|^2 / \operatorname{tr} \Sigma

    Args:
        mean: the mean of each feature, shape (..., D).
        variances: the variances of each feature, shape (..., D).

    Returns:
        Shape (...), float64; infinite where only the mean is not zero, and 0 where all is zero.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for tensors without features, or of different widths.

    >>> signal_to_noise(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 6.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    (signal, unit), noise = _in_units("means", mean), _features("variances", variances)
    if signal.shape[-1] != noise.shape[-1]:
        raise ValueError(
            f"expected means and variances of the same features, got {tuple(mean.shape)} and"
            f" {tuple(variances.shape)}"
        )
    signal, noise = signal.square().sum(-1), (noise / unit / unit).sum(-1)
    return torch.where(signal > 0, signal / noise, torch.where(noise > 0, 0.0, signal))


def max_abs(largest: Tensor) -> Tensor:
    r"""The largest magnitude :math:`\max |x_{ij}|` of all features.

    Args:
        largest: the largest magnitude of each feature, shape (..., D).

    Returns:
        Shape (...), float64.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> max_abs(torch.tensor([1.0, 7.0]))
    tensor(7., dtype=torch.float64)
    """
    return _features("largest magnitudes", largest).amax(-1)


def zero_share(zero_shares: Tensor) -> Tensor:
    """The share of all values that are exactly zero.

    Args:
        zero_shares: the share of each feature's values that are zero, shape (..., D).

    Returns:
        Shape (...), float64.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> zero_share(torch.tensor([0.0, 0.5]))
    tensor(0.2500, dtype=torch.float64)
    """
    return _features("shares of zeros", zero_shares).mean(-1)


def dead_features(variances: Tensor) -> Tensor:
    """The share of features that never change: their variance is zero.

    Args:
        variances: the variances of each feature, shape (..., D).

    Returns:
        Shape (...), float64.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> dead_features(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    return (_features("variances", variances) == 0).to(torch.float64).mean(-1)


def dormant_features(magnitudes: Tensor, tau: float = 0.025) -> Tensor:
    r"""The share of features whose mean magnitude is at most :math:`\tau` times the average over features.

    Feature j is dormant if :math:`E|x_j| \le \tau \frac{1}{D} \sum_k E|x_k|` (Sokar et al. 2023,
    `arXiv:2302.12902 <https://arxiv.org/abs/2302.12902>`_).

    Args:
        magnitudes: the mean magnitude of each feature, shape (..., D).
        tau: share of the average magnitude, not negative.

    Returns:
        Shape (...), float64; 1 where all features are zero.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features, or a ``tau`` that is negative or not a number.

    >>> dormant_features(torch.tensor([1.0, 0.01, 0.0, 2.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    tau = check_tau(tau)
    magnitudes, _ = _in_units("magnitudes", magnitudes)
    return (magnitudes <= tau * magnitudes.mean(-1, keepdim=True)).to(torch.float64).mean(-1)


def outlier_features(second_moments: Tensor) -> Tensor:
    r"""The kurtosis of the features' scales: 1 where all are equal, D where one has all the energy.

    .. math:: \frac{\frac{1}{D} \sum_j E[x_j^2]^2}{\left(\frac{1}{D} \sum_j E[x_j^2]\right)^2}

    (He et al. 2024, `arXiv:2405.19279 <https://arxiv.org/abs/2405.19279>`_).

    Args:
        second_moments: the mean square of each feature, shape (..., D).

    Returns:
        Shape (...), float64; 1 where all features are zero.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for a tensor without features.

    >>> outlier_features(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]]))
    tensor([1., 4.], dtype=torch.float64)
    """
    squares = _features("second moments", second_moments)
    largest = squares.amax(-1, keepdim=True)
    # Dividing by the largest keeps squares from overflowing.
    shares = torch.where(largest > 0, squares / torch.where(largest > 0, largest, 1.0), 1.0)
    return shares.square().mean(-1) / shares.mean(-1).square()


def check_tau(tau: float) -> float:
    """Return ``tau`` of :func:`dormant_features` as a float; raise a ValueError unless it is at least 0."""
    if not isinstance(tau, numbers.Real) or isinstance(tau, bool) or not 0 <= tau < math.inf:
        raise ValueError(f"expected tau to be a number that is not negative, got {tau!r}")
    return float(tau)


def _in_units(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in units of about the largest, so that sums and squares stay in range; the unit, (..., 1)."""
    values = _features(name, values)
    unit = power_of_two_below(values.abs().amax(-1, keepdim=True))
    return values / unit, unit


def _features(name: str, values: Tensor) -> Tensor:
    check_real(name, values)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"expected {name} of shape (..., D), got {tuple(values.shape)}")
    return values.to(torch.float64)
