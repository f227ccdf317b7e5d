"""Compares two epochs of a run, or two runs: as rows, and as text with the answer first."""

from __future__ import annotations

import contextlib
import math
import statistics as averages
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralmetrics.findings import find, has_eigenvalues, read_numbers
from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.functional.relations import (
    MINIMUM_SAMPLES,
    frechet_distance,
    linear_cka,
    subspace_overlap,
)
from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.metrics import IntrinsicDimensionMetric
from spectralmetrics.probing.facts import UNKNOWN_LAYER
from spectralmetrics.recording.recompute import recompute
from spectralmetrics.recording.record import RecordKey, Row
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writers.arrays import SavedLayer
from spectralmetrics.sums import Numbered
from spectralmetrics.table import number, percent, plural, screen_width, text_table, wrapped


def compare(
    left: str | Path,
    right: str | Path | None = None,
    *,
    epochs: tuple[int, int] | None = None,
    stage: str = "eval",
    threshold: float = 0.99,
) -> list[dict[str, Any]]:
    """Compare two runs layer by layer, or two epochs of one run; they need arrays (writer ``"arrays"``).

    Args:
        left: directory of a run.
        right: another run; None compares two epochs of ``left``.
        epochs: epochs (left, right), whose last records with arrays are compared; default: each run's last.
        stage: the stage of the observations, ``"train"`` or ``"eval"``.
        threshold: the leading eigenspaces explain this share of the variance, in (0, 1].

    Returns:
        A dict for each layer, in forward order: first the left layers, then layers only on the right:

        - ``layer``;
        - ``{statistic}_left`` and ``{statistic}_right`` for each recorded statistic, as it was recorded;
        - ``subspace_overlap`` of the leading eigenspaces, in [0, 1]: see
          :func:`~spectralmetrics.functional.subspace_overlap`;
        - ``overlap_by_chance``: what random subspaces of these dimensions share on average, max(k, l) / D;
        - ``frechet_distance`` as a share of the total variance of both sides, tr Σ₁ + tr Σ₂: 0 for equal
          distributions, at most 1 where the means agree;
        - ``linear_cka`` of up to 1,024 rows with the same numbers, also where the widths differ, if both runs
          measured sources with equally many rows, see :func:`~spectralmetrics.measure`: rows with one number
          are taken for the same sample;
        - ``note``: the reason why a value is missing, or ``""``.

        Values that a side lacks, or that cannot be compared because the widths differ, are None.

    Raises:
        FileNotFoundError: if a run holds no arrays.
        ValueError: for an epoch or a stage that was not recorded, or a threshold outside (0, 1].

    Directions are compared unit by unit. Between two networks whose weights began differently, units do not
    correspond and the overlap is near chance; :class:`~spectralmetrics.LayerSimilarity` compares those.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, Recorder
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
    >>> directory = tempfile.mkdtemp()
    >>> batch = torch.randn(32, 4)
    >>> with LayerProbe(model) as probe, Recorder(directory, probe, ["csv", "arrays"]) as recorder:
    ...     for epoch in range(2):
    ...         _ = model(batch * (1 + epoch))
    ...         _ = recorder.record(epoch)
    >>> row = compare(directory, epochs=(0, 1))[0]
    >>> row["layer"], row["saturation_left"] == row["saturation_right"], round(row["subspace_overlap"], 6)
    ('0', True, 1.0)
    """
    return _rows(_sides(left, right, epochs, stage, threshold), stage, threshold)


def _sides(
    left: str | Path,
    right: str | Path | None,
    epochs: tuple[int, int] | None,
    stage: str,
    threshold: float,
) -> list[_Side]:
    check_threshold(threshold)
    if right is None and epochs is None:
        raise ValueError("expected a second run, or epochs=(first, second) of one run; got one run only")
    given = (None, None) if epochs is None else tuple(epochs) if isinstance(epochs, Iterable) else (epochs,)
    if len(given) != 2 or isinstance(epochs, str):
        raise ValueError(f"expected two epochs, for the left and for the right side, got {epochs!r}")
    return [
        _open(directory, epoch, stage)
        for directory, epoch in zip((left, left if right is None else right), given, strict=True)
    ]


def _rows(sides: Sequence[_Side], stage: str, threshold: float) -> list[dict[str, Any]]:
    shapes = {}
    for first, second in _pairs(*(side.run.layers(side.key, stage) for side in sides)):
        name = (first or second).layer  # type: ignore[union-attr]  # one of them is there
        shapes[name] = _compare_layers(first, second, threshold)
    statistics = list(dict.fromkeys(s for side in sides for values in side.values.values() for s in values))
    rows = []
    for layer in dict.fromkeys([*sides[0].values, *shapes, *sides[1].values]):
        row: dict[str, Any] = {"layer": layer}
        for statistic in statistics:
            for name, side in zip(("left", "right"), sides, strict=True):
                row[f"{statistic}_{name}"] = side.values.get(layer, {}).get(statistic)
        row |= shapes.get(layer) or _without("no covariance was kept")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Side:
    """One record of a run."""

    run: SavedRun
    key: RecordKey
    rows: list[Row]
    values: dict[str, dict[str, float]]  # layer -> statistic -> value


def _open(directory: str | Path, epoch: int | None, stage: str) -> _Side:
    run = SavedRun(directory)
    run.check(arrays=True)
    key = run.last_of(epoch, arrays=True)
    rows = run.rows if run.has_table else [Row(**row) for row in recompute(directory)]
    rows = [row for row in rows if row.key == key]
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.stage == stage and row.is_of_layer:
            values.setdefault(row.layer, {})[row.statistic] = row.value
    if not values:
        stages = sorted({row.stage for row in rows if row.layer})
        raise ValueError(f"expected a stage of {key} of {directory} among {stages}, got {stage!r}")
    return _Side(run, key, rows, values)


def _pairs(
    left: Iterator[SavedLayer], right: Iterator[SavedLayer]
) -> Iterator[tuple[SavedLayer | None, SavedLayer | None]]:
    """Pairs of layers of one name; for two runs of one network, one pair is in memory at a time."""
    passed: dict[str, SavedLayer] = {}
    for first in left:
        while first.layer not in passed and (second := next(right, None)) is not None:
            passed[second.layer] = second
        yield first, passed.pop(first.layer, None)
    for second in [*passed.values(), *right]:
        yield None, second


def _compare_layers(first: SavedLayer | None, second: SavedLayer | None, threshold: float) -> dict[str, Any]:
    if first is None or second is None:
        return _without(f"only on the {'left' if second is None else 'right'}")
    sides = {"left": first, "right": second}
    damaged = [f"on the {side}: {why}" for side, layer in sides.items() if (why := _damage(layer))]
    if damaged:
        return _without(damaged[0])
    widths = len(first.mean), len(second.mean)
    if widths[0] != widths[1]:
        return _without(f"widths {widths[0]} and {widths[1]}") | _alignment(first, second)
    spectra = [first.spectrum(), second.spectrum()]
    if not all(map(has_eigenvalues, spectra)):
        return _without("no covariance was kept") | _alignment(first, second)
    variance = float(spectra[0].total_variance + spectra[1].total_variance)
    metric = IntrinsicDimensionMetric(threshold=threshold)
    sizes = [float(metric.value_of(spectrum)) for spectrum in spectra]
    if any(map(math.isnan, sizes)):
        return _without("a sketch does not hold the share")
    bases = [s.eigenvectors[:, : int(size)] for s, size in zip(spectra, sizes, strict=True)]
    dimensions = [basis.shape[1] for basis in bases]
    row = _without("") | _alignment(first, second)
    if any(spectrum.sketch is not None for spectrum in spectra):
        row["note"] = "sketched: no Fréchet distance"
    elif variance > 0:
        distance = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
        row["frechet_distance"] = float(distance) / variance
    if 0 not in dimensions:
        row["subspace_overlap"] = float(subspace_overlap(*bases))
        row["overlap_by_chance"] = max(dimensions) / widths[0]
    else:
        where = [name for name, k in zip(("left", "right"), dimensions, strict=True) if k == 0]
        row["note"] = f"constant on the {' and the '.join(where)}"
    return row


def _alignment(first: SavedLayer, second: SavedLayer) -> dict[str, float]:
    """Linear CKA of corresponding rows; empty if no rows are known to correspond."""
    samples = [each for layer in (first, second) for each in layer.sums if isinstance(each, Numbered)]
    if len(samples) < 2 or first.count + first.non_finite != second.count + second.non_finite:
        return {}
    left, right = samples[0].paired_with(samples[1])
    return {"linear_cka": float(linear_cka(left, right))} if len(left) >= MINIMUM_SAMPLES else {}


def _damage(layer: SavedLayer) -> str:
    try:
        _ = layer.sums
    except ValueError as error:
        return str(error)
    return ""


def _without(note: str) -> dict[str, Any]:
    return {**dict.fromkeys((*_GEOMETRY, "linear_cka")), "note": note}


_CELL = 8
_NOTE_WIDTH = 24
_UNRELATED = 0.05  # linear CKA below which rows have nothing in common
_NAMED = 3  # layers in one line of the answer
_ROUND_OFF = 1e-6  # in an overlap of equal subspaces
_GEOMETRY = {"subspace_overlap": "overlap", "overlap_by_chance": "chance", "frechet_distance": "Fréchet"}

_LEGEND = (
    "overlap: share of the smaller leading eigenspace that lies in the larger; chance: of random ones",
    "Fréchet: distance of the distributions as a share of their variance; 0 where they are equal",
)


def describe_comparison(
    left: str | Path,
    right: str | Path | None = None,
    *,
    epochs: tuple[int, int] | None = None,
    stage: str = "eval",
    threshold: float = 0.99,
) -> str:
    """The result of :func:`~spectralmetrics.compare` as text that fits the terminal, else 100 columns.

    Args:
        left: directory of a run.
        right: another run; None compares two epochs of ``left``.
        epochs: epochs (left, right); default: the last of each run.
        stage: ``"train"`` or ``"eval"``.
        threshold: share of variance of the leading eigenspaces.

    Raises:
        FileNotFoundError, ValueError: as ``compare``.
    """
    sides = _sides(left, right, epochs, stage, threshold)
    rows = _rows(sides, stage, threshold)
    means, scalars = _numbers_of_runs(sides, stage)
    lines = [
        f"{name:<6} {side.run.directory}, {side.key}"
        for name, side in zip(("left", "right"), sides, strict=True)
    ]
    lines += wrapped(f"layers in {stage}; leading eigenspaces explain {percent(threshold)} of the variance")
    # The means over one layer, and what changed most among one, are its own numbers.
    is_one = len(rows) == 1
    numbers = scalars if is_one else {**scalars, **means}
    lines += ["", *_pairs_of_numbers(numbers)] if numbers else []
    lines += _problems(sides, stage, threshold)
    lines += _alarms(sides)
    if answer := _answer(rows):
        lines += ["", *answer]
    lines += ["", *(_numbers_of_layer(rows[0]) if is_one else _table(rows)), ""]
    return "\n".join([*lines, *(line for each in _LEGEND for line in wrapped(each))])


def _numbers_of_runs(
    sides: Sequence[_Side], stage: str
) -> tuple[dict[str, list[float | None]], dict[str, list[float | None]]]:
    """Means over the layers, and scalars that the task added: name -> the numbers of both sides."""
    averaged: list[dict[str, float]] = []
    added: list[dict[str, float]] = []
    for side in sides:
        rows = side.rows if side.run.has_table else []
        means = [row for row in rows if row.layer == MEAN_LAYER and row.stage == stage]
        averaged.append({f"mean {row.statistic.replace('_', ' ')}": row.value for row in means})
        scalars = [row for row in rows if not row.layer]
        added.append({f"{row.stage} {row.statistic}".strip(): row.value for row in scalars})
    return _side_by_side(averaged), _side_by_side(added)


def _problems(sides: Sequence[_Side], stage: str, threshold: float) -> list[str]:
    """Problems on both sides, a line for each layer and kind."""
    lines = []
    for name, side in zip(("left", "right"), sides, strict=True):
        numbers = []
        for layer in side.run.layers(side.key, stage):
            with contextlib.suppress(ValueError):  # a damaged layer is named in the table
                facts = side.run.facts.get(layer.layer, UNKNOWN_LAYER)
                numbers.append(
                    read_numbers(layer.layer, layer.spectrum(), facts.ceiling, threshold, facts.of_gradients)
                )
        problems = [each for each in find(stage, numbers) if each.severity == "problem"] if numbers else []
        lines += [f"problem on the {name}: {each.layer}: {each.message}" for each in problems]
    return ["", *(part for line in lines for part in wrapped(line))] if lines else []


def _alarms(sides: Sequence[_Side]) -> list[str]:
    """The alarms of a monitor while the runs were recorded."""
    lines = []
    names = {side.run.directory: f"on the {name}" for name, side in zip(("left", "right"), sides, strict=True)}
    for side in {side.run.directory: side for side in sides}.values():
        where = names[side.run.directory] if len(names) > 1 else "of this run"
        alarms = side.run.alarms
        lines += [f"alarm {where}: {alarm}" for alarm in alarms[:_NAMED]]
        if len(alarms) > _NAMED:
            lines.append(f"and {plural(len(alarms) - _NAMED, 'more alarm')} {where}")
    return ["", *lines] if lines else []


def _side_by_side(sides: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    return {name: [side.get(name) for side in sides] for name in dict.fromkeys([*sides[0], *sides[1]])}


def _pairs_of_numbers(numbers: Mapping[str, Sequence[float | None]]) -> list[str]:
    width = max(map(len, numbers), default=0)
    return [f"{name:<{width}}  {_arrow(*pair)}" for name, pair in numbers.items()]


def _answer(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest changes, and what could not be compared, in a few lines."""
    if rows and _are_equal(rows):
        who = "the layer has" if len(rows) == 1 else "all layers have"
        return wrapped(f"No difference: {who} the same numbers and the same covariance.")
    lines = []
    if not units_correspond(rows):
        lines += wrapped(
            "In most layers the eigenspaces share no more than random ones: units of the two networks do not"
            " correspond, as after different seeds, and overlap and Fréchet distance say little. Compare the"
            " statistics, and the networks themselves by LayerSimilarity (CKA)."
        )
    elif len(rows) > 1:
        moved = [row for row in rows if row["frechet_distance"]]
        moved.sort(key=lambda row: -row["frechet_distance"])
        named = [f"{row['layer']} {number(row['frechet_distance'])}" for row in moved]
        lines += _first("Changed most, by Fréchet distance: ", named)
        turned = [row for row in rows if (row["subspace_overlap"] or 1) < 1 - _ROUND_OFF]
        turned.sort(key=lambda row: row["subspace_overlap"])
        named = [f"{row['layer']} {number(row['subspace_overlap'])}" for row in turned]
        lines += _first("Least overlap: ", named)
    if len(rows) > 1:
        lines += _changes(rows)
    aligned = [
        f"{row['layer']} {number(row['linear_cka'])}"
        + ("" if row["linear_cka"] > _UNRELATED else ", so that they do not correspond")
        for row in rows
        if row["linear_cka"] is not None
    ]
    lines += _first("Linear CKA of rows of the same numbers: ", aligned)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault(row["note"], []).append(row["layer"])
    for note, layers in reasons.items():
        lines += _listing(f"{note[0].upper()}{note[1:]}: ", layers)
    return lines


def _statistics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key.removesuffix("_left") for key in (rows[0] if rows else {}) if key.endswith("_left")]


def _are_equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if no statistic and no distribution changed in any layer."""
    names = _statistics(rows)
    return all(
        row["frechet_distance"] == 0 and all(row[f"{name}_left"] == row[f"{name}_right"] for name in names)
        for row in rows
    )


def _changes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each statistic that changed, and one for those that did not."""
    lines, same = [], []
    for statistic in _statistics(rows):
        pairs = [(row["layer"], row[f"{statistic}_left"], row[f"{statistic}_right"]) for row in rows]
        pairs = [pair for pair in pairs if None not in pair]
        changes = [pair for pair in pairs if pair[1] != pair[2]]
        changes.sort(key=lambda pair: -abs(pair[2] - pair[1]))
        words = statistic.replace("_", " ")
        lines += _first(
            f"Largest change of {words}: ", [f"{layer} {_arrow(*pair)}" for layer, *pair in changes]
        )
        same += [words] if pairs and not changes else []
    return lines + (_listing("No change of ", same, ".") if same else [])


def _numbers_of_layer(row: Mapping[str, Any]) -> list[str]:
    """The numbers of the only layer, a line for each."""
    pairs = {name: _arrow(row[f"{name}_left"], row[f"{name}_right"]) for name in _statistics([row])}
    pairs |= {name: number(row[key]) for key, name in _GEOMETRY.items()}
    names = {name: name.replace("_", " ") for name in pairs}
    width = max(map(len, names.values()))
    return [f"layer {row['layer']}", *(f"{names[name]:<{width}}  {value}" for name, value in pairs.items())]


def units_correspond(rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if the eigenspaces share more than random subspaces would, in most of the layers.

    >>> row = {"subspace_overlap": 0.9, "overlap_by_chance": 0.25}
    >>> units_correspond([row]), units_correspond([row | {"subspace_overlap": 0.27}])
    (True, False)
    """
    shares = [share for row in rows if (share := _beyond_chance(row)) is not None]
    return not shares or averages.median(shares) > 0.2


def _beyond_chance(row: Mapping[str, Any]) -> float | None:
    """0 where two subspaces share what random ones would, 1 where one holds the other."""
    overlap, chance = row["subspace_overlap"], row["overlap_by_chance"]
    if overlap is None or chance >= 1:
        return None
    return float((overlap - chance) / (1 - chance))


def _first(head: str, items: Sequence[str]) -> list[str]:
    """One line that names the first few items, more only for one that is long; none without items."""
    shown = list(items[:_NAMED])
    while len(shown) > 1 and len(head) + len(", ".join(shown)) > screen_width():
        shown.pop()
    return wrapped(head + ", ".join(shown)) if shown else []


def _listing(head: str, items: Sequence[str], end: str = "") -> list[str]:
    """One line that names as many of the items as fit."""
    line = head
    for index, item in enumerate(items):
        rest = len(items) - index - 1
        more = f", and {rest + 1} more"
        joined = f"{line}{', ' if index else ''}{_short(item, 60)}"
        if index and len(joined) + (len(f", and {rest} more") if rest else len(end)) > screen_width():
            return [f"{line}{more}{end}"]
        line = joined
    return wrapped(line + end)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = _statistics(rows)
    width = screen_width()
    room = width - min(max(len(row["layer"]) for row in rows), width // 2)
    room -= min(max(len(row["note"]) for row in rows), _NOTE_WIDTH)
    room -= (_CELL + 2) * len(_GEOMETRY)
    columns: dict[str, str] = {}  # key -> head
    for name in names:
        head = "\n".join([*name.split("_"), "left"])
        room -= max(map(len, [*head.split("\n"), "0" * _CELL])) + _CELL + 4
        if room < 0:
            break
        columns |= {f"{name}_left": head, f"{name}_right": "right"}
    rest = names[len(columns) // 2 :]
    columns |= _GEOMETRY
    cells = [[row["layer"], *(number(row[key]) for key in columns), row["note"]] for row in rows]
    heads = ["layer", *(f"{head:>{_CELL}}" for head in columns.values()), ""]
    lines = text_table(heads, cells, rule=True)
    return [*lines, *(_listing("No room here for: ", rest) if rest else [])]


def _arrow(left: float | None, right: float | None) -> str:
    return f"{number(left)} -> {number(right)}"


def _short(text: str, length: int) -> str:
    """The end of a long name, which says more than its beginning."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
