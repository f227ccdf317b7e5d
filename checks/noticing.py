"""Find the tests that run a line of the code, and run them on a changed file.

pytest runs in a process forked from one that has imported the libraries, since imports take most of the time of
a short run.
"""

from __future__ import annotations

import ast
import compileall
import contextlib
import dataclasses
import multiprocessing
import os
import py_compile
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import coverage
import pytest

COPIED = (
    "src",
    "tests",
    "docs",
    "examples",
    "csrc",
    "benchmarks",
    "checks",
    "pyproject.toml",
    "CONTRIBUTING.md",
    "README.md",
    "hatch_build.py",
)
_LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torchmetrics",
    "scipy.linalg",
    "scipy.stats",
    "hypothesis",
    "sklearn.linear_model",
)
_OPTIONS = ("-q", "-x", "--assert=plain", "-p", "no:cacheprovider")
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(list(_LIBRARIES))


@dataclasses.dataclass(frozen=True)
class Map:
    """Time and lines of each test of a room.

    Attributes:
        elsewhere: test files whose lines are not recorded: they run code in other processes, or traced.
        seconds: node id of a passed test -> its seconds.
        lines: file -> line -> the tests that run it: node ids; test files, for lines that fixtures run; "" for
            lines that run when a module is imported.
        failed: node ids of the failed tests.
    """

    elsewhere: tuple[str, ...]
    seconds: dict[str, float]
    lines: dict[str, dict[int, set[str]]]
    failed: list[str]

    def tests_of(self, file: str, text: str, line: int) -> list[str]:
        """The tests that may run a line: the quickest file first, the files of ``elsewhere`` last.

        All tests if the record does not show which.
        """
        runs = self.lines.get(file, {})
        who = set().union(*(runs.get(each, ()) for each in _what_runs(text, line)))
        if _is_cached(text, line):
            who.add("")
        found = {test for test in self.seconds if test in who or _file_of(test) in who}
        everywhere = not found or "" in who
        chosen = set(self.seconds) if everywhere else found
        cost: dict[str, float] = defaultdict(float)
        for test in chosen:
            cost[_file_of(test)] += self.seconds[test] + (1e6 if everywhere and test not in found else 0)
        unseen = {test for test in self.seconds if _file_of(test) in self.elsewhere}
        chosen |= unseen
        cost.update((_file_of(test), 1e12) for test in unseen)
        return sorted(chosen, key=lambda test: (cost[_file_of(test)], _file_of(test)))


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _what_runs(text: str, line: int) -> range:
    """The lines that run if this line has an effect: its statement, or the function that it heads."""
    inner: ast.stmt | None = None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            inner = node if inner is None or node.lineno >= inner.lineno else inner
    if inner is None:
        return range(line, line + 1)
    body = getattr(inner, "body", None)
    if not body:
        return range(inner.lineno, (inner.end_lineno or line) + 1)
    if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return range(inner.lineno, (inner.end_lineno or line) + 1)
    return range(inner.lineno, body[0].lineno)


def _is_cached(text: str, line: int) -> bool:
    """True if a line belongs to a function that caches its result: later tests do not run the line again."""
    return any(
        isinstance(node, ast.FunctionDef)
        and node.lineno <= line <= (node.end_lineno or line)
        and any(
            "cache" in ast.unparse(each) and "property" not in ast.unparse(each) for each in node.decorator_list
        )
        for node in ast.walk(ast.parse(text))
    )


class Copy:
    """A copy of the project, with one changed file at a time."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = root / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build"))
            elif source.exists():
                shutil.copy(source, target)
        # Checked by the hash of the source, so that a changed file never runs as the old one.
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        for name in ("src", "tests"):
            compileall.compile_dir(folder / name, quiet=1, invalidation_mode=by_hash)

    def map(self, paths: Sequence[str], elsewhere: Sequence[str], options: Sequence[str]) -> Map:
        """Run all tests of a room and record the lines that they run."""
        # Past failures, too: the map leaves out the tests that fail.
        arguments = [*options, "--maxfail=0", *paths, *elsewhere]
        found = self._run(arguments, _Watching(self.folder / "src"), 3600)
        if found is None:
            raise RuntimeError(f"pytest could not run {' '.join(paths)}")
        return Map(tuple(elsewhere), *found)

    def try_out(
        self, file: Path, text: str, tests: Sequence[str], options: Sequence[str], seconds: float
    ) -> int | None:
        """Exit status of the tests if a file has this text; None if they crash or take longer than this."""
        path = self.folder / file
        original = path.read_bytes()
        path.write_text(text, encoding="utf-8")
        try:
            files = dict.fromkeys(map(_file_of, tests))
            status: int | None = self._run([*options, *files], _Chosen(list(tests)), seconds)
            if status == pytest.ExitCode.NO_TESTS_COLLECTED:
                raise RuntimeError(f"pytest has found none of the tests of {file}, such as {tests[0]}")
            return status
        finally:
            path.write_bytes(original)

    def _run(self, arguments: Sequence[str], plugin: Any, seconds: float) -> Any:
        """The plugin's result; None if the run crashes or takes longer than this."""
        mine, theirs = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_in_child, args=(self.folder, [*arguments], plugin, theirs))
        process.start()
        theirs.close()
        try:
            return mine.recv() if mine.poll(seconds) else None
        except EOFError:  # a crash
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also the processes that the tests started
            process.kill()
            process.join()
            mine.close()


def _in_child(folder: Path, arguments: list[str], plugin: Any, answer: Any) -> None:
    os.setsid()
    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(folder / "src"), str(folder)]
    os.environ.update(PYTHONPATH=str(folder / "src"), PYTHONDONTWRITEBYTECODE="1")
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with plugin.around():
        status = pytest.main([*_OPTIONS, *arguments], plugins=[plugin])
    answer.send(plugin.found(int(status)))


class _Watching:
    """A plugin that records which test runs which line."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=[str(self.source)])
        self.coverage.start()
        try:
            yield
        finally:
            self.coverage.stop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(_file_of(item.nodeid))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.coverage.switch_context(_file_of(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def found(self, status: int) -> tuple[dict[str, float], dict[str, dict[int, set[str]]], list[str]] | None:
        """The fields of a :class:`Map` without ``elsewhere``; None if pytest could not run."""
        if status not in (0, 1):
            return None
        data = self.coverage.get_data()
        lines = {
            Path(file).relative_to(self.source).as_posix(): {
                line: set(who) for line, who in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        passed = {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}
        return passed, lines, self.failed


class _Chosen:
    """A plugin that runs only these tests, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests = list(tests)

    def around(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = set(self.tests)
        order = {file: number for number, file in enumerate(dict.fromkeys(map(_file_of, self.tests)))}
        items[:] = sorted((i for i in items if i.nodeid in wanted), key=lambda i: order[_file_of(i.nodeid)])

    def found(self, status: int) -> int:
        return status
