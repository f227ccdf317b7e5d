"""The public names of the package, which the package itself imports when the first of them is used."""

from spectralmetrics import functional as functional
from spectralmetrics.files import *  # noqa: F403  # its own list says which
from spectralmetrics.findings import FINDING_RULES as FINDING_RULES
from spectralmetrics.findings import Finding as Finding
from spectralmetrics.findings import FindingRule as FindingRule
from spectralmetrics.functional import Observations as Observations
from spectralmetrics.functional import Spectrum as Spectrum
from spectralmetrics.functional.tail import layer_profile as layer_profile
from spectralmetrics.functional.tail import low_saturation_tail as low_saturation_tail
from spectralmetrics.integrations.values import loggable as loggable
from spectralmetrics.layers import register_layer as register_layer
from spectralmetrics.metrics import *  # noqa: F403
from spectralmetrics.monitoring import DEFAULT_ALARMS as DEFAULT_ALARMS
from spectralmetrics.monitoring import Alarm as Alarm
from spectralmetrics.monitoring import AlarmRule as AlarmRule
from spectralmetrics.monitoring import Monitor as Monitor
from spectralmetrics.probing import History as History
from spectralmetrics.probing import HistoryRow as HistoryRow
from spectralmetrics.probing import LayerProbe as LayerProbe
from spectralmetrics.probing import Mover as Mover
from spectralmetrics.probing import Summary as Summary
from spectralmetrics.probing import SummaryRow as SummaryRow
from spectralmetrics.projection import PCAProjection as PCAProjection
from spectralmetrics.projection import insert_projections as insert_projections
from spectralmetrics.projection import randomize_projections as randomize_projections
from spectralmetrics.projection import set_projection_threshold as set_projection_threshold
from spectralmetrics.receptive_field import ReceptiveField as ReceptiveField
from spectralmetrics.receptive_field import border_layer as border_layer
from spectralmetrics.receptive_field import receptive_fields as receptive_fields
from spectralmetrics.recording import Record as Record
from spectralmetrics.recording import Recorder as Recorder
from spectralmetrics.recording import Writer as Writer
from spectralmetrics.recording import compare as compare
from spectralmetrics.recording import describe_comparison as describe_comparison
from spectralmetrics.recording import draw_run as draw_run
from spectralmetrics.recording import draw_runs as draw_runs
from spectralmetrics.recording import read_records as read_records
from spectralmetrics.recording import recompute as recompute
from spectralmetrics.recording import summarise_run as summarise_run
from spectralmetrics.recording import write_report as write_report
from spectralmetrics.similarity import LayerSimilarity as LayerSimilarity
from spectralmetrics.similarity import Similarity as Similarity
from spectralmetrics.weights import WeightRow as WeightRow
from spectralmetrics.weights import WeightSummary as WeightSummary
from spectralmetrics.weights import weight_spectra as weight_spectra
