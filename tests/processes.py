"""Processes without traces of other tests: forks of a process that has only imported what they need."""

import multiprocessing

import pytest

# Importing takes four seconds. The first test that starts the server has it import the modules of all tests.
_IMPORTED = (
    "tests.distributed.engines.scenarios",
    "tests.distributed.test_processes",
    "tests.recording.test_killed",
    "tests.recording.test_restore",
)

needs_fork = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs fork"
)


def fresh():
    """Return a context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context
