"""Sums that can be re-based, merged and exchanged between processes, one kind a file."""

from spectralmetrics.sums.accumulate import accumulate
from spectralmetrics.sums.arithmetic import full_precision, has_float64, no_autocast
from spectralmetrics.sums.decomposition import check_covariance, eigenvalues, eigenvectors, symmetrise
from spectralmetrics.sums.folds import Folds, empty_folds, first_fold, stack
from spectralmetrics.sums.intake import products_dtype
from spectralmetrics.sums.labelled import Labelled, empty_labelled
from spectralmetrics.sums.merging import run_together, together
from spectralmetrics.sums.moments import (
    Moments,
    covariance,
    empty_moments,
    mean,
    merge,
    moments_of_covariance,
    rebase,
    upper_covariance,
    variances,
)
from spectralmetrics.sums.numbered import Numbered, empty_numbered
from spectralmetrics.sums.observations import Observations
from spectralmetrics.sums.per_feature import Marginals, empty_marginals
from spectralmetrics.sums.reservoir import Reservoir, empty_reservoir, kept_rows, offer
from spectralmetrics.sums.ring import ForwardHistory, empty_history
from spectralmetrics.sums.sketch import Sketch, empty_sketch
from spectralmetrics.sums.sum import Exchange, Intake, SpectralSum, Sum, kinds

__all__ = [
    "Exchange",
    "Folds",
    "ForwardHistory",
    "Intake",
    "Labelled",
    "Marginals",
    "Moments",
    "Numbered",
    "Observations",
    "Reservoir",
    "Sketch",
    "SpectralSum",
    "Sum",
    "accumulate",
    "check_covariance",
    "covariance",
    "eigenvalues",
    "eigenvectors",
    "empty_folds",
    "empty_history",
    "empty_labelled",
    "empty_marginals",
    "empty_moments",
    "empty_numbered",
    "empty_reservoir",
    "empty_sketch",
    "first_fold",
    "full_precision",
    "has_float64",
    "kept_rows",
    "kinds",
    "mean",
    "merge",
    "moments_of_covariance",
    "no_autocast",
    "offer",
    "products_dtype",
    "rebase",
    "run_together",
    "stack",
    "symmetrise",
    "together",
    "upper_covariance",
    "variances",
]
