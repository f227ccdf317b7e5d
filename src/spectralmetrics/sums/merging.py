"""Merge sums across processes in a fixed number of collectives.

What is merged is written as a generator that yields a float64 tensor and receives the sum of what all
processes yielded at that point, see :meth:`.Sum.exchange`. :func:`run_together` drives any number of them in
lockstep, so that the first yields of all layers and statistics travel in one all-reduce, and the second in
another: first a few numbers per sum to agree on its width, since a process that saw no rows does not know it,
then what an origin is agreed on by, then the sums. These may go to the one process that reads them.

>>> def average(value):
...     total = yield torch.tensor([value, 1.0], dtype=torch.float64)
...     return float(total[0] / total[1])
>>> exchange = together([average(2.0), average(4.0)])
>>> sent = next(exchange)
>>> try:
...     exchange.send(2 * sent)  # as if another process had sent the same
... except StopIteration as finished:
...     finished.value
[2.0, 4.0]
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.sums.sum import Exchange

_MOST_BYTES = 2**25  # of one collective of :func:`gather_objects`


class ForReader(Tensor):
    """A tensor whose sum only the process that reads the result receives; others may receive None."""


class Piece(NamedTuple):
    """Numbers that are written where they are sent from, so that they are in memory once.

    Attributes:
        size: their number.
        write: puts them into a tensor of shape (size,), float64, on the device of the sum.
    """

    size: int
    write: Callable[[Tensor], object]

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """All numbers of a tensor."""
        return cls(tensor.numel(), lambda out: out.copy_(tensor.reshape(-1)))

    @classmethod
    def of_sum(cls, matrix: Tensor, left: Tensor, right: Tensor) -> Piece:
        """A matrix and the product of two others, row after row."""
        return cls(matrix.numel(), lambda out: torch.addmm(matrix, left, right, out=out.view(matrix.shape)))


class Pieces(list[Piece]):
    """Pieces that an exchange yields as one tensor for whoever reads the result.

    Args:
        home: the device on which they are written.
    """

    def __init__(self, home: torch.device) -> None:
        super().__init__()
        self.home = home

    @property
    def size(self) -> int:
        """The number of values."""
        return sum(piece.size for piece in self)

    def write(self, out: Tensor) -> None:
        """Put the numbers into a tensor of shape (size,), on any device."""
        for piece, part in zip(self, out.split([piece.size for piece in self]), strict=True):
            if out.device == self.home:
                piece.write(part)
            else:
                here = part.new_empty(piece.size, device=self.home)
                piece.write(here)
                part.copy_(here)


class Largest(Tensor):
    """A tensor of which the largest of each number is received, and not the sum."""


def run_together(exchanges: Sequence[Exchange], group: Any = None, reader: int | None = None) -> list[Any]:
    """Run exchanges in lockstep, one collective for all of them per step; return what each returns.

    Args:
        exchanges: the same number in the same order on every process of the group.
        group: the process group; the default group if None.
        reader: the process of the group that needs the results, others get None; None for all of them.
    """
    everything = together(exchanges, communication_device(group))
    received: Tensor | None = None
    summed: Tensor
    is_first = True
    while True:
        try:
            packed = next(everything) if is_first else everything.send(received)
        except StopIteration as finished:
            results: list[Any] = finished.value
            return results
        is_first = False
        summed = packed.as_subclass(Tensor)
        received = summed
        op = dist.ReduceOp.MAX if isinstance(packed, Largest) else dist.ReduceOp.SUM
        if reader is None or not isinstance(packed, ForReader):
            dist.all_reduce(summed, op=op, group=group)
            continue
        dist.reduce(summed, _global_rank(group, reader), op=op, group=group)
        if dist.get_rank(group) != reader:
            received = None  # what is there is of no use
        del packed, summed  # as large as all that is sent


def together(
    exchanges: Sequence[Exchange], device: torch.device | str = "cpu"
) -> Generator[Tensor, Tensor | None, list[Any]]:
    """Several exchanges as one, whose yields are all of theirs in one tensor that are reduced alike.

    Args:
        exchanges: may end after different numbers of yields.
        device: the device of what is yielded; each exchange receives its part where it sent it from.
    """
    results: list[Any] = [None] * len(exchanges)
    waiting: dict[int, Tensor | Pieces] = {}

    def advance(index: int, received: Tensor | None, is_first: bool = False) -> None:
        exchange = exchanges[index]
        try:
            waiting[index] = next(exchange) if is_first else exchange.send(received)
        except StopIteration as finished:
            results[index] = finished.value

    for index in range(len(exchanges)):
        advance(index, None, is_first=True)
    while waiting:
        # What is reduced in another way travels by itself.
        largest = sorted(index for index, each in waiting.items() if isinstance(each, Largest))
        order = largest or sorted(waiting)
        # With anything in it that all must have, all get the whole.
        is_for_reader = all(isinstance(waiting[index], (ForReader, Pieces)) for index in order)
        kind = Largest if largest else ForReader if is_for_reader else Tensor
        layout = [
            (torch.Size([sent.size]), sent.home) if isinstance(sent, Pieces) else (sent.shape, sent.device)
            for sent in map(waiting.__getitem__, order)
        ]
        sizes = [shape.numel() for shape, _ in layout]
        packed = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        for index, part in zip(order, packed.split(sizes), strict=True):
            # The exchanges keep nothing that they have yielded, nor is it kept here.
            sent = waiting.pop(index)
            if isinstance(sent, Pieces):
                sent.write(part)
            else:
                part.copy_(sent.as_subclass(Tensor).reshape(-1))
            del sent, part
        received = yield packed.as_subclass(kind)
        del packed
        if received is None:
            for index in order:
                advance(index, None)
            continue
        for index, part, (shape, home) in zip(order, received.split(sizes), layout, strict=True):
            advance(index, part.reshape(shape).to(home))
    return results


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The objects of all processes of a group, on all of them.

    Unlike ``all_gather_object`` of PyTorch it takes no more memory than all of it together, also if one
    process has most of it, and no backend for tensors on the CPU.

    Args:
        value: anything that can be pickled.
        group: the process group; the default group if None.
    """
    rank, world, device = dist.get_rank(group), dist.get_world_size(group), communication_device(group)
    own = pickle.dumps(value)
    sizes = torch.zeros(world, dtype=torch.int64, device=device)
    sizes[rank] = len(own)
    dist.all_reduce(sizes, group=group)
    ends = sizes.cumsum(0).tolist()
    start, everything = ends[rank] - len(own), bytearray(ends[-1])
    everything[start : ends[rank]] = own
    view = torch.frombuffer(everything, dtype=torch.uint8)
    for piece in view.split(_MOST_BYTES):
        # Each byte is zero on all processes but one, so that the sum is that one's.
        moved = piece.to(device)
        dist.all_reduce(moved, group=group)
        if moved is not piece:
            piece.copy_(moved)
    return [pickle.loads(everything[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]


def _global_rank(group: Any, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def agree(
    num_features: int, is_known: bool, rank: int, world_size: int
) -> Generator[Tensor, Tensor, int | None]:
    """The first step of an exchange: the width that all processes with data have; 0 if none has data.

    None if all know the result of an earlier exchange, which needs no other then.

    Raises:
        ValueError: if the widths differ.
    """
    width, _ = yield from agree_beside(num_features, is_known, rank, world_size, torch.empty(0, device="cpu"))
    return width


def agree_beside(
    num_features: int, is_known: bool, rank: int, world_size: int, own: Tensor
) -> Generator[Tensor, Tensor, tuple[int | None, Tensor]]:
    """As :func:`agree`, and in the same step what each process has, shape (world_size, n), on the CPU.

    Args:
        num_features: see :func:`agree`.
        is_known: likewise.
        rank: likewise.
        world_size: likewise.
        own: what this process has, shape (n,).
    """
    header = torch.zeros(world_size, 2 + len(own), dtype=torch.float64, device="cpu")
    header[rank, :2] = torch.tensor([num_features, not is_known], dtype=torch.float64, device="cpu")
    header[rank, 2:] = own
    header = (yield header).cpu()
    return (agree_on_width(header[:, 0]) if header[:, 1].any() else None), header[:, 2:]


def agree_on_width(widths: Tensor) -> int:
    """The width that all processes with data have; 0 if none has data.

    Args:
        widths: one number for each process, 0 where there is no data.

    Raises:
        ValueError: if they differ.
    """
    known = sorted({int(width) for width in widths if width > 0})
    if len(known) > 1:
        each = ", ".join(f"{int(width)} on process {rank}" for rank, width in enumerate(widths) if width > 0)
        raise ValueError(f"expected the same number of features on every process, got {each}")
    return known[0] if known else 0


def communication_device(group: Any) -> torch.device:
    """The device of tensors that the processes of a group exchange."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
