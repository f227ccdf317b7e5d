"""Make a reference page for each metric and function, and the tables of all of them, at build time.

A new statistic gets its page without a line here: its docstring, and a picture of its value over the spectrum.
A metric whose constructor needs arguments gets a picture if ``ARGUMENTS`` names them, a metric whose ``update``
needs more than rows if it needs labels. ``DRAWINGS`` holds special pictures. Other metrics have none.
"""

import inspect
import logging
import re
from io import StringIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torchmetrics

import spectralmetrics
from spectralmetrics import functional, metrics

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)

HEAD = """\
import torch
from spectralmetrics import {name}

torch.manual_seed(0)
metric = {name}({arguments})
"""


def series(loop, batch, ticks, label, before=""):
    """Code that plots a metric's value for 13 settings of the data, one after the other.

    Args:
        loop: the loop's variable and values, such as ``"mean in torch.linspace(0, 3, 13)"``.
        batch: the lines that update the metric.
        ticks: place on the axis -> its label.
        label: label of the axis.
        before: lines before the loop.
    """
    indented = "".join(f"    {line}\n" for line in batch)
    places, names = list(ticks), ", ".join(f'"{each}"' for each in ticks.values())
    return (
        f"{HEAD}{before}values = []\n"
        f"for {loop}:\n{indented}    values.append(metric.compute())\n    metric.reset()\n"
        f"figure, axis = metric.plot(values)\naxis.set_xticks({places}, [{names}])\n"
        f'_ = axis.set_xlabel("{label}")\n'
    )


OVER_SPECTRA = series(
    "decay in torch.linspace(0, 3, 13)",
    [
        "variances = torch.arange(1.0, 33.0) ** -decay  # of 32 features",
        "metric.update(torch.randn(2000, 32) * variances.sqrt())",
    ],
    {0: "0", 4: "1", 8: "2", 12: "3"},
    "$a$, where the $i$-th variance is $1 / i^a$",
)
OVER_NOISE = series(
    "noise in torch.linspace(0.2, 5, 13)",
    ["metric.update(centres[labels] + noise * torch.randn(2000, 32), labels)"],
    {0: "0.2", 6: "2.6", 12: "5"},
    "noise around the centres of three classes",
    "centres, labels = torch.randn(3, 32), torch.randint(3, (2000,))  # three classes, 32 features\n",
)
BEHIND_RELU = series(
    "lowest in torch.linspace(0, -6, 13)",
    [
        "biases = lowest * torch.linspace(0, 1, 32)  # of 32 units with a ReLU",
        "metric.update(torch.relu(torch.randn(2000, 32) + biases))",
    ],
    {0: "0", 4: "−2", 8: "−4", 12: "−6"},
    "the lowest bias of 32 units with a ReLU; the highest is 0",
)
OVER_MEANS = series(
    "mean in torch.linspace(0, 3, 13)",
    ["metric.update(torch.randn(2000, 32) + mean)"],
    {0: "0", 4: "1", 8: "2", 12: "3"},
    "mean of 32 features, in standard deviations",
)

ONCE = (
    HEAD
    + """\
metric.update(torch.randn(2000, 12) @ torch.randn(12, 12))
figure, axis = metric.plot()
"""
)

TEMPLATES = {
    "DeadFeaturesMetric": BEHIND_RELU,
    "DormantFeaturesMetric": BEHIND_RELU,
    "ZeroShareMetric": BEHIND_RELU,
    "MaxAbsMetric": OVER_MEANS,
    "SignalToNoiseMetric": OVER_MEANS,
    "SpreadMetric": OVER_MEANS,
}
"""The code for metrics that do not change with the spectrum."""

DRAWINGS = {
    "EigenspaceEmbeddingMetric": """\
import torch
from spectralmetrics import EigenspaceEmbeddingMetric

torch.manual_seed(0)
metric = EigenspaceEmbeddingMetric(num_components=2, max_samples=500)
centres, labels = 4 * torch.randn(3, 32), torch.randint(3, (2000,))  # three clusters, 32 features
metric.update(centres[labels] + torch.randn(2000, 32))
figure, axis = metric.plot()
""",
    "HistoryMetric": """\
import torch
from spectralmetrics import HistoryMetric

torch.manual_seed(0)
metric = HistoryMetric(steps=100)
for step in range(100):
    metric.update(1.02**step * torch.randn(64, 32))  # the scale drifts
figure, axis = metric.plot()
""",
    "LinearCKAMetric": """\
import torch
from spectralmetrics import LinearCKAMetric

torch.manual_seed(0)
metric = LinearCKAMetric()
values = []
for noise in torch.linspace(0, 3, 13):
    for _ in range(10):
        left = torch.randn(64, 16)
        metric.update(left, left + noise * torch.randn(64, 16))
    values.append(metric.compute())
    metric.reset()
figure, axis = metric.plot(values)
axis.set_xticks([0, 4, 8, 12], ["0", "1", "2", "3"])
_ = axis.set_xlabel("noise added to one side")
""",
}

CODE = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

ARGUMENTS = {"num_classes": "num_classes=3"}
"""Required argument of a constructor -> the argument given."""
PREFERRED = {"CovarianceDeterminantMetric": "log=True"}
INTERNAL = {"statistic", "other_sums", "spectral_sum", "from_sketch", "interval_of", "check_range"}
"""Members that a subclass defines for its base class, not for users."""
BASES = (metrics.SpectralMetric, metrics.MarginalMetric)
"""Base classes without a value of their own; the first page of the reference describes them."""


def documented():
    """The metrics with a page: short name, or else the class' name -> class."""
    found = {
        name: metric
        for name, metric in spectralmetrics.statistics().items()
        if metric.__module__.startswith("spectralmetrics.")
    }
    others = (getattr(metrics, name) for name in metrics.__all__)
    for other in others:
        is_metric = inspect.isclass(other) and issubclass(other, torchmetrics.Metric)
        if is_metric and other not in (*found.values(), *BASES):
            found[snake(other.__name__.removesuffix("Metric"))] = other
    return found


def snake(name):
    """The name of a class in snake case, for a file."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def path_of(metric):
    """The path from which a reader imports a metric."""
    public = getattr(metrics, metric.__name__, None) is metric
    return f"{'spectralmetrics.metrics' if public else metric.__module__}.{metric.__name__}"


def required(function):
    """The names of a function's required arguments, without ``self``."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def drawing(metric):
    """Code that draws the metric; None if the metric needs arguments that this file does not supply."""
    name = metric.__name__
    if name in DRAWINGS:
        return DRAWINGS[name]
    asked, updated = required(metric.__init__), required(metric.update)
    if not set(asked) <= set(ARGUMENTS) or not set(updated[1:]) <= {"labels"}:
        return None
    takes_labels = "labels" in inspect.signature(metric.update).parameters
    template = OVER_NOISE if takes_labels else ONCE if "plot" in vars(metric) else OVER_SPECTRA
    template = TEMPLATES.get(name, template)
    arguments = PREFERRED.get(name, ", ".join(ARGUMENTS[each] for each in asked))
    return template.format(name=name, arguments=arguments)


def draw(metric, code):
    """The picture as SVG; None if drawing fails."""
    try:
        namespace = {}
        with matplotlib.rc_context({"figure.figsize": (6, 3.6), "svg.hashsalt": metric.__name__}):
            exec(compile(code, f"<picture of {metric.__name__}>", "exec"), namespace)
            picture = StringIO()
            namespace["figure"].savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
        return picture.getvalue()
    except Exception as error:
        logger.info("no picture of %s: %s", metric.__name__, error)
        return None
    finally:
        plt.close("all")


def summary(item):
    """The first paragraph of a docstring, in Markdown."""
    paragraph = (inspect.getdoc(item) or "").split("\n\n")[0].replace("\n", " ")
    paragraph = re.sub(r"`(.*?) <(http.*?)>`_", r"[\1](\2)", paragraph)
    paragraph = re.sub(r":func:`(\w+)`", r"{func}`~spectralmetrics.functional.\1`", paragraph)
    formula = re.compile(r":math:`(.*?)`")
    return formula.sub(lambda found: f"${found[1].replace('|', chr(92) + 'vert ')}$", paragraph)


def used_in(name):
    """Links to the examples and the guides whose code contains the metric's name."""
    examples = [
        f"[](../../gallery/{path.stem})"
        for path in sorted((HERE.parent / "examples").glob("plot_*.py"))
        if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
    ]
    guides = [
        f"[](../../{path.relative_to(HERE)})"
        for path in sorted([*HERE.glob("*.md"), *HERE.glob("guide/*.md")])
        for code in ["\n".join(CODE.findall(path.read_text(encoding="utf-8")))]
        if re.search(rf"\b{name}\b", code)
    ]
    found = [("Examples", examples), ("Guides", guides)]
    return [f"- {title}: {', '.join(links)}" for title, links in found if links]


def page(short_name, metric, code, picture):
    """The text of a page."""
    path, registered = path_of(metric), short_name in spectralmetrics.statistics()
    own = [
        name
        for name, value in vars(metric).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in INTERNAL
    ]
    lines = [f"# {metric.__name__}", ""]
    if registered:
        lines += [f"`{short_name}` in a probe's values, in `records.csv` and on the command line.", ""]
    lines += ["```{eval-rst}", f".. autoclass:: {path}"]
    lines += [f"   :members: {', '.join(own)}"] if own else []
    lines += ["   :show-inheritance:", "```", ""]
    if picture:
        title = f"{metric.__name__} drawn by the code below"
        image = [f"```{{image}} images/{short_name}.svg", f":alt: {title}", "```"]
        lines += ["## A picture", "", *image, "", "```python", code.rstrip(), "```", ""]
    function = FUNCTIONS.get(short_name, short_name)
    if hasattr(functional, function):
        lines += [f"Without a state: {{func}}`spectralmetrics.functional.{function}`.", ""]
    if registered:
        base = "{class}`~spectralmetrics.metrics.SpectralMetric`"
        lines += [f"{base} describes `update`, `reset`, `interval` and the other arguments.", ""]
    if used := used_in(metric.__name__):
        lines += ["## Where it is used", "", *used, ""]
    lines += ["Typical values, and remedies: [](../../guide/choosing.md).", ""]
    return "\n".join(lines)


def write(path, text):
    """Write a file unless it has this text already, so that Sphinx does not read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_pages(reference):
    """Write all pages, in ``reference/metrics``, and their table."""
    found = documented()
    folder = reference / "metrics"
    for old in folder.glob("*.md"):
        if old.stem not in found:
            old.unlink()
    table = ["| class | short name | what it is |", "|---|---|---|"]
    for short_name, metric in found.items():
        code = drawing(metric)
        picture = code and draw(metric, code)
        if picture:
            write(folder / "images" / f"{short_name}.svg", picture)
        write(folder / f"{short_name}.md", page(short_name, metric, code, picture))
        key = f"`{short_name}`" if "short_name" in vars(metric) else ""
        table.append(f"| [{metric.__name__}](metrics/{short_name}.md) | {key} | {summary(metric)} |")
    names = [f"metrics/{short_name}" for short_name in found]
    toctree = ["```{toctree}", ":hidden:", "", *names, "```"]
    write(reference / "metrics_table.md", "\n".join([*table, "", *toctree, ""]))


PARTS = {
    "dimension": "From eigenvalues",
    "power_law": "From eigenvalues",
    "dispersion": "From a covariance",
    "held_out": "Uncertainty of a value",
    "labels": "With labels",
    "marginals": "Each feature by itself",
    "relations": "Between layers and between distributions",
    "decomposition": "Covariances, their spectra and sums",
    "accumulate": "Covariances, their spectra and sums",
    "moments": "Covariances, their spectra and sums",
    "observations": "Covariances, their spectra and sums",
    "spectrum": "Covariances, their spectra and sums",
}
"""Module of a function -> its heading in the table."""


FUNCTIONS = {
    "spectrum": "eigenvalues",
    "covariance_trace": "trace",
    "covariance_determinant": "determinant",
    "rms": "root_mean_square",
    "linear_probe": "ridge_explained_variance",
}
"""Short name of a statistic -> its function, if the function has another name."""


def function_page(name, item):
    """The text of a page of a function, or of a class that functions take."""
    is_class = inspect.isclass(item)
    lines = [f"# {name}", "", "```{eval-rst}"]
    lines += [f".. auto{'class' if is_class else 'function'}:: spectralmetrics.functional.{name}"]
    lines += ["   :members:"] if is_class else []
    lines += ["```", ""]
    names = {FUNCTIONS.get(short_name, short_name): metric for short_name, metric in documented().items()}
    if metric := names.get(name):
        lines += [f"For data in batches: {{class}}`{path_of(metric)}`.", ""]
    return "\n".join(lines)


def write_function_pages(reference):
    """Write a page for each public name of ``spectralmetrics.functional``, and the tables of all."""
    folder = reference / "functional"
    for old in folder.glob("*.md"):
        if old.stem not in functional.__all__:
            old.unlink()
    tables = {title: [] for title in PARTS.values()}
    for name in sorted(functional.__all__, key=lambda each: inspect.isclass(getattr(functional, each))):
        item = getattr(functional, name)
        write(folder / f"{name}.md", function_page(name, item))
        title = PARTS.get(item.__module__.split(".")[-1], "Others")
        tables.setdefault(title, []).append(f"| [{name}](functional/{name}.md) | {summary(item)} |")
    lines = []
    for title, rows in tables.items():
        lines += [f"## {title}", "", "| name | what it is |", "|---|---|", *rows, ""]
    lines += ["```{toctree}", ":hidden:", "", *(f"functional/{name}" for name in functional.__all__), "```", ""]
    write(reference / "functional_table.md", "\n".join(lines))
