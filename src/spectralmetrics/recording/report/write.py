"""Recorded runs -> one HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from spectralmetrics.recording.files import replace_file
from spectralmetrics.recording.report.collect import Progress, collect
from spectralmetrics.recording.report.encode import compress, pack
from spectralmetrics.recording.saved import SavedRun, run_names

LIBRARY = "plotly/plotly-cartesian.min.js"
SCRIPTS = ("data.js", "values.js", "charts.js", "figures.js", "curves.js", "table.js", "live.js", "page.js")


def write_report(
    directories: str | Path | Iterable[str | Path],
    path: str | Path,
    *,
    progress: Progress = lambda name, total: None,
) -> Path:
    """Write recorded runs as one page that a browser opens without a network or a server.

    The page has sliders for the epoch and, if the runs have arrays, the threshold: at each of its positions
    dimension, saturation and what stands out equal the results of :func:`recompute` and :func:`summarise_run`.
    For runs of earlier releases, and runs that recorded no eigenvalues, each covariance is decomposed first.
    Parts of layers that cannot be read are left out, with one warning that names them.

    Args:
        directories: the directories of one or several runs, each with a ``records.csv`` or arrays.
        path: the path of the HTML file; an existing file is replaced.
        progress: called before each spectrum with its name and the number of all spectra.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: if a directory holds no run.
        TypeError: for directories of another kind.
        ValueError: if there is no directory, or a file in one cannot be read.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> directory = Path(tempfile.mkdtemp())
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["csv", "arrays"]) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     _ = recorder.record()
    >>> write_report(directory, directory / "report.html").name
    'report.html'
    """
    return write_page(directories, path, progress=progress)


def write_page(
    directories: str | Path | Iterable[str | Path],
    path: str | Path,
    *,
    progress: Progress = lambda name, total: None,
    refresh: float | None = None,
) -> Path:
    """Like :func:`write_report`, for a page that may reload.

    Args:
        directories: the directories of the runs.
        path: the path of the file.
        progress: see :func:`write_report`.
        refresh: seconds after which the page reloads; None: never.
    """
    if not isinstance(directories, (str, Path, Iterable)):
        raise TypeError(f"expected the directory of a run, or several, got {directories!r}")
    paths = (
        [Path(directories)] if isinstance(directories, (str, Path)) else [Path(each) for each in directories]
    )
    if not paths:
        raise ValueError("expected the directory of at least one run, got none")
    runs = dict(zip(run_names(paths), map(SavedRun, paths), strict=True))
    for run in runs.values():
        run.check()
    content = collect(runs, progress)
    page = files(__package__) / "page"
    text = (page / "page.html").read_text(encoding="utf-8")
    parts = {
        "refresh": "" if refresh is None else f"{refresh:g}",
        "title": html.escape(f"spectralmetrics: {', '.join(runs)}"),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "library": compress((page / LIBRARY).read_bytes()),
        "data": pack(content),
        "script": "\n".join((page / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part, 1)
    path = Path(path)
    replace_file(path, text.encode(errors="replace"))  # a directory's name may not be valid text
    return path
