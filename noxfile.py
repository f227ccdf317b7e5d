"""Sessions: tests, lint, typecheck, docs, tests_oldest, demo, mutants, benchmarks, reproduction."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "typecheck", "tests", "tests_oldest"]
nox.options.reuse_existing_virtualenvs = True

OLDEST_TORCHMETRICS = "1.6.0"


def install(session: nox.Session, *extras: str) -> None:
    session.env["PIP_NO_COMPILE"] = "1"  # most of what is installed is never imported
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]" if extras else ".")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests and doctests, on the newest torchmetrics."""
    install(session, "test")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """The tests of what touches torchmetrics, on the oldest release supported."""
    install(session, "test")
    session.install("-c", "constraints.txt", f"torchmetrics=={OLDEST_TORCHMETRICS}")
    paths = ("tests/metrics/test_torchmetrics.py", "tests/metrics/test_own_statistic.py", "tests/distributed")
    # Two processes show what torchmetrics does between processes; more of them are for `tests`.
    few = ("-k", "not (processes-3 or processes-4)")
    session.run("pytest", "-n", "2", *few, *paths, "src/spectralmetrics/metrics")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff", "clang-format==23.1.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "--Werror", *map(str, Path("csrc").iterdir()))


@nox.session
def typecheck(session: nox.Session) -> None:
    install(session, "demo", "lightning", "transformers")
    session.install("mypy")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small network on real digits and look at its layers; arguments after `--` are passed on."""
    install(session, "demo")
    session.run("spectralmetrics", "demo", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change the code in 300 places, one at a time, and see that the tests notice; an hour on two cores."""
    install(session, "test")
    session.install("-c", "constraints.txt", "cosmic-ray==8.7.0")
    session.run("python", "mutants/run.py", *session.posargs)


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
        "training_step",
        "hook",
        "compute",
        "merge",
        "memory",
        "folds",
        "similarity",
        "report_page",
    )
    for script in (*scripts, "intervals", "intervals_real"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
    for script in ("report", "intervals_report"):
        session.run("python", f"benchmarks/{script}.py")


@nox.session
def reproduction(session: nox.Session) -> None:
    """Train what reproduction/results.json does not hold (delete it to train all), then figure and tables."""
    install(session, "test")
    session.run("python", "-m", "reproduction.measure", *session.posargs)
    session.run("python", "-m", "reproduction.report")
