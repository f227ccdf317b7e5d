"""Sphinx settings; `python -m nox -s docs` builds the site into docs/_build/html."""

import inspect
import re
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

import torch

import spectralmetrics

HERE = Path(__file__).parent

project = "spectralmetrics"
author = "The spectralmetrics developers"
project_copyright = "2026, the spectralmetrics developers"
release = version_of("spectralmetrics")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = [
    "_build",
    "guide/observations_tables",
    "published_picture_tables",
    "reference/statistics_table.md",
    "sg_execution_times.rst",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "spectralmetrics"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"^several_processes\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
}
# Several threads make the examples' small convolutions slower where cores are busy.
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")

STATISTICS = "reference/statistics_table.md"


def write_statistics(app):
    """The table of all statistics, from the classes themselves, so that a new one is in it."""
    lines = ["| class | short name | what it is |", "|---|---|---|"]
    for short_name, metric in spectralmetrics.statistics().items():
        if metric.__module__.startswith("spectralmetrics."):
            summary = re.sub(
                r":math:`(.*?)`", r"$\1$", inspect.getdoc(metric).split("\n\n")[0].replace("\n", " ")
            )
            link = f"{{class}}`~spectralmetrics.metrics.{metric.__name__}`"
            lines.append(f"| {link} | `{short_name}` | {summary} |")
    target = HERE / STATISTICS
    text = "\n".join(lines) + "\n"
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", write_statistics)
