"""Models that PyTorch's engines spread over processes; one group of each size runs all scenarios."""

import pytest

from tests.distributed import groups
from tests.distributed.engines import scenarios

pytestmark = pytest.mark.xdist_group("engines")

GROUPS = [pytest.param(each, marks=() if each == "2" else pytest.mark.long) for each in scenarios.SCENARIOS]


@pytest.fixture(scope="module", params=GROUPS, ids="processes-{}".format)
def finished(request, tmp_path_factory):
    group = request.param
    folder = tmp_path_factory.mktemp(f"engines{group}")
    # A forked process has the emulated device of other tests, and transformers would put models on it.
    method = "forkserver" if "long" in group else "fork"
    groups.run(int(group[0]), scenarios.SCENARIOS[group], folder, method=method)
    return group, folder


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda scenario: scenario.__name__)
def test_scenario(finished, scenario):
    group, folder = finished
    if scenario in scenarios.SCENARIOS[group]:
        groups.assert_passed(folder, int(group[0]), scenario)
