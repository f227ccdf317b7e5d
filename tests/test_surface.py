"""What users can call, with which arguments and defaults: a change of it is one of a promise."""

import enum
import importlib
import inspect
import re
from pathlib import Path

import pytest

KEPT = Path(__file__).parent / "data" / "surface.txt"
MODULES = (
    "spectralmetrics",
    *(
        f"spectralmetrics.{part}"
        for part in ("functional", "metrics", "probing", "projection", "recording", "sums")
    ),
)


def surface():
    """One line for each public function, class and method, by the module that has it first."""
    lines, seen = [], set()
    for module in map(importlib.import_module, MODULES):
        for name in sorted(module.__all__):
            found = getattr(module, name)
            if id(found) not in seen and callable(found) and not isinstance(found, enum.EnumMeta):
                seen.add(id(found))
                lines += _lines(f"{module.__name__}.{name}", found)
    return lines


def _lines(name, found):
    try:
        yield f"{name}{_arguments(found)}"
    except ValueError:  # a type alias
        return
    if inspect.isclass(found):
        for method in sorted(vars(found)):
            function = inspect.unwrap(getattr(found, method))
            is_own = getattr(function, "__module__", "").startswith("spectralmetrics.")
            if not method.startswith("_") and is_own and callable(function):
                yield f"{name}.{method}{_arguments(function)}"


def _arguments(function):
    """Names and defaults, without annotations."""
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
