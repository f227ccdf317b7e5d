"""Groups of processes (gloo) on this machine. One start runs many scenarios, because starting is slow."""

import datetime
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import processes

STRICT = (
    ("error", ""),
    ("ignore", ".*barrier.*"),  # torch.distributed warns of it on some platforms
    ("ignore", "FSDP2-wrapped module"),
    ("ignore", "Guards may run slower on Python 3.13.0"),
)
LENIENT = (("ignore", ""),)


def _process(rank, world, folder, scenarios, filters, timeout, arguments):
    for action, message in filters:
        warnings.filterwarnings(action, message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # from torch.distributed
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    for scenario in scenarios:
        start = time.monotonic()
        try:
            scenario(rank, world, *arguments)
            if arguments[:1] != ("dies",):
                dist.barrier()
        except BaseException:
            Path(folder, f"{scenario.__name__}.{rank}.failed").write_text(traceback.format_exc())
            os._exit(1)  # the others would wait for this one
        Path(folder, f"{scenario.__name__}.{rank}.passed").write_text(f"{time.monotonic() - start:.1f}")
    os._exit(0)


def run(world, scenarios, folder, *, method="fork", filters=STRICT, timeout=60, limit=400, arguments=()):
    """Run functions of (rank, world) one after the other on each process of a fresh group; return exit codes.

    Args:
        world: number of processes.
        scenarios: the functions; the first that fails ends its process, and the others soon after.
        folder: folder in which the group meets, and writes which scenarios passed or failed, and the seconds.
        method: start method; with ``"forkserver"``, processes have no trace of what other tests did to torch.
        filters: (action, message) of each filter for warnings.
        timeout: seconds after which a collective fails.
        limit: seconds after which running processes are killed.
        arguments: further arguments of the functions; ``"dies"`` comes first if a process ends on purpose.
    """
    processes.fresh()  # names the modules that a fork server imports
    context = mp.start_processes(
        _process,
        (world, str(folder), scenarios, filters, timeout, arguments),
        nprocs=world,
        join=False,
        start_method=method,
    )
    end = time.monotonic() + limit
    while time.monotonic() < end and any(each.exitcode is None for each in context.processes):
        time.sleep(0.02)
    codes = [each.exitcode for each in context.processes]
    for each in context.processes:
        if each.is_alive():
            each.kill()
    return codes


def torchrun(arguments, processes=2, timeout=200, **options):
    """Run Python with these arguments on processes that torchrun starts; return what they print.

    Args:
        arguments: arguments of Python: a script or a module, and its own arguments.
        processes: number of processes.
        timeout: seconds after which all of them are killed.
        options: further arguments of ``subprocess.Popen``.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("COLUMNS", None)  # pytest-xdist sets it for its workers
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    for _ in range(3):
        started = subprocess.Popen([sys.executable, *launcher, *arguments], start_new_session=True, **options)
        try:
            output, errors = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the workers too: they hold the pipes
            raise
        # Seen once in a hundred starts: a gloo thread that frees a tensor while Python ends is unwound
        # through C++, which aborts. Other faults have other messages.
        if "terminate called without an active exception" not in errors:
            break
    assert started.returncode == 0, errors
    return output


def failures(folder):
    """Tracebacks of a group, by "scenario.rank.failed"."""
    return {path.name: path.read_text() for path in Path(folder).glob("*.failed")}


def assert_passed(folder, world, scenario):
    """Fail unless all processes have run a scenario to its end."""
    failed = failures(folder)
    own = [text for name, text in failed.items() if name.startswith(f"{scenario.__name__}.")]
    assert not own, own[0]
    passed = len(list(Path(folder).glob(f"{scenario.__name__}.*.passed")))
    assert passed == world, f"not run to the end, after the failure of {list(failed)}"
