"""Collect the package's warnings from its source: `python docs/warning_messages.py` prints them.

`docs/reference/warnings.md` explains each of them, and a test compares the two. `…` stands for text that is
filled in at run time. The reason why a layer is left out is a message of its own.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "spectralmetrics"
GAP = "…"
WARNERS = {"warnings.warn", "_warn", "self._warn_once", "warn_user"}
"""Functions that warn: ``warnings.warn``, and functions of the package that pass their message on to it."""


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module or function, without the nodes of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from own_nodes(child)


class Reader:
    """Finds the messages in the source of a package.

    Args:
        source: the folder of the package.
    """

    def __init__(self, source: Path = SOURCE) -> None:
        self._modules = {
            path.relative_to(source).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(source.rglob("*.py"))
        }
        self._functions = [
            node
            for module in self._modules.values()
            for node in ast.walk(module)
            if isinstance(node, ast.FunctionDef)
        ]

    def messages(self) -> dict[str, str]:
        """Message -> the file that contains it."""
        found = {
            " ".join(words.split()): path
            for path, module in self._modules.items()
            for function in ast.walk(module)
            if isinstance(function, ast.FunctionDef)
            for said in spoken(function)
            for words in self._wordings(said, function)
        }
        return {message: path for message, path in found.items() if message != GAP}

    def _wordings(self, node: ast.AST, function: ast.FunctionDef, known: tuple[str, ...] = ()) -> list[str]:
        """The texts that an expression may have; a gap if they depend on the run."""
        found: list[str] = [GAP]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, ast.JoinedStr):
            parts = [self._wordings(part, function, known) for part in node.values]
            found = ["".join(each) for each in itertools.product(*parts)]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts = [self._wordings(part, function, known) for part in (node.left, node.right)]
            found = ["".join(each) for each in itertools.product(*parts)]
        elif isinstance(node, ast.FormattedValue):
            found = self._wordings(node.value, function, known)
        elif isinstance(node, ast.IfExp):
            found = [
                each for part in (node.body, node.orelse) for each in self._wordings(part, function, known)
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name == "format" and isinstance(node.func, ast.Attribute):
                found = [each.replace("{}", GAP) for each in self._wordings(node.func.value, function, known)]
            elif name not in known:
                found = self._returned(name, (*known, name)) or found
        elif isinstance(node, ast.Name) and node.id not in {*known, *arguments(function)}:
            for scope in (function, *(self._modules.values() if node.id.isupper() else ())):
                if values := assigned(node.id, scope):
                    found = [w for each in values for w in self._wordings(each, function, (*known, node.id))]
                    break
        found = [re.sub(f"{GAP}+", GAP, each) for each in found]
        return [GAP] if GAP in found else found

    def _returned(self, name: str, known: tuple[str, ...]) -> list[str]:
        """The texts returned by functions of the package with this name."""
        return [
            words
            for function in self._functions
            if function.name == name and function.returns and "str" in ast.unparse(function.returns)
            for node in own_nodes(function)
            if isinstance(node, ast.Return) and node.value is not None
            for words in self._wordings(node.value, function, known)
            if words
        ]


def spoken(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """The messages of a function, without messages that it gets as an argument."""
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, wanted = node.exc, {"LeftOut"}
        elif isinstance(node, ast.Call):
            call, wanted = node, WARNERS
        else:
            continue
        if ast.unparse(call.func) in wanted and call.args:
            said = call.args[0]
            if not (isinstance(said, ast.Name) and said.id in arguments(function)):
                yield said


def arguments(function: ast.FunctionDef) -> set[str]:
    """The names of a function's arguments."""
    return {each.arg for each in function.args.args}


def assigned(name: str, scope: ast.AST) -> list[ast.expr]:
    """The expressions that a scope assigns to a name."""
    found = []
    for node in own_nodes(scope):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.NamedExpr) and name in map(ast.unparse, targets):
            found.append(node.value)
    return found


if __name__ == "__main__":
    for message, where in Reader().messages().items():
        print(f"{where}: {message}")
