"""Processes that know nothing of what tests have done: forks of one that has only imported what they need."""

import multiprocessing

import pytest

# Every process would take four seconds for that; whoever is first to start one makes them all at once.
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
    """A context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context
