"""Draws one recorded run, or several together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.plotting import literal, plot_heatmap, plot_layers, plot_profile, plot_spectrum
from spectralmetrics.recording.record import RecordKey, Row, Settings, recorded_threshold
from spectralmetrics.recording.saved import Failures, SavedRun, run_names
from spectralmetrics.recording.writers.plot import FOLDER_NAME, draw_profile, save_figure, title_of
from spectralmetrics.sums.checks import check_names, check_positive_integer
from spectralmetrics.table import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[str], None]


def draw_run(
    directory: str | Path,
    *,
    epoch: int | None = None,
    statistics: Sequence[str] | None = None,
    threshold: float | None = None,
    output: str | Path | None = None,
    dpi: int = 150,
    progress: Progress = lambda name: None,
) -> list[Path]:
    """Draw a recorded run: profiles of one epoch, heat maps over all, and spectra if arrays were kept.

    Layers without a spectrum are left out of that picture, with one warning that names them.

    Args:
        directory: the directory of the run; needs its ``records.csv``.
        epoch: epoch whose last record is drawn as profiles and spectra; the last epoch if None.
        statistics: names as in ``records.csv``, and ``"spectrum"``; all if None.
        threshold: threshold of the dashed lines in the spectra; default: as recorded for saturation, or 0.99.
            Without spectra, a warning says why it is not used.
        output: folder for the pictures; ``plots`` in the run's own if None.
        dpi: dots per inch.
        progress: called with the name of each picture before it is drawn.

    Returns:
        The PNG files written: ``{statistic}-epoch-000003.png``, ``{statistic}-{stage}-epochs.png`` and
        ``spectrum-{stage}-epoch-000003.png``.

    Raises:
        FileNotFoundError: if the directory has no records.
        TypeError: for statistics that are not a sequence of names.
        ValueError: for an epoch or statistic that was not recorded, or a threshold or ``dpi`` out of range.
        ModuleNotFoundError: without matplotlib.
    """
    check_names("statistics", () if statistics is None else statistics)
    check_positive_integer("dpi", dpi)
    if threshold is not None:
        check_threshold(threshold)
    run = SavedRun(directory)
    run.check(rows=True)
    rows, settings = run.rows, run.statistics
    key = run.last_of(epoch)
    at_epoch = {other for other in run.arrays if other.epoch == key.epoch}
    spectra_key = max(at_epoch, key=lambda other: other.order, default=None)
    recorded = _statistics_of(rows)
    drawable = [*recorded, *([] if spectra_key is None or "spectrum" in recorded else ["spectrum"])]
    chosen = drawable if statistics is None else list(statistics)
    if unknown := [name for name in chosen if name not in drawable]:
        raise ValueError(f"expected statistics among {drawable}, got {unknown[0]!r}")

    folder = run.directory / FOLDER_NAME if output is None else Path(output)
    written = []
    by_step = not run.has_epochs
    epoch_name = f"epoch-{key.epoch:06d}"

    def save(name: str, draw: Callable[..., Figure], *arguments: Any) -> None:
        progress(name)
        save_figure(draw(*arguments), folder / name, dpi)
        written.append(folder / name)

    of_epoch = [row for row in rows if row.key == key]
    for statistic in [name for name in chosen if name in recorded]:
        if statistic in _statistics_of(of_epoch):
            save(f"{statistic}-{epoch_name}.png", draw_profile, of_epoch, statistic, settings, run.facts)
        for stage in dict.fromkeys(row.stage for row in rows if row.statistic == statistic and row.layer):
            places = run.places(by_step)
            name = f"{statistic}-{stage}-epochs.png"
            save(name, _draw_heatmap, rows, statistic, stage, settings, places, by_step)
    if threshold is not None and ("spectrum" not in chosen or spectra_key is None):
        why = "statistics leave them out" if spectra_key else f"{run.directory} has no arrays of {key}"
        warnings.warn(f"threshold {threshold} is for spectra, which are not drawn: {why}", stacklevel=2)
    if "spectrum" in chosen and spectra_key is not None:
        share = recorded_threshold(settings) if threshold is None else threshold
        spectra: dict[str, dict[str, Any]] = {}
        failures = Failures()
        for layer in run.layers(spectra_key):
            progress(f"spectrum of {layer.layer} in {layer.stage}")
            with failures.of(spectra_key, layer, "the spectrum"):
                spectrum = layer.spectrum()
                if layer.is_empty:
                    raise ValueError("all its observations were left out for NaN or infinities")
                if spectrum.sketch is not None:  # its line for the threshold would be wrong
                    raise ValueError("a sketch of its covariance was kept")
                spectra.setdefault(layer.stage, {})[layer.layer] = spectrum.eigenvalues
        for stage, of_stage in spectra.items():
            title = f"Spectra in {literal(stage)}, {spectra_key}; dashed: {percent(share)} of the variance"
            save(
                f"spectrum-{stage}-{epoch_name}.png",
                lambda: plot_layers(of_stage, plot_spectrum, title=title, threshold=share)[0],  # noqa: B023
            )
        failures.warn()
    return written


def draw_runs(
    directories: Sequence[str | Path],
    *,
    epoch: int | None = None,
    statistics: Sequence[str] | None = None,
    output: str | Path | None = None,
    dpi: int = 150,
    progress: Progress = lambda name: None,
) -> list[Path]:
    """Draw the profiles of several runs into one picture for each statistic and stage.

    Args:
        directories: the directories of the runs; each needs its ``records.csv``.
        epoch: the epoch of all runs; default: the last of each.
        statistics: names as in ``records.csv``; all if None. A run that lacks one is left out of that picture.
        output: folder for the pictures; ``plots`` of the first run if None.
        dpi: dots per inch.
        progress: called with the name of each picture before it is drawn.

    Returns:
        The PNG files written, ``{statistic}-{stage}-runs.png``.

    Raises:
        FileNotFoundError: if a directory has no records.
        TypeError: for directories or statistics that are not a sequence.
        ValueError: for an epoch that a run has not recorded, a statistic that none has, one run twice, no run,
            or a ``dpi`` that is not a positive integer.
        ModuleNotFoundError: without matplotlib.
    """
    check_names("statistics", () if statistics is None else statistics)
    check_positive_integer("dpi", dpi)
    if isinstance(directories, (str, Path)) or not isinstance(directories, Iterable):
        raise TypeError(f"expected a sequence of directories, got {directories!r}")
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise ValueError("expected the directory of at least one run, got none")
    runs = {label: SavedRun(path) for label, path in zip(_labels(paths), paths, strict=True)}
    profiles: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    settings = {name: each for run in runs.values() for name, each in run.statistics.items()}
    differ = {
        name
        for run in runs.values()
        for name, each in run.statistics.items()
        if each.get("threshold") != settings[name].get("threshold")
    }
    for label, run in runs.items():
        run.check(rows=True)
        key = run.last_of(epoch)
        for row in run.rows:
            if row.key == key and row.is_of_layer:
                at = run.statistics.get(row.statistic, {}).get("threshold") if row.statistic in differ else None
                own = f"{label}, {key}" + ("" if at is None else f", at {percent(at)}")
                of_runs = profiles.setdefault((row.statistic, row.stage), {})
                of_runs.setdefault(own, {})[row.layer] = row.value
    recorded = list(dict.fromkeys(statistic for statistic, _ in profiles))
    if unknown := [name for name in statistics or () if name not in recorded]:
        raise ValueError(f"expected statistics among {recorded}, got {unknown[0]!r}")
    settings = {name: each for name, each in settings.items() if name not in differ}
    folder = paths[0] / FOLDER_NAME if output is None else Path(output)
    written = []
    for (statistic, stage), of_runs in profiles.items():
        if statistics is None or statistic in statistics:
            target = folder / f"{statistic}-{stage}-runs.png"
            progress(target.name)
            title = f"{title_of(statistic, settings)}, {stage}"
            save_figure(plot_profile(of_runs, statistic=statistic, title=title)[0], target, dpi)
            written.append(target)
    return written


def _draw_heatmap(
    rows: Sequence[Row],
    statistic: str,
    stage: str,
    settings: Mapping[str, Settings],
    places: Mapping[RecordKey, int],
    by_step: bool = False,
) -> Figure:
    """Draw all epochs or steps of a statistic in one stage; for the places see :meth:`.SavedRun.places`."""
    profiles: dict[int, dict[str, float]] = {}
    for row in rows:
        is_one = row.statistic == statistic and row.stage == stage and row.is_of_layer
        if is_one and row.key in places:
            profiles.setdefault(places[row.key], {})[row.layer] = row.value
    title = f"{title_of(statistic, settings)}, {literal(stage)}{', by step' if by_step else ''}"
    return plot_heatmap(profiles, statistic=statistic, title=title)[0]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ between the runs."""
    parts = [os.path.abspath(path) for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path, each in zip(paths, parts, strict=True) if parts.count(each) > 1)
        raise ValueError(f"expected different runs, got {twice} twice")
    return run_names(paths)


def _statistics_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.statistic for row in rows if row.layer))
