"""Draw which part of the package imports which, from the source; ``--write`` puts it into CONTRIBUTING.md.

    python docs/draw_imports.py [--write]

A part is a folder or a file directly below ``src/spectralmetrics``. Imports inside functions and for types
alone count like any other.
"""

import argparse
import graphlib
import re
from pathlib import Path

import grimp

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
_DRAWING = re.compile(r"(<!-- imports -->\n\n```text\n)(.*?)(```)", re.DOTALL)


def module_imports():
    """Module -> the modules of the package that it imports, by full names."""
    graph = grimp.build_graph("spectralmetrics", cache_dir=None)
    return {each: sorted(graph.find_modules_directly_imported_by(each)) for each in sorted(graph.modules)}


def part_of(module):
    """``spectralmetrics.sums.moments`` -> ``sums``; the face of the package, two files, has the empty name."""
    part = [*module.split("."), ""][1]
    return "" if part == "face" else part


def part_imports(imports):
    """Part -> the other parts that it imports; without the face, which imports what it offers."""
    found = {part_of(module): set() for module in imports}
    for module, imported in imports.items():
        found[part_of(module)] |= {part_of(each) for each in imported} - {part_of(module)}
    return {part: others - {""} for part, others in found.items() if part}


def draw(parts):
    """A table in text: each part stands below all that it imports.

    >>> print(draw({"top": {"base", "middle"}, "middle": {"base"}, "base": set()}), end="")
                     1 2 3
    1 base           .
    2 middle         x .
    3 top            x x .
    """
    sorter = graphlib.TopologicalSorter({part: sorted(parts[part]) for part in sorted(parts)})
    order = list(sorter.static_order())
    digits = len(str(len(order)))
    columns = " ".join(f"{number:>{digits}}" for number in range(1, len(order) + 1))
    lines = [" " * (digits + 16) + columns]
    for number, part in enumerate(order, 1):
        marks = ["x" if other in parts[part] else " " for other in order[: number - 1]]
        cells = " ".join(f"{mark:>{digits}}" for mark in [*marks, "."])
        lines.append(f"{number:>{digits}} {part:<15}{cells}")
    return "\n".join(lines) + "\n"


def drawn(page=PAGE):
    """The drawing that the page holds."""
    found = _DRAWING.search(page.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"expected a drawing after <!-- imports --> in {page}")
    return found[2]


def main():
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the drawing into CONTRIBUTING.md")
    drawing = draw(part_imports(module_imports()))
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_DRAWING.sub(lambda found: found[1] + drawing + found[3], text), encoding="utf-8")
    print(drawing, end="")


if __name__ == "__main__":
    main()
