"""Text tables and the one format of numbers, for summaries, comparisons and the console."""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from spectralmetrics.extras import from_extra

WIDTH = 100
"""Columns of the screen that tables fit."""


def number(value: float | None) -> str:
    """A number with the digits that a reader can use.

    >>> [number(value) for value in (12, 0.18751, 1.0, 123.456, 0.00012, None, math.nan)]
    ['12', '0.188', '1.000', '123.5', '1.20e-04', '-', '?']
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "?"
    if isinstance(value, int):
        return str(value)
    if math.isinf(value):
        return str(value)
    size = abs(value)
    if size < 10:
        return f"{value:.3f}" if size == 0 or size >= 1e-3 else f"{value:.2e}"
    return f"{value:#.4g}" if size < 1000 else f"{value:.2e}"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "layer"), plural(12, "layer")
    ('1 layer', '12 layers')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.995)
    '99.5 %'
    """
    return f"{100 * share:.4g} %"


def wrap_name(name: str, width: int) -> list[str]:
    """A qualified name in lines that end at a dot, slash, dash or underscore; too long words are broken.

    >>> wrap_name("encoder.layers.11.attention", 18)
    ['encoder.layers.11.', 'attention']
    """
    lines = [""]
    for piece in re.findall(r"[^./_\-\s]*[./_\-\s]|[^./_\-\s]+", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def text_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    rule: bool = False,
    name_width: int | None = None,
) -> list[str]:
    r"""The lines of a table: names in the first column, words in the last, numbers between them.

    Names and words without room continue in further lines of their row.

    Args:
        heads: the heads of the columns; a line break begins another line.
        rows: the cells of the rows.
        left: heads of further columns that are text and not numbers.
        rule: draw a line below the heads.
        name_width: the width of the first column; None gives it the room that the words do not need.

    >>> print(*text_table(["layer", "n", "note"], [["layer1.conv", "12", "few"], ["fc", "9", ""]]), sep="\n")
    layer         n  note
    layer1.conv  12  few
    fc            9
    """
    height = max(head.count("\n") for head in heads) + 1
    stacked = [[""] * (height - 1 - head.count("\n")) + head.split("\n") for head in heads]
    above = list(zip(*stacked, strict=True))
    lines = [*above, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)]
    room = WIDTH - sum(widths[1:]) - 2 * len(widths)
    words_room = min(max(len(line[-1]) for line in lines), max(room // 2, 18))
    widths[0] = min(widths[0], max(room - words_room, 12) if name_width is None else name_width)
    printed = []
    for line in lines:
        names = wrap_name(line[0], widths[0])
        words = textwrap.wrap(line[-1], max(room - widths[0], 12)) or [""]
        for index in range(max(len(names), len(words))):
            middle = line[1:-1] if index == 0 else [""] * (len(heads) - 2)
            cells = [
                text.ljust(size) if head in left else text.rjust(size)
                for text, size, head in zip(middle, widths[1:], heads[1:-1], strict=True)
            ]
            first = (names[index] if index < len(names) else "").ljust(widths[0])
            printed.append("  ".join([first, *cells, words[index] if index < len(words) else ""]).rstrip())
    if rule:
        printed.insert(height, "-" * max(map(len, printed)))
    return printed


def encodable(text: str) -> str:
    """The text as standard output can encode it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def import_pandas() -> Any:
    """The pandas module, for data frames.

    Raises:
        ModuleNotFoundError: without pandas, extra ``spectralmetrics[pandas]``.
    """
    with from_extra("pandas", "a data frame needs pandas"):
        import pandas
    return pandas
