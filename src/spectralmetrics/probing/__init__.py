"""Metrics on the layers of a model: which layers, which rows, and the probe itself."""

from spectralmetrics.layers import DEFAULT_LAYERS
from spectralmetrics.probing.movers import History, HistoryRow, Mover
from spectralmetrics.probing.probe import LayerProbe
from spectralmetrics.probing.selection import select_layers
from spectralmetrics.probing.summary import Summary, SummaryRow

__all__ = [
    "DEFAULT_LAYERS",
    "History",
    "HistoryRow",
    "LayerProbe",
    "Mover",
    "Summary",
    "SummaryRow",
    "select_layers",
]
