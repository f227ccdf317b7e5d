import re
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


def test_the_quick_start_prints_what_it_shows(capsys):
    (code,), (shown,) = blocks("python"), blocks("text")
    random = torch.get_rng_state()
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    torch.set_rng_state(random)
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == shown.splitlines()[:2]
    found, expected = numbers(printed), numbers(shown)
    assert list(found) == list(expected) == ["1", "3", "5"]
    for layer, (*facts, dimension) in expected.items():
        assert found[layer][:-1] == tuple(facts)
        assert found[layer][-1] == pytest.approx(dimension, abs=4)  # training rounds otherwise elsewhere
    assert set(namespace["probe"].compute("eval")) == {f"saturation/eval/{layer}" for layer in "135"}


def test_the_commands_are_those_of_ci():
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && python -m nox -s {session}" in TEXT
    script = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m pip install nox && python -m nox -s tests" in script


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_links_within_the_repository(link):
    assert (README.parent / link).exists()
