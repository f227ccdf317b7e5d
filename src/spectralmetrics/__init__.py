"""Streaming spectral metrics of neural-network features: which layers do work, while training runs."""

from spectralmetrics import functional
from spectralmetrics.functional import Observations, Spectrum
from spectralmetrics.integrations.values import loggable
from spectralmetrics.layers import register_layer
from spectralmetrics.metrics import (
    CovarianceDeterminantMetric,
    CovarianceMetric,
    CovarianceTraceMetric,
    DiagonalTraceMetric,
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    Interval,
    IntrinsicDimensionMetric,
    LinearCKAMetric,
    LinearProbeMetric,
    NeuralCollapseMetric,
    ParticipationRatioMetric,
    PowerLawExponentMetric,
    SaturationMetric,
    SpectralMetric,
    SpectrumMetric,
    StableRankMetric,
    statistics,
)
from spectralmetrics.probing import LayerProbe, Summary, SummaryRow
from spectralmetrics.projection import (
    PCAProjection,
    insert_projections,
    randomize_projections,
    set_projection_threshold,
)
from spectralmetrics.receptive_field import ReceptiveField, border_layer, receptive_fields
from spectralmetrics.recording import (
    Record,
    Recorder,
    Writer,
    compare,
    draw_run,
    read_records,
    recompute,
    summarise_run,
    write_report,
)
from spectralmetrics.similarity import LayerSimilarity, Similarity
from spectralmetrics.tail import layer_profile, low_saturation_tail

__version__ = "0.2.0"

__all__ = [
    "CovarianceDeterminantMetric",
    "CovarianceMetric",
    "CovarianceTraceMetric",
    "DiagonalTraceMetric",
    "EffectiveRankMetric",
    "EigenspaceEmbeddingMetric",
    "Interval",
    "IntrinsicDimensionMetric",
    "LayerProbe",
    "LayerSimilarity",
    "LinearCKAMetric",
    "LinearProbeMetric",
    "NeuralCollapseMetric",
    "Observations",
    "PCAProjection",
    "ParticipationRatioMetric",
    "PowerLawExponentMetric",
    "ReceptiveField",
    "Record",
    "Recorder",
    "SaturationMetric",
    "Similarity",
    "SpectralMetric",
    "Spectrum",
    "SpectrumMetric",
    "StableRankMetric",
    "Summary",
    "SummaryRow",
    "Writer",
    "border_layer",
    "compare",
    "draw_run",
    "functional",
    "insert_projections",
    "layer_profile",
    "loggable",
    "low_saturation_tail",
    "randomize_projections",
    "read_records",
    "receptive_fields",
    "recompute",
    "register_layer",
    "set_projection_threshold",
    "statistics",
    "summarise_run",
    "write_report",
]
