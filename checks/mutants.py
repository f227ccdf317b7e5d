"""Change one place of the code at a time, at random, and see whether a test notices.

    python checks/mutants.py                    # 300 changes, half an hour on two cores
    python checks/mutants.py --number 10 --seed 3 --rooms projection
    python checks/mutants.py --keep FOLDER         # continue a stopped run: skip the changes it has tested
    python checks/mutants.py --again output.txt    # only those that survived there, after tests were added

The script draws a place of the code, then one of the changes possible there: another operator, another number,
True for False, a loop that never runs. In a copy of the project with this one change it runs the tests of the
place's room that run the changed line, up to the first failure. ``equivalent.toml`` lists changes that no test
can notice, each with a reason. The exit status is 1 if the tests notice fewer than 95 % of the others.

Cosmic Ray finds the places and makes the changes: it changes the text of a file and nothing else. mutmut 3 was
tried as well. It puts a trampoline into each function that it changes, which ``inspect.signature``,
``torch.compile``, pickles and process groups see; it leaves the bodies of classes alone, and runs all tests
once before it begins.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import queue
import random
import re
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from noticing import Copy, Map

ROOT = Path(__file__).parents[1]
SOURCE = Path("src/spectralmetrics")
ENOUGH = 0.95
# Room (a folder, or a file by its name) -> the tests that should notice a change, besides its doctests.
_OF_ALL = ("tests/accelerator", "tests/bad_input/test_bad_input.py", "tests/test_surface.py")
_MEANING = ("tests/test_findings.py", "tests/monitoring")
TESTS = {
    "sums": ("tests/sums", "tests/functional", "tests/metrics", *_OF_ALL),
    "functional": ("tests/functional", "tests/metrics", *_OF_ALL),
    "metrics": ("tests/metrics", *_OF_ALL),
    "probing": ("tests/probing", *_OF_ALL),
    "projection": ("tests/test_projection.py", "tests/probing/test_sketches.py", *_OF_ALL),
    "files": ("tests/files", *_OF_ALL),
    "monitoring": (*_MEANING, *_OF_ALL),
    "findings.py": (*_MEANING, *_OF_ALL),
    "weights.py": ("tests/test_weights.py", *_OF_ALL),
    "recording": ("tests/recording", *_OF_ALL),
}
ELSEWHERE = ("tests/probing/test_compilation.py", "tests/distributed/test_processes.py")
OPTIONS = ("-k", "not torchrun")
# Identity in place of equality, and the reverse: both give the same for the types, strings and small numbers
# that are compared here.
LEFT_OUT = tuple(
    f"_{one}_{other}"
    for pair in itertools.product(("Eq", "NotEq"), ("Is", "IsNot"))
    for one, other in (pair, pair[::-1])
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        room: part of the package.
        file: path relative to the package.
        line: number of the changed line, from 1.
        before: the line before the change, without indentation.
        after: the line after the change.
        text: the whole changed file.
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
    """Changes at places drawn without replacement, each place with the same chance.

    The draw depends on the text at a place, so that it stays the same if other lines change.
    """
    places: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for room in rooms:
        where = ROOT / SOURCE / room
        for path in [where] if where.is_file() else sorted(where.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            lines = [line.strip() for line in text.splitlines()]
            file = path.relative_to(ROOT / SOURCE).as_posix()
            for operator, occurrence, (row, column) in _changes(get_ast(text)):
                line = lines[row - 1]
                place = f"{seed} {file} {line} {lines[: row - 1].count(line)} {column}"
                places.setdefault((room, file, place), []).append((operator, occurrence))
    found: list[Mutant] = []
    for room, file, place in sorted(places, key=lambda each: hashlib.sha256(each[2].encode()).digest()):
        operator, occurrence = random.Random(place).choice(places[room, file, place])
        mutant = _make(room, file, operator, occurrence)
        if mutant is not None:
            found.append(mutant)
        if len(found) == number:
            break
    return found


def _changes(tree: object) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(operator, index among its places, the place) of all changes of a file."""
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
    """The change; None if it leaves the program the same, such as a change in an annotation."""
    source = (ROOT / SOURCE / file).read_text(encoding="utf-8")
    text = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    try:
        if text is None or _program(source) == _program(text):
            return None
    except SyntaxError:  # Cosmic Ray's grammar differs; such a change needs no test
        return None
    lines = zip(source.splitlines(), text.splitlines(), strict=False)
    number, (before, after) = next((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return Mutant(room, file, number, before.strip(), after.strip(), text)


def _program(text: str) -> str:
    """The program without annotations and imports for type checkers, which never run."""
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


def _without_line(mutant: Mutant) -> str:
    """A pattern of a printed mutant that matches any line number."""
    return re.escape(str(mutant)).replace(f":{mutant.line}\\\n", r":\d+\n", 1) + r"\n"


class Kept:
    """Results of earlier runs, in a folder if there is one.

    They belong to one state of the code: start with an empty folder when the code has changed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._outcomes: dict[str, tuple[int | None, int, float]] = {}
        self._lock = threading.Lock()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "outcomes.jsonl").exists():
            lines = (folder / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
            self._outcomes = {mutant: tuple(outcome) for mutant, outcome in map(json.loads, lines)}

    def map_of(self, room: str) -> Map | None:
        """The kept map of a room's tests, or None."""
        if self._folder is None or not (path := self._folder / f"{room}.pickle").exists():
            return None
        found: Map = pickle.loads(path.read_bytes())
        return found

    def keep_map(self, room: str, map_: Map) -> None:
        """Keep the map of a room's tests."""
        if self._folder is not None and map_.seconds:
            (self._folder / f"{room}.pickle").write_bytes(pickle.dumps(map_))

    def outcome_of(self, mutant: Mutant) -> tuple[int | None, int, float] | None:
        """The kept exit status of the tests, their number, and seconds; or None."""
        return self._outcomes.get(str(mutant))

    def keep_outcome(
        self, mutant: Mutant, outcome: tuple[int | None, int, float]
    ) -> tuple[int | None, int, float]:
        """Keep the outcome of a change, and return it."""
        if self._folder is not None:
            with self._lock, (self._folder / "outcomes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps([str(mutant), outcome]) + "\n")
        return outcome


def read_equivalent() -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) -> why no test can notice it; exits if a file or line is gone."""
    entries = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text(encoding="utf-8"))["mutant"]
    for each in entries:
        path = ROOT / SOURCE / each["file"]
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if each["before"] not in map(str.strip, lines):
            sys.exit(
                f"expected lines of the code in equivalent.toml, got {each['before']!r} of {each['file']}:"
                " remove the entry, or write down what stands there now"
            )
    return {(each["file"], each["before"], each["after"]): each["reason"] for each in entries}


def main() -> int:
    """Draw, run, report; return the exit status."""
    parser = argparse.ArgumentParser(description="Change one place of the code at a time, and run its tests.")
    parser.add_argument("--number", type=int, default=300, help="changes to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--rooms", nargs="+", choices=list(TESTS), default=list(TESTS), help="(default: all)")
    parser.add_argument("--workers", type=int, default=2, help="tests at the same time (default: 2)")
    parser.add_argument("--again", type=Path, help="output of a run: test its survivors again")
    parser.add_argument("--keep", type=Path, help="folder for the maps of tests and the outcomes")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    equivalent = read_equivalent()
    drawn = draw(options.number, options.seed, options.rooms)
    wanted = [each for each in drawn if (each.file, each.before, each.after) not in equivalent]
    print(f"{len(drawn)} changes drawn, {len(drawn) - len(wanted)} of them listed as equivalent", flush=True)
    before = len(wanted)
    if options.again is not None:
        survived = options.again.read_text(encoding="utf-8")
        wanted = [each for each in wanted if re.search(f"SURVIVED.*: {_without_line(each)}", survived)]
    if options.list:
        print(*drawn, sep="\n")
        return 0
    survivors = []
    kept = Kept(options.keep)
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(options.workers):
            copies.put(Copy(ROOT, Path(folder) / str(number)))

        def look(room: str) -> Map:
            map_ = kept.map_of(room)
            if map_ is None:
                copy = copies.get()
                try:
                    map_ = copy.map([*TESTS[room], f"{SOURCE}/{room}"], ELSEWHERE, OPTIONS)
                finally:
                    copies.put(copy)
                kept.keep_map(room, map_)
            return map_

        def run(mutant: Mutant) -> tuple[int | None, int, float]:
            if (found := kept.outcome_of(mutant)) is not None:
                return found
            map_ = maps[mutant.room]
            original = (ROOT / SOURCE / mutant.file).read_text(encoding="utf-8")
            tests = map_.tests_of(f"spectralmetrics/{mutant.file}", original, mutant.line)
            seconds = 3 * sum(map_.seconds[each] for each in tests) + 60
            copy, start = copies.get(), time.perf_counter()
            try:
                status = copy.try_out(SOURCE / mutant.file, mutant.text, tests, OPTIONS, seconds)
            finally:
                copies.put(copy)
            return kept.keep_outcome(mutant, (status, len(tests), time.perf_counter() - start))

        with ThreadPoolExecutor(options.workers) as pool:
            rooms = sorted({each.room for each in wanted})
            maps = dict(zip(rooms, pool.map(look, rooms), strict=True))
            for room, map_ in maps.items():
                print(
                    f"the {len(map_.seconds)} tests of {room} take {sum(map_.seconds.values()):.0f} s",
                    flush=True,
                )
                if map_.failed:
                    print("and are left out, since they fail without any change:", *map_.failed, sep="\n")
                if not map_.seconds:
                    return 2
            for number, (mutant, (status, tests, took)) in enumerate(
                zip(wanted, pool.map(run, wanted), strict=True), 1
            ):
                outcome = {0: "SURVIVED", None: "noticed by no end"}.get(status, "noticed")
                print(f"{number}/{len(wanted)} {outcome}, {tests} tests, {took:.0f} s: {mutant}", flush=True)
                if status == 0:
                    survivors.append(mutant)
    share = 1 - len(survivors) / max(before, 1)
    if survivors:
        print("\nNo test has noticed:", *survivors, sep="\n")
    print(f"\n{share:.1%} of {before} changes were noticed, and {ENOUGH:.0%} are expected")
    return int(share < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
