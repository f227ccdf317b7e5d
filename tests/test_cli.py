import csv
import subprocess
import sys

import pytest
from torch import nn

import spectralmetrics
from spectralmetrics import demo
from spectralmetrics.cli import main
from spectralmetrics.functional.compiled import describe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real demo, on a slice of the digits."""
    folder = tmp_path_factory.mktemp("demo") / "nested"
    whole = demo.load_digits

    def slice_of_digits(seed):
        images, labels, more_images, more_labels = whole(seed)
        assert images.shape == (4000, 1, 32, 32)
        assert more_images.shape == (1000, 1, 32, 32)
        assert sorted(set(labels.tolist())) == list(range(10))
        return images[:256], labels[:256], more_images[:100], more_labels[:100]

    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "load_digits", slice_of_digits)
    try:
        status = main(["demo", "--epochs", "2", "--threshold", "0.9", "--output", str(folder)])
    finally:
        patch.undo()
    return status, folder


class SmallNetwork(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))


@pytest.mark.xdist_group("demo")
class TestDemo:
    def test_records(self, finished):
        status, folder = finished
        assert status == 0
        with open(folder / "records.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["epoch", "stage", "layer", "statistic", "value", "low", "high", "step"]
        layers = list(dict.fromkeys(row["layer"] for row in rows if row["statistic"] == "saturation"))
        assert len(layers) == 22
        assert layers[0] == "stem"
        assert layers[-2:] == ["head", "mean"]
        assert len(rows) == 2 * (22 * 3 * 2 + 1)
        for row in rows:
            if row["statistic"] == "saturation":
                assert 0 <= float(row["value"]) <= 1
                assert (row["low"] == "") == (row["high"] == "") == (row["layer"] == "mean")
                if row["low"]:
                    assert float(row["low"]) <= float(row["value"])
                    # A fold without data leaves the upper end unknown.
                    assert not float(row["high"]) < float(row["value"])
        assert {row["epoch"] for row in rows} == {"0", "1"}

    def test_arrays_and_pictures(self, finished):
        folder = finished[1]
        assert sorted(path.name for path in (folder / "arrays").iterdir()) == [
            "epoch-000000.npz",
            "epoch-000001.npz",
        ]
        names = {path.name for path in (folder / "plots").iterdir()}
        statistics = ("saturation", "intrinsic_dimension", "linear_probe")
        assert names == {
            "saturation-and-labels.png",
            *(f"{s}-epoch-00000{k}.png" for s in statistics for k in (0, 1)),
            *(f"{s}-{t}-epochs.png" for s in statistics for t in ("train", "eval")),
            *(f"spectrum-{stage}-epoch-000001.png" for stage in ("train", "eval")),
        }
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "plots").iterdir())

    def test_saturation_and_labels_are_of_the_last_validation(self, finished):
        rows = demo.read_rows(finished[1] / "records.csv")
        axis = demo.draw_both(rows, "title").axes[0]
        lines = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
        for label, statistic in (("saturation", "saturation"), ("labels explained (R²)", "linear_probe")):
            values = [
                row.value
                for row in rows
                if (row.epoch, row.stage, row.statistic) == (1, "eval", statistic) and row.layer != "mean"
            ]
            assert lines[label] == values
            assert len(values) == 21

    def test_report(self, finished):
        page = (finished[1] / "report.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")

    def test_plot(self, finished, tmp_path, capsys):
        run = str(finished[1])
        arguments = ["--epoch", "1", "--statistics", "saturation", "--output", str(tmp_path), "--dpi", "40"]
        assert main(["plot", run, *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        names = ("epoch-000001.png", "train-epochs.png", "eval-epochs.png")
        assert lines == [str(tmp_path / f"saturation-{name}") for name in names]
        assert {str(path) for path in tmp_path.iterdir()} == set(lines)

    def test_recompute(self, finished, tmp_path, capsys):
        run = finished[1]
        assert main(["recompute", str(run), "--threshold", "0.9"]) == 0  # as recorded
        printed = capsys.readouterr().out
        recorded = (run / "records.csv").read_text().splitlines()
        again = [line for line in printed.splitlines() if "linear_probe" not in line]
        assert again == [line for line in recorded if "accuracy" not in line and "linear_probe" not in line]
        # A regression on saved values differs in the last digits from one on the sums.
        of_labels = [
            [float(line.split(",")[4]) for line in lines if "linear_probe" in line]
            for lines in (printed.splitlines(), recorded)
        ]
        assert len(of_labels[0]) == 2 * 2 * 22
        assert of_labels[0] == pytest.approx(of_labels[1], rel=1e-9)
        output = tmp_path / "more.csv"
        assert main(["recompute", str(run), "--threshold", "0.5", "0.9", "--output", str(output)]) == 0
        assert "1,eval,mean,saturation@0.5," in output.read_text()
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["plot", "RUN", "--epoch", "7"], "0 to 1, got 7"),
            (["plot", "RUN", "--statistics", "rank"], "got 'rank'"),
            (["recompute", "RUN", "--statistics", "rank"], "got 'rank'"),
            (["recompute", "RUN", "--statistics", "covariance"], "numbers, got 'covariance'"),
            (["plot", "no/such/run"], "got no/such/run"),
            (["recompute", "no/such/run"], "got no/such/run"),
            (["plot", "RUN", "--output", "/dev/null/x"], "/dev/null"),
        ],
    )
    def test_bad_input_is_one_line(self, finished, arguments, message, capsys):
        assert main([str(finished[1]) if each == "RUN" else each for each in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert "Traceback" not in error

    @pytest.mark.long
    @pytest.mark.filterwarnings("ignore:in (train|eval) there are fewer observations")
    def test_same_seed_same_values(self, tmp_path, monkeypatch):
        whole = demo.load_digits
        monkeypatch.setattr(demo, "load_digits", lambda seed: tuple(part[:64] for part in whole(seed)))
        monkeypatch.setattr(demo, "ResidualNetwork", SmallNetwork)
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # saving takes long
        runs = [demo.run(epochs=1, seed=seed, output=tmp_path) for seed in (3, 3, 4)]
        texts = [repr(rows) for rows in runs]  # unknown upper ends of intervals are NaN
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--epochs", "0"], "expected a positive integer, got '0'"),
        (["demo", "--epochs", "many"], "expected a positive integer, got 'many'"),
        (["demo", "--threshold", "1.5"], "got 1.5"),
        (["demo", "--threshold", "nan"], "got nan"),
        (["demo", "--threshold", "high"], "got 'high'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["plot"], "required: RUN"),
        (["plot", ".", "--dpi", "0"], "got '0'"),
        (["recompute", ".", "--threshold", "0"], "got 0.0"),
        (["recompute", ".", "--threshold"], "expected at least one argument"),
        (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["mlxtend.data", "rich.console"])
def test_without_the_extra_it_is_named(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "spectralmetrics[demo]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "demo"),
        (["demo", "--help"], "examples:"),
        (["plot", "--help"], "examples:"),
        (["recompute", "--help"], "examples:"),
        (["compare", "--help"], "examples:"),
        (["weights", "--help"], "examples:"),
        (["measure", "--help"], "examples:"),
    ],
)
def test_help(arguments, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert expected in shown
    assert max(map(len, shown.split("examples:")[0].splitlines())) <= 72


@pytest.mark.parametrize("arguments", [["--help"], ["measure", "--help"], ["paint"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    code = f"import sys; from spectralmetrics.cli import main; main({arguments})"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_the_package_has_its_names_when_they_are_used():
    code = """
import sys, spectralmetrics
assert "torch" not in sys.modules
try:
    spectralmetrics.nothing
except AttributeError as error:
    assert str(error) == "module 'spectralmetrics' has no attribute 'nothing'"
assert set(spectralmetrics.__all__) <= set(dir(spectralmetrics))
assert {"sums", "table", "probing"} <= set(vars(spectralmetrics))  # rooms, as before
from spectralmetrics import *
print(Monitor.__name__, spectralmetrics.LayerProbe is LayerProbe)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout.split(), ran.stderr) == (["Monitor", "True"], "")


def test_the_installed_program():
    command = [sys.executable, "-m", "spectralmetrics", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0
    said = [f"spectralmetrics {spectralmetrics.__version__}", f"sums in the memory of the CPU: {describe()}"]
    assert finished.stdout.splitlines() == said


def test_importing_the_package_imports_no_extra():
    code = (
        "import sys; from spectralmetrics import LayerProbe;"
        " print(*(m for m in ('rich', 'mlxtend', 'delve') if m in sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.split() == []  # torchmetrics itself imports matplotlib if it is installed
