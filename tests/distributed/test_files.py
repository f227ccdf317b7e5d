"""`spectralmetrics measure` under torchrun. `files.py` tests how the files are shared out."""

import os
import subprocess
import sys

import numpy as np
import pytest

from spectralmetrics.cli import main
from tests.files.world import rows

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.long
def test_torchrun_prints_what_one_process_prints(tmp_path, capsys):
    for index, shard in enumerate(rows(1000).split(100)):
        np.save(tmp_path / f"{index}.npy", shard)
    arguments = ["measure", str(tmp_path), "--folds", "4"]
    assert main(arguments) == 0
    alone = capsys.readouterr().out
    assert "1,000 x 12 float32 in 10 parts, 4 folds of whole files" in alone
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, "-m", "spectralmetrics", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("COLUMNS", None)  # pytest-xdist sets it for its workers
    for _ in range(3):
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        # A gloo thread that ends late aborts once in a hundred runs.
        if "terminate called without an active exception" not in found.stderr:
            break
    assert found.returncode == 0, found.stderr
    assert found.stdout == alone
