r"""Eigenvalues that directions fitted to some of the data hold on the rest of it.

Directions that are fitted to few observations look too unequal on the same observations: the first ones take
more than their share of the variance, the last ones less. On data that they were not fitted to they look too
equal. So the two spectra enclose that of unlimited data in what most statistics say of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate as running
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums import Moments, covariance, eigenvectors, merge, rebase
from spectralmetrics.sums.checks import check_real, check_type
from spectralmetrics.sums.decomposition import symmetrise, without_round_off


def held_out_eigenvalues(folds: Sequence[Moments], center: bool = True) -> Tensor:
    r"""The variance that each direction fitted to the other folds has in a fold, averaged over the folds.

    For each fold :math:`i` with :math:`n_i` observations, :math:`v_{i1}, v_{i2}, \dots` are the eigenvectors of
    all other folds together, in their order, and :math:`\mu_{-i}` is the mean of those. Directions in which the
    others do not vary have no order; each is given the mean of what they hold. With the non-increasing sequence
    that lies nearest in least squares (Barlow & Brunk 1972) in the place of

    .. math:: h_k = \frac{1}{n} \sum_i \sum_{x \in \text{fold } i} \left(v_{ik}^\top (x - \mu_{-i})\right)^2

    the result is a spectrum. It is the cross-validated estimate of eigenvalues (Bartz, arXiv:1611.00798), as an
    average over the eigenvectors of each split. About zero (``center=False``) it is never steeper than the
    spectrum of all folds together: its first k values hold no more than the first k eigenvalues, and all of
    them hold the same.

    Args:
        folds: at least two, over disjoint data of one width D; see the argument ``folds`` of the metrics. What
            belongs together (the positions of one map, the tokens of one text) must be in one fold, or the
            folds are no strangers to each other.
        center: False takes second moments about zero.

    Returns:
        Shape (D,), float64, descending; what round-off leaves of a zero is zero.

    Raises:
        ValueError: for fewer than two folds, folds of different widths, or a fold without observations.

    >>> from spectralmetrics.functional import Observations, accumulate, empty_moments
    >>> folds = [empty_moments(3) for _ in range(2)]
    >>> for seed, fold in enumerate(folds):
    ...     rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed))
    ...     accumulate(fold, Observations(rows * torch.tensor([1.0, 0.5, 0.1])))
    >>> values = held_out_eigenvalues(folds)
    >>> bool((values.diff() <= 0).all())
    True
    """
    return leave_one_out(folds, center).held_out


class LeftOut(NamedTuple):
    """What is known of a spectrum by leaving out one fold at a time.

    Attributes:
        held_out: what directions fitted to the other folds hold, shape (D,), see :func:`held_out_eigenvalues`.
        others: the eigenvalues of all folds but one, shape (g, D).
    """

    held_out: Tensor
    others: Tensor


def leave_one_out(folds: Sequence[Moments], center: bool = True) -> LeftOut:
    """The held-out eigenvalues and those that their directions had where they were fitted.

    See :func:`held_out_eigenvalues` for the arguments and what is raised.
    """
    _check(folds)
    total = torch.stack([fold.count for fold in folds]).sum()
    fitted = []
    found = torch.zeros_like(folds[0].origin)
    for fold, others in zip(folds, without_each(folds), strict=True):
        values, vectors = eigenvectors(covariance(others, center=center))
        fitted.append(values)
        about = others.mean() if center else torch.zeros_like(others.origin)
        second = symmetrise(rebase(fold, about).second)
        found += _alike_where(values == 0, ((second @ vectors) * vectors).sum(0))
    return LeftOut(without_round_off(_non_increasing(found / total)), torch.stack(fitted))


def without_each(folds: Sequence[Moments]) -> Iterator[Moments]:
    """For each of at least two folds all the others together, in three merges for each."""
    first, *later = folds
    before = [None, *running([first, *later[:-1]], merge)]  # all folds before each
    after = [*reversed(list(running(reversed(later), merge))), None]  # and all after it
    for left, right in zip(before, after, strict=True):
        others = right if left is None else left if right is None else merge(left, right)
        assert others is not None
        yield others


def sampling_margin(values: Sequence[Tensor]) -> Tensor:
    r"""How far a statistic may lie from its value for other draws of the data, with a confidence of 95 %.

    .. math:: t_{g-1} \sqrt{\frac{g-1}{g} \sum_i (\theta_i - \bar\theta)^2}

    with the statistic :math:`\theta_i` of all folds but one: the jackknife's standard error (Efron 1982), and
    for so few values the quantile of Student's t.

    Args:
        values: of the statistic, g at least 2, all of one shape.

    Returns:
        Of that shape, float64.

    Raises:
        TypeError: for values that are no tensors of real numbers.
        ValueError: for fewer than two, or values of different shapes.

    >>> sampling_margin([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]).round(decimals=2)
    tensor(4.9700, dtype=torch.float64)
    """
    from scipy.special import stdtrit

    for value in values:
        check_real("values", value)
    if len({value.shape for value in values}) != 1 or len(values) < 2:
        shapes = [tuple(value.shape) for value in values]
        raise ValueError(f"expected at least 2 values of one shape, got {len(values)} of shapes {shapes}")
    stacked = torch.stack([value.to(torch.float64) for value in values])
    folds = len(stacked)
    error = (stacked.var(0, correction=1) * (folds - 1) ** 2 / folds).sqrt()
    # Of a statistic that is infinite or no number without some fold, nothing is known beyond its value.
    return torch.where(error.isfinite(), error, 0) * float(stdtrit(folds - 1, 0.975))


def _check(folds: Sequence[Moments]) -> None:
    for fold in folds:
        check_type("a fold", fold, Moments)
    if len(folds) < 2:
        raise ValueError(f"expected at least 2 folds, got {len(folds)}: nothing is held out of one")
    widths = [fold.num_features for fold in folds]
    if len(set(widths)) > 1:
        raise ValueError(f"expected folds of one width, got {widths} features")
    counts = torch.stack([fold.count for fold in folds]).tolist()
    if not all(counts):
        raise ValueError(f"expected observations in every fold, got {counts}")


def _alike_where(unordered: Tensor, values: Tensor) -> Tensor:
    # Directions in which the others do not vary have no order but that of the eigensolver's round-off. With few
    # observations they are many, and the fold varies along them.
    mean = torch.where(unordered, values, 0).sum() / unordered.sum().clamp(min=1)
    return torch.where(unordered, mean, values)


def _non_increasing(values: Tensor) -> Tensor:
    # Sorted instead, the largest of many noisy values would come first, and the sum of the first be too large.
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression(values.cpu().numpy(), increasing=False).x
    return torch.from_numpy(fitted.copy()).to(values.device).clamp_(min=0)
