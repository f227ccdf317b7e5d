"""Change one place of the code at a time, at random, and see whether a test notices.

    python checks/mutants.py                    # 300 changes, about an hour on two cores
    python checks/mutants.py --number 10 --seed 3 --rooms projection

A place of the code is drawn, then one of the changes that can be made there: another operator, another number,
True for False, a loop that never runs. The tests of that room run in a copy of the project with this one
change, up to the first failure. Changes that no test can notice are listed in ``equivalent.toml`` with the
reason. The exit status is 1 if fewer than 95 % of the others are noticed.

Cosmic Ray finds the places and makes the changes. Why it and not mutmut, which was tried as well: mutmut 3 puts
a trampoline into each function that it changes, which ``inspect.signature``, ``torch.compile``, pickles and
process groups see, leaves the bodies of classes alone, and runs all tests once before it begins. Cosmic Ray
changes the text of a file and nothing else.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
SOURCE = Path("src/spectralmetrics")
ENOUGH = 0.95
# Of each room the tests that are to notice, those first that notice most in a second. What is compiled is the
# same for both sets of instructions, so one of them is enough here.
TESTS = {
    "sums": (
        "tests/sums/test_intake.py",
        "tests/functional/test_statistics.py",
        "tests/sums",
        "tests/bad_input/test_bad_input.py",
        "-k",
        "not avx512",
    ),
    "functional": ("tests/functional", "tests/bad_input/test_bad_input.py", "tests/metrics/test_properties.py"),
    "metrics": (
        "tests/metrics/test_own_statistic.py",
        "tests/metrics/test_similarity.py",
        "tests/metrics/test_torchmetrics.py",
        "tests/metrics",
        "tests/bad_input/test_bad_input.py",
    ),
    "probing": (
        "tests/probing/test_selection.py",
        "tests/probing/test_observations.py",
        "tests/probing/test_summary.py",
        "tests/probing",
        "tests/bad_input/test_bad_input.py",
    ),
    "projection": ("tests/test_projection.py", "tests/bad_input/test_bad_input.py"),
}
# Identity in place of equality, and the reverse: of the types, strings and small numbers that are compared
# here it says the same.
LEFT_OUT = tuple(
    f"_{one}_{other}"
    for pair in itertools.product(("Eq", "NotEq"), ("Is", "IsNot"))
    for one, other in (pair, pair[::-1])
)
COPIED = (
    "src",
    "tests",
    "docs",
    "examples",
    "csrc",
    "benchmarks",
    "pyproject.toml",
    "CONTRIBUTING.md",
    "README.md",
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        room: part of the package.
        file: relative to the package.
        line: its number, from 1.
        before: the line as it is, without indentation.
        after: and as it is changed.
        text: the whole file, changed.
    """

    room: str
    file: str
    line: int
    before: str
    after: str
    text: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n    - {self.before}\n    + {self.after}"


def draw(number: int, seed: int, rooms: Sequence[str]) -> list[Mutant]:
    """Changes at places that are drawn without replacement, each place with the same chance."""
    places: dict[tuple[str, str, tuple[int, int]], list[tuple[str, int]]] = {}
    for room in rooms:
        for path in sorted((ROOT / SOURCE / room).rglob("*.py")):
            tree = get_ast(path.read_text(encoding="utf-8"))
            file = path.relative_to(ROOT / SOURCE).as_posix()
            for operator, occurrence, start in _changes(tree):
                places.setdefault((room, file, start), []).append((operator, occurrence))
    generator = random.Random(seed)
    found: list[Mutant] = []
    for room, file, start in generator.sample(sorted(places), len(places)):
        operator, occurrence = generator.choice(places[room, file, start])
        mutant = _make(room, file, operator, occurrence)
        if mutant is not None:
            found.append(mutant)
        if len(found) == number:
            break
    return found


def _changes(tree: object) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(operator, its how manieth place, the place) of all changes of a file."""
    nodes = list(ast_nodes(tree))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments() or name.endswith(("/NoOp", *LEFT_OUT)):
            continue
        operator = kind()
        places = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, start in enumerate(places):
            yield name, occurrence, tuple(start)


def _make(room: str, file: str, operator: str, occurrence: int) -> Mutant | None:
    """The change; None for one that leaves the program as it is, such as one of an annotation."""
    source = (ROOT / SOURCE / file).read_text(encoding="utf-8")
    text = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    try:
        if text is None or _program(source) == _program(text):
            return None
    except SyntaxError:  # of another grammar's making: no test need notice it
        return None
    lines = zip(source.splitlines(), text.splitlines(), strict=False)
    number, (before, after) = next((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return Mutant(room, file, number, before.strip(), after.strip(), text)


def _program(text: str) -> str:
    """The program without what is never evaluated: annotations, and imports for type checkers."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.dump(tree)


class Copy:
    """A copy of the project, in which one file is changed at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build"))
            elif source.exists():
                shutil.copy(source, target)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def survives(self, mutant: Mutant, seconds: float) -> bool:
        """Whether the tests of the room pass although the file is changed."""
        path = self.folder / SOURCE / mutant.file
        original = path.read_bytes()
        path.write_text(mutant.text, encoding="utf-8")
        try:
            return self.passes(mutant.room, seconds)
        finally:
            path.write_bytes(original)

    def passes(self, room: str, seconds: float) -> bool:
        """Whether the tests of a room pass within a time; a change that has them run for ever is noticed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        process = subprocess.Popen(
            [*command, *TESTS[room]],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # processes that the tests have started, too
            process.communicate()
            return False
        if process.returncode in (4, 5):  # no tests, or no such file: nothing has been asked
            raise RuntimeError(f"pytest could not run the tests of {room}:\n{output[-2000:]}")
        return process.returncode == 0


def read_equivalent() -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) -> why no test can notice it."""
    entries = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text(encoding="utf-8"))["mutant"]
    return {(each["file"], each["before"], each["after"]): each["reason"] for each in entries}


def main() -> int:
    """Draw, run, report; return the exit status."""
    parser = argparse.ArgumentParser(description="Change one place of the code at a time, and run its tests.")
    parser.add_argument("--number", type=int, default=300, help="of changes to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--rooms", nargs="+", choices=list(TESTS), default=list(TESTS), help="(default: all)")
    parser.add_argument("--workers", type=int, default=2, help="tests at the same time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    options = parser.parse_args()
    equivalent = read_equivalent()
    drawn = draw(options.number, options.seed, options.rooms)
    wanted = [each for each in drawn if (each.file, each.before, each.after) not in equivalent]
    print(f"{len(drawn)} changes drawn, {len(drawn) - len(wanted)} of them listed as equivalent", flush=True)
    if options.list:
        print(*drawn, sep="\n")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(options.workers):
            copies.put(Copy(Path(folder) / str(number)))

        def run(room: str, mutant: Mutant | None, seconds: float) -> tuple[bool, float]:
            copy, start = copies.get(), time.perf_counter()
            try:
                passed = copy.passes(room, seconds) if mutant is None else copy.survives(mutant, seconds)
            finally:
                copies.put(copy)
            return passed, time.perf_counter() - start

        with ThreadPoolExecutor(options.workers) as pool:
            rooms = sorted({each.room for each in wanted})
            limits = {}
            for room, (passed, took) in zip(rooms, pool.map(lambda r: run(r, None, 1800), rooms), strict=True):
                if not passed:
                    print(f"the tests of {room} fail without any change")
                    return 2
                limits[room] = 2 * took + 30
                print(f"the tests of {room} take {took:.0f} s", flush=True)
            results = pool.map(lambda each: run(each.room, each, limits[each.room]), wanted)
            for number, (mutant, (survived, took)) in enumerate(zip(wanted, results, strict=True), 1):
                outcome = "SURVIVED" if survived else "noticed"
                print(f"{number}/{len(wanted)} {outcome} in {took:.0f} s: {mutant}", flush=True)
                if survived:
                    survivors.append(mutant)
    share = 1 - len(survivors) / max(len(wanted), 1)
    if survivors:
        print("\nNo test has noticed:", *survivors, sep="\n")
    print(f"\n{share:.1%} of {len(wanted)} changes were noticed, and {ENOUGH:.0%} are expected")
    return int(share < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
