"""Keeping a run and looking at it: the recorder, its writers, recomputation, pictures."""

from spectralmetrics.recording.compare import compare, read_records
from spectralmetrics.recording.comparison import describe_comparison
from spectralmetrics.recording.draw import draw_run
from spectralmetrics.recording.draw_several import draw_runs
from spectralmetrics.recording.recompute import recompute
from spectralmetrics.recording.record import Record, Row
from spectralmetrics.recording.recorder import Recorder
from spectralmetrics.recording.report import write_report
from spectralmetrics.recording.summary import summarise_run
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers import (
    ArraysWriter,
    ConsoleWriter,
    CSVWriter,
    PlotWriter,
    TensorBoardWriter,
)

__all__ = [
    "ArraysWriter",
    "CSVWriter",
    "ConsoleWriter",
    "PlotWriter",
    "Record",
    "Recorder",
    "Row",
    "TensorBoardWriter",
    "Writer",
    "compare",
    "describe_comparison",
    "draw_run",
    "draw_runs",
    "read_records",
    "recompute",
    "summarise_run",
    "write_report",
]
