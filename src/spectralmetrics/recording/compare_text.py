"""A comparison of runs or epochs as text, with the answer first."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics as averages
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectralmetrics.findings import LayerNumbers, find
from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.probing.summary import numbers_of
from spectralmetrics.recording.compare import Side, open_sides, rows_of
from spectralmetrics.recording.manifest import MODULE
from spectralmetrics.recording.record import Row
from spectralmetrics.table import listing, number, percent, plural, screen_width, text_table, wrapped

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
    sides = open_sides(left, right, epochs, stage, threshold)
    rows = rows_of(sides, threshold)
    lines = [f"{side.name:<6} {side.run.directory}, {side.key}" for side in sides]
    lines += wrapped(f"layers in {stage}; leading eigenspaces explain {percent(threshold)} of the variance")
    # The means over one layer, and what changed most among one, are its own numbers.
    is_one = len(rows) == 1
    numbers = _of_both(sides, _scalar) | ({} if is_one else _of_both(sides, _mean))
    table = [f"layer {rows[0]['layer']}", *_numbers_of_layer(rows[0])] if is_one else _table(rows)
    parts = [_aligned([*numbers.items()]), _settings(sides), _problems(sides, threshold), _alarms(sides)]
    for part in (*parts, _answer(rows)):
        lines += ["", *part] if part else []
    return "\n".join([*lines, "", *table, "", *(line for each in _LEGEND for line in wrapped(each))])


def _of_both(sides: Sequence[Side], name_of: Callable[[Row, str], str]) -> dict[str, str]:
    """Name -> the numbers of both sides, of the rows of ``records.csv`` that get a name."""
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        for row in side.rows if side.run.has_table else []:
            if name := name_of(row, side.stage):
                found.setdefault(name, {})[side.name] = row.value
    return {name: _arrow(own.get("left"), own.get("right")) for name, own in found.items()}


def _scalar(row: Row, stage: str) -> str:
    """The name of a number that the task added."""
    return "" if row.layer else f"{row.stage} {row.statistic}".strip()


def _mean(row: Row, stage: str) -> str:
    """The name of a mean over the layers."""
    is_mean = row.layer == MEAN_LAYER and row.stage == stage
    return f"mean {row.statistic.replace('_', ' ')}" if is_mean else ""


def _aligned(numbers: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each number, behind its name."""
    width = max((len(name) for name, _ in numbers), default=0)
    return [f"{name:<{width}}  {value}" for name, value in numbers]


def _settings(sides: Sequence[Side]) -> list[str]:
    """A line for each statistic that was recorded with other settings on either side."""
    left, right = (side.run.statistics for side in sides)
    lines = []
    for name in (each for each in left if each in right):
        own = {key: value for key, value in left[name].items() if key != MODULE}  # a class may move
        other = [key for key, value in own.items() if right[name].get(key, value) != value]
        if other:
            pairs = ", ".join(f"{key} {own[key]} -> {right[name][key]}" for key in other)
            lines += wrapped(f"{name} was recorded with other settings: {pairs}")
    return lines


def _problems(sides: Sequence[Side], threshold: float) -> list[str]:
    """Problems on both sides, a line for each layer and kind."""
    lines = []
    for side in sides:
        numbers: list[LayerNumbers] = []
        for layer in side.layers():
            with contextlib.suppress(ValueError):  # a damaged layer is named in the table
                numbers += numbers_of({layer.layer: layer.spectrum()}, side.run.facts, threshold)
        untrained = functools.partial(side.run.untrained, side.key)
        for each in find(side.stage, numbers, untrained) if numbers else []:
            if each.severity == "problem":
                lines += wrapped(f"problem on the {side.name}: {each.layer}: {each.message}")
    return lines


def _alarms(sides: Sequence[Side]) -> list[str]:
    """The alarms of a monitor while the runs were recorded."""
    lines = []
    by_directory = {side.run.directory: side for side in sides}
    for side in by_directory.values():
        where = f"on the {side.name}" if len(by_directory) > 1 else "of this run"
        alarms = side.run.alarms
        lines += [f"alarm {where}: {alarm}" for alarm in alarms[:_NAMED]]
        if len(alarms) > _NAMED:
            lines.append(f"and {plural(len(alarms) - _NAMED, 'more alarm')} {where}")
    return lines


def _answer(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest changes, and what could not be compared, in a few lines."""
    names = _statistics(rows)
    if rows and all(
        row["frechet_distance"] == 0
        and all(_is_same(row[f"{name}_left"], row[f"{name}_right"]) for name in names)
        for row in rows
    ):
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
        lines += _first("Changed most, by Fréchet distance: ", _numbered(moved, "frechet_distance"))
        known = [row for row in rows if row["subspace_overlap"] is not None]
        turned = [row for row in known if row["subspace_overlap"] < 1 - _ROUND_OFF]
        turned.sort(key=lambda row: row["subspace_overlap"])
        lines += _first("Least overlap: ", _numbered(turned, "subspace_overlap"))
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
        lines += listing(f"{note[0].upper()}{note[1:]}: ", layers)
    return lines


def _numbered(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [f"{row['layer']} {number(row[key])}" for row in rows]


def _statistics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key.removesuffix("_left") for key in (rows[0] if rows else {}) if key.endswith("_left")]


def _changes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each statistic that changed, and one for those that did not."""
    lines, same = [], []
    for statistic in _statistics(rows):
        pairs = [(row["layer"], row[f"{statistic}_left"], row[f"{statistic}_right"]) for row in rows]
        pairs = [pair for pair in pairs if None not in pair]
        changes = [pair for pair in pairs if not _is_same(*pair[1:])]
        changes.sort(key=lambda pair: -_size_of_change(*pair[1:]))
        words = statistic.replace("_", " ")
        lines += _first(
            f"Largest change of {words}: ", [f"{layer} {_arrow(*pair)}" for layer, *pair in changes]
        )
        same += [words] if pairs and not changes else []
    return lines + (listing("No change of ", same, ".") if same else [])


def _is_same(left: float | None, right: float | None) -> bool:
    """True if two values are equal, or both NaN."""
    return left == right or (left is not None and right is not None and math.isnan(left) and math.isnan(right))


def _size_of_change(left: float, right: float) -> float:
    """The size of a change; infinite if one of the values is NaN."""
    change = abs(right - left)
    return math.inf if math.isnan(change) else change


def _numbers_of_layer(row: Mapping[str, Any]) -> list[str]:
    """The numbers of the only layer, a line for each."""
    pairs = [(n.replace("_", " "), _arrow(row[f"{n}_left"], row[f"{n}_right"])) for n in _statistics([row])]
    return _aligned([*pairs, *((name, number(row[key])) for key, name in _GEOMETRY.items())])


def units_correspond(rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if the eigenspaces share more than random subspaces would, in most of the layers.

    >>> row = {"subspace_overlap": 0.9, "overlap_by_chance": 0.25}
    >>> units_correspond([row]), units_correspond([row | {"subspace_overlap": 0.27}])
    (True, False)
    """
    pairs = [(row["subspace_overlap"], row["overlap_by_chance"]) for row in rows]
    # 0 where two subspaces share what random ones would, 1 where one holds the other.
    shares = [(own - chance) / (1 - chance) for own, chance in pairs if own is not None and chance < 1]
    return not shares or averages.median(shares) > 0.2


def _first(head: str, items: Sequence[str]) -> list[str]:
    """One line that names the first few items, more only for one that is long; none without items."""
    shown = list(items[:_NAMED])
    while len(shown) > 1 and len(head) + len(", ".join(shown)) > screen_width():
        shown.pop()
    return wrapped(head + ", ".join(shown)) if shown else []


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
    return [*lines, *(listing("No room here for: ", rest) if rest else [])]


def _arrow(left: float | None, right: float | None) -> str:
    return f"{number(left)} -> {number(right)}"
