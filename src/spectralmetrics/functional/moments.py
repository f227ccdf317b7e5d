"""The name that dense moments had in 0.1.0; they are in :mod:`spectralmetrics.sums`."""

from spectralmetrics.sums.accumulate import accumulate
from spectralmetrics.sums.decomposition import symmetrise
from spectralmetrics.sums.moments import (
    Moments,
    covariance,
    empty_moments,
    mean,
    merge,
    rebase,
    upper_covariance,
    variances,
)
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.precision import full_precision

__all__ = [
    "Moments",
    "Observations",
    "accumulate",
    "covariance",
    "empty_moments",
    "full_precision",
    "mean",
    "merge",
    "rebase",
    "symmetrise",
    "upper_covariance",
    "variances",
]
