"""Bad input to everything that writes or reads runs."""

import math

import spectralmetrics as sm
from spectralmetrics.recording import (
    ArraysWriter,
    ConsoleWriter,
    PlotWriter,
    ReportWriter,
    TensorBoardWriter,
    describe_comparison,
    draw_runs,
)
from tests.bad_input.of_functions import SHARES
from tests.bad_input.of_metrics import _integers
from tests.bad_input.table import Given, refuses

RUN, EMPTY = Given(lambda w: w.run), Given(lambda w: w.empty)
NO_PATH = [(3, TypeError, "str … os.PathLike … int"), (None, TypeError, "str … os.PathLike … NoneType")]
ARRAYS = [
    *NO_PATH,
    (EMPTY, FileNotFoundError, "expected a run recorded with the writer 'arrays', got …/empty"),
    (
        Given(lambda w: w.table),
        FileNotFoundError,
        "expected a run recorded with the writer 'arrays', got …/table",
    ),
]
TABLES = [*NO_PATH, (EMPTY, FileNotFoundError, "expected a run with a records.csv, got …/empty")]
EPOCHS = [
    ((0,), ValueError, "expected two epochs, for the left and for the right side, got (0,)"),
    ((0, 1, 2), ValueError, "expected two epochs, for the left and for the right side, got (0, 1, 2)"),
    (3, ValueError, "expected two epochs, for the left and for the right side, got 3"),
    ("01", ValueError, "expected two epochs, for the left and for the right side, got '01'"),
    ((0, 7), ValueError, "expected an epoch of …/run that has arrays, 0 to 1, got 7"),
    ((0, "1"), ValueError, "expected an epoch of …/run that has arrays, 0 to 1, got '1'"),
]
UNKNOWN_STAGES = [
    (stage, ValueError, f"expected a stage of epoch 0 of …/run among ['eval', 'train'], got {stage!r}")
    for stage in ("test", None)
]
SOME_SHARES = [row for row in SHARES if row[0] is not None]
NAMES = [
    ("saturation", TypeError, "expected statistics as a sequence of names, got 'saturation'"),
    (3, TypeError, "expected statistics as a sequence of names, got 3"),
    (["width"], ValueError, "expected statistics among … got 'width'"),
]
OUTPUT = Given(lambda w: w.folder / "pictures")

ROWS_OF_RUNS = [
    *refuses(
        "Recorder",
        sm.Recorder,
        {"directory": Given(lambda w: w.folder / "new")},
        directory=[
            *NO_PATH,
            (
                RUN,
                FileExistsError,
                "…/run already holds records (csv, arrays); mode='resume' goes on after them",
            ),
            (
                Given(lambda w: w.folder / "open"),
                BlockingIOError,
                "expected no other recorder of …/open, got one in this process that is still open",
            ),
        ],
        probe=[
            ("x", TypeError, "expected probe to be a LayerProbe or None, got str"),
            (Given(lambda w: w.model), TypeError, "expected probe to be a LayerProbe or None, got Sequential"),
        ],
        writers=[
            ("arays", ValueError, "expected a writer among ['csv', … got 'arays'; did you mean 'arrays'?"),
            (3, TypeError, "expected the names of writers or Writers, got int"),
            (None, TypeError, "expected the names of writers or Writers, got NoneType"),
            ([3], TypeError, "expected the name of a writer or a Writer, got int"),
            (["csv", "csv"], ValueError, "expected each writer once, got ['csv'] more than once"),
            (sm.Writer, TypeError, "got the class Writer; call it"),
            ([ConsoleWriter], TypeError, "got the class ConsoleWriter; call it"),
        ],
        mode=[
            (mode, ValueError, f"expected a mode among ('create', 'resume', 'overwrite'), got {mode!r}")
            for mode in ("append", None, 3)
        ],
    ),
    *refuses(
        "Recorder.add_scalar",
        Given(lambda w: w.recorder.add_scalar),
        {"name": "accuracy", "value": 1.0},
        name=[
            ("", ValueError, "expected the name of a scalar, got ''"),
            (3, ValueError, "expected the name of a scalar, got 3"),
            ("saturation", ValueError, "expected a name that no probed metric has, got 'saturation'"),
        ],
        value=[
            (value, TypeError, f"expected 'accuracy' to be a number, got {value!r}")
            for value in ("high", None, 1j)
        ],
        stage=[
            (3, TypeError, "expected stage to be a string, got 3"),
            (None, TypeError, "expected stage to be a string, got None"),
        ],
        layer=[
            (3, TypeError, "expected layer to be a string, got 3"),
            ("mean", ValueError, "expected the name of a layer, got 'mean', the name of the mean over layers"),
        ],
    ),
    *refuses(
        "Recorder.record",
        Given(lambda w: w.recorder.record),
        epoch=[
            (epoch, ValueError, f"expected an epoch as an integer that is not negative, got {epoch!r}")
            for epoch in (-1, 1.5, "7", True)
        ],
        progress=[("bar", TypeError, "expected progress to be a function of two numbers or None, got 'bar'")],
        step=[
            (step, ValueError, f"expected a step as an integer that is not negative, got {step!r}")
            for step in (-1, 1.5, "7", True)
        ],
    ),
    *refuses(
        "ArraysWriter",
        ArraysWriter,
        every_step=[(1, TypeError, "expected every_step to be True or False, got 1")],
    ),
    *refuses(
        "ReportWriter",
        ReportWriter,
        refresh=[
            (refresh, ValueError, f"expected refresh to be a positive number of seconds, got {refresh!r}")
            for refresh in (0, -1, math.inf, "10", True, None)
        ],
    ),
    *refuses(
        "Monitor",
        sm.Monitor,
        {"probe": Given(lambda w: w.probe)},
        probe=[
            ("x", TypeError, "expected probe to be a LayerProbe, got str"),
            (Given(lambda w: w.model), TypeError, "expected probe to be a LayerProbe, got Sequential"),
            (
                Given(lambda w: w.probe),
                RuntimeError,
                "expected a probe that has observed nothing, to which a HistoryMetric can be added",
            ),
        ],
        every=[
            (every, ValueError, f"expected every to be a positive integer, got {every!r}")
            for every in (0, -1, 1.5, "7", None)
        ],
        stage=[
            (stage, ValueError, f"expected a stage among ('train', 'eval'), got {stage!r}")
            for stage in ("test", None)
        ],
        alarms=[
            ("dead", TypeError, "expected alarms to be a sequence of AlarmRules, got 'dead'"),
            (["dead"], TypeError, "expected alarms to be a sequence of AlarmRules, got ['dead']"),
            (sm.DEFAULT_ALARMS[0], TypeError, "expected alarms to be a sequence of AlarmRules, got AlarmRule("),
            (
                [sm.DEFAULT_ALARMS[0]._replace(statistic="rank")],
                ValueError,
                "expected the statistic of a rule among ('non_finite', 'spread', … got 'rank'",
            ),
        ],
        on_alarm=[
            (each, ValueError, f"expected on_alarm to be 'warn', 'stop' or a function, got {each!r}")
            for each in ("raise", None, 3)
        ],
        recorder=[("run", TypeError, "expected recorder to be a Recorder or None, got str")],
    ),
    *refuses(
        "Recorder.add_alarm",
        Given(lambda w: w.recorder.add_alarm),
        alarm=[
            ("dead", TypeError, "expected an Alarm, got 'dead'"),
            (None, TypeError, "expected an Alarm, got None"),
        ],
    ),
    *refuses(
        "Recorder.drop_alarms",
        Given(lambda w: w.recorder.drop_alarms),
        step=[
            (step, ValueError, f"expected a step as an integer that is not negative, got {step!r}")
            for step in (-1, 1.5, "7", True)
        ],
    ),
    *refuses("read_records", sm.read_records, directory=TABLES),
    *[
        row
        for function in (sm.compare, describe_comparison)
        for row in [
            *refuses(
                function.__name__,
                function,
                {"left": RUN, "epochs": (0, 1)},
                left=ARRAYS,
                right=[ARRAYS[0], *ARRAYS[2:]],
                epochs=EPOCHS,
                threshold=SHARES,
            ),
            *refuses(function.__name__, function, {"left": RUN, "epochs": (0, 1)}, stage=UNKNOWN_STAGES),
            *refuses(
                function.__name__,
                function,
                {"left": RUN},
                right=[(None, ValueError, "expected a second run, or epochs=(first, second) of one run")],
            ),
        ]
    ],
    *refuses(
        "summarise_run",
        sm.summarise_run,
        {"directory": RUN},
        directory=ARRAYS,
        epoch=[
            (epoch, ValueError, f"expected an epoch of …/run that has arrays, 0 to 1, got {epoch!r}")
            for epoch in (7, -1, "1", 1.5)
        ],
        stage=[
            (stage, ValueError, f"expected a stage of epoch 1 among ['eval', 'train'], got {stage!r}")
            for stage in ("test", None)
        ],
        statistic=[
            ("width", ValueError, "expected statistics among … got 'width'"),
            (3, ValueError, "expected statistics among … got 3"),
            ("spectrum", ValueError, "expected a statistic that is one number, got 'spectrum' of shape (3,)"),
        ],
        threshold=SOME_SHARES,
    ),
    *refuses(
        "recompute",
        sm.recompute,
        {"directory": RUN},
        directory=ARRAYS,
        threshold=[*SOME_SHARES, *(([0.9, share], error, words) for share, error, words in SHARES)],
        statistics=[
            ("width", ValueError, "expected statistics among … got 'width'"),
            (["width"], ValueError, "expected statistics among … got 'width'"),
            (3, TypeError, "expected names of statistics or metrics, got 3"),
            ([3], ValueError, "expected statistics among … got 3"),
            ({"mine": 3}, TypeError, "expected metric 'mine' to be a SpectralMetric, got int"),
            (sm.SaturationMetric, TypeError, "got the class SaturationMetric; call it"),
            (
                "embedding",
                ValueError,
                "'embedding' of '0' in train, epoch 0: expected a sample for 'embedding'",
            ),
        ],
        progress=[("bar", TypeError, "'str' object is not callable")],
    ),
    *refuses(
        "draw_run",
        sm.draw_run,
        {"directory": RUN, "output": OUTPUT},
        directory=TABLES,
        epoch=[
            (epoch, ValueError, f"expected an epoch of …/run that was recorded, 0 to 1, got {epoch!r}")
            for epoch in (7, -1, "1")
        ],
        statistics=NAMES,
        threshold=SOME_SHARES,
        output=NO_PATH[:1],
        dpi=_integers("dpi"),
        progress=[("bar", TypeError, "'str' object is not callable")],
    ),
    *refuses(
        "draw_runs",
        draw_runs,
        {"directories": Given(lambda w: [w.run, w.table]), "output": OUTPUT},
        directories=[
            (RUN, TypeError, "expected a sequence of directories, got …Path('"),
            ("runs", TypeError, "expected a sequence of directories, got 'runs'"),
            (3, TypeError, "expected a sequence of directories, got 3"),
            ([], ValueError, "expected the directory of at least one run, got none"),
            ([3], TypeError, "str … os.PathLike … int"),
            (Given(lambda w: [w.run, w.run]), ValueError, "expected different runs, got …/run twice"),
            (
                Given(lambda w: [w.run, w.empty]),
                FileNotFoundError,
                "expected a run with a records.csv, got …/empty",
            ),
        ],
        epoch=[
            (epoch, ValueError, f"expected an epoch of …/run that was recorded, 0 to 1, got {epoch!r}")
            for epoch in (7, "1")
        ],
        statistics=NAMES,
        output=NO_PATH[:1],
        dpi=_integers("dpi"),
        progress=[("bar", TypeError, "'str' object is not callable")],
    ),
    *refuses(
        "write_report",
        sm.write_report,
        {"directories": RUN, "path": Given(lambda w: w.folder / "report.html")},
        directories=[
            (3, TypeError, "expected the directory of a run, or several, got 3"),
            (None, TypeError, "expected the directory of a run, or several, got None"),
            ([], ValueError, "expected the directory of at least one run, got none"),
            (EMPTY, FileNotFoundError, "expected a run with a records.csv or arrays, got …/empty"),
        ],
        path=[NO_PATH[0], (EMPTY, IsADirectoryError, "Is a directory: '…/empty'")],
        progress=[("bar", TypeError, "'str' object is not callable")],
    ),
    *refuses("ConsoleWriter", ConsoleWriter, max_layers=_integers("max_layers", or_none=True)),
    *refuses("PlotWriter", PlotWriter, dpi=_integers("dpi")),
    *refuses(
        "TensorBoardWriter", TensorBoardWriter, colour=[(1, TypeError, "unexpected keyword argument 'colour'")]
    ),
    *refuses(
        "layer_profile",
        sm.layer_profile,
        {"values": {"saturation/eval/conv": 0.5}, "metric": "saturation", "stage": "eval"},
        values=[
            (
                [{}],
                TypeError,
                "expected what a probe's compute() or a recorder's record() returned, got a list",
            ),
            (
                None,
                TypeError,
                "expected what a probe's compute() or a recorder's record() returned, got a NoneType",
            ),
            ({}, ValueError, "expected values of 'saturation/eval', got no values"),
        ],
        metric=[
            (each, ValueError, f"expected values of '{each}/eval', got 'saturation/eval'")
            for each in ("rank", 3)
        ],
        stage=[
            (each, ValueError, f"expected values of 'saturation/{each}', got 'saturation/eval'")
            for each in ("train", None)
        ],
    ),
    *refuses(
        "loggable",
        sm.loggable,
        values=[
            ([1.0], TypeError, "expected the dict that compute() or record() returns, got [1.0]"),
            (None, TypeError, "expected the dict that compute() or record() returns, got None"),
            ({3: 1.0}, TypeError, "expected names as keys, got 3"),
        ],
    ),
    *refuses(
        "low_saturation_tail",
        sm.low_saturation_tail,
        {"saturation": {"conv": 0.5, "head": 0.9}},
        saturation=[
            ([0.5], TypeError, "expected a dict of layers and saturations, got [0.5]"),
            (None, TypeError, "expected a dict of layers and saturations, got None"),
            *(
                ({"conv": value}, ValueError, f"expected saturations in [0, 1], got {value!r} for 'conv'")
                for value in (1.5, -0.1, float("nan"), "0.5", None)
            ),
        ],
        ratio=[
            (ratio, ValueError, f"expected a ratio in (0, 1), got {ratio!r}")
            for ratio in (0, 1, float("nan"), "0.5", None)
        ],
        output_layers=[
            (number, ValueError, f"expected output_layers as an integer that is not negative, got {number!r}")
            for number in (-1, 1.5, "1", None, True)
        ],
    ),
]
