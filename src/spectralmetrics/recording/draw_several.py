"""Pictures of several recorded runs together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from spectralmetrics.plotting import plot_profile
from spectralmetrics.recording.compare import read_records
from spectralmetrics.recording.manifest import read_manifest
from spectralmetrics.recording.pictures import check_names, save_figure, title_of
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.tail import MEAN_LAYER


def draw_runs(
    directories: Sequence[str | Path],
    *,
    epoch: int | None = None,
    statistics: Sequence[str] | None = None,
    output: str | Path | None = None,
    dpi: int = 150,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Draw the profiles of several runs into one picture for each statistic and stage.

    Args:
        directories: of the runs; each needs its ``records.csv``.
        epoch: of all runs; the last of each if None.
        statistics: names as in ``records.csv``; all if None. A run that lacks one is left out of that picture.
        output: folder for the pictures; ``plots`` of the first run if None.
        dpi: dots per inch.
        progress: called with the name of each picture before it is drawn.

    Returns:
        The PNG files written, ``{statistic}-{stage}-runs.png``.

    Raises:
        FileNotFoundError: if a directory has no records.
        TypeError: for directories or statistics that are no sequence.
        ValueError: for an epoch that a run has not recorded, a statistic that none has, one run twice, no run,
            or a ``dpi`` that is no positive integer.
        ModuleNotFoundError: without matplotlib.
    """
    check_names("statistics", statistics)
    check_positive_integer("dpi", dpi)
    if isinstance(directories, (str, Path)) or not isinstance(directories, Iterable):
        raise TypeError(f"expected a sequence of directories, got {directories!r}")
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise ValueError("expected the directory of at least one run, got none")
    labels = _labels(paths)
    profiles: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    epoch_of: dict[str, int] = {}
    for path, label in zip(paths, labels, strict=True):
        rows = read_records(path)
        if not rows:
            raise ValueError(f"expected records in {path}, got none")
        epochs = list(dict.fromkeys(row["epoch"] for row in rows))
        shown = epoch_of[label] = epochs[-1] if epoch is None else epoch
        if shown not in epochs:
            raise ValueError(
                f"expected an epoch among those of {path}, {epochs[0]} to {epochs[-1]}, got {shown!r}"
            )
        for row in rows:
            if row["epoch"] == shown and row["layer"] not in ("", MEAN_LAYER):
                of_run = profiles.setdefault((row["statistic"], row["stage"]), {}).setdefault(label, {})
                of_run[row["layer"]] = row["value"]
    known = list(dict.fromkeys(statistic for statistic, _ in profiles))
    if unknown := [name for name in statistics or () if name not in known]:
        raise ValueError(f"expected statistics among {known}, got {unknown[0]!r}")
    settings = read_manifest(paths[0]).statistics
    folder = paths[0] / "plots" if output is None else Path(output)
    written = []
    for (statistic, stage), of_runs in profiles.items():
        if statistics is not None and statistic not in statistics:
            continue
        target = folder / f"{statistic}-{stage}-runs.png"
        progress(target.name)
        named = {f"{label}, epoch {epoch_of[label]}": profile for label, profile in of_runs.items()}
        title = f"{title_of(statistic, settings)}, {stage}"
        save_figure(plot_profile(named, statistic=statistic, title=title)[0], target, dpi)
        written.append(target)
    return written


def _labels(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path, each in zip(paths, parts, strict=True) if parts.count(each) > 1)
        raise ValueError(f"expected different runs, got {twice} twice")
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels
