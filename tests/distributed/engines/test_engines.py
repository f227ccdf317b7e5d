"""Models that PyTorch's engines spread over processes; one group of each size runs all scenarios."""

import datetime
import os
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.engines import scenarios

pytestmark = pytest.mark.xdist_group("engines")


def process(rank, group, folder):
    world = int(group[0])
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.distributed's own
    warnings.filterwarnings("ignore", message=".*barrier.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for scenario in scenarios.SCENARIOS[group]:
        start = time.monotonic()
        try:
            scenario(rank, world)
            dist.barrier()
        except BaseException:
            Path(folder, f"{scenario.__name__}.{rank}.failed").write_text(traceback.format_exc())
            os._exit(1)  # the others would wait for this one
        Path(folder, f"{scenario.__name__}.{rank}.passed").write_text(f"{time.monotonic() - start:.1f}")
    os._exit(0)


GROUPS = [pytest.param(each, marks=() if each == "2" else pytest.mark.long) for each in scenarios.SCENARIOS]


@pytest.fixture(scope="module", params=GROUPS, ids="processes-{}".format)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"engines{request.param}")
    # What is forked knows of the device that other tests emulate, and transformers puts models there.
    context = mp.start_processes(
        process,
        args=(request.param, str(folder)),
        nprocs=int(request.param[0]),
        join=False,
        start_method="spawn" if "long" in request.param else "fork",
    )
    end = time.monotonic() + 400
    while time.monotonic() < end and any(each.exitcode is None for each in context.processes):
        time.sleep(0.02)
    for each in context.processes:
        each.kill()
    return request.param, folder


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda scenario: scenario.__name__)
def test_scenario(finished, scenario):
    group, folder = finished
    if scenario not in scenarios.SCENARIOS[group]:
        return
    failures = {path.name: path.read_text() for path in Path(folder).glob("*.failed")}
    own = [text for name, text in failures.items() if name.startswith(f"{scenario.__name__}.")]
    assert not own, own[0]
    passed = len(list(Path(folder).glob(f"{scenario.__name__}.*.passed")))
    assert passed == int(group[0]), f"not run to the end, after the failure of {list(failures)}"
