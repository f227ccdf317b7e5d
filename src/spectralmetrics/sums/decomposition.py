r"""Eigenvalues and eigenvectors of a covariance, and of several at a time.

The eigenvalues of a covariance are not negative; values that a symmetric eigensolver returns below zero, or
within its error bound of zero, are round-off and count as zero.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from spectralmetrics.sums.checks import are_all_finite, check_real
from spectralmetrics.torch_private import use_one_thread

_LEAST_WIDTH = 192  # below, starting threads takes longer than they save
_BYTES = 2**28  # of the memory for matrices that are decomposed at a time
_MATRICES = 6  # a matrix, its eigenvectors, and what LAPACK and the merging of folds take

T = TypeVar("T")
R = TypeVar("R")


def eigenvalues(covariance: Tensor) -> Tensor:
    r"""Eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D \ge 0` of a covariance matrix.

    Values below :math:`16 \max(D, 16)\, \epsilon \lambda_1` (:math:`\epsilon` of float64), the round-off of
    sums of many products and of the eigensolver, are returned as zero.

    Args:
        covariance: symmetric positive semi-definite, shape (..., D, D), floating.

    Returns:
        Shape (..., D), float64, descending.

    Raises:
        ValueError: if the last two dimensions are not square, or a value is not finite.

    >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([3., 1.], dtype=torch.float64)
    """
    values = torch.linalg.eigvalsh(check_covariance(covariance), UPLO="U")
    return without_round_off(values.flip(-1))


def eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues as :func:`eigenvalues` gives them, and the orthonormal eigenvectors.

    The sign of each eigenvector is fixed: its entry of largest magnitude is positive (the first of them
    where several are equal), so that the result is reproducible across machines.

    Args:
        covariance: symmetric positive semi-definite, shape (..., D, D), floating.

    Returns:
        Eigenvalues (..., D) and eigenvectors (..., D, D), one in each column, both float64.

    Raises:
        ValueError: if the last two dimensions are not square, or a value is not finite.

    >>> values, vectors = eigenvectors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> values
    tensor([4., 3.], dtype=torch.float64)
    >>> vectors
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    values, vectors = ascending_eigenvectors(covariance)
    return values, with_fixed_signs(vectors.flip(-1)).add_(0.0)


def ascending_eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`eigenvectors`, but vectors keep the solver's order, last first, and the solver's signs."""
    values, vectors = torch.linalg.eigh(check_covariance(covariance), UPLO="U")
    return without_round_off(values.flip(-1)), vectors


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """Vectors, one in each column, turned so that the entry of largest magnitude is positive."""
    # Prefer the first of entries that are equal up to round-off: round-off must not decide the sign.
    magnitude = vectors.abs()
    nearly_largest = magnitude >= magnitude.amax(-2, keepdim=True) * (1 - 1e-6)
    leading = nearly_largest.to(torch.uint8).argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, leading) < 0, -1.0, 1.0)


def check_square(covariance: Tensor) -> None:
    """Raise a TypeError or ValueError unless these are real numbers of shape (..., D, D)."""
    check_real("a covariance", covariance)
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2] or covariance.shape[-1] == 0:
        raise ValueError(f"expected a covariance of shape (..., D, D), got {tuple(covariance.shape)}")


def check_covariance(covariance: Tensor) -> Tensor:
    """The covariance in float64; a TypeError or ValueError unless it is real, square and finite."""
    check_square(covariance)
    covariance = covariance.to(torch.float64)
    if not are_all_finite(covariance):
        raise ValueError("expected a finite covariance, got one that holds NaN or infinite values")
    return covariance


def without_round_off(values: Tensor) -> Tensor:
    """Descending eigenvalues, with zero for values that may be the round-off of a zero."""
    return torch.where(values > values[..., :1] * round_off(values.shape[-1]), values, 0)


def round_off(features: int) -> float:
    """The round-off of many float64 products and an eigensolver, relative to the largest eigenvalue."""
    return 16 * max(features, 16) * torch.finfo(torch.float64).eps


def symmetrise(upper: Tensor) -> Tensor:
    """The symmetric matrix with the given upper triangle; values below the diagonal are ignored.

    >>> symmetrise(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    return upper.triu().add_(upper.triu(1).mT)


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, number: int, width: int, device: torch.device
) -> Iterator[R]:
    """Yield the results of a function that decomposes a matrix of each item, in the order of the items.

    On the CPU several items are worked on at a time, by as many threads as PyTorch uses for one operation, each
    in one thread: LAPACK gains little from a second thread on matrices of a few hundred rows, and loses much
    where other programs use the same cores, since its threads wait for each other. An error is raised in the
    calling thread, and ends the work.

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
