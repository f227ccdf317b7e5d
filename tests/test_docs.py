"""Every Python block of the documentation runs, page by page, and no link within it is broken."""

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


# Their cells train networks. The build of the site runs them as well.
LONG = {"index", "accelerators", "choosing", "collapse", "integrations", "resuming", "summary"}
LONG |= {"embeddings", "low_rank", "pretraining", "self_supervised"}
RUN = [
    pytest.param(page, marks=[pytest.mark.long] * (page.stem in LONG), id=str(page.relative_to(ROOT)))
    for page in PAGES
    if python_blocks(page)
]


# What other libraries warn of is not ours.
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
            continue  # made by the build, which refuses broken ones
        assert target.exists() or target.with_suffix(".md").exists(), link
