import pytest
import torch

from spectralmetrics.sums import has_float64
from tests.accelerator.device import emulated_device, without_float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def accelerator():
    """A device that is not the CPU: a real one if the machine has one, else the emulated one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else emulated_device()


@pytest.fixture
def emulated():
    if torch.cuda.is_available():
        pytest.skip("autograd knows one kind of accelerator in a process")
    return emulated_device()


@pytest.fixture
def like_mps():
    """The emulated device without float64."""
    if torch.cuda.is_available():
        pytest.skip("autograd knows one kind of accelerator in a process")
    device = emulated_device()
    has_float64.cache_clear()
    with without_float64():
        yield device
    has_float64.cache_clear()
