import email
import importlib.util
import re
import tomllib
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
    )  # links that the hook does not know
    within = [(match[1], link[match.end() :]) for link in links if (match := re.match(base, link))]
    assert len(within) > 5
    for kind, path in within:
        assert (README.parent / path).is_file()
        assert (kind == "raw") == path.endswith(".png")
    assert re.sub(base, "", published).strip() == README.read_text(encoding="utf-8").strip()


def test_code_is_published_as_it_is():
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    spec = importlib.util.spec_from_file_location("hatch_build", README.parent / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    text = (
        "[`a[0](x)`](a.md#b) [c](https://c.org) [d](#e) [![f](g.svg)](h)\n```python\nlayers[0](x)\n```\n[i](j)"
    )
    assert hatch_build.absolute(text, "https://r", "v1") == (
        "[`a[0](x)`](https://r/blob/v1/a.md#b) [c](https://c.org) [d](#e) "
        "[![f](https://r/raw/v1/g.svg)](https://r/blob/v1/h)\n```python\nlayers[0](x)\n```\n[i](https://r/blob/v1/j)"
    )
