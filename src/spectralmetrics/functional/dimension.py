r"""The number of directions that a spectrum fills: pure functions of eigenvalues.

Every function takes eigenvalues :math:`\lambda_i \ge 0` in its last dimension, in any order. Negative values
are round-off and count as zero; NaN and infinities raise a ValueError. A spectrum that is zero throughout has
dimension, saturation and ranks 0.
"""

from __future__ import annotations

import numbers
from typing import Literal, get_args

import torch
from torch import Tensor

from spectralmetrics.sums.arithmetic import power_of_two_below
from spectralmetrics.sums.checks import are_all_finite, check_real, is_integer

Rule = Literal["explained", "delve"]


def intrinsic_dimension(eigenvalues: Tensor, threshold: float = 0.99, rule: Rule = "explained") -> Tensor:
    r"""The number of leading directions that explain a share ``threshold`` of the variance.

    .. math:: \min \{ k : \lambda_1 + \dots + \lambda_k \ge \delta \textstyle\sum_i \lambda_i \}

    as in Richter et al. (`arXiv:2006.08679 <https://arxiv.org/abs/2006.08679>`_) and Shenk et al.
    (`arXiv:1907.08589 <https://arxiv.org/abs/1907.08589>`_). A share that misses the threshold by no more than
    the round-off of the sum counts as reaching it.

    Args:
        eigenvalues: shape (..., D).
        threshold: the share :math:`\delta`, in (0, 1].
        rule: ``"explained"`` is the definition above. ``"delve"`` counts the directions whose cumulative share
            lies below the threshold, as Delve 0.1.50 does: one fewer, and 0 where one direction suffices.

    Returns:
        Shape (...), int64.

    Raises:
        ValueError: for a threshold outside (0, 1] or an unknown rule.

    >>> spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> intrinsic_dimension(spectrum, threshold=0.85)
    tensor(3)
    >>> intrinsic_dimension(spectrum, threshold=0.85, rule="delve")
    tensor(2)
    """
    threshold = check_threshold(threshold)
    check_rule(rule)
    values = _descending(eigenvalues)
    values = values / power_of_two_below(values[..., :1])  # so that no sum overflows; exact
    cumulative = cumulative_sum(values)
    if rule == "delve":
        # All-zero spectra give NaN shares, which are not below any threshold.
        return (cumulative / values.sum(-1, keepdim=True) < threshold).sum(-1)
    total = cumulative[..., -1:]
    round_off = values.shape[-1] * torch.finfo(values.dtype).eps
    below = cumulative < (threshold - round_off) * total
    return torch.where(total[..., 0] > 0, below.sum(-1) + 1, 0)


def saturation(eigenvalues: Tensor, threshold: float = 0.99, rule: Rule = "explained") -> Tensor:
    """The intrinsic dimension as a share of the width D (`arXiv:2006.08679 <https://arxiv.org/abs/2006.08679>`_).

    Args:
        eigenvalues: shape (..., D).
        threshold: share of the variance to explain, in (0, 1].
        rule: as in :func:`intrinsic_dimension`.

    Returns:
        Shape (...), float64, in [0, 1].

    Raises:
        ValueError: for a threshold outside (0, 1] or an unknown rule.

    >>> saturation(torch.tensor([4.0, 3.0, 2.0, 1.0]), threshold=0.85)
    tensor(0.7500, dtype=torch.float64)
    """
    return intrinsic_dimension(eigenvalues, threshold, rule).to(torch.float64) / eigenvalues.shape[-1]


def effective_rank(eigenvalues: Tensor) -> Tensor:
    r"""The exponential of the entropy of the normalised singular values.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i / \sum_j \sigma_j,
              \quad \sigma_i = \sqrt{\lambda_i}

    from Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. The
    singular values of the data matrix are :math:`\sqrt{n \lambda_i}`; the factor cancels. For the spectrum of
    the second moment about zero it is RankMe (`arXiv:2210.02885 <https://arxiv.org/abs/2210.02885>`_).

    Args:
        eigenvalues: the eigenvalues of the covariance, not singular values; shape (..., D).

    Returns:
        Shape (...), float64, between 1 and D, or 0.

    >>> effective_rank(torch.tensor([1.0, 0.25, 0.0])).round(decimals=3)
    tensor(1.8900, dtype=torch.float64)
    """
    singular, largest = _relative(eigenvalues)
    singular = singular.sqrt()
    shares = singular / singular.sum(-1, keepdim=True)
    return torch.where(largest > 0, torch.special.entr(shares).sum(-1).exp(), 0)


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    r"""The participation ratio :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2`.

    The dimensionality of Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement"
    (2017).

    Args:
        eigenvalues: shape (..., D).

    Returns:
        Shape (...), float64, between 1 and D, or 0.

    >>> participation_ratio(torch.tensor([2.0, 2.0, 0.0]))
    tensor(2., dtype=torch.float64)
    """
    relative, largest = _relative(eigenvalues)
    return torch.where(largest > 0, relative.sum(-1).square() / relative.square().sum(-1), 0)


def stable_rank(eigenvalues: Tensor) -> Tensor:
    r"""The stable rank :math:`\sum_i \lambda_i / \lambda_1` of the data matrix.

    With singular values :math:`\sigma_i^2 \propto \lambda_i` it is :math:`\|X\|_F^2 / \|X\|_2^2` (Rudelson &
    Vershynin, "Sampling from large matrices", J. ACM 2007).

    Args:
        eigenvalues: shape (..., D).

    Returns:
        Shape (...), float64, between 1 and D, or 0.

    >>> stable_rank(torch.tensor([4.0, 2.0, 2.0]))
    tensor(2., dtype=torch.float64)
    """
    relative, largest = _relative(eigenvalues)
    return torch.where(largest > 0, relative.sum(-1), 0)


def power_law_exponent(eigenvalues: Tensor, first: int = 1, last: int | None = None) -> Tensor:
    r"""The exponent :math:`\alpha` of the power law :math:`\lambda_i \propto i^{-\alpha}`.

    Minus the slope of the least-squares line through :math:`(\log i, \log \lambda_i)` for
    :math:`i = \text{first}, \dots, \text{last}`, as in α-ReQ (Agrawal et al., NeurIPS 2022); the tail is often
    fitted without the first few eigenvalues. Zero eigenvalues have no logarithm and are left out of the fit.

    Args:
        eigenvalues: shape (..., D).
        first: first index of the fit, counted from 1.
        last: last index of the fit, inclusive; None or a number above D: up to the last positive eigenvalue.

    Returns:
        Shape (...), float64; NaN where fewer than two positive eigenvalues lie in the range.

    Raises:
        ValueError: if ``first`` is below 1 or ``last`` is not above ``first``.

    >>> power_law_exponent(torch.arange(1, 100, dtype=torch.float64) ** -1.5)
    tensor(1.5000, dtype=torch.float64)
    """
    check_fit_range(first, last)
    values = _descending(eigenvalues)[..., first - 1 : last]
    index = torch.arange(first, first + values.shape[-1], dtype=torch.float64, device=values.device)
    used = values > 0
    weight = used.to(torch.float64)
    count = weight.sum(-1, keepdim=True)
    x = index.log().expand_as(values)
    y = torch.where(used, values, 1.0).log()
    x = (x - (weight * x).sum(-1, keepdim=True) / count) * weight
    y = y - (weight * y).sum(-1, keepdim=True) / count
    return torch.where(count[..., 0] >= 2, -(x * y).sum(-1) / x.square().sum(-1), torch.nan)


def check_threshold(threshold: float) -> float:
    """Return the threshold as a float, also one of numpy; raise a ValueError unless it lies in (0, 1]."""
    if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ValueError(f"expected a threshold in (0, 1], the share of variance to explain, got {threshold!r}")
    return float(threshold)


def check_rule(rule: str) -> None:
    """Raise a ValueError unless ``rule`` is a rule of :func:`intrinsic_dimension`."""
    if rule not in get_args(Rule):
        raise ValueError(f"expected a rule among {get_args(Rule)}, got {rule!r}")


def check_fit_range(first: int, last: int | None) -> None:
    """Raise a ValueError unless ``first`` and ``last`` enclose two eigenvalues, counted from 1."""
    if not is_integer(first, 1) or (last is not None and not is_integer(last, int(first) + 1)):
        raise ValueError(f"expected indices 1 <= first < last for the fit, got first={first!r}, last={last!r}")


def _descending(eigenvalues: Tensor) -> Tensor:
    return finite_eigenvalues(eigenvalues).clamp(min=0).sort(dim=-1, descending=True).values


def cumulative_sum(values: Tensor) -> Tensor:
    """The cumulative sum along the last dimension."""
    # CUDA has no deterministic `cumsum` of floating-point values: it raises if determinism is switched on.
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _scan(values)
    return values.cumsum(-1)


def _scan(values: Tensor) -> Tensor:
    """The cumulative sum along the last dimension in ⌈log₂ D⌉ additions, always in the same order."""
    step = 1
    while step < values.shape[-1]:
        values = torch.cat([values[..., :step], values[..., step:] + values[..., :-step]], -1)
        step *= 2
    return values


def check_eigenvalues(eigenvalues: Tensor) -> None:
    """Raise a TypeError or ValueError unless these are real numbers of shape (..., D)."""
    check_real("eigenvalues", eigenvalues)
    if eigenvalues.ndim == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(
            f"expected eigenvalues of shape (..., D) with D >= 1, got shape {tuple(eigenvalues.shape)}"
        )


def finite_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """Return the eigenvalues in float64; raise a TypeError or ValueError unless they are real and finite."""
    check_eigenvalues(eigenvalues)
    # A NaN compares as neither above nor below a threshold, and would count as zero.
    if not are_all_finite(eigenvalues):
        raise ValueError("expected finite eigenvalues, got NaN or infinite ones")
    return eigenvalues.to(torch.float64)


def _relative(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues divided by the largest, so that squares neither overflow nor vanish, and the largest."""
    values = finite_eigenvalues(eigenvalues).clamp(min=0)
    largest = values.amax(-1)
    return values / torch.where(largest > 0, largest, 1.0)[..., None], largest
