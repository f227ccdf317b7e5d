"""Sphinx settings; `python -m nox -s docs` builds the site into docs/_build/html."""

import html
import inspect
import os
import re
import sys
import tempfile
import textwrap
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

import torch
from docutils import nodes
from furo.navigation import get_navigation_tree
from sphinx.util.docutils import SphinxDirective
from torch import nn

import spectralmetrics
import spectralmetrics.integrations.lightning
import spectralmetrics.integrations.transformers
from spectralmetrics.demo import load_digits

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import inventories  # noqa: E402
import metric_pages  # noqa: E402

project = "spectralmetrics"
author = "The spectralmetrics developers"
project_copyright = "2026, the spectralmetrics developers"
release = version_of("spectralmetrics")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = [
    "README.md",
    "_build",
    "gallery/*.ipynb",  # for download; the pages are made from the examples themselves
    "guide/large_models_tables",
    "guide/observations_tables",
    "language_models_tables",
    "published_picture_tables",
    "reference/functional_table.md",
    "reference/metrics_table.md",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Pages with `{code-cell}` run when the site is built, each in its own process and empty folder. They show their
# printed text and pictures. Text on standard error is a warning, and so an error of the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
nb_output_stderr = "remove-warn"

html_theme = "furo"
html_title = "spectralmetrics"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
EXTRA = HERE / "_build" / "extra"  # copied as it is
EXTRA.mkdir(parents=True, exist_ok=True)
html_extra_path = [str(EXTRA)]
html_css_files = ["custom.css"]

# Lists of names stand in for documentation of other libraries that cannot be reached.
intersphinx_mapping = inventories.mapping(HERE / "_build" / "inventories")
intersphinx_timeout = 5

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
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
    "thumbnail_size": (880, 616),
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
}
# One thread: small convolutions are no faster with several, and sums come out the same on every machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Settings of the pages' processes, such as the format of pictures.
KERNEL = HERE / "_build" / "ipython" / "profile_default" / "ipython_kernel_config.py"
KERNEL.parent.mkdir(parents=True, exist_ok=True)
KERNEL.write_text(
    """
c.InteractiveShellApp.exec_lines = [
    "%matplotlib inline",
    # tqdm, without widgets
    "import warnings; warnings.filterwarnings('ignore', message='IProgress not found')",
]
c.InlineBackend.figure_formats = {"svg"}
c.HistoryManager.enabled = False
""",
    encoding="utf-8",
)
os.environ["IPYTHONDIR"] = str(KERNEL.parents[1])
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")


def write_reference(app):
    """Write the pages of metrics and functions from the code, so that a new one gets a page."""
    metric_pages.write_pages(HERE / "reference")
    metric_pages.write_function_pages(HERE / "reference")


def write_example_report(app):
    """Write a report to try out: train two networks for a few seconds."""
    target = EXTRA / "example_report.html"
    images, labels, validation_images, validation_labels = load_digits(seed=0)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, width in (("narrow", 32), ("wide", 256)):
            torch.manual_seed(0)
            hidden = [nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            hidden += [nn.Linear(width, width), nn.ReLU()]
            model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
            optimizer = torch.optim.Adam(model.parameters())
            probe = spectralmetrics.LayerProbe(model, folds=8)
            runs[name] = Path(folder) / name
            with probe, spectralmetrics.Recorder(runs[name], probe, ["csv", "arrays"]) as recorder:
                for _ in range(6):
                    model.train()
                    for batch in torch.randperm(4000).split(50):
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                        optimizer.step()
                    model.eval()
                    with torch.no_grad():
                        found = torch.cat([model(part).argmax(1) for part in validation_images.split(50)])
                    accuracy = (found == validation_labels).double().mean()
                    recorder.add_scalar("accuracy", accuracy, stage="eval")
                    recorder.record()
        spectralmetrics.write_report(list(runs.values()), target)


def skip_member(app, what, name, obj, skip, options):
    """Leave out fields of named tuples, which the class describes, and members that only refer to it."""
    said = inspect.getdoc(obj) or ""
    return True if said.startswith(("Alias for field number", "See the class")) else None


def public_bases(app, name, obj, options, bases):
    """Show a base class that readers can import, in place of a private one."""
    for index, base in enumerate(bases):
        while inspect.isclass(base) and base.__name__.startswith("_"):
            base = base.__base__
        bases[index] = base


class Guides(SphinxDirective):
    """A list of guides, which also enter the menu; each line is `page: what it is for`."""

    has_content = True

    def run(self):
        """See Sphinx."""
        pages = [line.partition(": ")[::2] for line in self.content if line.strip()]
        menu = ["```{toctree}", ":hidden:", "", *(page for page, _ in pages), "```", ""]
        return self.parse_text_to_nodes(
            "\n".join([*menu, *(f"- [](<{page}.md>): {why}" for page, why in pages)])
        )


def describe(app, page, template, context, doctree):
    """Give a page's first paragraph to search engines and previews."""
    paragraph = doctree and next(doctree.findall(nodes.paragraph), None)
    if paragraph is None or 'name="description"' in context.get("metatags", ""):
        return
    words = textwrap.shorten(paragraph.astext(), 160, placeholder=" …")
    context["metatags"] += f'<meta name="description" content="{html.escape(words)}">\n'


def shorten_menu(app, page, template, context, doctree):
    """Give the menu two levels, so that it ends above the fold; tables link to deeper pages."""
    tree = context["toctree"](collapse=False, titles_only=True, maxdepth=2, includehidden=True)
    context["furo_navigation_tree"] = get_navigation_tree(tree)


CALLBACKS = (
    spectralmetrics.integrations.lightning.LayerProbeCallback,
    spectralmetrics.integrations.transformers.LayerProbeCallback,
)
PROBE_ARGUMENTS = re.compile(r"^Args:\n(.*?)^(?=\S)", re.DOTALL | re.MULTILINE)


def list_options(app, what, name, obj, options, lines):
    """Replace a callback's `**arguments` by the arguments of the probe."""
    if obj not in CALLBACKS:
        return
    place = next(index for index, line in enumerate(lines) if line.lstrip().startswith("**arguments"))
    arguments = PROBE_ARGUMENTS.search(inspect.getdoc(spectralmetrics.LayerProbe))[1].rstrip().splitlines()
    indent = len(lines[place]) - len(lines[place].lstrip())
    kept, keep = [], True
    for line in arguments:
        if re.match(r" {4}\S", line):
            keep = line.split(":")[0].strip() not in ("model", "metrics")
        if keep:
            kept.append(" " * (indent - 4) + line)
    end = place + 1
    while end < len(lines) and lines[end].startswith(" " * (indent + 1)):
        end += 1
    lines[place:end] = kept


def setup(app):
    """Called by Sphinx."""
    app.add_directive("guides", Guides)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", shorten_menu, priority=900)  # after the theme
    app.connect("builder-inited", write_reference)
    app.connect("builder-inited", write_example_report)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-bases", public_bases)
    # Before napoleon turns the docstring's sections into fields.
    app.connect("autodoc-process-docstring", list_options, priority=400)
