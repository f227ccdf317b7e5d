import hypothesis
import numpy as np
import pytest
import torch

from tests.accelerator.device import emulated_device

# PyTorch makes room for the devices that it knows when the first backward runs.
emulated_device()

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def one_thread():
    """One thread of torch's: many small products take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
