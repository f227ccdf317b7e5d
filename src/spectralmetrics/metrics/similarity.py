"""Linear CKA of two layers, streamed over batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from spectralmetrics.functional.relations import (
    MINIMUM_SAMPLES,
    check_pair,
    cka,
    debiased_hsic,
    usable_rows,
)
from spectralmetrics.metrics.base import NanStrategy
from spectralmetrics.metrics.overrides import MergingMetric


class LinearCKAMetric(MergingMetric):
    r"""Debiased linear centred kernel alignment between two layers, or between one layer of two networks.

    .. math:: \frac{\sum_b n_b \operatorname{HSIC}(X_b, Y_b)}
              {\sqrt{\sum_b n_b \operatorname{HSIC}(X_b, X_b)} \sqrt{\sum_b n_b \operatorname{HSIC}(Y_b, Y_b)}}

    over batches :math:`b` of :math:`n_b` samples, with the unbiased estimator of HSIC
    (:func:`~spectralmetrics.functional.debiased_hsic`) of each batch, as in `Nguyen et al. 2021
    <https://arxiv.org/abs/2010.15327>`_. Batches count by their samples, so that a short last one does not
    weigh as much as a full one. The value is 1 if the features differ by a rotation, a shift and a scale only,
    and about 0 if they are uncorrelated. It lies in [−1, 1] for any data, and is 0 where a side is constant
    within every batch. It differs from the CKA of all samples at once; the guide shows by how much.

    The state is three float64 sums and two counts, so merging across batches, metrics and processes is a sum.

    Inputs to ``update``:
        - **left** -- rows (N, D1) in any floating dtype, one for each sample
        - **right** -- rows (N, D2) of the same samples in the same order

    Args:
        nan_strategy: a sample with NaN or infinities on either side (or with float64 values beyond 1e60) is
            left out and counted; so is the rest of a batch that has fewer than four others. ``"warn"`` says so
            at ``compute``, ``"error"`` raises there, ``"ignore"`` is silent.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        TypeError: from ``update``, for rows that are not floating.
        ValueError: from ``update``, for rows that are not 2-D, of different numbers, or of one to three
            samples; the state is then as it was. No samples at all are a no-op.
        RuntimeError: from ``compute``, if no sample has been counted.

    >>> _ = torch.manual_seed(0)
    >>> metric = LinearCKAMetric()
    >>> for _ in range(10):
    ...     left = torch.randn(32, 16)
    ...     metric.update(left, left @ torch.diag(torch.arange(16.0)))
    >>> round(float(metric.compute()), 2)
    0.75
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    cross: Tensor
    left: Tensor
    right: Tensor
    count: Tensor
    non_finite: Tensor

    def __init__(self, *, nan_strategy: NanStrategy = "warn", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if nan_strategy not in get_args(NanStrategy):
            raise ValueError(f"expected nan_strategy among {get_args(NanStrategy)}, got {nan_strategy!r}")
        self.nan_strategy = nan_strategy
        for name in ("cross", "left", "right"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "non_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, left: Tensor, right: Tensor) -> None:
        """Add a batch.

        Args:
            left: rows (N, D1), floating.
            right: rows (N, D2) of the same samples.
        """
        if all(isinstance(rows, Tensor) and rows.ndim == 2 and len(rows) == 0 for rows in (left, right)):
            return
        check_pair(left, right)
        # Sums made in inference mode must still be tensors that can be added to outside it.
        with torch.inference_mode(False), torch.no_grad():
            left, right = left.detach(), right.detach().to(left.device)
            valid = usable_rows(left) & usable_rows(right)
            number = valid.sum()
            counted = torch.where(number >= MINIMUM_SAMPLES, number, 0)
            sums = {
                "cross": number * debiased_hsic(left, right, valid),
                "left": number * debiased_hsic(left, left, valid),
                "right": number * debiased_hsic(right, right, valid),
                "count": counted,
                "non_finite": len(left) - counted,
            }
            for name, value in sums.items():
                # The state moves to the device of the rows.
                setattr(self, name, getattr(self, name).to(value.device) + value)

    def compute(self) -> Tensor:
        """The alignment, shape (), float64."""
        count, left_out = int(self.count), int(self.non_finite)
        detail = f"samples left out for NaN or infinite values: {left_out}"
        if left_out and self.nan_strategy == "error":
            raise RuntimeError(f"LinearCKAMetric: {detail}; nan_strategy='warn' only warns of them")
        if count == 0:
            because = f" ({detail})" if left_out else ""
            raise RuntimeError(
                f"LinearCKAMetric has counted no sample{because}; call `update` before `compute`"
            )
        if left_out and self.nan_strategy == "warn":
            warnings.warn(f"LinearCKAMetric: {detail}", stacklevel=2)
        return cka(self.cross, self.left, self.right)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, as torchmetrics' metrics do.

        Args:
            val: a value of ``compute`` or ``forward``, or a sequence of values; None computes one.
            ax: a matplotlib axis to draw into.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)
