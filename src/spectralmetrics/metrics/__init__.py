"""torchmetrics of a layer's feature spectrum."""

from spectralmetrics.metrics.base import Interval, SpectralMetric, statistics
from spectralmetrics.metrics.dimension import (
    EffectiveRankMetric,
    IntrinsicDimensionMetric,
    ParticipationRatioMetric,
    PowerLawExponentMetric,
    SaturationMetric,
    StableRankMetric,
)
from spectralmetrics.metrics.dispersion import (
    CovarianceDeterminantMetric,
    CovarianceTraceMetric,
    DiagonalTraceMetric,
)
from spectralmetrics.metrics.labels import LinearProbeMetric, NeuralCollapseMetric
from spectralmetrics.metrics.similarity import LinearCKAMetric
from spectralmetrics.metrics.spectrum import CovarianceMetric, EigenspaceEmbeddingMetric, SpectrumMetric

__all__ = [
    "CovarianceDeterminantMetric",
    "CovarianceMetric",
    "CovarianceTraceMetric",
    "DiagonalTraceMetric",
    "EffectiveRankMetric",
    "EigenspaceEmbeddingMetric",
    "Interval",
    "IntrinsicDimensionMetric",
    "LinearCKAMetric",
    "LinearProbeMetric",
    "NeuralCollapseMetric",
    "ParticipationRatioMetric",
    "PowerLawExponentMetric",
    "SaturationMetric",
    "SpectralMetric",
    "SpectrumMetric",
    "StableRankMetric",
    "statistics",
]
