"""Merge sums across processes in a fixed number of collectives.

An exchange is a generator that yields a float64 tensor and receives the sum of the tensors that all processes
yielded at that point, see :meth:`.Sum.exchange`. :func:`run_together` drives exchanges in lockstep: the first
yields of all layers and statistics travel in one all-reduce, the second yields in another. First come a few
numbers per sum to agree on its width, which a process without rows lacks; then numbers to agree on an origin;
then the sums. The sums may go only to the process that reads them.

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
    """A tensor whose sum goes only to the process that reads the result; others may receive None."""


class Piece(NamedTuple):
    """Numbers that are written straight into the tensor to send, so that memory holds them once.

    Attributes:
        size: number of values.
        write: writes the numbers into a tensor of shape (size,), float64, on the device of the sum.
    """

    size: int
    write: Callable[[Tensor], object]

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """A piece of all numbers of a tensor."""
        return cls(tensor.numel(), lambda out: out.copy_(tensor.reshape(-1)))

    @classmethod
    def of_sum(cls, matrix: Tensor, left: Tensor, right: Tensor) -> Piece:
        """A piece of the sum of a matrix and the product ``left @ right``, row after row."""
        return cls(matrix.numel(), lambda out: torch.addmm(matrix, left, right, out=out.view(matrix.shape)))


class Pieces(list[Piece]):
    """Pieces that an exchange yields in place of one :class:`ForReader` tensor.

    Args:
        home: the device on which the pieces are written.
    """

    def __init__(self, home: torch.device) -> None:
        super().__init__()
        self.home = home

    @property
    def size(self) -> int:
        """The number of values."""
        return sum(piece.size for piece in self)

    def write(self, out: Tensor) -> None:
        """Write the numbers into a tensor of shape (size,), on any device."""
        for piece, part in zip(self, out.split([piece.size for piece in self]), strict=True):
            if out.device == self.home:
                piece.write(part)
            else:
                written = part.new_empty(piece.size, device=self.home)
                piece.write(written)
                part.copy_(written)


class Largest(Tensor):
    """A tensor whose elementwise maximum over the processes is received, and not the sum."""


def run_together(exchanges: Sequence[Exchange], group: Any = None, reader: int | None = None) -> list[Any]:
    """Run exchanges in lockstep, with one collective for all per step; return the result of each.

    Args:
        exchanges: the same number in the same order on every process of the group.
        group: the process group; the default group if None.
        reader: rank in the group of the only process that gets results, others get None; None: all get them.
    """
    everything = together(exchanges, communication_device(group))
    received: Tensor | None = None  # begins the generator
    while True:
        try:
            packed = everything.send(received)
        except StopIteration as finished:
            results: list[Any] = finished.value
            return results
        received = summed = packed.as_subclass(Tensor)
        op = dist.ReduceOp.MAX if isinstance(packed, Largest) else dist.ReduceOp.SUM
        if reader is None or not isinstance(packed, ForReader):
            dist.all_reduce(summed, op=op, group=group)
            continue
        dist.reduce(summed, op=op, group=group, group_dst=reader)
        if dist.get_rank(group) != reader:
            received = None  # only the reader's memory holds the sum
        del packed, summed  # as large as the whole message


def together(
    exchanges: Sequence[Exchange], device: torch.device | str = "cpu"
) -> Generator[Tensor, Tensor | None, list[Any]]:
    """Combine exchanges into one; each yield packs into one tensor all their tensors that are reduced alike.

    Args:
        exchanges: the exchanges, which may end after different numbers of yields.
        device: the device of the yielded tensors; each exchange receives its part on the device it sent from.
    """
    results: list[Any] = [None] * len(exchanges)
    waiting: dict[int, Tensor | Pieces] = {}

    def advance(index: int, received: Tensor | None) -> None:
        try:
            waiting[index] = exchanges[index].send(received)
        except StopIteration as finished:
            results[index] = finished.value

    for index in range(len(exchanges)):
        advance(index, None)
    while waiting:
        # Tensors that are reduced by their maximum travel alone.
        largest = sorted(index for index, each in waiting.items() if isinstance(each, Largest))
        order = largest or sorted(waiting)
        # If all processes need one of the parts, all receive the whole tensor.
        is_for_reader = all(isinstance(waiting[index], (ForReader, Pieces)) for index in order)
        kind = Largest if largest else ForReader if is_for_reader else Tensor
        layout = [
            (torch.Size([sent.size]), sent.home) if isinstance(sent, Pieces) else (sent.shape, sent.device)
            for sent in map(waiting.__getitem__, order)
        ]
        sizes = [shape.numel() for shape, _ in layout]
        packed = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        for index, part in zip(order, packed.split(sizes), strict=True):
            # Exchanges do not keep tensors that they have yielded; nor does this loop.
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
    """Gather the objects of all processes of a group, on all of them.

    Unlike PyTorch's ``all_gather_object`` it takes no more memory than all objects together, also if one
    process has most of the bytes, and it needs no backend for tensors on the CPU.

    Args:
        value: anything that can be pickled.
        group: the process group; the default group if None. Without one the value is the only one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
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
        # Each byte is zero on all processes but one, so that the sum is this process' byte.
        moved = piece.to(device)
        dist.all_reduce(moved, group=group)
        if moved is not piece:
            piece.copy_(moved)
    return [pickle.loads(everything[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]


def agree(
    num_features: int, is_known: bool, rank: int, world_size: int, own: Tensor | None = None
) -> Generator[Tensor, Tensor, tuple[int | None, Tensor]]:
    """The first step of an exchange: agree on the width of all processes with data.

    Args:
        num_features: the width of this process' sum; 0 without data.
        is_known: True if the result of an earlier exchange is still right here.
        rank: the rank of this process in the group.
        world_size: the number of processes in the group.
        own: further numbers of this process to gather in the same step, shape (n,).

    Returns:
        The width, 0 if none has data, None if all have the result of an earlier exchange and need no other; and
        the gathered numbers, shape (world_size, n), on the CPU.

    Raises:
        ValueError: if the widths differ.
    """
    own = torch.empty(0, device="cpu") if own is None else own
    header = torch.zeros(world_size, 2 + len(own), dtype=torch.float64, device="cpu")
    header[rank, :2] = torch.tensor([num_features, not is_known], dtype=torch.float64, device="cpu")
    header[rank, 2:] = own
    header = (yield header).cpu()
    return (agree_on_width(header[:, 0]) if header[:, 1].any() else None), header[:, 2:]


def agree_on_width(widths: Tensor) -> int:
    """The width on all processes with data; 0 if none has data.

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
