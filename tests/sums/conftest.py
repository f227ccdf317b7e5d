import pytest

from spectralmetrics.sums import compiled


@pytest.fixture(params=[None, "avx2", "avx512"], ids=["pytorch", "avx2", "avx512"])
def instructions(request):
    with compiled.using(request.param):
        if compiled.instruction_set() != request.param:
            pytest.skip(f"{request.param} is not to be had here")
        yield request.param
