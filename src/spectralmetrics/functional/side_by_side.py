"""Decompose several matrices at a time, each in one thread.

LAPACK gains little from a second thread on matrices of a few hundred rows, and loses much where other programs
use the same cores: its threads wait for each other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from spectralmetrics.torch_private import use_one_thread

_LEAST_WIDTH = 192  # below, starting threads takes longer than they save
_BYTES = 2**28  # of the memory for matrices that are decomposed at a time
_MATRICES = 6  # a matrix, its eigenvectors, and what LAPACK and the merging of folds take

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, number: int, width: int, device: torch.device
) -> Iterator[R]:
    """Yield the results of a function that decomposes a matrix of each item, in the order of the items.

    On the CPU several items are worked on at a time, by as many threads as PyTorch uses for one operation.
    An error is raised in the calling thread, and ends the work.

    Args:
        function: called with one item, in another thread, where tensor operations use one thread.
        items: what to work on; each is made when a thread is free for it.
        number: the number of items.
        width: the width D of the matrices.
        device: the device of the matrices.

    >>> squares = side_by_side(torch.linalg.eigvalsh, [torch.eye(256)] * 3, number=3, width=256,
    ...     device=torch.device("cpu"))
    >>> [float(values.sum()) for values in squares]
    [256.0, 256.0, 256.0]
    """
    workers = min(number, torch.get_num_threads(), _BYTES // (_MATRICES * 8 * width**2))
    # At the end of the program no thread can be started any more.
    can_start = use_one_thread is not None and threading.main_thread().is_alive()
    if workers < 2 or width < _LEAST_WIDTH or device.type != "cpu" or not can_start:
        yield from map(function, items)
        return
    inference = torch.is_inference_mode_enabled()
    results: list[Future[R]] = [Future() for _ in range(number)]
    waiting, source, lock = deque(results), iter(items), threading.Lock()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                # Items are made by these threads, too: with several threads for one operation, as the calling
                # thread has, each operation would wait for all of these.
                with lock:
                    if not waiting:
                        return
                    result = waiting.popleft()
                    try:
                        item = next(source)
                    except BaseException as error:
                        waiting.clear()
                        result.set_exception(error)
                        return
                try:
                    result.set_result(function(item))
                except BaseException as error:
                    with lock:
                        waiting.clear()
                    result.set_exception(error)
                del item

    with ThreadPoolExecutor(workers, "spectralmetrics", use_one_thread) as threads:
        for _ in range(workers):
            threads.submit(work)
        try:
            for result in results:
                yield result.result()
        finally:
            with lock:
                waiting.clear()
