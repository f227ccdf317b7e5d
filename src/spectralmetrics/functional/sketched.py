r"""Bounds of statistics of a spectrum, from a sketch.

A sketch gives leading eigenvalues :math:`\hat\lambda_i \le \lambda_i` and the trace :math:`T = \sum_i
\lambda_i`. The rest of the trace, :math:`\tau = T - \sum_i \hat\lambda_i`, is spread over the eigenvalues in
an unknown way. So :math:`\lambda_i \le \hat\lambda_i + \tau`, and the sum of the first k eigenvalues exceeds
:math:`\hat\lambda_1 + \dots + \hat\lambda_k` by at most :math:`\tau`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.functional.dimension import Rule, check_rule, check_threshold, cumulative_sum


class Estimate(NamedTuple):
    """A value, and two bounds that enclose the true value for certain.

    Attributes:
        value: shape (); NaN if the sketch does not determine it.
        low: the lower bound, shape ().
        high: the upper bound, shape ().
    """

    value: Tensor
    low: Tensor
    high: Tensor


def intrinsic_dimension(
    leading: Tensor, total: Tensor, num_features: int, threshold: float, rule: Rule = "explained"
) -> Estimate:
    """Bounds of the intrinsic dimension; the value is the upper bound, which holds the share for certain.

    Args:
        leading: lower bounds of the leading eigenvalues, descending, shape (k,).
        total: the sum of all eigenvalues, shape ().
        num_features: the width D.
        threshold: share of the variance to explain, in (0, 1].
        rule: see :func:`~spectralmetrics.functional.intrinsic_dimension`.

    Returns:
        Shape (), int64; where the leading eigenvalues do not hold the share, the value is NaN and the upper
        bound D.

    >>> estimate = intrinsic_dimension(torch.tensor([6.0, 2.0, 1.0]), torch.tensor(10.0), 50, threshold=0.75)
    >>> int(estimate.low), int(estimate.high)
    (2, 2)
    >>> intrinsic_dimension(torch.tensor([6.0, 2.0, 1.0]), torch.tensor(10.0), 50, threshold=0.95)
    Estimate(value=tensor(nan, dtype=torch.float64), low=tensor(3), high=tensor(50))
    """
    threshold = check_threshold(threshold)
    check_rule(rule)
    cumulative = cumulative_sum(leading.to(torch.float64))
    total = total.to(torch.float64)
    if not total > 0:
        zero = torch.zeros((), dtype=torch.int64, device=leading.device)
        return Estimate(zero, zero, zero)
    wanted = (threshold - num_features * torch.finfo(torch.float64).eps) * total
    rest = (total - cumulative[-1]).clamp(min=0)
    fewer = 1 if rule == "delve" else 0
    low = (cumulative + rest < wanted).sum() + 1 - fewer
    high = (cumulative < wanted).sum() + 1 - fewer
    if cumulative[-1] >= wanted:
        return Estimate(high, low, high)
    return Estimate(torch.full_like(total, torch.nan), low, torch.full_like(low, num_features - fewer))


def saturation(
    leading: Tensor, total: Tensor, num_features: int, threshold: float, rule: Rule = "explained"
) -> Estimate:
    """Like :func:`intrinsic_dimension`, but as a share of the width; shape (), float64.

    >>> saturation(torch.tensor([6.0, 2.0, 1.0]), torch.tensor(10.0), 50, threshold=0.75).value
    tensor(0.0400, dtype=torch.float64)
    """
    dimensions = intrinsic_dimension(leading, total, num_features, threshold, rule)
    return Estimate(*(each.to(torch.float64) / num_features for each in dimensions))


def stable_rank(leading: Tensor, total: Tensor) -> Estimate:
    """Bounds of the stable rank; the value is the upper bound.

    Args:
        leading: lower bounds of the leading eigenvalues, descending, shape (k,).
        total: the sum of all eigenvalues, shape ().

    Returns:
        Shape (), float64.

    >>> estimate = stable_rank(torch.tensor([6.0, 2.0]), torch.tensor(10.0))
    >>> round(float(estimate.low), 3), round(float(estimate.high), 3)
    (1.25, 1.667)
    """
    leading, total = leading.to(torch.float64), total.to(torch.float64)
    rest = (total - leading.sum()).clamp(min=0)
    high = _ratio(total, leading[0])
    low = torch.maximum(_ratio(total, leading[0] + rest), (total > 0).to(torch.float64))
    return Estimate(high, low, high)


def participation_ratio(leading: Tensor, total: Tensor, square_share: Tensor) -> Estimate:
    """The participation ratio from an estimate of the sum of squared eigenvalues, and its bounds.

    Args:
        leading: lower bounds of the leading eigenvalues, descending, shape (k,).
        total: the sum of all eigenvalues, shape ().
        square_share: an estimate of the sum of their squares over the square of ``total``, shape (); it is
            clipped to its own bounds.

    Returns:
        Shape (), float64.

    >>> estimate = participation_ratio(torch.tensor([6.0, 2.0]), torch.tensor(10.0), torch.tensor(0.41))
    >>> round(float(estimate.value), 3), round(float(estimate.low), 3), round(float(estimate.high), 3)
    (2.439, 1.471, 2.5)
    """
    total = total.to(torch.float64)
    shares = leading.to(torch.float64) / total  # their squares neither overflow nor vanish
    rest = (1 - shares.sum()).clamp(min=0)
    least = shares.square().sum()
    most = least + 2 * shares[0] * rest + rest.square()  # all of the rest in the first one
    squares = torch.minimum(torch.maximum(square_share.to(torch.float64), least), most)
    has_variance = (total > 0).to(torch.float64)
    return Estimate(*(_ratio(has_variance, each) for each in (squares, most, least)))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 for a numerator of 0."""
    return torch.where(numerator > 0, numerator / denominator, 0)
