"""Decompose several matrices at a time, each in one thread.

LAPACK gains little from a second thread on matrices of a few hundred rows, and loses much of it where other
programs use the same cores. Several matrices side by side gain nearly all that the cores have.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from spectralmetrics.torch_private import use_one_thread

_LEAST_WIDTH = 96  # below, starting a thread takes longer than a decomposition
_BYTES = 2**28  # of the memory for matrices that are decomposed at a time
_MATRICES = 6  # a matrix, its eigenvectors, and what LAPACK and the merging of folds take

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, number: int, width: int, device: torch.device
) -> Iterator[R]:
    """Yield the results of a function that decomposes a matrix of each item, in the order of the items.

    On the CPU several items are worked on at a time, by as many threads as PyTorch uses for one operation.
    Items are made and results yielded in the calling thread. An error of the function is raised there, and
    ends the work.

    Args:
        function: called with one item, in another thread; its tensor operations use one thread.
        items: what to work on; made one by one, so that few are in memory.
        number: the number of items.
        width: the width D of the matrices.
        device: the device of the matrices.

    >>> squares = side_by_side(torch.linalg.eigvalsh, [torch.eye(128)] * 3, number=3, width=128,
    ...     device=torch.device("cpu"))
    >>> [float(values.sum()) for values in squares]
    [128.0, 128.0, 128.0]
    """
    workers = min(number, torch.get_num_threads(), _BYTES // (_MATRICES * 8 * width**2))
    # At the end of the program no thread can be started any more.
    can_start = use_one_thread is not None and threading.main_thread().is_alive()
    if workers < 2 or width < _LEAST_WIDTH or device.type != "cpu" or not can_start:
        yield from map(function, items)
        return
    inference = torch.is_inference_mode_enabled()

    def work(item: T) -> R:
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, "spectralmetrics", use_one_thread) as threads:
        try:
            for item in items:
                running.append(threads.submit(work, item))
                if len(running) > workers:  # one waits, so that no thread does
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for each in running:
                each.cancel()
