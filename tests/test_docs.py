"""Every Python block of the documentation runs, page by page, and no link within it is broken."""

import importlib.util
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from spectralmetrics.metrics import base

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]


def python_blocks(page):
    """Blocks that are only shown, and cells that run when the site is built, without their options."""
    fences = r"^```(?:python|\{code-cell\}[^\n]*)\n(?::[^\n]*\n)*(.*?)^```"
    return re.findall(fences, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Pages whose cells train networks; only the build of the site runs them.
LEFT_TO_THE_SITE = {"accelerators", "choosing", "collapse", "resuming", "summary"}
LEFT_TO_THE_SITE |= {"embeddings", "low_rank", "pretraining", "self_supervised"}
LONG = {"integrations"}
RUN = [
    pytest.param(page, marks=[pytest.mark.long] * (page.stem in LONG), id=str(page.relative_to(ROOT)))
    for page in PAGES
    if python_blocks(page) and page.stem not in LEFT_TO_THE_SITE
]


def test_what_the_site_does_not_run_runs_here():
    for page in PAGES:
        if page.stem in LEFT_TO_THE_SITE:
            assert "```python" not in page.read_text(encoding="utf-8"), page


# Warnings of other libraries.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN)
def test_the_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_STATISTICS", base._STATISTICS.copy())  # a page may define its own
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other store without a server
    (tmp_path / "runs").mkdir()
    random = torch.get_rng_state()
    namespace = {"__name__": "documentation"}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
    plt.close("all")
    torch.set_rng_state(random)


def test_there_are_blocks_to_run():
    assert sum(len(python_blocks(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http|#)([^)#\s]+)", text):
        target = page.parent / link
        if "gallery" in target.parts:
            continue  # made by the build, which refuses broken links
        assert target.exists() or target.with_suffix(".md").exists(), link


GUIDES = re.compile(r"^```\{guides\}\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_every_page_stands_in_one_path_of_the_menu():
    folders = (DOCS, DOCS / "guide", DOCS / "reference")
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES if page.parent in folders}
    listed = [
        (page.parent / f"{line.partition(': ')[0]}.md").resolve()
        for page, text in pages.items()
        for block in GUIDES.findall(text)
        for line in block.splitlines()
    ]
    no_pages = {DOCS / "README.md", DOCS / "index.md"}
    no_pages |= {DOCS / "reference" / f"{made}_table.md" for made in ("functional", "metrics")}
    assert sorted(listed) == sorted(p for p in pages if p not in no_pages and not GUIDES.search(pages[p]))


def load(name):
    """Load a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quoted(page):
    """Block quotes of a page, each on one line."""
    blocks = page.read_text(encoding="utf-8").split("\n\n")
    return [" ".join(block[2:].replace("\n> ", " ").split()) for block in blocks if block.startswith("> ")]


def test_every_warning_is_explained():
    """Messages must match the code: each new or reworded message needs an entry on the page."""
    explained = quoted(DOCS / "reference" / "warnings.md")
    messages = load("warning_messages").Reader().messages()
    assert len(messages) > 50
    assert sorted(messages.keys() - set(explained)) == []
    assert sorted(set(explained) - messages.keys()) == []


def test_the_reader_of_warnings_finds_them_all(tmp_path):
    (tmp_path / "one.py").write_text(
        "PLAIN = 'a constant'\n"
        "def _warn(message):\n    warnings.warn(message)\n"
        "def why(x) -> str:\n    return f'it is {x}'\n"
        "def f(n):\n"
        "    words = 'few' if n else 'none'\n"
        "    warnings.warn(f'{n} of {words}: {n.x}{n.y}')\n"
        "    _warn(PLAIN)\n    _warn(why(n))\n    raise LeftOut('left ' 'out')\n"
    )
    found = load("warning_messages").Reader(tmp_path).messages()
    assert set(found) == {"… of few: …", "… of none: …", "a constant", "it is …", "left out"}
