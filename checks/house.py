"""Size of each room of the package, and number of files through which one layer's output goes.

    python checks/house.py            lines of code and of docstrings, room by room
    python checks/house.py --walk     files from the hook to the sums, to records.csv, and to the page

A line of code holds something besides comments and docstrings. A file counts for the walk if a plain eager
model with one linear layer calls a function or method of it.
"""

import argparse
import ast
import io
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "spectralmetrics"
_NOTHING = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count(source):
    """Lines of code and lines of docstrings of a file.

    >>> count('"A module."\\n\\n# Why.\\nx = 1\\n')
    (1, 1)
    """
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        for each in getattr(node, "body", ()) if not isinstance(node, (ast.Lambda, ast.IfExp)) else ():
            if isinstance(each, ast.Expr) and isinstance(getattr(each.value, "value", None), str):
                docstrings.update(range(each.lineno, each.end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOTHING:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), len(docstrings)


def lines():
    """Print both for each folder and file directly below the package, and for all."""
    found = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        code, docstrings = count(path.read_text(encoding="utf-8"))
        for room in (path.relative_to(PACKAGE).parts[0], "all"):
            found.update({(room, "files"): 1, (room, "code"): code, (room, "docstrings"): docstrings})
    print(f"{'room':20} {'files':>6} {'code':>7} {'docstrings':>11}")
    for room in [*sorted({room for room, _ in found} - {"all"}), "all"]:
        print(f"{room:20} {found[room, 'files']:6} {found[room, 'code']:7,} {found[room, 'docstrings']:11,}")


def walked(function):
    """A function's result, and the files of the package that it runs, in order."""
    found = {}

    def note(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)) and frame.f_code.co_name != "<module>":
            found.setdefault(str(Path(path).relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, list(found)


def walk():
    """Print the files that one layer's output goes through."""
    import torch
    from torch import nn

    import spectralmetrics as sm
    from spectralmetrics.recording.report.write import write_report

    model, rows = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        probe = sm.LayerProbe(model)
        recorder = sm.Recorder(folder, probe, ["csv", "arrays"])
        # The second forward runs through fewer files: the first one stores the layer's layout.
        steps = [
            ("to the sums, first forward", lambda: model(rows)),
            ("to the sums, later forwards", lambda: model(rows)),
            ("to records.csv", recorder.record),
            ("to the page", lambda: write_report(Path(folder), Path(folder) / "report.html")),
        ]
        for name, step in steps:
            _, files = walked(step)
            new = [each for each in files if each not in seen]
            seen.update(files)
            print(f"{name}: {len(files)} files, {len(new)} of them new: {', '.join(new)}")
    print(f"from the hook to the report: {len(seen)} files")


def main():
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walk", action="store_true", help="the files that one layer's output goes through")
    walk() if parser.parse_args().walk else lines()


if __name__ == "__main__":
    main()
