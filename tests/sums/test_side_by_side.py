"""Matrices decomposed in parallel give the same results, in order, and other threads keep their settings."""

import subprocess
import sys
import threading
import weakref

import pytest
import torch

from spectralmetrics.sums import decomposition
from spectralmetrics.sums.decomposition import side_by_side

CPU = torch.device("cpu")


needs_limits = pytest.mark.skipif(
    decomposition.use_one_thread is None,
    reason="no function of PyTorch's library sets the threads of one thread",
)


def run(function, items, width=256, device=CPU):
    return list(side_by_side(function, items, number=len(items), width=width, device=device))


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_results_keep_the_order_of_their_items():
    matrices = [torch.randn(300, 256, dtype=torch.float64).T.cov() for _ in range(8)]
    wanted = [torch.linalg.eigvalsh(matrix) for matrix in matrices]
    threads, at_a_time = set(), threading.Barrier(2)

    def decompose(matrix):
        at_a_time.wait(60)
        threads.add(threading.current_thread())
        return torch.linalg.eigvalsh(matrix)

    for found, value in zip(run(decompose, matrices), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    assert len(threads) == 2
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    ("number", "width", "device"), [(1, 256, "cpu"), (4, 8, "cpu"), (4, 3000, "cpu"), (4, 256, "meta")]
)
@pytest.mark.usefixtures("two_threads")
def test_nothing_is_gained_by_threads(number, width, device):
    threads = run(lambda item: threading.current_thread(), range(number), width, torch.device(device))
    assert threads == [threading.current_thread()] * number


@pytest.mark.usefixtures("two_threads")
def test_one_after_the_other_where_a_thread_cannot_be_limited(monkeypatch):
    monkeypatch.setattr(decomposition, "use_one_thread", None)
    assert run(lambda item: threading.current_thread(), range(3)) == [threading.current_thread()] * 3


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_few_items_are_in_memory_at_a_time():
    class Item:
        pass

    alive, most = weakref.WeakSet(), []

    def items():
        for _ in range(20):
            item = Item()
            alive.add(item)
            yield item

    results = side_by_side(lambda item: most.append(len(alive)), items(), number=20, width=256, device=CPU)
    assert list(results) == [None] * 20
    assert max(most) <= 4


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_who_wants_no_more_results_ends_the_work():
    go_on, made = threading.Event(), []

    def items():
        for item in range(20):
            made.append(item)
            yield item

    results = side_by_side(lambda item: item == 0 or go_on.wait(60), items(), number=20, width=256, device=CPU)
    assert next(results)
    threading.Timer(0.2, go_on.set).start()
    results.close()
    assert len(made) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spectralmetrics")]


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_an_item_that_cannot_be_made_is_an_error():
    def items():
        yield 0
        raise ValueError("no second")

    results = side_by_side(lambda item: item, items(), number=3, width=256, device=CPU)
    assert next(results) == 0
    with pytest.raises(ValueError, match="no second"):
        next(results)


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_an_error_is_raised_and_ends_the_work():
    done = []

    def work(item):
        if item == 2:
            raise ValueError("no third")
        done.append(item)

    with pytest.raises(ValueError, match="no third"):
        run(work, range(50))
    assert len(done) < 10


@needs_limits
@pytest.mark.usefixtures("two_threads")
def test_threads_work_in_the_callers_inference_mode():
    with torch.inference_mode():
        assert all(run(lambda item: torch.zeros(1).is_inference(), range(3)))
    assert not any(run(lambda item: torch.zeros(1).is_inference(), range(3)))


PROGRAM = """
import atexit, threading, torch
from spectralmetrics.sums.decomposition import side_by_side

def run():
    read = lambda item: (torch.get_num_threads(), threading.current_thread() is threading.main_thread())
    return list(side_by_side(read, range(3), number=3, width=256, device=torch.device("cpu")))

left, right = torch.randn(2, 999, 999)
before = left @ right
print(run(), torch.get_num_threads(), torch.equal(before, left @ right))
atexit.register(lambda: print(run()))
"""


@needs_limits
def test_other_threads_keep_their_number_and_the_end_of_a_program_needs_no_thread():
    program = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(3)\n" + PROGRAM],
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout.splitlines() == [f"{[(1, False)] * 3} 3 True", f"{[(3, True)] * 3}"]
