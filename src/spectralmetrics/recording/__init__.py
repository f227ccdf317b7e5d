"""Keeping a run and looking at it: the recorder, its writers, recomputation, pictures."""

from spectralmetrics.recording.compare import compare
from spectralmetrics.recording.compare_text import describe_comparison
from spectralmetrics.recording.draw import draw_run, draw_runs
from spectralmetrics.recording.recompute import recompute, summarise_run
from spectralmetrics.recording.record import Record, Row
from spectralmetrics.recording.recorder import Recorder
from spectralmetrics.recording.report import write_report
from spectralmetrics.recording.saved import read_records
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers.arrays import ArraysWriter
from spectralmetrics.recording.writers.console import ConsoleWriter
from spectralmetrics.recording.writers.csv import CSVWriter
from spectralmetrics.recording.writers.plot import PlotWriter
from spectralmetrics.recording.writers.report import ReportWriter
from spectralmetrics.recording.writers.tensorboard import TensorBoardWriter

__all__ = [
    "ArraysWriter",
    "CSVWriter",
    "ConsoleWriter",
    "PlotWriter",
    "Record",
    "Recorder",
    "ReportWriter",
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
