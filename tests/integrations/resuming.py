"""Records of an interrupted and resumed training, compared with an uninterrupted one."""

import functools

import pytest

from spectralmetrics import CovarianceTraceMetric, SaturationMetric, read_records
from tests.distributed.groups import torchrun
from tests.integrations.rows import Rows

NAMES = ("epoch", "step", "stage", "statistic", "layer")


def metrics():
    """One metric of another library, and two with intervals."""
    return {"rows": Rows(), "variance": CovarianceTraceMetric(), "saturation": SaturationMetric()}


def drawing():
    """Arguments of a probe whose draws depend on the number of steps so far."""
    return {"folds": 2, "rows_per_feature": 0.5, "every_n_steps": 2, "each_layer": True}


def numbers(run):
    """Numbers of each row of a run, by the row's names; a duplicate row is an error."""
    found = {}
    for row in read_records(run):
        key = tuple(row[name] for name in NAMES)
        assert key not in found
        found[key] = [row[name] for name in ("value", "low", "high")]
    return found


def in_one_go(tmp_path_factory, train):
    """A function from the arguments of a trainer to the numbers of an uninterrupted training.

    Args:
        tmp_path_factory: the fixture of pytest.
        train: function that trains in a folder with these arguments and records in its folder "run".
    """

    @functools.cache
    def of(**arguments):
        folder = tmp_path_factory.mktemp("whole")
        train(folder, **arguments)
        return numbers(folder / "run")

    return of


def differing(run, expected, counts=lambda key: True):
    """Rows of a run that differ from ``expected``, are missing or are extra, among those that count."""
    found = numbers(run)
    return {
        key: (found.get(key), expected.get(key))
        for key in filter(counts, found.keys() | expected.keys())
        if found.get(key) != pytest.approx(expected.get(key), rel=1e-9, nan_ok=True)
    }


def remembered(monitor):
    """Flat list of the numbers in a monitor's memory."""

    def numbers(value):
        if isinstance(value, dict):
            return [each for key in sorted(value) for each in numbers(value[key])]
        return [each for part in value for each in numbers(part)] if isinstance(value, list) else [value]

    return numbers(monitor._past)


def on_two_processes(kind, folder):
    """Numbers of an uninterrupted training, and the numbers of a resumed one that differ."""
    torchrun(["-m", "tests.integrations.resuming_processes", kind, str(folder)], timeout=240)
    expected = numbers(folder / "whole")
    return expected, differing(folder / "cut", expected)
