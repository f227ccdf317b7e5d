"""Bad input on the command line: exit status 2, one line that quotes the value, and no file is changed."""

import argparse

import pytest

from spectralmetrics import cli
from tests.bad_input.world import World

SHARES = [
    (share, f"expected a threshold in (0, 1], the share of variance to explain, got {share}")
    for share in ("0.0", "1.5", "nan")
] + [("high", "expected a number in (0, 1], got 'high'")]
POSITIVE = [(number, f"expected a positive integer, got {number!r}") for number in ("0", "-3", "many", "1.5")]
INTEGERS = [(text, f"invalid int value: {text!r}") for text in ("x", "1.5")]
NO_TABLE = [("nowhere", "expected a run with a records.csv, got nowhere")]
NO_ARRAYS = [("nowhere", "expected a run recorded with the writer 'arrays', got nowhere")]
UNKNOWN = [("red", "unrecognized arguments: --colour red")]
# Command and its other arguments -> option or name of an argument -> bad value and words.
NO_MODULE = [("no.such", "cannot import 'no.such': No module named 'no'")]

TABLE = {
    ("",): {"command": [("paint", "invalid choice: 'paint'"), ("", "required: COMMAND")]},
    ("demo",): {
        "--epochs": POSITIVE,
        "--threshold": SHARES,
        "--seed": INTEGERS,
        "--colour": UNKNOWN,
    },
    ("plot", "RUN", "--output", "PICTURES"): {
        "--epoch": [*INTEGERS, ("7", "expected an epoch of … that was recorded, 0 to 1, got 7")],
        "--statistics": [("width", "expected statistics among … got 'width'")],
        "--threshold": SHARES,
        "--output": [("FILE/x", "FILE")],
        "--dpi": POSITIVE,
        "--import": NO_MODULE,
        "--colour": UNKNOWN,
    },
    ("plot",): {"directories": NO_TABLE},
    ("plot", "RUN", "TABLE", "--output", "PICTURES"): {
        "--epoch": [("7", "expected an epoch of … that was recorded, 0 to 1, got 7")],
        "--statistics": [("width", "expected statistics among … got 'width'")],
        "--threshold": [("0.9", "expected no --threshold with several runs")],
    },
    ("summary", "RUN"): {
        "--epoch": [*INTEGERS, ("7", "expected an epoch of … that has arrays, 0 to 1, got 7")],
        "--stage": [("test", "expected a stage of epoch 1 among ['eval', 'train'], got 'test'")],
        "--statistic": [
            ("width", "expected statistics among … got 'width'"),
            ("spectrum", "expected a statistic that is one number, got 'spectrum'"),
        ],
        "--threshold": SHARES,
        "--import": NO_MODULE,
        "--colour": UNKNOWN,
    },
    ("summary",): {"directory": NO_ARRAYS},
    ("weights", "nowhere.pt"): {"--colour": UNKNOWN, "--statistics": [("rank", "found no 'nowhere.pt'")]},
    ("weights",): {
        "checkpoint": [
            ("nowhere", "expected a checkpoint, found no 'nowhere'"),
            ("EMPTY", "expected .safetensors or .pt files in 'EMPTY', found none"),
        ],
        "--since": [("nowhere", "the following arguments are required: CHECKPOINT")],
    },
    ("measure", "RUN/records.csv"): {
        "--column": [("v", "got '.csv': pandas.read_csv")],
        "--labels": [("no.npy", "expected a file of labels, found no 'no.npy'")],
        "--no-center": [("", "got '.csv': pandas.read_csv")],
        "--folds": POSITIVE,
        "--record": [("RUN", "already holds records")],
        "--colour": UNKNOWN,
    },
    ("measure",): {
        "paths": [
            ("nowhere", "expected a file, a folder or a glob, found no 'nowhere'"),
            ("EMPTY", "expected files among"),
        ]
    },
    ("compare", "RUN", "--epochs", "0", "1"): {
        "--stage": [("test", "expected a stage of epoch 0 of … got 'test'")],
        "--threshold": SHARES,
        "--import": NO_MODULE,
        "--colour": UNKNOWN,
    },
    ("compare", "RUN"): {
        "--epochs": [
            (["0"], "expected 2 arguments"),
            (["0", "x"], "invalid int value: 'x'"),
            (["0", "7"], "expected an epoch of … that has arrays, 0 to 1, got 7"),
        ],
        "right": [*NO_ARRAYS, ("", "expected a second RUN, or two epochs of one")],
    },
    ("compare",): {"left": [(["nowhere", "RUN"], NO_ARRAYS[0][1])]},
    ("recompute", "RUN"): {
        "--threshold": [*SHARES, (["0.9", "2"], "got 2.0"), ([], "expected at least one argument")],
        "--statistics": [
            ("width", "expected statistics among … got 'width'"),
            ("spectrum", "expected statistics that are numbers, got 'spectrum'"),
        ],
        "--output": [("EMPTY", "Is a directory: EMPTY")],
        "--import": NO_MODULE,
        "--colour": UNKNOWN,
    },
    ("recompute",): {"directory": NO_ARRAYS},
    ("report", "RUN"): {
        "--output": [("EMPTY", "Is a directory: EMPTY")],
        "--import": NO_MODULE,
        "--colour": UNKNOWN,
    },
    ("report",): {"directories": [("nowhere", "expected a run with a records.csv or arrays, got nowhere")]},
}
ROWS = [
    (command, argument, value, words)
    for command, of_command in TABLE.items()
    for argument, bad in of_command.items()
    for value, words in bad
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    (made.folder / "file").touch()
    yield made
    made.close()


@pytest.mark.parametrize(("command", "argument", "value", "words"), ROWS)
def test_is_one_line_and_changes_nothing(command, argument, value, words, world, capsys):
    places = {"RUN": "run", "TABLE": "table", "EMPTY": "empty", "FILE": "file", "PICTURES": "pictures"}

    def placed(text):
        for name, path in places.items():
            text = text.replace(name, str(world.folder / path)) if name in text.split("/") else text
        return text

    values = [value] if isinstance(value, str) else value
    option = [argument] if argument.startswith("--") else []
    given = [placed(text) for text in (*command, *option, *values) if text]
    before = world.fingerprint()
    try:
        status = cli.main(given)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("spectralmetrics")
    place = 0
    for part in words.split("…"):
        text = (
            placed(part.strip()) if part.strip() in places else part.strip().replace("EMPTY", placed("EMPTY"))
        )
        assert (place := error.find(text, place)) >= 0, (text, error)
    after = world.fingerprint()
    # The demo seeds the random state; a command has a process of its own.
    assert not [key for key in {*before, *after} - {"random"} if before.get(key) != after.get(key)]


ELSEWHERE = {("demo", "output"): "tests/test_cli.py has it: the demo loads its digits before it writes"}


def test_every_option_of_every_command_is_in_the_table():
    (commands,) = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        found = {key for command, rows in TABLE.items() if command[0] == name for key in rows}
        taken = [each for each in parser._actions if each.dest != "help"]
        missing = [each.dest for each in taken if not {each.dest, *each.option_strings} & found]
        missing = [dest for dest in missing if (name, dest) not in ELSEWHERE]
        assert not missing, f"add rows for {name} to tests/bad_input/test_commands.py"
