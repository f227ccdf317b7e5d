import hypothesis
import numpy as np
import pytest
import torch

from tests.accelerator.device import CAN_BE_EMULATED, emulated_device

# PyTorch reserves room for the devices it has when the first backward runs.
if CAN_BE_EMULATED:
    emulated_device()

NO_LIMITS = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("default", derandomize=True, max_examples=8, **NO_LIMITS)
# Used by `.ci/run`.
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=20, **NO_LIMITS)
# Used by `nox -s properties`: a million examples over the 210 tests of sums and statistics.
hypothesis.settings.register_profile("properties", max_examples=5000, **NO_LIMITS)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def one_thread():
    """Use one thread of torch: many small products take longer on several."""
    yield from _with_threads(1)


@pytest.fixture
def two_threads():
    """Use two threads of torch; `nox -s tests` sets one."""
    yield from _with_threads(2)


def _with_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)
