"""Real process groups (gloo). One group of each size runs all scenarios, because starting it is slow."""

import itertools
from pathlib import Path

import pytest

from tests.distributed import files, groups, pipelines, records, resuming, scenarios, spread

EVERYWHERE = scenarios.EVERYWHERE + spread.SCENARIOS + records.SCENARIOS + files.SCENARIOS
ON_SEVERAL = EVERYWHERE + pipelines.SCENARIOS + resuming.SCENARIOS
SCENARIOS = {
    1: EVERYWHERE,
    2: ON_SEVERAL + scenarios.ON_TWO,
    3: EVERYWHERE + resuming.SCENARIOS,  # an odd number, and a process in the middle
    # Sums merged in two rounds, a grid, inner pipeline stages, layers that each process has alone.
    4: scenarios.ON_FOUR + spread.SCENARIOS + pipelines.SCENARIOS,
}
ALL = list(dict.fromkeys(itertools.chain(*SCENARIOS.values())))


pytestmark = pytest.mark.xdist_group("processes")


# Two processes show most faults, and each process takes seconds to start.
GROUPS = [pytest.param(2), *(pytest.param(each, marks=pytest.mark.long) for each in SCENARIOS if each != 2)]


@pytest.fixture(scope="module", params=GROUPS, ids="processes-{}".format)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"group{request.param}")
    groups.run(request.param, SCENARIOS[request.param], folder, method="forkserver", timeout=300)
    return request.param, folder


@pytest.mark.parametrize("scenario", ALL, ids=lambda s: s.__name__)
def test_scenario(finished, scenario):
    world, folder = finished
    if scenario in SCENARIOS[world]:
        groups.assert_passed(folder, world, scenario)


@pytest.mark.long
@pytest.mark.parametrize("world", [2])
def test_the_example_script_runs_under_torchrun(world, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "several_processes.py"
    output = groups.torchrun([str(script)], world, timeout=120, cwd=tmp_path)
    for layer in "024":
        assert f"saturation/eval/{layer}: " in output
        assert f"effective_rank/eval/{layer}: " in output
