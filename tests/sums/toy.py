"""A kind of sum from outside the package, and a metric that reads it: everything that a user writes for one."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spectralmetrics import SpectralMetric
from spectralmetrics.sums import Intake, Sum
from spectralmetrics.sums.merging import agree_on_width
from tests.sums.streams import rows_of


@dataclass(frozen=True)
class Extremes(Sum):
    """The largest magnitude of each feature, shape (D,), float64; zero before any observation."""

    states: ClassVar = {"largest": "largest_magnitude"}
    arrays: ClassVar = ("largest_magnitudes",)
    described: ClassVar = "largest magnitudes"

    largest: Tensor

    @property
    def num_features(self):
        return self.largest.shape[0]

    def empty(self, num_features, device=None):
        return empty_extremes(num_features, device)

    def intake(self, gram_dtype):
        return ExtremesIntake()

    def merged(self, other):
        if other.num_features == 0:
            return self
        theirs = other.largest.to(self.largest.device)
        return replace(
            self, largest=torch.maximum(self.largest, theirs) if self.num_features else theirs.clone()
        )

    def exchange(self, known, rank, world_size):
        header = torch.zeros(world_size, 2, dtype=torch.float64)
        header[rank] = torch.tensor([self.num_features, known is None], dtype=torch.float64)
        header = (yield header).cpu()
        if not header[:, 1].any():
            return known
        width = agree_on_width(header[:, 0])
        if width == 0:
            return None
        table = torch.zeros(world_size, width, dtype=torch.float64)
        if self.num_features:
            table[rank] = self.largest
        table = yield table
        return replace(self, largest=table.amax(0))

    def saved(self):
        yield "largest_magnitudes", self.largest

    @classmethod
    def restored(cls, read):
        return cls(read("largest_magnitudes"))


class ExtremesIntake(Intake):
    def add(self, sums, observations, batch):
        rows = observations.rows().detach().abs().to(torch.float64)
        kept = rows.isfinite().all(1)
        if observations.valid is not None:
            kept = kept & observations.valid
        largest = torch.where(kept[:, None], rows, 0).amax(0)
        torch.maximum(sums.largest, largest, out=sums.largest)


def empty_extremes(num_features, device=None):
    with torch.inference_mode(False):
        return Extremes(torch.zeros(num_features, dtype=torch.float64, device=device or "cpu"))


class CrestFactorMetric(SpectralMetric):
    """Largest magnitude of each feature over its standard deviation about zero, shape (D,)."""

    short_name = "crest_factor"
    has_interval = False

    def other_sums(self):
        return (empty_extremes(0),)

    def statistic(self, spectrum):
        second = spectrum.variances + (spectrum.mean.square() if spectrum.center else 0)
        return spectrum.part(Extremes).largest / second.sqrt()


# -- for the tests ----------------------------------------------------------------------------------------


def check_extremes(sums, batches, error=None):
    rows = rows_of(batches)
    expected = rows.abs().amax(0) if len(rows) else torch.zeros(sums.num_features, dtype=torch.float64)
    if sums.num_features:
        assert torch.equal(sums.largest, expected)


def crest_factor(rows):
    """Crest factor of rows (N, D), computed with numpy."""
    x = rows.double().numpy()
    return torch.from_numpy(abs(x).max(0) / (x**2).mean(0) ** 0.5)
