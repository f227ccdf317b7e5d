"""Text tables and the one format of numbers, for summaries, comparisons and the console."""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectralmetrics.extras import from_extra

WIDTH = 100
"""Columns that tables fit where there is no terminal."""
_NARROWEST = 16
"""The fewest columns for names, and for words beside numbers."""


def number(value: float | None) -> str:
    """A number with the digits that a reader can use.

    >>> [number(value) for value in (12, 0.18751, 1.0, 123.456, 0.00012, None, math.nan)]
    ['12', '0.188', '1.000', '123.5', '1.20e-04', '-', '?']
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "?"
    if isinstance(value, int) or math.isinf(value):
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

    >>> percent(0.995), percent(0.99999)
    ('99.5 %', '99.999 %')
    """
    return f"{100 * share:.6g} %"


def screen_width() -> int:
    """Columns of the terminal; 100 where standard output is none, such as a file or a notebook."""
    if sys.stdout is None or sys.stdout is not sys.__stdout__:
        return WIDTH
    return shutil.get_terminal_size((WIDTH, 24)).columns


def wrapped(text: str) -> list[str]:
    """The lines of a paragraph on the screen, the second and later ones indented; words are not broken."""
    lines = textwrap.wrap(
        text, screen_width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return lines or [""]


def listing(head: str, items: Sequence[str], end: str = "") -> list[str]:
    """One line that names as many of the items as fit, and counts the others."""
    line = head
    for index, item in enumerate(items):
        rest = len(items) - index - 1
        short = item if len(item) <= 60 else f"…{item[-59:]}"  # the end says more than the beginning
        joined = f"{line}{', ' if index else ''}{short}"
        if index and len(joined) + len(f", and {rest} more" * bool(rest) + end) > screen_width():
            return [f"{line}, and {rest + 1} more{end}"]
        line = joined
    return wrapped(line + end)


def by_reason(head: str, reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, which names as many of its items as fit; ``reasons`` is item -> reason.

    >>> by_reason("skipped ", {"0.bias": "it is no matrix", "1": "it is empty", "2.bias": "it is no matrix"})
    ['skipped 0.bias, 2.bias: it is no matrix', 'skipped 1: it is empty']
    """
    items: dict[str, list[str]] = {}
    for item, reason in reasons.items():
        items.setdefault(reason, []).append(item)
    return [line for reason, some in items.items() for line in listing(head, some, f": {reason}")]


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


def shorten_names(names: Iterable[str], width: int) -> dict[str, str]:
    """Names of layers in ``width`` characters, as far as different names stay different.

    From the left, parts of names that are too long become the shortest beginnings that no sibling has.
    Then the end of the last part is cut, no further than siblings differ. Numbers stay whole.

    >>> names = ["encoder.layers.10.attention", "decoder.layers.10.attention", "head"]
    >>> list(shorten_names(names, 22).values())
    ['e.layers.10.attention', 'd.layers.10.attention', 'head']
    >>> list(shorten_names(names, 12).values())
    ['e.l.10.atte…', 'd.l.10.atte…', 'head']
    """
    parts = {name: name.split(".") for name in names}
    siblings: dict[tuple[str, ...], set[str]] = {}
    for each in parts.values():
        for depth, part in enumerate(each):
            siblings.setdefault(tuple(each[:depth]), set()).add(part)
    shown: dict[tuple[str, ...], str] = {}  # the way to a part -> its beginning, in all names that have it
    for each in parts.values():
        excess = len(".".join(each)) - width
        for depth, part in enumerate(each):
            if excess <= 0:
                break
            least = _beginning(part, siblings[tuple(each[:depth])] - {part})
            if depth < len(each) - 1:
                shown[tuple(each[: depth + 1])] = part[:least]
            elif least < len(part) - 1:
                shown[tuple(each)] = part[: max(least, len(part) - excess - 1)] + "…"
            excess -= len(part) - least
    return {
        name: ".".join(shown.get(tuple(each[: depth + 1]), part) for depth, part in enumerate(each))
        for name, each in parts.items()
    }


def _beginning(part: str, others: Iterable[str]) -> int:
    """The length of the shortest beginning of a part that no other part has."""
    if part[-1:].isdigit():
        return len(part)
    sizes = (n for n in range(1, len(part)) if not any(other.startswith(part[:n]) for other in others))
    return next(sizes, len(part))


def text_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    spare: Sequence[str] = (),
    width: int | None = None,
    rule: bool = False,
) -> list[str]:
    r"""The lines of a table: names in the first column, words in the last, numbers between them.

    Names come first. Where not all has room, words go below their row, heads are broken, spare columns are left
    out until half of the screen is free for names, and only then long names are broken; in a narrow terminal
    they are shortened, see :func:`shorten_names`.

    Args:
        heads: the heads of the columns; a line break begins another line.
        rows: the cells of the rows.
        left: heads of further columns that are text and not numbers.
        spare: heads of columns that can be left out, first those that are missed least.
        width: the width of the screen; None: see :func:`screen_width`.
        rule: draw a line below the heads.

    >>> rows = [["layer1.conv", "12", "few"], ["fc", "9", ""]]
    >>> print(*text_table(["layer", "n", "note"], rows), sep="\n")
    layer         n  note
    layer1.conv  12  few
    fc            9
    >>> print(*text_table(["layer", "n", "note"], rows, spare=["n"], width=18), sep="\n")
    layer         n
      note
    layer1.conv  12
      few
    fc            9
    """
    width = screen_width() if width is None else width
    names, *columns, words = zip(heads, *rows, strict=True)
    wanted = min(max(map(len, names)), width // 2)
    if width - _taken(columns) < wanted:
        columns = [(column[0].replace(" ", "\n"), *column[1:]) for column in columns]
    left_out = []
    for head in spare:
        if width - _taken(columns) >= wanted:
            break
        columns = [column for column in columns if column[0] != head]
        left_out.append(head)
    room = max(width - _taken(columns), _NARROWEST)
    if width < WIDTH:  # in a narrow terminal; files keep whole names, in several lines
        shorter = shorten_names(names[1:], room)
        names = (names[0], *(shorter[name] for name in names[1:]))
    sizes = [min(max(map(len, names)), room), *map(_size, columns)]
    beside = room - sizes[0] - 2
    has_room = beside >= min(max(map(len, words)), _NARROWEST)
    printed: list[str] = []
    for row, (name, *cells, text) in enumerate(zip(names, *columns, words, strict=True)):
        stacks = [wrap_name(name, sizes[0]), *(cell.split("\n") for cell in cells)]
        stacks.append(textwrap.wrap(text, beside) if has_room and text else [""])
        height = max(map(len, stacks))
        gaps = [[""] * (height - len(stack)) for stack in stacks]
        aligned = [stack + gap if row else gap + stack for stack, gap in zip(stacks, gaps, strict=True)]
        for first, *others, last in zip(*aligned, strict=True):
            middle = [
                text.ljust(size) if column[0] in left else text.rjust(size)
                for text, size, column in zip(others, sizes[1:], columns, strict=True)
            ]
            printed.append("  ".join([first.ljust(sizes[0]), *middle, last]).rstrip())
        if not has_room:
            printed += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")
        if rule and row == 0:
            place = len(printed)
    if rule:
        printed.insert(place, "-" * max(map(len, printed)))
    return [*printed, *(wrapped(f"No room here for: {', '.join(left_out)}") if left_out else [])]


def _size(column: Sequence[str]) -> int:
    """The width of a column."""
    return max(len(line) for cell in column for line in cell.split("\n"))


def _taken(columns: Sequence[Sequence[str]]) -> int:
    """The width of the columns between names and words."""
    return sum(_size(column) + 2 for column in columns)


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
