"""A damaged manifest gives one line on the command line, never a traceback."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from spectralmetrics import Recorder
from spectralmetrics.cli import main
from spectralmetrics.recording import draw

RUN = Path(__file__).parents[1] / "data" / "run-0.1.0"
MANIFEST = json.loads((RUN / "recording.json").read_text())
WRONG = (None, 3, -1.5, "x", True, [], {}, [1, 2], {"a": 1})


def paths(content, path=()):
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from paths(value, (*path, key))


def damaged():
    """Manifests with one part replaced by something else, and contents that are no JSON."""
    for path in paths(MANIFEST):
        for wrong in WRONG:
            content = copy.deepcopy(MANIFEST)
            at = content
            for key in path[:-1]:
                at = at[key]
            if path:
                at[path[-1]] = wrong
            yield "/".join(path), json.dumps(content if path else wrong).encode()
    text = (RUN / "recording.json").read_bytes()
    for length in (0, 1, 40, len(text) - 1):
        yield "cut off", text[:length]
    yield "bytes", b"\xff\xfe\x00"
    yield "depth", b"[" * 100_000
    yield "more", text.replace(b'"format": 1', b'"format": 1, "colour": "red"')
    yield "later", text.replace(b'"format": 1', b'"format": 7')


@pytest.mark.filterwarnings("ignore")
def test_commands_and_resuming(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw, "save_figure", lambda *arguments: None)  # takes most of the time
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    shutil.rmtree(run / "arrays")
    (run / "arrays").mkdir()
    shutil.copy(RUN / "arrays" / "epoch-000000.npz", run / "arrays")
    refused = 0
    for where, content in damaged():
        (run / "recording.json").write_bytes(content)
        for command in (["plot", "--dpi", "10", "--statistics", "saturation"], ["recompute"]):
            status = main([command[0], str(run), *command[1:]])
            error = capsys.readouterr().err.splitlines()
            assert status in (0, 2), (where, content)
            errors = [line for line in error if "left out" not in line]
            assert len(errors) == (status == 2), (where, content, error)
            refused += status == 2
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        try:
            Recorder(run, None, ["arrays"], mode="resume").close()
        except ValueError as error:
            assert "recording.json" in str(error) or "expected" in str(error)  # noqa: PT017
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        else:
            for path, held in before.items():
                path.write_bytes(held)
    assert refused > 50


@pytest.mark.parametrize(
    "text", ['{"format": 1, "statistics": {"saturation": 3}}', '{"format": 1, "writers": 3}']
)
def test_it_is_named(text, tmp_path, capsys):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    (run / "recording.json").write_text(text)
    assert main(["plot", str(run)]) == 2
    assert f"expected {run / 'recording.json'} to be a recorder's" in capsys.readouterr().err
