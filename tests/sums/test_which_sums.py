"""Every report of speed names the code that computes the sums, so that nothing is slower silently."""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from spectralmetrics import LayerProbe
from spectralmetrics.cli import main
from spectralmetrics.functional import compiled as public
from spectralmetrics.probing import probe as probing
from spectralmetrics.sums import compiled, fused, library

ROOT = Path(__file__).parents[2]
REASONS = (
    "there",
    "switched off",
    "other system",
    "gone",
    "gone after install",
    "noted",
    "damaged",
    "stale",
    "old",
)
FAULTS = {"gone after install", "damaged", "stale"}  # the library of the install is missing or unusable


def forget():
    """Clear everything that is found out once per process."""
    found = (
        library.find,
        library.is_switched_off,
        compiled._best_instructions,
        fused.why_not,
        probing._warn_fault,
    )
    for each in found:
        each.cache_clear()


@pytest.fixture
def _afresh(monkeypatch):
    """Detect under the test's patches, and clear the results for other tests."""
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def install(monkeypatch, tmp_path, _afresh):
    """A function that puts the package's library into a state."""
    before = library.find()
    monkeypatch.delenv("SPECTRALMETRICS_COMPILED", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_accumulate.so")
    monkeypatch.setattr(library, "NOTE", tmp_path / "_accumulate.txt")
    pure = types.SimpleNamespace(read_text=lambda name: "Root-Is-Purelib: true\n")
    real = importlib.metadata.distribution
    own = "spectralmetrics"
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: pure if name == own else real(name))

    def put(state):
        if state == "switched off":
            monkeypatch.setenv("SPECTRALMETRICS_COMPILED", "0")
        elif state == "other system":
            monkeypatch.setattr("platform.machine", lambda: "aarch64")
        elif state == "gone after install":
            pure.read_text = lambda name: "Root-Is-Purelib: false\n"
        elif state == "noted":
            library.NOTE.write_text("c++ returned exit status 1: fatal error\n")
        elif state == "damaged":
            library.LIBRARY.write_text("no library")
        elif state in ("there", "stale", "old"):
            if before.library is None:
                pytest.skip(f"no library to look at: {before.why}")
            shutil.copyfile(before.library._name, library.LIBRARY)
        if state == "stale":
            monkeypatch.setattr(library, "INTERFACE_VERSION", library.INTERFACE_VERSION + 1)
        forget()
        if state == "old":
            library.find().library.best_instructions = lambda: 0

    return put


@pytest.mark.parametrize("state", REASONS)
def test_why(state, install, caplog):
    install(state)
    words = {
        "there": r"compiled with AVX(2|-512)",
        "switched off": r"by PyTorch: SPECTRALMETRICS_COMPILED=0 is in the environment",
        "other system": r"by PyTorch: .*Linux on x86-64 only, and this is linux aarch64",
        "gone": r"by PyTorch: no compiled library beside the package \(.*_accumulate\.so\)",
        "gone after install": r"by PyTorch: no compiled library .*, where the install had put one; install .*",
        "noted": r"by PyTorch: nothing was compiled .*: c\+\+ returned exit status 1: fatal error",
        "damaged": r"by PyTorch: the compiled library cannot be loaded \(.+\); install .* again",
        "stale": r"by PyTorch: the compiled library is of other sources, interface version \d+ and not \d+; .*",
        "old": r"by PyTorch: the processor has no AVX2 with FMA",
    }
    assert re.fullmatch(words[state], public.describe())
    assert (public.instruction_set() is None) == (state != "there")
    # If an install has gone bad, a probe warns once; if it could not be better, it does not warn.
    assert bool(compiled.fault()) == (state in FAULTS)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            messages = []
            patch.setattr(probing, "warn_user", messages.append)
            LayerProbe(nn.Linear(3, 2)).remove()
        assert len(messages) == (state in FAULTS and not _)


def test_where_it_is_said(install, capsys):
    install("noted")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.splitlines()[1:] == [f"sums in the memory of the CPU: {public.describe()}"]
    model = nn.Sequential(nn.Linear(4, 3))
    with LayerProbe(model, budget=0.5) as probe:
        for _ in range(8):
            model(torch.randn(16, 4))
    summary = probe.summary("train")
    assert f"(budget 50 %), sums {public.describe()}, dimension" in summary.title
    assert max(map(len, str(summary).splitlines())) <= 100
    probe.to("meta")
    assert "sums" not in probe._budget_words("train")


def test_benchmarks_say_what_they_run_on(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import common

    with compiled.using(None):
        common.Parser("It measures.").parse_args([])
    assert "sums by PyTorch: `using(None)`" in capsys.readouterr().out
    for path in (ROOT / "benchmarks").glob("*.py"):
        if path.name != "common.py":
            assert "ArgumentParser" not in path.read_text(), path


@pytest.mark.parametrize("version", ["standard", "editable"])
def test_the_install_leaves_a_note_in_the_place_of_the_library(version, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    sums = tmp_path / "src" / "spectralmetrics" / "sums"
    sums.mkdir(parents=True)
    app = types.SimpleNamespace(display_warning=lambda words: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = []
    for compiler in ("no-compiler", f"{sys.executable} -c 'import sys; sys.exit(\"error: bad\")'", "works"):
        monkeypatch.setenv("CXX", compiler)
        if compiler == "works":  # the compiler itself is not run
            monkeypatch.setattr(
                hatch_build.CompileHook, "_compile", lambda self, path: path.write_text("library")
            )
        hook = hatch_build.CompileHook(str(tmp_path), {}, None, None, str(tmp_path), "wheel", app)
        build = {"force_include": {}}
        hook.initialize(version, build)
        put = {Path(name).name: Path(made) for made, name in build["force_include"].items()}
        found.append({name: path.read_text() for name, path in put.items()})
        if version == "editable":
            assert not put
            found[-1] = {path.name: path.read_text() for path in sums.iterdir()}
        assert build.get("pure_python", True) == (compiler != "works")
        hook.finalize(version, build, "")
    missing, failed, made = found
    assert list(missing) == list(failed) == ["_accumulate.txt"]
    assert "no-compiler" in missing["_accumulate.txt"]
    assert re.fullmatch(r"\S+ returned exit status 1: error: bad\n", failed["_accumulate.txt"])
    assert made == {"_accumulate.so": "library"}


@pytest.mark.usefixtures("_afresh")
def test_version_says_what_runs_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("SPECTRALMETRICS_COMPILED", "0")
    with pytest.raises(SystemExit):
        main(["--version"])
    said = capsys.readouterr().out
    assert "sums in the memory of the CPU: by PyTorch: SPECTRALMETRICS_COMPILED=0 is in the environment" in said
    assert "sums on GPUs: by PyTorch: SPECTRALMETRICS_COMPILED=0 is set" in said


@pytest.mark.usefixtures("_afresh")
def test_what_is_said_later_is_what_was_done(monkeypatch):
    monkeypatch.setenv("SPECTRALMETRICS_COMPILED", "0")
    assert public.instruction_set() is None
    monkeypatch.delenv("SPECTRALMETRICS_COMPILED")
    assert public.instruction_set() is None
    assert public.describe() == "by PyTorch: SPECTRALMETRICS_COMPILED=0 is in the environment"
