"""Some of the trainings of ``checks/alarms.py``, whose rates the guide shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "checks" / "alarms.py"
HEALTHY = ("mlp", "plateau", "neural collapse")
PLANTED = ("planted dead", "planted scale")


@pytest.mark.long
def test_collapses_are_found_and_healthy_runs_are_left_alone(tmp_path):
    kept = tmp_path / "runs.jsonl"
    command = [sys.executable, str(CHECK), "--set", "calibration", "--runs", str(kept)]
    command += ["--healthy", "1", "--planted", "1", "--steps", "300", "--only", *HEALTHY, *PLANTED]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runs = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(run["kind"] for run in runs) == sorted((*HEALTHY, *PLANTED))
    for run in runs:
        assert run["took"], run
        assert run["found"] == (run["kind"] in PLANTED), run

    # Runs with a result are not repeated.
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert kept.read_text().count("\n") == len(runs)
    assert again.splitlines()[-6:] == first.splitlines()[-6:]
    assert "healthy together: 0 of 3 with an alarm" in again
