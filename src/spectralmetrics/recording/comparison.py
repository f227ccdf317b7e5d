"""A comparison of two runs or epochs as text: the answer first, then a table of all layers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectralmetrics.recording.compare import compare, last_epoch, read_records
from spectralmetrics.recording.pictures import percent
from spectralmetrics.recording.writers.csv import FILE_NAME
from spectralmetrics.tail import MEAN_LAYER

_WIDTH = 100
_LAYER_WIDTH = 28
_CELL = 8
_NAMED = 3  # layers in one line of the answer
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
    """What :func:`~spectralmetrics.compare` finds, as text of at most 100 columns.

    Args:
        left: directory of a run.
        right: of another run; None compares two epochs of ``left``.
        epochs: of the left and of the right side; of two runs their last ones if None.
        stage: ``"train"`` or ``"eval"``.
        threshold: share of variance of the leading eigenspaces.

    Raises:
        FileNotFoundError, ValueError: as ``compare``.
    """
    rows = compare(left, right, epochs=epochs, stage=stage, threshold=threshold)
    directories = [Path(left), Path(left if right is None else right)]
    both = epochs if epochs is not None else tuple(map(last_epoch, directories))
    means, scalars = _numbers_of_runs(directories, both, stage)
    lines = [
        f"{side:<6} {directory}, epoch {epoch}"
        for side, directory, epoch in zip(("left", "right"), directories, both, strict=True)
    ]
    lines += [f"layers in {stage}; leading eigenspaces explain {percent(threshold)} of the variance", ""]
    lines += _pairs_of_numbers({**scalars, **means})
    lines += _answer(rows, means)
    lines += ["", *_table(rows), "", *_LEGEND]
    return "\n".join(lines)


def _numbers_of_runs(
    directories: Sequence[Path], epochs: Sequence[int], stage: str
) -> tuple[dict[str, list[float | None]], dict[str, list[float | None]]]:
    """Means over the layers, and what the task added: name -> the number of either side."""
    found: list[dict[str, float]] = []
    added: list[dict[str, float]] = []
    for directory, epoch in zip(directories, epochs, strict=True):
        rows = read_records(directory) if (directory / FILE_NAME).exists() else []
        of_epoch = [row for row in rows if row["epoch"] == epoch]
        means = [row for row in of_epoch if row["layer"] == MEAN_LAYER and row["stage"] == stage]
        found.append({f"mean {row['statistic'].replace('_', ' ')}": row["value"] for row in means})
        scalars = [row for row in of_epoch if not row["layer"]]
        added.append({f"{row['stage']} {row['statistic']}".strip(): row["value"] for row in scalars})
    return _side_by_side(found), _side_by_side(added)


def _side_by_side(sides: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    return {name: [side.get(name) for side in sides] for name in dict.fromkeys([*sides[0], *sides[1]])}


def _pairs_of_numbers(numbers: Mapping[str, Sequence[float | None]]) -> list[str]:
    width = max(map(len, numbers), default=0)
    return [f"{name:<{width}}  {_arrow(*pair)}" for name, pair in numbers.items()]


def _answer(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any]) -> list[str]:
    """What changed most, and what could not be compared, in a few lines."""
    lines = [""]
    compared = [row for row in rows if row["frechet_distance"] is not None]
    if units_correspond(rows):
        most = sorted(compared, key=lambda row: -row["frechet_distance"])
        named = [f"{row['layer']} {_number(row['frechet_distance'])}" for row in most]
        lines += _first("Changed most, by Fréchet distance: ", named)
        turned = [row for row in rows if row["subspace_overlap"] is not None]
        turned.sort(key=lambda row: row["subspace_overlap"])
        named = [f"{row['layer']} {_number(row['subspace_overlap'])}" for row in turned]
        lines += _first("Least overlap: ", named)
    else:
        lines += [
            "In most layers the eigenspaces share no more than random ones: units of the two networks do not",
            "correspond, as after different seeds, and overlap and Fréchet distance tell little. Compare the",
            "statistics, and the networks themselves by LayerSimilarity (CKA).",
        ]
    for statistic in [key.removesuffix("_left") for key in (rows[0] if rows else {}) if key.endswith("_left")]:
        pairs = [(row["layer"], row[f"{statistic}_left"], row[f"{statistic}_right"]) for row in rows]
        changes = [pair for pair in pairs if None not in pair and pair[1] != pair[2]]
        changes.sort(key=lambda pair: -abs(pair[2] - pair[1]))
        if changes:
            named = [f"{layer} {_arrow(*pair)}" for layer, *pair in changes]
            lines += _first(f"Largest change of {statistic.replace('_', ' ')}: ", named)
        elif any(None not in pair for pair in pairs):
            lines += [f"No change of {statistic.replace('_', ' ')}."]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault(row["note"], []).append(row["layer"])
    for note, layers in reasons.items():
        lines += _listing(f"{note[0].upper()}{note[1:]}: ", layers)
    return lines


def units_correspond(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the eigenspaces share more than random subspaces would, in most of the layers.

    >>> row = {"subspace_overlap": 0.9, "overlap_by_chance": 0.25}
    >>> units_correspond([row]), units_correspond([row | {"subspace_overlap": 0.27}])
    (True, False)
    """
    shares = [share for row in rows if (share := _beyond_chance(row)) is not None]
    return not shares or statistics.median(shares) > 0.2


def _beyond_chance(row: Mapping[str, Any]) -> float | None:
    """0 where two subspaces share what random ones would, 1 where one holds the other."""
    overlap, chance = row["subspace_overlap"], row["overlap_by_chance"]
    if overlap is None or chance >= 1:
        return None
    return float((overlap - chance) / (1 - chance))


def _first(head: str, items: Sequence[str]) -> list[str]:
    """One line that names the first few items; none without items."""
    shown = list(items[:_NAMED])
    while len(shown) > 1 and len(head) + len(", ".join(shown)) > _WIDTH:
        shown.pop()
    return [head + ", ".join(shown)] if shown else []


def _listing(head: str, items: Sequence[str]) -> list[str]:
    """One line that names as many of the items as fit."""
    line = head
    for index, item in enumerate(items):
        rest = len(items) - index - 1
        more = f", and {rest + 1} more"
        joined = f"{line}{', ' if index else ''}{_short(item, 60)}"
        if index and len(joined) + (len(f", and {rest} more") if rest else 0) > _WIDTH:
            return [line + more]
        line = joined
    return [line]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = [key.removesuffix("_left") for key in rows[0] if key.endswith("_left")]
    layer_width = max(len("layer"), *(len(_short(row["layer"], _LAYER_WIDTH)) for row in rows))
    note_width = max(len(row["note"]) for row in rows)
    room = _WIDTH - layer_width - (_CELL + 1) * len(_GEOMETRY) - (note_width + 2 if note_width else 0)
    shown = names[: max(room // (2 * _CELL + 2), 0)]
    heads = [[" " * layer_width], [" " * layer_width], [f"{'layer':<{layer_width}}"]]
    for name in shown:
        words = name.split("_")
        half = (len(words) + 1) // 2
        upper, lower = (" ".join(words[:half]), " ".join(words[half:])) if len(words) > 1 else ("", words[0])
        for head, text in zip(heads, (upper, lower), strict=False):
            head.append(f"{_short(text, 2 * _CELL):>{2 * _CELL + 1}}")
        heads[2] += [f"{side:>{_CELL}}" for side in ("left", "right")]
    heads[2] += [f"{name:>{_CELL}}" for name in _GEOMETRY.values()]
    lines = [line.rstrip() for line in (" ".join(head) for head in heads) if line.strip()]
    lines.append("-" * max(map(len, lines)))
    for row in rows:
        cells = [f"{_short(row['layer'], _LAYER_WIDTH):<{layer_width}}"]
        keys = [f"{name}_{side}" for name in shown for side in ("left", "right")]
        cells += [f"{_number(row[key]):>{_CELL}}" for key in [*keys, *_GEOMETRY]]
        lines.append(f"{' '.join(cells)}  {row['note']}".rstrip())
    if rest := names[len(shown) :]:
        lines += _listing("No room here for: ", [*rest])
    return lines


def _arrow(left: float | None, right: float | None) -> str:
    return f"{_number(left)} -> {_number(right)}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.2e}"


def _short(text: str, length: int) -> str:
    """Of a long name the end, which says more than the beginning."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
