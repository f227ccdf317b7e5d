"""Metrics of labelled features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectralmetrics.functional import labels as functional
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.metrics.statistic import Interval
from spectralmetrics.sums import Labelled, Observations, SpectralSum, empty_labelled
from spectralmetrics.sums.checks import check_positive_integer


class LabelledMetric(SpectralMetric):
    """Base class of statistics of labelled observations.

    ``update`` takes rows (N, D), floating, and labels (N,), integers from 0 to K - 1; rows with a
    negative label, such as -100, are skipped. The state holds the sum of each class beside the moments of all
    classes, and metrics with the same number of classes share it.

    Args:
        num_classes: K.
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`; ``center`` is True.

    Raises:
        ValueError: for fewer than 2 classes; from ``update`` on the CPU, and from ``compute`` elsewhere, for
            labels of K or more.
    """

    takes_observations = True
    needs_labels = True
    needs_eigenvalues = False

    def __init__(self, num_classes: int, num_features: int | None = None, **kwargs: Any) -> None:
        check_positive_integer("num_classes", num_classes)
        if num_classes < 2:
            raise ValueError(f"expected num_classes to be at least 2, got {num_classes!r}")
        if not kwargs.get("center", True):
            raise ValueError("expected center=True: statistics of labels are about the mean")
        if kwargs.get("sketch_size") is not None:
            raise ValueError(
                f"expected sketch_size=None for {type(self).__name__}, which cannot be read from a sketch, got"
                f" {kwargs['sketch_size']!r}"
            )
        self.num_classes = num_classes
        super().__init__(num_features, **kwargs)

    def spectral_sum(self) -> SpectralSum:
        """See :meth:`SpectralMetric.spectral_sum`."""
        return empty_labelled(self.num_classes, 0, folds=self.folds)

    def update(self, rows: Tensor | Observations, labels: Tensor | None = None) -> None:
        """Add labelled observations.

        Args:
            rows: shape (N, D), floating, or :class:`~spectralmetrics.functional.Observations`.
            labels: shape (N,), integers; None if the observations have them.
        """
        observations = rows if isinstance(rows, Observations) else Observations(rows)
        if labels is not None:
            observations = replace(observations, labels=labels)
        if observations.labels is None:
            raise ValueError(f"expected labels for {type(self).__name__}, got None: update(rows, labels)")
        self._check(observations, rows)
        labels, valid = observations.labels, observations.valid
        if labels.is_cpu:  # on an accelerator, reading them would wait for it
            labels = labels if valid is None else labels[valid]
            if len(labels) and int(labels.max()) >= self.num_classes:
                raise ValueError(
                    f"expected labels below num_classes={self.num_classes}, got {int(labels.max())}"
                )
        self._take_given(observations)

    def check_range(self, in_range: bool | None = None) -> None:
        """Raise a RuntimeError if the observations have overflowed, a ValueError for labels out of range."""
        first = self.sums[0]
        assert isinstance(first, Labelled)
        if not in_range and (strays := int(first.strays.sum())):
            raise ValueError(
                f"expected labels below num_classes={self.num_classes}, got {strays} of that and above"
            )
        super().check_range(in_range)


class LinearProbeMetric(LabelledMetric):
    """The share of the labels' variance that a linear regression on the features explains.

    A ridge regression of one-hot labels with an intercept, from sums alone, see
    :func:`~spectralmetrics.functional.ridge_explained_variance`. With ``folds`` each fold is scored by the
    regression on the others, without a second pass over the data, see
    :func:`~spectralmetrics.functional.held_out_explained_variance`; without, the regression is scored on the
    data that it was fitted to, which is too good if there are few observations per feature. ``compute``
    returns a tensor of shape (), float64: :math:`R^2`, at most 1. The ends of :meth:`interval` are the
    held-out value and the fitted value.

    Args:
        num_classes: K.
        ridge: penalty on the weights, as a share of the mean variance of the features.
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`LabelledMetric`.

    Example:
        >>> import torch
        >>> metric = LinearProbeMetric(num_classes=2)
        >>> rows = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 3.0], [1.0, 3.0]])
        >>> metric.update(rows, labels=torch.tensor([0, 1, 0, 1]))
        >>> metric.compute().round(decimals=3)
        tensor(1., dtype=torch.float64)
    """

    short_name = "linear_probe"
    plot_upper_bound = 1.0

    def __init__(
        self, num_classes: int, ridge: float = 1e-3, num_features: int | None = None, **kwargs: Any
    ) -> None:
        self.ridge = functional.check_ridge(ridge)
        super().__init__(num_classes, num_features, **kwargs)

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        labelled = spectrum.part(Labelled)
        if labelled.number > 1:
            return functional.held_out_explained_variance(labelled, self.ridge)
        return self._fitted(labelled)

    def interval_of(self, spectrum: Spectrum) -> Interval:
        """See :meth:`SpectralMetric.interval_of`."""
        labelled = spectrum.part(Labelled)
        if labelled.number < 2:
            raise RuntimeError("expected observations kept in folds, got one: give the metric folds=8, say")
        ends = self.statistic(spectrum), self._fitted(labelled)
        return Interval(torch.minimum(*ends), torch.maximum(*ends))

    def _fitted(self, labelled: Labelled) -> Tensor:
        return functional.ridge_explained_variance(
            labelled.covariance(), labelled.class_means(), labelled.class_counts.sum(0), self.ridge
        )


class NeuralCollapseMetric(LabelledMetric):
    r"""The variance of features within classes, relative to the distance between classes (NC1).

    :math:`\operatorname{tr}(\Sigma_W \Sigma_B^+) / K`, see :func:`~spectralmetrics.functional.neural_collapse`.
    ``compute`` returns a tensor of shape (), float64; it falls to 0 where the features of a class become one
    point.

    Args:
        num_classes: K.
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`LabelledMetric`.

    Example:
        >>> import torch
        >>> metric = NeuralCollapseMetric(num_classes=2)
        >>> metric.update(torch.tensor([[-2.0], [0.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    short_name = "neural_collapse"
    has_interval = False
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        labelled = spectrum.part(Labelled)
        return functional.neural_collapse(
            labelled.covariance(), labelled.class_means(), labelled.class_counts.sum(0)
        )
