"""torchmetrics of a layer's feature spectrum."""

from spectralmetrics.metrics.base import SpectralMetric, statistics
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
from spectralmetrics.metrics.history import HistoryMetric
from spectralmetrics.metrics.labels import LinearProbeMetric, NeuralCollapseMetric
from spectralmetrics.metrics.marginals import (
    DeadFeaturesMetric,
    DormantFeaturesMetric,
    MarginalMetric,
    MaxAbsMetric,
    OutlierFeaturesMetric,
    RootMeanSquareMetric,
    SignalToNoiseMetric,
    SpreadMetric,
    ZeroShareMetric,
)
from spectralmetrics.metrics.similarity import LinearCKAMetric
from spectralmetrics.metrics.spectrum import CovarianceMetric, EigenspaceEmbeddingMetric, SpectrumMetric
from spectralmetrics.metrics.statistic import Interval

__all__ = [
    "CovarianceDeterminantMetric",
    "CovarianceMetric",
    "CovarianceTraceMetric",
    "DeadFeaturesMetric",
    "DiagonalTraceMetric",
    "DormantFeaturesMetric",
    "EffectiveRankMetric",
    "EigenspaceEmbeddingMetric",
    "HistoryMetric",
    "Interval",
    "IntrinsicDimensionMetric",
    "LinearCKAMetric",
    "LinearProbeMetric",
    "MarginalMetric",
    "MaxAbsMetric",
    "NeuralCollapseMetric",
    "OutlierFeaturesMetric",
    "ParticipationRatioMetric",
    "PowerLawExponentMetric",
    "RootMeanSquareMetric",
    "SaturationMetric",
    "SignalToNoiseMetric",
    "SpectralMetric",
    "SpectrumMetric",
    "SpreadMetric",
    "StableRankMetric",
    "ZeroShareMetric",
    "statistics",
]
