import pytest
import torch

from spectralmetrics.sums import has_float64
from tests.accelerator.device import emulated_device, without_float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(params=["emulated", "cuda"])
def accelerator(request):
    """A device that is not the CPU: the emulated one, and a real one where there is one."""
    if request.param == "emulated":
        return emulated_device()
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return torch.device("cuda", 0)


@pytest.fixture
def emulated():
    return emulated_device()


@pytest.fixture
def like_mps():
    """The emulated device without float64."""
    device = emulated_device()
    has_float64.cache_clear()
    with without_float64():
        yield device
    has_float64.cache_clear()
