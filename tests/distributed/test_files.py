"""`spectralmetrics measure` under torchrun. `files.py` tests how the files are shared out."""

import numpy as np
import pytest

from spectralmetrics.cli import main
from tests.distributed.groups import torchrun
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
    assert torchrun(["-m", "spectralmetrics", *arguments]) == alone
