import pytest

from spectralmetrics.sums import compiled

BEST = compiled.instruction_set()
# PyTorch, and the best instructions of this processor. The others do the same, so they are `long`.
OTHER = [each for each in ("avx2", "avx512") if each != BEST]


@pytest.fixture(
    params=[
        pytest.param(None, id="pytorch"),
        *([pytest.param(BEST, id=BEST)] if BEST else []),
        *(pytest.param(each, id=each, marks=pytest.mark.long) for each in OTHER),
    ]
)
def instructions(request):
    with compiled.using(request.param):
        if compiled.instruction_set() != request.param:
            pytest.skip(f"{request.param} is not to be had here")
        yield request.param
