"""Limits of how much of the layers' outputs is observed."""

from __future__ import annotations

import math
import numbers
import sys
import zlib
from dataclasses import dataclass

from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.parts import LeftOut
from spectralmetrics.probing.sampling import sample_size
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.checks import check_positive_integer, check_seed


@dataclass
class Limits:
    """Limits of how much of a layer's output is observed; see :class:`~spectralmetrics.LayerProbe`."""

    max_samples: int | None = None
    rows_per_feature: float | None = None
    max_features: int = 8192
    sketch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integer("max_features", self.max_features)
        check_positive_integer("sketch_size", self.sketch_size, or_none=True)
        check_positive_integer("max_samples", self.max_samples, or_none=True)
        check_seed(self.seed)
        rows = self.rows_per_feature
        if rows is not None and not (isinstance(rows, numbers.Real) and 0 < rows < math.inf):
            raise ValueError(f"expected rows_per_feature to be a positive number or None, got {rows!r}")

    def room(self, of_layer: LayerMetrics) -> int | None:
        """The number of samples that a layer can still take; None: any number."""
        return None if self.max_samples is None else max(self.max_samples - of_layer.samples, 0)

    def keeps_nothing(self, of_layer: LayerMetrics) -> bool:
        """True if the sums of a layer get no further rows."""
        return bool(of_layer.given_up or of_layer.too_wide or self.room(of_layer) == 0)

    def check_width(self, of_layer: LayerMetrics, width: int) -> None:
        """Keep a sketch for a layer that is too wide for a covariance, or leave the layer out."""
        if width <= self.max_features or not of_layer.keeps_matrices or of_layer.is_sketched:
            return
        if self.sketch_size is None:
            of_layer.too_wide = True
            raise LeftOut(
                f"{width} features exceed max_features={self.max_features}; their covariance would take"
                f" {8 * width**2 / 2**30:.1f} GiB, a sketch (sketch_size=512)"
                f" {8 * width * 512 / 2**30:.2g} GiB"
            )
        of_layer.sketch(self.sketch_size)

    def draws(
        self, of_layer: LayerMetrics, width: int, most: int | None, forward: int, steps: Steps
    ) -> tuple[int | None, int]:
        """The number of observations of a forward to draw, None for all, and the seed of the draws.

        Args:
            of_layer: the layer of the forward.
            width: number of features.
            most: largest number to draw; None for all.
            forward: number of the forward.
            steps: steps of the model, with the budget.
        """
        rows_per_feature = steps.rows_per_feature(of_layer.stage, self.rows_per_feature)
        if rows_per_feature is None and most is None:
            return None, 0
        size = sys.maxsize if most is None else most
        if rows_per_feature is not None:
            size = min(sample_size(rows_per_feature, width), size)
        where = f"{self.seed} {of_layer.stage} {of_layer.layer} {of_layer.epoch} {forward}"
        return size, zlib.crc32(where.encode())
