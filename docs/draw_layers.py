"""Draw where each type of layer has its features; ``--write`` puts the table into the guide on probing.

python docs/draw_layers.py [--write]
"""

import argparse
import re
from pathlib import Path

from spectralmetrics import layers

PAGE = Path(__file__).parent / "guide" / "probes.md"
_TABLE = re.compile(r"(<!-- layers -->\n\n)(.*?)(\n<!-- end of layers -->)", re.DOTALL)
_DIMS = {1: "Dimension 1: `(N, C, *spatial)`", -1: "Last: (N, …, D)", "input": "As in its input"}


def kinds():
    """(name, kind) of each type; types of other packages carry the package's name."""
    own = [
        (kind.__name__, each) for kind, each in layers._KINDS.items() if kind.__module__.startswith("torch.nn")
    ]
    return own + [
        (f"{name} ({module.split('.')[0]})", each) for (module, name), each in layers._ELSEWHERE.items()
    ]


def draw():
    """The table, in Markdown."""
    groups = {}
    for name, kind in kinds():
        features = kind.dim.__doc__.rstrip(".") if callable(kind.dim) else _DIMS[kind.dim]
        if kind.batch_first is not None:
            features += ", (T, N, D) unless `batch_first`"
        key = features, "yes" if kind.is_default else "", "yes" if kind.ceiling else ""
        names = groups.setdefault(key, {})
        base, rank = re.fullmatch(r"(.*?)(?:([123])d)?", name).groups()
        names.setdefault(base, []).append(rank)
    lines = ["| layers | features | probed by default | ceiling known |", "|---|---|---|---|"]
    for (features, default, ceiling), names in groups.items():
        shown = [
            f"`{base}{'/'.join(sorted(ranks))}d`" if ranks[0] else f"`{base}`" for base, ranks in names.items()
        ]
        lines.append(f"| {', '.join(shown)} | {features} | {default} | {ceiling} |")
    return "\n".join(lines) + "\n"


def drawn():
    """The table in the guide."""
    return _TABLE.search(PAGE.read_text(encoding="utf-8")).group(2)


def main():
    """Draw it, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split(";")[0])
    parser.add_argument("--write", action="store_true", help="put it into the guide")
    table = draw()
    if parser.parse_args().write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            _TABLE.sub(lambda found: found.group(1) + table + found.group(3), page), encoding="utf-8"
        )
    print(table, end="")


if __name__ == "__main__":
    main()
