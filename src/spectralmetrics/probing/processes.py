"""The process groups in which a probe's metrics are merged, and errors that all processes of a group get."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.sums.merging import communication_device, gather_objects

T = TypeVar("T")

NO_GROUP: Any = object()
"""Stands for a process group if this process works alone."""


def is_one_of_several() -> bool:
    """True if there is a default process group with other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def digest(text: str) -> int:
    """A number that is equal for equal texts; with either sign it fits into a tensor of int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def extremes(numbers: Sequence[int], group: Any) -> tuple[list[int], list[int]]:
    """The largest and the smallest value of each number over the processes of a group; one collective."""
    both = torch.tensor(
        [*numbers, *(-each for each in numbers)], dtype=torch.int64, device=communication_device(group)
    )
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    largest = both.tolist()
    return largest[: len(numbers)], [-each for each in largest[len(numbers) :]]


def merging_group(places: Iterable[LayerMetrics]) -> Any:
    """The one process group in which all metrics of these layers are merged; NO_GROUP if there is none."""
    group = _common_group(places)
    return group if group is not NO_GROUP and has_others(group) else NO_GROUP


def reading_group(places: Iterable[LayerMetrics]) -> Any:
    """The process group whose processes read these layers together; its first process warns and writes.

    It is the group in which all metrics are merged, or the default group if there is no such group.
    """
    group = _common_group(places)
    return None if group is NO_GROUP else group


def _common_group(places: Iterable[LayerMetrics]) -> Any:
    groups = {each.process_group if is_merged(each) else NO_GROUP for place in places for each in place.leaders}
    return groups.pop() if len(groups) == 1 else NO_GROUP


def merging_groups(places: Iterable[LayerMetrics]) -> list[Any]:
    """The process groups in which metrics of these layers are merged, in the order of the metrics."""
    leaders = [each for place in places for each in place.leaders if is_merged(each)]
    return [group for group in dict.fromkeys(each.process_group for each in leaders) if has_others(group)]


def merges_nothing(places: Iterable[LayerMetrics]) -> bool:
    """True if no metric of these layers is merged across processes."""
    return not any(is_merged(each) for place in places for each in place.leaders)


def has_others(group: Any) -> bool:
    """True if this process is in the group and the group has other processes."""
    return is_one_of_several() and dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def is_first(group: Any) -> bool:
    """True if this process warns and writes for its group; a process outside of the group does for itself."""
    return not has_others(group) or dist.get_rank(group) == 0


def is_merged(metric: Any) -> bool:
    """True if a metric is merged across processes when it is computed."""
    return bool(metric.sync_on_compute and metric.distributed_available_fn())


def gather_agreed(value: T, error: BaseException | None, group: Any) -> list[T]:
    """The values of all processes; raises an error on all processes if one had an error."""
    described = None if error is None else in_words(error)
    gathered = gather_objects((described, value), group)
    if error is not None:
        raise error
    if failed := [(number, words) for number, (words, _) in enumerate(gathered) if words is not None]:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError("; ".join(f"process {ranks[number]} raised {words}" for number, words in failed))
    return [each for _, each in gathered]


def check_agreed(error: BaseException | None, group: Any, call: str = "") -> None:
    """Raise an error on all processes if one has an error, or if their calls differ; otherwise one collective.

    A call comes with the arguments that must be equal on all processes.
    """
    (has_failed, high), (_, low) = extremes([error is not None, digest(call)], group)
    if has_failed or high != low:
        check_calls(gather_agreed(call, error, group), group)


def check_calls(calls: Sequence[str], group: Any) -> None:
    """Raise a ValueError if the calls of a group's processes, in the order of ranks, differ."""
    other = next((rank for rank, call in enumerate(calls) if call != calls[0]), None)
    if other is not None:
        ranks = dist.get_process_group_ranks(group)
        raise ValueError(
            f"expected the same call on all processes, got {calls[0]} on process {ranks[0]} and {calls[other]}"
            f" on process {ranks[other]}"
        )


def agreed(function: Callable[[], T], groups: Iterable[Any], call: str = "") -> T:
    """Call a function; raise an error on all processes of these groups if one had an error or another call.

    An interrupt from the keyboard can stop the function. All processes give the groups in the same order.
    """
    value: Any = None
    error: BaseException | None = None
    try:
        with interruptible():
            value = function()
    except BaseException as raised:
        error = raised
    for group in groups:
        try:
            check_agreed(error, group, call)
        except BaseException as raised:
            error = raised
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


class _Waiting:
    """A handler of the interrupt from the keyboard that delays it until :meth:`deliver`."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler
        self._came: list[tuple[Any, ...]] = []

    def __call__(self, *signal_and_frame: Any) -> None:
        self._came.append(signal_and_frame)

    def deliver(self) -> None:
        if self._came:
            signal_and_frame, self._came = self._came[0], []
            self.handler(*signal_and_frame)


def _handler() -> Any:
    """The handler of the interrupt from the keyboard; None if an interrupt need not wait."""
    if not is_one_of_several() or threading.current_thread() is not threading.main_thread():
        return None  # no process waits, or another thread gets it
    handler = signal.getsignal(signal.SIGINT)
    return handler if callable(handler) else None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay an interrupt from the keyboard to the end of the context, or to :func:`interruptible` inside it.

    If a process stopped between two collectives, the others would wait for it.
    """
    handler = _handler()
    if handler is None or isinstance(handler, _Waiting):
        yield
        return
    waiting = _Waiting(handler)
    signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        waiting.deliver()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let an interrupt from the keyboard raise at once; the caller must send the error to all processes."""
    waiting = _handler()
    if not isinstance(waiting, _Waiting):
        yield
        return
    signal.signal(signal.SIGINT, waiting.handler)
    try:
        waiting.deliver()
        yield
    finally:
        signal.signal(signal.SIGINT, waiting)


def on_first_process(
    function: Callable[[], T], group: Any, serve: Callable[[], None] | None = None
) -> tuple[T, BaseException | None]:
    """Call a function on the first process of a group; on this process if it is in no group with others.

    Args:
        function: the function to call.
        group: the process group.
        serve: called meanwhile on the other processes, and afterwards on the first process.

    Returns:
        The function's value and the error or None, on all processes.
    """
    value: Any = None
    error: BaseException | None = None
    if not has_others(group):
        try:
            value = function()
        except BaseException as raised:
            error = raised
        return value, error
    with uninterrupted():
        try:
            if is_first(group):
                with interruptible():
                    value = function()
        except BaseException as raised:
            error = raised
        try:
            if serve is not None:
                serve()
        except BaseException as raised:
            error = error or raised
        gathered = gather_objects((value, None if error is None else portable(error)), group)
    value, error_of_first = gathered[0]
    ranks = dist.get_process_group_ranks(group)
    failed = {rank: each for rank, (_, each) in zip(ranks, gathered, strict=True) if each is not None}
    if error is None and failed:
        error = error_of_first
        if not isinstance(error, Exception):
            words = (f"process {rank} raised {in_words(each)}" for rank, each in failed.items())
            error = RuntimeError("; ".join(words))
    return value, error


def from_first_process(function: Callable[[], T], group: Any) -> T:
    """The value of :func:`on_first_process`; raises its error."""
    value, error = on_first_process(function, group)
    if error is not None:
        raise error
    return value


def portable(error: BaseException) -> BaseException:
    """The error, or a RuntimeError with its words if it cannot be sent to other processes."""
    if not is_one_of_several():
        return error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(in_words(error))
    return error


def in_words(error: BaseException) -> str:
    """Type and message of an error."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")
