"""Pictures of a recorded run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.plotting import literal, plot_layers, plot_spectrum
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.pictures import check_names, draw_heatmap, draw_profile, percent, save_figure
from spectralmetrics.recording.record import Row, Settings
from spectralmetrics.recording.writers.arrays import read_layers, saved_epochs
from spectralmetrics.recording.writers.csv import FILE_NAME, read_rows
from spectralmetrics.sums.checks import check_positive_integer

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

    Args:
        directory: of the run; needs its ``records.csv``.
        epoch: of the profiles and spectra; the last if None.
        statistics: names as in ``records.csv``, and ``"spectrum"``; all if None.
        threshold: of the dashed lines in the spectra; that of the recorded saturation if None, or else 0.99.
        output: folder for the pictures; ``plots`` in the run's own if None.
        dpi: dots per inch.
        progress: called with the name of each picture before it is drawn.

    Returns:
        The PNG files written: ``{statistic}-epoch-000003.png``, ``{statistic}-{stage}-epochs.png`` and
        ``spectrum-{stage}-epoch-000003.png``.

    Raises:
        FileNotFoundError: if the directory has no records.
        TypeError: for statistics that are no sequence of names.
        ValueError: for an epoch or statistic that was not recorded, or a threshold or ``dpi`` out of range.
        ModuleNotFoundError: without matplotlib.
    """
    check_names("statistics", statistics)
    check_positive_integer("dpi", dpi)
    if threshold is not None:
        check_threshold(threshold)
    directory = Path(directory)
    if not (directory / FILE_NAME).exists():
        raise FileNotFoundError(f"expected a run with a {FILE_NAME}, got {directory}")
    rows = read_rows(directory / FILE_NAME)
    if not rows:
        raise ValueError(f"expected records in {directory / FILE_NAME}, got none")
    epochs = list(dict.fromkeys(row.epoch for row in rows))
    epoch = epochs[-1] if epoch is None else epoch
    if epoch not in epochs:
        raise ValueError(f"expected an epoch among those recorded, {epochs[0]} to {epochs[-1]}, got {epoch!r}")
    manifest = read_manifest(directory)
    settings = manifest.statistics
    arrays = saved_epochs(directory).get(epoch)
    recorded = _statistics_of(rows)
    known = [*recorded, *([] if arrays is None or "spectrum" in recorded else ["spectrum"])]
    chosen = known if statistics is None else list(statistics)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"expected statistics among {known}, got {unknown[0]!r}")

    folder = directory / "plots" if output is None else Path(output)
    written = []

    def save(name: str, draw: Callable[[], Figure]) -> None:
        progress(name)
        save_figure(draw(), folder / name, dpi)
        written.append(folder / name)

    for statistic in chosen:
        if statistic not in recorded:
            continue
        of_epoch = [row for row in rows if row.epoch == epoch]
        if statistic in _statistics_of(of_epoch):
            save(
                f"{statistic}-epoch-{epoch:06d}.png",
                lambda: draw_profile(of_epoch, statistic, settings, manifest.facts),  # noqa: B023
            )
        for stage in dict.fromkeys(row.stage for row in rows if row.statistic == statistic and row.layer):
            save(
                f"{statistic}-{stage}-epochs.png",
                lambda: draw_heatmap(rows, statistic, stage, settings),  # noqa: B023
            )
    if "spectrum" in chosen and arrays is not None:
        share = _recorded_threshold(settings) if threshold is None else threshold
        spectra: dict[str, dict[str, Any]] = {}
        for layer in read_layers(arrays):
            if layer.spectrum().sketch is not None:
                continue  # where the threshold is crossed would be drawn wrong
            progress(f"spectrum of {layer.layer} in {layer.stage}")
            spectra.setdefault(layer.stage, {})[layer.layer] = layer.spectrum().eigenvalues
        for stage, of_stage in spectra.items():
            title = f"Spectra in {literal(stage)}, epoch {epoch}; dashed: {percent(share)} of the variance"
            save(
                f"spectrum-{stage}-epoch-{epoch:06d}.png",
                lambda: plot_layers(of_stage, plot_spectrum, title=title, threshold=share)[0],  # noqa: B023
            )
    return written


def _statistics_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.statistic for row in rows if row.layer))


def _recorded_threshold(settings: Mapping[str, Settings]) -> float:
    return next((float(each["threshold"]) for each in settings.values() if "threshold" in each), 0.99)
