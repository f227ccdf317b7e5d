"""Existing rows: in files, in memory, or in the partitions of an engine."""

from spectralmetrics.files.engines import moments_of
from spectralmetrics.files.fields import ReadError
from spectralmetrics.files.measurement import Measurement, measure
from spectralmetrics.sums import merge

__all__ = ["Measurement", "ReadError", "measure", "merge", "moments_of"]
