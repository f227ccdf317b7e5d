"""Runs with a user's own statistics: the module that they need, and the command line that imports it."""

import json
import sys

import pytest
import torch
from torch import nn

from spectralmetrics import LayerProbe, Recorder, recompute
from spectralmetrics.cli import main
from spectralmetrics.metrics import base

MODULE = '''
from spectralmetrics import SpectralMetric


class {kind}(SpectralMetric):
    """The largest eigenvalue."""

    short_name = "{name}"

    def statistic(self, spectrum):
        return spectrum.eigenvalues[0]
'''


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A run with a module that is no longer imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mylab_largest.py").write_text(MODULE.format(kind="LargestOfMyLab", name="largest_of_my_lab"))
    import mylab_largest

    model = nn.Sequential(nn.Linear(4, 3)).eval()
    probe = LayerProbe(model, mylab_largest.LargestOfMyLab())
    with Recorder(tmp_path / "run", probe, ["csv", "arrays"]) as recorder:
        model(torch.randn(50, 4))
        recorder.record()

    def forget():
        del sys.modules["mylab_largest"]
        del base._STATISTICS["largest_of_my_lab"]

    forget()
    yield tmp_path / "run"
    if "mylab_largest" in sys.modules:
        forget()


def test_a_run_names_the_module_that_it_needs(recorded):
    manifest = json.loads((recorded / "recording.json").read_text())
    assert manifest["statistics"]["largest_of_my_lab"]["module"] == "mylab_largest"
    with pytest.raises(ValueError, match=r"import mylab_largest first \(on the command line: --import mylab_"):
        recompute(recorded, statistics="largest_of_my_lab")


def test_the_command_line_imports_it(recorded, capsys):
    assert main(["recompute", str(recorded)]) == 2
    assert "--import mylab_largest" in capsys.readouterr().err
    assert main(["recompute", str(recorded), "--import", "mylab_largest"]) == 0
    assert "largest_of_my_lab" in capsys.readouterr().out
    assert main(["recompute", str(recorded), "--import", "no_such_module_of_mine"]) == 2
    assert "cannot import 'no_such_module_of_mine'" in capsys.readouterr().err
    assert len(recompute(recorded)) == 2


def test_a_run_of_0_2_0_does_not_know_it(recorded):
    manifest = json.loads((recorded / "recording.json").read_text())
    for module, words in ((None, "import its module first"), ("", "put it into a module")):
        settings = manifest["statistics"]["largest_of_my_lab"]
        settings.pop("module", None)
        if module is not None:
            settings["module"] = module
        (recorded / "recording.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=words):
            recompute(recorded, statistics="largest_of_my_lab")
