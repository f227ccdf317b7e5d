"""The chart library that goes into the page."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path


def read_plotly() -> tuple[str, bytes]:
    """The version of the Python package plotly, and the script of plotly.js that it ships.

    The package is not imported: that would take a second, and needs nothing but the file.

    Raises:
        ModuleNotFoundError: without plotly.
    """
    found = importlib.util.find_spec("plotly")
    folder = next(iter(found.submodule_search_locations or ()), None) if found is not None else None
    script = Path(folder or "", "package_data", "plotly.min.js")
    if folder is None or not script.exists():
        raise ModuleNotFoundError('the report needs plotly: pip install "spectralmetrics[report]"')
    return importlib.metadata.version("plotly"), script.read_bytes()
