r"""Statistics of folds: held-out eigenvalues, and values without bias.

Directions that are fitted to few observations look too unequal on the same observations: the first ones take
more than their share of the variance, the last ones less. On other data they look too equal. So for most
statistics, the values of the two spectra enclose the value for unlimited data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.sums import Moments, merge, rebase
from spectralmetrics.sums.checks import check_real, check_type
from spectralmetrics.sums.decomposition import side_by_side, without_round_off

_BLOCK_VALUES = 2**21  # of float64, 16 MB
_BLOCK_ROWS = 128  # of an upper triangle, at least, so that nearly half of a product is saved


def held_out_eigenvalues(folds: Sequence[Moments], center: bool = True) -> Tensor:
    r"""The variances of a fold along directions that are fitted to the other folds, averaged over the folds.

    For each fold :math:`i` with :math:`n_i` observations, :math:`v_{i1}, v_{i2}, \dots` are the eigenvectors of
    all other folds together, in their order, and :math:`\mu_{-i}` is the mean of these folds. Directions in
    which the other folds do not vary have no order; each gets the mean of their variances. The result is the
    non-increasing sequence that is nearest in least squares (Barlow & Brunk 1972) to

    .. math:: h_k = \frac{1}{n} \sum_i \sum_{x \in \text{fold } i} \left(v_{ik}^\top (x - \mu_{-i})\right)^2

    It is the cross-validated estimate of eigenvalues (Bartz, arXiv:1611.00798), as an average over the
    eigenvectors of each split. About zero (``center=False``) it is never steeper than the spectrum of all folds
    together: the sum of its first k values is at most the sum of the first k eigenvalues, and the sums of all
    values are equal.

    Args:
        folds: at least two, over disjoint data of one width D; see the argument ``folds`` of the metrics. Rows
            that belong together (the positions of one map, the tokens of one text) must be in one fold, or the
            folds are not independent.
        center: False takes second moments about zero.

    Returns:
        Shape (D,), float64, descending; the round-off of a zero is set to zero.

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
    """A spectrum read with one fold left out at a time.

    Attributes:
        held_out: variances along directions of the other folds, shape (D,), see :func:`held_out_eigenvalues`.
        others: the eigenvalues of all folds but one, shape (g, D).
    """

    held_out: Tensor
    others: Tensor


def leave_one_out(folds: Sequence[Moments], center: bool = True) -> LeftOut:
    """The held-out eigenvalues, and the eigenvalues of the folds to which their directions were fitted.

    See :func:`held_out_eigenvalues` for the arguments and exceptions.
    """
    _check_widths(folds)
    counts = torch.stack([fold.count for fold in folds])
    if not counts.all():
        raise ValueError(f"expected observations in every fold, got {counts.tolist()}")
    of_each = side_by_side(
        lambda pair: _held(*pair, center),
        zip(folds, without_each(folds), strict=True),
        number=len(folds),
        width=folds[0].num_features,
        device=folds[0].second.device,
    )
    pairs = list(of_each)
    squares = torch.stack([values for values, _ in pairs]).sum(0)
    fitted = torch.stack([values for _, values in pairs])
    return LeftOut(without_round_off(_non_increasing(squares / counts.sum())), fitted)


def _held(fold: Moments, others: Moments, center: bool) -> tuple[Tensor, Tensor]:
    """A fold's sums of squares along directions fitted to the other folds, and the eigenvalues of these."""
    values, vectors = others.ascending_eigenvectors(center=center)
    about = others.mean() if center else torch.zeros_like(others.origin)
    held = _squares_along(vectors, rebase(fold, about).second).flip(0)
    return _alike_where(values == 0, held), values


def _squares_along(vectors: Tensor, second: Tensor) -> Tensor:
    """Second moments along each column; only the upper triangle of the matrix counts."""
    squares = vectors.new_zeros(vectors.shape[1])
    turned = vectors.mT  # the solver leaves one vector after the other in memory
    step = max(_BLOCK_ROWS, len(second) // 4)
    for start in range(0, len(second), step):
        stop = start + step
        rows = second[start:stop, start:].triu()
        rows.diagonal().mul_(0.5)  # the other values count twice
        squares += (turned[:, start:] @ rows.mT).mul_(turned[:, start:stop]).sum(1)
    return squares.mul_(2)


def without_each(folds: Sequence[Moments], rest: Moments | None = None) -> Iterator[Moments]:
    """For each fold yield all other folds merged; log2 g merged sums are in memory at a time.

    Args:
        folds: at least two, or one if there is a rest.
        rest: sums that are merged into every result.
    """
    if len(folds) == 1:
        assert rest is not None
        yield rest
        return
    half = len(folds) // 2
    for part, others in ((folds[:half], folds[half:]), (folds[half:], folds[:half])):
        yield from without_each(part, reduce(merge, others if rest is None else [rest, *others]))


def unbiased_participation_ratio(folds: Sequence[Moments], center: bool = True) -> Tensor:
    r"""The participation ratio of unlimited data, from few observations in folds.

    The squares in :math:`(\operatorname{tr} \Sigma)^2 / \operatorname{tr} \Sigma^2` of a covariance of few
    observations are too large, since its errors are squared, too: 24 observations of 192 independent features
    show a ratio of 20. Errors of different folds :math:`a \ne b` are independent, so that products of their
    unbiased covariances contain no squared errors:

    .. math:: \frac{\sum_{a \ne b} w_{ab} \operatorname{tr} C_a \operatorname{tr} C_b}
              {\sum_{a \ne b} w_{ab} \operatorname{tr}(C_a C_b)}, \qquad w_{ab} = (n_a - 1)(n_b - 1)

    Observations of one fold may depend on each other, as positions of one map do, and then count as one input.
    The ratio of two unbiased sums is itself biased where independent inputs are very few: on average 8 inputs
    in 4 folds give a value that is 12 to 50 % too large, and 64 inputs in 8 folds a value within 4 %. A value
    outside [1, D], which few observations can give, is set to the nearest end.

    Args:
        folds: two or more with at least 2 observations each (at least 1 about zero), over disjoint data of one
            width D; other folds are skipped.
        center: False takes second moments about zero, divided by n and weighted by :math:`n_a n_b`.

    Returns:
        Shape (), float64, between 1 and D; 0 for constant features.

    Raises:
        TypeError: for a fold that is not a Moments.
        ValueError: for folds of different widths, or fewer than two that hold enough observations.

    >>> from spectralmetrics.functional import Observations, accumulate, empty_moments
    >>> folds = [empty_moments(64) for _ in range(4)]
    >>> for seed, fold in enumerate(folds):
    ...     accumulate(fold, Observations(torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))))
    >>> bool(unbiased_participation_ratio(folds) > 50)
    True
    """
    _check_widths(folds)
    least = 2 if center else 1
    counts = [int(fold.count) for fold in folds]
    if sum(count >= least for count in counts) < 2:
        raise ValueError(f"expected at least 2 folds of {least} observations or more, got folds of {counts}")
    return clipped_ratio(fold_products(folds, center), folds[0].num_features)


def fold_products(folds: Sequence[Moments], center: bool = True) -> Tensor:
    r"""The traces :math:`\operatorname{tr} S_a` and products :math:`\operatorname{tr}(S_a S_b)` of folds.

    :math:`S_a` is the scatter of a fold about its own mean, or about zero, in units in which the traces add up
    to one. Folds without a degree of freedom have a negative trace, and no products.

    Returns:
        Shape (g, 1 + g), float64: the trace of each fold, then its products with all.
    """
    width, device = folds[0].num_features, folds[0].second.device
    scales = [torch.zeros((), dtype=torch.float64, device=device) for _ in folds]
    corrections = []
    for index, fold in enumerate(folds):
        count = fold.count.to(torch.float64)
        offset = fold.first / count.clamp(min=1)
        mean = fold.origin + offset
        left, right = torch.stack([-fold.first, count * mean], 1), torch.stack([offset, mean])
        if center:
            left, right = left[:, :1], right[:1]
        corrections.append((left, right))
        diagonal = (fold.second.diagonal() + (left * right.T).sum(1)).clamp(min=0)
        scales[index] = torch.where(count >= (2 if center else 1), diagonal.sum(), -1)
    traces = torch.stack(scales)
    total = traces.clamp(min=0).sum()
    unit = torch.where(total > 0, total, 1.0)
    factors = (traces > 0) / unit
    products = torch.zeros(len(folds), len(folds), dtype=torch.float64, device=device)
    height = max(_BLOCK_VALUES // (len(folds) * width), 1)
    for start in range(0, width, height):  # the matrices of all folds at once would be as large as the state
        stop = min(start + height, width)
        rows = torch.stack(
            [
                torch.addmm(fold.second[start:stop, start:], left[start:stop], right[:, start:]).triu_()
                for fold, (left, right) in zip(folds, corrections, strict=True)
            ]
        )
        rows *= factors[:, None, None]
        diagonal = rows.diagonal(dim1=1, dim2=2)
        rows = rows.flatten(1)
        products += 2 * rows @ rows.T - diagonal @ diagonal.T
    return torch.cat([(traces / unit)[:, None], products], 1)


def participation_of_products(products: Tensor) -> Tensor:
    """The ratio of :func:`unbiased_participation_ratio`, not clipped; NaN without two folds.

    Args:
        products: the result of :func:`fold_products`.
    """
    traces, products = products[:, 0].clamp(min=0), products[:, 1:]
    apart = ~torch.eye(len(traces), dtype=torch.bool, device=traces.device)
    squares = (torch.outer(traces, traces) * apart).sum()
    return squares / (products * apart).sum()


def clipped_ratio(products: Tensor, num_features: int) -> Tensor:
    """Like :func:`participation_of_products`, clipped to [1, D]; 0 if all features are constant."""
    ratio = participation_of_products(products).clamp(1, num_features)
    traces = products[:, 0]
    is_constant = ((traces >= 0).sum() > 1) & ~(traces > 0).any()
    return torch.where(is_constant, 0, ratio)


def participation_interval(products: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Bounds (low, high) of the unbiased participation ratio; NaN with fewer than three folds that vary.

    The :func:`sampling_margin` is the margin of the reciprocal, in which products of folds are added up: its
    errors spread alike to both sides.
    """
    held = products[:, 0] > 0
    products = products[held][:, torch.cat([held.new_ones(1), held])]
    number = len(products)
    if number < 3:
        unknown = products.new_full((), torch.nan)
        return unknown, unknown
    left_out = []
    for fold in range(number):
        kept = torch.arange(number, device=products.device) != fold
        left_out.append(1 / participation_of_products(products[kept][:, torch.cat([kept.new_ones(1), kept])]))
    middle, margin = 1 / participation_of_products(products), sampling_margin(left_out)
    low, high = 1 / (middle + margin), 1 / (middle - margin)
    high = torch.where(high > 0, high, num_features)  # the reciprocal may be zero
    return low.clamp(1, num_features), high.clamp(1, num_features)


def sampling_margin(values: Sequence[Tensor]) -> Tensor:
    r"""The margin of a statistic for another draw of the data, with a confidence of 95 %.

    .. math:: t_{g-1} \sqrt{\frac{g-1}{g} \sum_i (\theta_i - \bar\theta)^2}

    with the statistic :math:`\theta_i` of all folds but one: the jackknife's standard error (Efron 1982), and
    for so few values the quantile of Student's t.

    Args:
        values: the values of the statistic, g at least 2, all of one shape.

    Returns:
        Of that shape, float64.

    Raises:
        TypeError: for values that are not tensors of real numbers.
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
    # A statistic that is infinite or NaN without some fold has no known margin, only a value.
    return torch.where(error.isfinite(), error, 0) * float(stdtrit(folds - 1, 0.975))


def _check_widths(folds: Sequence[Moments]) -> None:
    for fold in folds:
        check_type("a fold", fold, Moments)
    if len(folds) < 2:
        raise ValueError(f"expected at least 2 folds, got {len(folds)}: nothing is held out of one")
    widths = [fold.num_features for fold in folds]
    if len(set(widths)) > 1:
        raise ValueError(f"expected folds of one width, got {widths} features")


def _alike_where(unordered: Tensor, values: Tensor) -> Tensor:
    # Directions in which the other folds do not vary are ordered only by the eigensolver's round-off. With few
    # observations there are many of them, and the fold varies along them.
    mean = torch.where(unordered, values, 0).sum() / unordered.sum().clamp(min=1)
    return torch.where(unordered, mean, values)


def _non_increasing(values: Tensor) -> Tensor:
    # Sorting would put the largest of many noisy values first: the sum of the first values would be too large.
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression(values.cpu().numpy(), increasing=False).x
    return torch.from_numpy(fitted.copy()).to(values.device).clamp_(min=0)
