"""The name that dense moments had in 0.1.0; they are in :mod:`spectralmetrics.sums`."""

from spectralmetrics.sums import *  # noqa: F403
