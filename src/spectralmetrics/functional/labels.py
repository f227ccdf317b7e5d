r"""Statistics of labelled features: a linear regression, and neural collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.functional.held_out import without_each
from spectralmetrics.sums import Labelled, check_covariance, eigenvectors, rebase
from spectralmetrics.sums.checks import check_real, check_type
from spectralmetrics.sums.decomposition import symmetrise


def ridge_explained_variance(
    covariance: Tensor, class_means: Tensor, class_counts: Tensor, ridge: float = 1e-3
) -> Tensor:
    r"""The share of the labels' variance that a linear regression on the features explains.

    The labels are one-hot vectors :math:`y_i \in \{0, 1\}^K`, and :math:`W, b` minimise

    .. math:: \frac{1}{n} \sum_i \|y_i - W^\top x_i - b\|^2 + \lambda \|W\|_F^2, \qquad
              \lambda = \text{ridge} \cdot \operatorname{tr}(\Sigma) / D,

    which is ridge regression (Hoerl & Kennard 1970) with an intercept. The result is :math:`R^2`, one minus
    the squared errors over the squares about the mean label, both summed over all classes.

    Args:
        covariance: :math:`\Sigma` of all observations, divided by n, shape (D, D).
        class_means: mean of each class about the mean of all observations, shape (K, D); ignored for a class
            without observations.
        class_counts: number of observations of each class, shape (K,).
        ridge: share of the mean variance; 0 for least squares.

    Returns:
        Shape (), float64; 0 if all features are constant, NaN if all labels are the same.

    Raises:
        ValueError: for a covariance that is not square or not finite, or a negative ridge.

    >>> covariance = torch.tensor([[2.0]])  # of the features -2, 0, 0, 2 with the labels 0, 0, 1, 1
    >>> means = torch.tensor([[-1.0], [1.0]])
    >>> ridge_explained_variance(covariance, means, torch.tensor([2, 2]), ridge=0)
    tensor(0.5000, dtype=torch.float64)
    """
    covariance = check_covariance(covariance)
    _check_classes(covariance, class_means, class_counts)
    check_ridge(ridge)
    shares = class_counts.to(torch.float64) / class_counts.sum()
    cross = torch.where(shares[:, None] > 0, shares[:, None] * class_means.to(torch.float64), 0).mT  # (D, K)
    weights = _regress(covariance, cross, ridge)
    explained = 2 * (weights * cross).sum() - (weights * (covariance @ weights)).sum()
    return explained / _label_variance(shares)


def held_out_explained_variance(labelled: Labelled, ridge: float = 1e-3) -> Tensor:
    r"""Like :func:`ridge_explained_variance`, with each fold scored by the regression on the others.

    One minus the squared errors of all folds over the squares about the mean label of all observations: the
    :math:`R^2` of cross-validated predictions. Folds without observations are skipped.

    Args:
        labelled: sums in at least two folds.
        ridge: share of the mean variance of the observations that a regression is fitted to.

    Returns:
        Shape (), float64; at most 1, negative where the mean label predicts better. NaN unless two folds have
        observations.

    >>> from spectralmetrics.sums import Observations, empty_labelled
    >>> sums = empty_labelled(2, 3, folds=2)
    >>> intake, labels = sums.intake(torch.float64), torch.arange(40) % 2
    >>> for batch in range(2):
    ...     intake.add(sums, Observations(torch.eye(3)[labels], labels=labels), batch)
    >>> _ = intake.flush(sums)
    >>> bool(held_out_explained_variance(sums) > 0.99)
    True
    """
    check_type("labelled", labelled, Labelled)
    check_ridge(ridge)
    if labelled.number < 2:
        raise ValueError("expected at least 2 folds, got 1: nothing is held out of one")
    present = [index for index, count in enumerate(labelled.counts.tolist()) if count]
    numbers = labelled.class_counts.to(torch.float64)  # (g, K)
    if len(present) < 2:
        return labelled.seconds.new_full((), torch.nan)
    errors = labelled.seconds.new_zeros(())
    folds = labelled.each
    for held, fitted in zip(present, without_each([folds[index] for index in present]), strict=True):
        others = [index for index in present if index != held]
        about = fitted.mean()
        counts = numbers[others].sum(0)
        shares = counts / counts.sum()
        sums = labelled.class_sums(about)  # (g, K, D)
        weights = _regress(fitted.covariance(), sums[others].sum(0).mT / counts.sum(), ridge)
        fold = rebase(folds[held], about)
        own = numbers[held]
        # Sums of the held-out fold about the mean label of the others, their prediction without features.
        cross = (sums[held] - shares[:, None] * fold.first).mT  # (D, K)
        labels = (own * (1 - 2 * shares)).sum() + own.sum() * shares.square().sum()
        second = symmetrise(fold.second)
        errors = errors + labels - 2 * (weights * cross).sum() + (weights * (second @ weights)).sum()
    total = numbers.sum(0)
    return 1 - errors / (total.sum() * _label_variance(total / total.sum()))


def neural_collapse(covariance: Tensor, class_means: Tensor, class_counts: Tensor) -> Tensor:
    r"""The variance of features within classes, relative to the distance between classes (NC1).

    .. math:: \operatorname{tr}(\Sigma_W \Sigma_B^+) / K

    (Papyan, Han & Donoho 2020), with the covariance :math:`\Sigma_W` of the observations about the means of
    their classes and the covariance :math:`\Sigma_B` of the K class means about their own mean, with the same
    weight for every class. It falls to 0 as training goes on after the training error has vanished.

    Args:
        covariance: the covariance of all observations, divided by n, shape (D, D).
        class_means: mean of each class about the mean of all observations, shape (K, D).
        class_counts: number of observations of each class, shape (K,); a class without any does not count.

    Returns:
        Shape (), float64; NaN unless two classes have observations, infinite where their means agree and the
        observations vary.

    Raises:
        ValueError: for a covariance that is not square or not finite.

    >>> covariance = torch.tensor([[2.0]])  # of the features -2, 0, 0, 2 with the labels 0, 0, 1, 1
    >>> neural_collapse(covariance, torch.tensor([[-1.0], [1.0]]), torch.tensor([2, 2]))
    tensor(0.5000, dtype=torch.float64)
    """
    covariance = check_covariance(covariance)
    _check_classes(covariance, class_means, class_counts)
    has_rows = class_counts > 0
    number = has_rows.sum().to(torch.float64).clamp(min=1)
    class_means = torch.where(has_rows[:, None], class_means.to(torch.float64), 0)
    shares = class_counts.to(torch.float64) / class_counts.sum()
    between = shares.sqrt()[:, None] * class_means  # its products sum to the covariance between classes
    within = covariance - between.mT @ between
    centre = class_means.sum(0) / number
    deviations = torch.where(has_rows[:, None], class_means - centre, 0) / number.sqrt()  # (K, D)
    _, sizes, directions = torch.linalg.svd(deviations, full_matrices=False)
    # K points have K - 1 directions, and round-off adds one.
    kept = sizes > sizes[0] * 1e-10 * max(deviations.shape)
    along = ((directions @ within) * directions).sum(1).clamp(min=0)
    ratio = torch.where(kept, along / torch.where(kept, sizes, 1.0).square(), 0).sum() / number
    spread = within.diagonal().clamp(min=0).sum()
    ratio = torch.where((sizes[0] == 0) & (spread > 0), torch.inf, ratio)
    return torch.where(number > 1, ratio, torch.nan)


def _regress(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weights W (D, K) of the regression."""
    if ridge == 0:
        values, vectors = eigenvectors(covariance)
        inverse = torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0)
        return vectors @ (inverse[:, None] * (vectors.mT @ cross))
    penalty = ridge * covariance.diagonal().mean()
    # The weights of constant features are zero.
    penalty = torch.where(penalty > 0, penalty, 1.0)
    factor = torch.linalg.cholesky(covariance + penalty * torch.eye(len(covariance)).to(covariance))
    return torch.cholesky_solve(cross, factor)


def _label_variance(shares: Tensor) -> Tensor:
    """The variance of one-hot labels, all classes together; NaN for a single class."""
    variance = (shares * (1 - shares)).sum()
    return torch.where(variance > 0, variance, torch.nan)


def _check_classes(covariance: Tensor, class_means: Tensor, class_counts: Tensor) -> None:
    check_real("class_means", class_means)
    check_real("class_counts", class_counts)
    if class_means.ndim != 2 or class_means.shape[1] != len(covariance):
        raise ValueError(
            f"expected class_means of shape (K, {len(covariance)}), got {tuple(class_means.shape)}"
        )
    if class_counts.shape != class_means.shape[:1]:
        raise ValueError(
            f"expected class_counts of shape ({len(class_means)},), got {tuple(class_counts.shape)}"
        )


def check_ridge(ridge: float) -> float:
    """Return the ridge; raise a ValueError unless it is a number of at least 0."""
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
        raise ValueError(f"expected ridge to be a number of at least 0, got {ridge!r}")
    return ridge
