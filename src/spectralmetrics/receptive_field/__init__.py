"""Receptive fields of layers, read from one forward pass."""

from spectralmetrics.receptive_field.extents import ReceptiveField as ReceptiveField
from spectralmetrics.receptive_field.extents import border_layer as border_layer
from spectralmetrics.receptive_field.extents import receptive_fields as receptive_fields
