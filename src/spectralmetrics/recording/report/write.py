"""Recorded runs -> one HTML file, with its numbers as text that a browser reads without a library."""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spectralmetrics.recording.files import replace_file
from spectralmetrics.recording.report.collect import Progress, collect
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
    """Like :func:`write_report`, for a page that reloads after some seconds; None: never."""
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


def pack(content: dict[str, Any]) -> str:
    """Lists, dicts, strings, numbers and arrays as one compressed block.

    Every array is taken out, and an object ``{"array": kind, "start": first byte, "shape": shape}`` says where
    it is. The block is 4 bytes with the length of the JSON, little endian, then the JSON, then the arrays.

    - ``"integers"``: int32. Neighbours along the last axis, epochs, are nearly equal: each number is stored as
      its difference from the one before. 0, -1, 1, -2, ... become 0, 1, 2, 3, ..., so that small differences
      of both signs have leading zeros. All first bytes come first, then all second bytes, so that these zeros
      stand together and compress well.
    - ``"floats"``: float64, the bytes in the same order. NaN and infinities are kept.

    Args:
        content: JSON except for its arrays, which hold integers below 2³⁰ or floats.

    Returns:
        zlib, as base64: letters and digits that no HTML parser takes for markup.
    """
    parts: list[bytes] = []
    position = 0

    def take_out(array: object) -> dict[str, Any]:
        nonlocal position
        if not isinstance(array, np.ndarray):
            raise TypeError(f"expected JSON or an array, got {array!r}")
        kind = "floats" if array.dtype.kind == "f" else "integers"
        reference = {"array": kind, "start": position, "shape": list(array.shape)}
        parts.append(_planes(array.astype("<f8")) if kind == "floats" else _planes(_differences(array)))
        position += len(parts[-1])
        return reference

    # JSON has no NaN: a float outside an array must be finite.
    header = json.dumps(content, default=take_out, allow_nan=False, ensure_ascii=False).encode(
        errors="replace"  # a lone surrogate in a name
    )
    return compress(b"".join((len(header).to_bytes(4, "little"), header, *parts)))


def compress(content: bytes) -> str:
    """zlib, as base64."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _differences(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    numbers = array.astype(np.int32)
    steps = np.diff(numbers, axis=-1, prepend=np.int32(0))
    return ((steps << 1) ^ (steps >> 31)).astype("<u4")


def _planes(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
