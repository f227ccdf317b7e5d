"""Every public function refuses bad values: one row for each value, and nothing is changed by the call."""

import dataclasses
import fnmatch
import inspect
import re

import pytest

from tests.bad_input.of_files import ROWS_OF_FILES
from tests.bad_input.of_functions import ROWS_OF_FUNCTIONS
from tests.bad_input.of_metrics import ROWS_OF_METRICS
from tests.bad_input.of_models import ROWS_OF_MODELS
from tests.bad_input.of_pictures import ROWS_OF_PICTURES
from tests.bad_input.of_runs import ROWS_OF_RUNS
from tests.bad_input.table import Given, quotes
from tests.bad_input.world import World
from tests.public import everything_public

TABLE = [
    *ROWS_OF_FUNCTIONS,
    *ROWS_OF_METRICS,
    *ROWS_OF_MODELS,
    *ROWS_OF_RUNS,
    *ROWS_OF_PICTURES,
    *ROWS_OF_FILES,
]
MODULES = ("", ".functional", ".metrics", ".monitoring", ".probing", ".projection", ".recording", ".plotting")

# Arguments without rows in the table, and why.
EXEMPT = {
    **dict.fromkeys(
        (
            "*(center)",
            "*(unbiased)",
            "*(log)",
            "*(keep_dim)",
            "*(recentre)",
            "*(reset)",
            "*(mode)",
            "*.has(kind)",
            "register_layer(default)",
        ),
        "any value is true or false",
    ),
    **dict.fromkeys(
        (
            "SpectralMetric.wanted(*",
            "SpectralMetric.read(*",
            "SpectralMetric.read_interval(*",
            "SpectralMetric.check_range(*",
            "*.from_sketch(*",
            "SpectralMetric.value_of(*",
            "SpectralMetric.misses(*",
            "SpectralMetric.sketch_instead(*",
            "MarginalMetric.sketch_instead(*",
            "MarginalMetric.reading(*",
            "MarginalMetric.wanted(*",
            "LayerProbe.merged(*",
            "LinearProbeMetric.interval_of(*",
            "ParticipationRatioMetric.interval_of(*",
            "*.clips(*",
            "SpectralMetric.is_clipped(*",
            "Spectrum(device)",
            "Spectrum.at(*",
            "Spectrum.about(*",
            "Spectrum.knows(*",
            "Spectrum.learn*",
        ),
        "between a probe and its metrics, which it made",
    ),
    **dict.fromkeys(
        ("*(kwargs)", "*(options)"), "passed on; a row with `colour` shows where an unknown one ends"
    ),
    **dict.fromkeys(
        (
            "Moments*",
            "Record[.(]*",
            "Row(*",
            "Summary*",
            "Interval(*",
            "ReceptiveField(*",
            "ProjectionRow(*",
            "Similarity(*",
            "InsertedProjections*",
            "History(*",
            "History.of_sums(*",
            "HistoryRow(*",
            "Mover(*",
            "Finding(*",
            "Alarm(*",
            "AlarmRule(*",
            "AlarmRecorder*",
            "FindingRule(*",
            "PowerLawTail(*",
            "Weight[RS]*",
            "Measurement(*",
            "ReadError(*",
        ),
        "made by the package, and read by its user",
    ),
    **dict.fromkeys(
        ("*.statistic(spectrum)", "SpectralMetric.interval_of(*", "Spectrum(cache)", "Spectrum(others)"),
        "for those who write a statistic, and called with what the package has made",
    ),
    **dict.fromkeys(
        (
            "*Writer.open(*",
            "*Writer.open_after(*",
            "*Writer.last_record(*",
            "*Writer.discard_after(*",
            "*Writer.write(*",
            "*Writer.restore(*",
            "*Writer.last_epoch(*",
            "*Writer.discard(*",
            "*Writer.holds_records(*",
        ),
        "called by a recorder, with what it has made",
    ),
    **dict.fromkeys(
        ("*Metric.plot(val)", "*Metric.plot(ax)"), "torchmetrics and the functions of plotting refuse"
    ),
    **dict.fromkeys(
        (
            "PCAProjection.train(*",
            "PCAProjection.set_extra_state(*",
            "*(process_group)",
            "Observations.to(device)",
        ),
        "what PyTorch hands over, or refuses",
    ),
    "Observations(*": "checked where they are given, so that a hook makes them at no cost",
    "Observations.take(index)": "an index, which PyTorch refuses",
    "*plot*(title)": "matplotlib writes anything",
    "accumulate(moments)": "any object with the five tensors will do",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_is_refused_and_changes_nothing(row, world):
    arguments = row.arguments(world)
    before = world.fingerprint()
    with pytest.raises(Exception, match=row.pattern()) as caught:
        row.function(world)(**arguments)
    assert type(caught.value) is row.error
    message = str(caught.value)
    # If the argument does not exist, the message must quote its name.
    assert quotes(arguments[row.argument], message) or re.search(f"['`]{row.argument}['`]", message)
    after = world.fingerprint()
    assert not [key for key in {*before, *after} if before.get(key) != after.get(key)]


def test_the_table_is_long_and_no_row_comes_twice():
    rows = [(row.name, id(row.call), row.argument, id(row.value), row.words) for row in TABLE]
    assert len(set(rows)) == len(rows) >= 200


def public():
    """Every public function, class and method, by name."""
    return {name: each for _, name, each in everything_public(MODULES)}


def arguments():
    """Every public argument, as "name(argument)" -> (its function, which classes may share; the argument)."""
    found = {}
    for name, each in public().items():
        for argument in list(inspect.signature(each).parameters):
            if argument not in ("self", "cls"):
                function = each.__init__ if inspect.isclass(each) else each
                found[f"{name}({argument})"] = inspect.unwrap(function), argument
    return found


def test_every_argument_of_every_public_function_is_in_the_table():
    everything = arguments()
    covered = {everything[key] for row in TABLE if (key := f"{row.name}({row.argument})") in everything}
    missing = [key for key, each in everything.items() if each not in covered]
    unexplained = [key for key in missing if not any(fnmatch.fnmatchcase(key, pattern) for pattern in EXEMPT)]
    assert not unexplained, "add rows to tests/bad_input, or a reason to EXEMPT"
    idle = [pattern for pattern in EXEMPT if not any(fnmatch.fnmatchcase(key, pattern) for key in missing)]
    assert not idle


def test_every_name_in_the_table_is_public():
    known = {*public(), *(f"{name}.{special}" for name in public() for special in ("__getitem__", "threshold"))}
    inherited = {"SpectralMetric.merge_state", "LinearProbeMetric.update", "NeuralCollapseMetric.update"}
    assert {row.name for row in TABLE} <= known | inherited


def test_a_message_without_the_value_is_noticed():
    assert quotes(0, "expected a positive integer, got 0")
    assert not quotes(0, "expected a positive integer")
    assert quotes({"a": -1.5}, "got -1.5 for 'a'")
    assert not quotes("x", "expected a dict")
    assert isinstance(Given(len).of("abc"), int)
    assert re.search(dataclasses.replace(TABLE[0], words="a … b").pattern(), "a, then b")
