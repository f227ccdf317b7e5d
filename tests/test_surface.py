"""The public surface with arguments and defaults; changing it changes a promise to users."""

import inspect
import re
from pathlib import Path

import pytest

from tests.public import everything_public

KEPT = Path(__file__).parent / "data" / "surface.txt"
MODULES = (
    "",
    ".functional",
    ".metrics",
    ".monitoring",
    ".probing",
    ".projection",
    ".recording",
    ".sums",
    ".plotting",
)


def surface():
    """One line for each public function, class and method, under the first module that has it."""
    lines = {}
    for module, name, each in everything_public(MODULES):
        lines.setdefault(id(each), f"{module}.{name}{_arguments(inspect.unwrap(each))}")
    return sorted(lines.values())


def _arguments(function):
    """Names and defaults of the arguments, without annotations."""
    signature = inspect.signature(function)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    shown = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x\w+", "", shown)


def test_it_is_as_it_was():
    kept = KEPT.read_text(encoding="utf-8").splitlines()
    found = surface()
    assert len(found) > 200
    gone, new = sorted(set(kept) - set(found)), sorted(set(found) - set(kept))
    if gone or new:
        pytest.fail(
            f"gone: {gone}\nnew: {new}\nWrite {KEPT.name} anew if that is meant"
            " (python -m tests.test_surface), and say in CHANGELOG.md what changes for users."
        )


if __name__ == "__main__":
    KEPT.write_text("\n".join(surface()) + "\n", encoding="utf-8")
