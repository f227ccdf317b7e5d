"""The writers that a recorder can be given by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers.arrays import ArraysWriter
from spectralmetrics.recording.writers.console import ConsoleWriter
from spectralmetrics.recording.writers.csv import CSVWriter
from spectralmetrics.recording.writers.history_file import HistoryWriter
from spectralmetrics.recording.writers.plot import PlotWriter
from spectralmetrics.recording.writers.report import ReportWriter
from spectralmetrics.recording.writers.tensorboard import TensorBoardWriter

_ALL = (CSVWriter, ArraysWriter, HistoryWriter, ConsoleWriter, TensorBoardWriter, PlotWriter, ReportWriter)
WRITERS: dict[str, type[Writer]] = {writer.name: writer for writer in _ALL}


def make_writers(writers: str | Writer | Sequence[str | Writer]) -> list[Writer]:
    """Make writers from names and instances.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, or two writers with the same name.
        ModuleNotFoundError: for a writer whose extra is not installed.

    >>> [writer.name for writer in make_writers(["arrays", CSVWriter()])]
    ['arrays', 'csv']
    """
    made: list[Writer] = []
    if isinstance(writers, type) or not isinstance(writers, (str, Writer, Iterable)):
        kind = f"the class {writers.__name__}; call it" if isinstance(writers, type) else type(writers).__name__
        raise TypeError(f"expected the names of writers or Writers, got {kind}")
    for writer in [writers] if isinstance(writers, (str, Writer)) else writers:
        if isinstance(writer, str):
            if writer not in WRITERS:
                close = difflib.get_close_matches(writer, WRITERS, cutoff=0.5)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"expected a writer among {list(WRITERS)}, got {writer!r}{hint}")
            made.append(WRITERS[writer]())
        elif isinstance(writer, Writer):
            made.append(writer)
        else:
            is_class = isinstance(writer, type) and issubclass(writer, Writer)
            kind = f"the class {writer.__name__}; call it" if is_class else type(writer).__name__
            raise TypeError(f"expected the name of a writer or a Writer, got {kind}")
    names = [writer.name for writer in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected each writer once, got {twice} more than once")
    return made
