import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "SaturationMetric" in capsys.readouterr().out
    assert (tmp_path / "profile.png").exists()
    assert len(list((tmp_path / "runs" / "mine" / "arrays").iterdir())) == 3
    assert {row["statistic"] for row in namespace["rows"]} == {"saturation", "stable_rank"}
    assert set(namespace["values"]) == {f"saturation/train/{layer}" for layer in "024"}


def test_the_commands_are_those_of_ci():
    command = "python -m pip install nox && python -m nox -s tests"
    assert command in README.read_text(encoding="utf-8")
    script = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert command in script


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_within_the_repository(link):
    assert (README.parent / link).exists()
