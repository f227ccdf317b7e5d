"""A history of the last forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.marginals import MarginalMetric
from spectralmetrics.plotting import plot_history
from spectralmetrics.sums import ForwardHistory, Sum, empty_history, ring
from spectralmetrics.sums.checks import check_positive_integer


class HistoryMetric(MarginalMetric):
    r"""Scale, mean, largest magnitude, zeros and rows left out, of each recent forward.

    In a probe, :meth:`.LayerProbe.history` returns the table of all layers. Every row of a forward counts, even
    if the probe draws some of them for other metrics; other metrics get the same rows as without a history. By
    hand, each ``update`` is a forward.

    ``compute`` returns a tensor of shape (k, 8), float64, a row for each of the last k forwards, the latest
    last: the forward, the step of the optimiser (-1 if it is unknown), the largest magnitude, the number of
    observations n, the number of observations left out for a NaN or an infinity, the sums of all n·D values and
    of their squares, and the number of values that are not zero. So the scale of a forward is

    .. math:: \sqrt{\frac{1}{n D} \sum_{ij} x_{ij}^2}

    Args:
        num_features: the width D; None reads it from the first rows.
        steps: number of forwards to remember.
        kwargs: see :class:`MarginalMetric`.

    Raises:
        ValueError: for a number of steps below 1.

    Example:
        >>> import torch
        >>> metric = HistoryMetric(steps=2)
        >>> for scale in (1.0, 2.0, 4.0):
        ...     metric.update(torch.tensor([[scale, -scale]]))
        >>> metric.compute()[:, 2]
        tensor([2., 4.], dtype=torch.float64)
    """

    is_statistic = False
    short_name = "history"
    parts = ()

    def __init__(self, num_features: int | None = None, steps: int = 256, **kwargs: Any) -> None:
        check_positive_integer("steps", steps)
        self.steps = int(steps)
        super().__init__(num_features, **kwargs)

    def other_sums(self) -> Sequence[Sum]:
        """See :meth:`SpectralMetric.other_sums`."""
        return (empty_history(self.steps, 0),)

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return spectrum.part(ForwardHistory).forwards()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the scale of each forward; a sequence draws its last value. See :meth:`SpectralMetric.plot`."""
        values = self.compute() if val is None else val
        table = values if isinstance(values, Tensor) else values[-1]
        scales = (table[:, ring.SQUARES] / (table[:, ring.COUNT] * (self.num_features or 1))).sqrt()
        pairs = list(zip(table[:, ring.FORWARD].tolist(), scales.tolist(), strict=True))
        figure, axes = plot_history({"": pairs}, ax=ax)
        return figure, axes[0, 0]
