"""Layout of the code. `pyproject.toml` lists permitted imports, for import-linter."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
import torchmetrics

from spectralmetrics.probing import core
from spectralmetrics.probing.core import Core
from spectralmetrics.probing.gradients import GradientRouter
from spectralmetrics.probing.mixtures import Mixtures
from spectralmetrics.probing.routing import Router

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("draw_imports", ROOT / "docs" / "draw_imports.py")
draw_imports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(draw_imports)

IMPORTS = draw_imports.module_imports()


def test_no_module_imports_itself_in_a_circle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises a CycleError that names a cycle


def test_the_drawing_is_that_of_the_code():
    expected = draw_imports.draw(draw_imports.part_imports(IMPORTS))
    assert draw_imports.drawn() == expected, "run `python docs/draw_imports.py --write`"


def metric_classes():
    """All metric classes of the package."""
    for name in IMPORTS:
        if name not in ("spectralmetrics.__main__", "spectralmetrics.sums.kernels"):  # needs Triton
            for each in vars(importlib.import_module(name)).values():
                if inspect.isclass(each) and issubclass(each, torchmetrics.Metric) and each.__module__ == name:
                    yield each


def test_private_methods_of_torchmetrics_are_overridden_in_one_file():
    stock = {name for name in dir(torchmetrics.Metric) if name.startswith("_") and not name.startswith("__")}
    stock |= {"__getstate__", "__setstate__", "__setattr__", "__getattr__", "update_called"}
    overriding = {
        each.__module__
        for each in metric_classes()
        for name, value in vars(each).items()
        if name in stock and (inspect.isroutine(value) or isinstance(value, property))
    }
    assert overriding == {"spectralmetrics.metrics.overrides"}


# Attributes of instances and classes that neither library promises.
THEIRS = {
    name
    for each in (torch.nn.Module(), torchmetrics.MeanMetric(), torchmetrics.MetricCollection([]))
    for name in dir(each)
    if name.startswith("_") and not name.startswith("__")
} | {"_orig_mod"}


def private_uses(tree):
    """Uses of private names of torch or torchmetrics; a method may call the method that it overrides."""
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own = {each for each in own if f"self.{each} = " in ast.unparse(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in THEIRS - own and names[0].split(".")[0] not in ("self", "super()", "cls"):
                yield names[0]
        elif isinstance(node, ast.Constant):
            names = []
            if node.value in THEIRS:
                yield node.value
        else:
            names = []
        for name in names:
            root, *rest = name.split(".")
            if root in ("torch", "torchmetrics", "nn") and any(re.match("_[^_]", part) for part in rest):
                yield name


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._len_torch_dispatch_stack()",
        "from torch._functorch import pyfunctorch",
        "import torch._dynamo",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "nn.modules.conv._ConvNd",
        "model._forward_hooks",
        "getattr(model, '_orig_mod', None)",
        "metric._computed = None",
        "collection._compute_groups_create_state_ref()",
    ],
)
def test_the_reader_sees_private_uses(line):
    assert list(private_uses(ast.parse(line)))
    assert not list(private_uses(ast.parse("super()._apply(fn); self._own; torch.nn.Module()")))


def test_private_names_of_torch_and_torchmetrics_are_used_in_one_file_each():
    source = ROOT / "src" / "spectralmetrics"
    found = {
        path.relative_to(source).as_posix(): uses
        for path in source.rglob("*.py")
        if (uses := sorted(set(private_uses(ast.parse(path.read_text(encoding="utf-8"))))))
    }
    assert set(found) == {"torch_private.py", "metrics/overrides.py"}, found


# Files of more than 350 lines, and why each is one file.
LONG_FILES = {
    "findings.py": "one table of rules, and how each is applied",
    "functional/spectrum.py": "everything that a statistic may read, a property each",
    "functional/relations.py": "half of it is docstrings with formulas and sources",
    "plotting.py": "one function for each picture, and what they share",
    "integrations/transformers.py": "one callback, a method for each event of the Trainer",
    "probing/probe.py": "the whole public face of a probe, half of it docstrings",
    "similarity.py": "one class and its result",
    "probing/reading.py": "what is read of layers, with every warning about it",
    "cli.py": "one command after the other, each with its help",
    "torch_private.py": "one private name after the other, with what is done without it",
    "sums/sketch.py": "one kind of sum, and what is read of it",
}


def test_long_files_have_a_reason():
    source = ROOT / "src" / "spectralmetrics"
    lengths = {
        path.relative_to(source).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in source.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > 350} == set(LONG_FILES)


def test_the_core_is_one_page_that_names_what_joins_it():
    page = Path(core.__file__).read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 200
    joined = {
        name for each in (Mixtures, Router, GradientRouter) for name in vars(each).keys() & vars(Core).keys()
    }
    joined = {name for name in joined if not name.startswith("__")}
    assert {"observe", "_route", "_batch", "take", "take_again"} <= joined
    assert not [name for name in joined if f"``{name}``" not in core.__doc__]


@pytest.mark.xdist_group("here")
def test_groups_of_tests_stay_on_one_worker(request):
    """If the plugin stops marking them, each worker silently makes what a group shares."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@here")


def docstrings(text):
    """All docstrings of a file, including docstrings of attributes."""
    values = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    return [each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_docstrings_begin_with_what_they_name():
    """Not with a question: "Whether there is one" says less than "True if there is one"."""
    questions = {"What", "Whether", "How", "Of", "Which", "Where", "Whose", "That", "Who", "Why", "When"}
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for docstring in docstrings(path.read_text(encoding="utf-8")):
            words = docstring.split()
            if words and words[0] in questions:
                found.append(f"{path.name}: {' '.join(words[:8])}")
    assert found == []


PEOPLE = re.compile(r"\b(told|notices?|nobody|somebody|whoever|looks? away)\b", re.IGNORECASE)


def test_docstrings_and_comments_do_not_speak_of_code_as_of_people():
    """Code gets values, finds faults and warns; a caller or reader is called so, not "somebody"."""
    source = ROOT / "src" / "spectralmetrics"
    found = {}
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        words = PEOPLE.findall("\n".join(docstrings(text) + comments(text)))
        if words:
            found[path.relative_to(source).as_posix()] = words
    assert not found, found
