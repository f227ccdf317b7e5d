import email
import re
import tomllib
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def numbers(table):
    """Layer -> type, width, ceiling, observations and dimension."""
    lines = (line.split() for line in table.splitlines()[2:] if line.strip())
    return {layer: (kind, *map(int, counts)) for layer, kind, *counts in (line[:6] for line in lines)}


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120


def test_the_site_begins_with_it():
    index = (README.parent / "docs" / "index.md").read_text(encoding="utf-8")
    assert index.startswith("```{include} ../README.md\n:relative-docs: docs/\n")
    marker = re.search(r"^:end-before: (.*)$", index, re.MULTILINE)[1]
    shown, rest = TEXT.split(marker)
    assert "## Quick start" in shown
    assert len(rest.splitlines()) < 15
    assert re.findall(r"\]\((?!http|docs/)([^)]+)\)", shown) == []  # nothing that the site lacks


def test_the_quick_start_prints_what_it_shows(capsys):
    (code,), (shown,) = blocks("python"), blocks("text")
    random = torch.get_rng_state()
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    torch.set_rng_state(random)
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == shown.splitlines()[:2]
    found, expected = numbers(printed), numbers(shown)
    assert list(found) == list(expected) == ["1", "3", "5", "7"]
    for layer, (*facts, dimension) in expected.items():
        assert found[layer][:-1] == tuple(facts)
        assert found[layer][-1] == pytest.approx(dimension, abs=4)  # training rounds differently elsewhere
    assert set(namespace["probe"].compute("eval")) == {f"saturation/eval/{layer}" for layer in "1357"}


def test_the_commands_are_those_of_ci():
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && python -m nox -s {session}" in TEXT
    script = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m pip install nox && python -m nox -s tests" in script


def test_versions_are_those_that_pip_asks_for():
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.match(r"(\w+)>=([\d.]+)", each).groups() for each in project["dependencies"])
    assert list(bounds) == ["torch", "torchmetrics", "numpy", "scipy"]
    assert f"torch ≥ {bounds['torch']} and torchmetrics ≥ {bounds['torchmetrics']}" in TEXT
    installing = (README.parent / "docs" / "guide" / "installing.md").read_text(encoding="utf-8")
    said = ", ".join(f"{name} {bound}" for name, bound in bounds.items())
    assert f"{said} and Python {project['requires-python'].removeprefix('>=')}, or newer" in " ".join(
        installing.split()
    )
    sessions = (README.parent / "noxfile.py").read_text(encoding="utf-8")
    assert f'TORCH = ("{bounds["torch"]}", ' in sessions
    workflow = (README.parent / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f'torch: ["{bounds["torch"]}", ' in workflow


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_links_within_the_repository(link):
    assert (README.parent / link).exists()


def test_the_published_links_lead_to_the_repository(tmp_path, monkeypatch):
    hatchling = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    monkeypatch.chdir(README.parent)
    folder = hatchling.prepare_metadata_for_build_wheel(str(tmp_path))
    metadata = email.message_from_bytes((tmp_path / folder / "METADATA").read_bytes())
    published = metadata.get_payload(decode=True).decode()
    urls = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    base = rf"{re.escape(urls['Repository'])}/(blob|raw)/v{re.escape(metadata['Version'])}/"

    links = re.findall(r"\]\(([^)]+)\)", published)
    assert [link for link in links if not link.startswith("https://")] == []
    assert not re.search(
        r"""(src|href)=|^\[[^]]+\]:""", published, re.MULTILINE
    )  # links in a form that the hook does not find
    within = [(match[1], link[match.end() :]) for link in links if (match := re.match(base, link))]
    assert len(within) > 5
    for kind, path in within:
        assert (README.parent / path).is_file()
        assert (kind == "raw") == path.endswith(".png")
    assert re.sub(base, "", published).strip() == README.read_text(encoding="utf-8").strip()
