"""Parts of tensors that are spread over processes, and the exchanges that make some of their rows whole."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.torch_private import group_named, masked_parts, spec_of_part, waited


class LeftOut(Exception):  # noqa: N818  # no error
    """Raised to leave a layer out, with the reason."""


def reason_of(error: Exception) -> str:
    """The reason why a layer is not observed any more, in words."""
    return str(error) if isinstance(error, LeftOut) else f"{type(error).__name__}: {error}"


class Split(NamedTuple):
    """The placement along one dimension of a device mesh; replicated without ``dim`` and ``op``.

    Attributes:
        group: the processes along that dimension.
        rank: number of this process in the group.
        size: number of processes.
        dim: dimension of the tensor that is sharded; None if none is.
        op: reduction over the processes that is still to be done, such as ``"sum"``; empty for none.
    """

    group: Any
    rank: int
    size: int
    dim: int | None = None
    op: str = ""

    @classmethod
    def along(cls, group: Any, dim: int | None = None, op: str = "") -> Split:
        """The split along a group of processes, of which this process is one."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group), dim, op)

    @property
    def is_replicated(self) -> bool:
        """True if all processes have the same tensor."""
        return self.dim is None and not self.op

    def __str__(self) -> str:
        return (
            f"Shard({self.dim})" if self.dim is not None else f"Partial({self.op})" if self.op else "Replicate"
        )


class Span(NamedTuple):
    """A range of one dimension, and the size of the whole dimension."""

    start: int
    stop: int
    size: int

    def of(self, number: int) -> int:
        """The share of a number that belongs to this range; the shares of all ranges add up to it.

        >>> [Span(k, k + 1, 3).of(5) for k in range(3)]
        [1, 2, 2]
        """
        return number * self.stop // self.size - number * self.start // self.size if self.size else 0


@dataclass(frozen=True)
class Part:
    """One process' part of a tensor.

    Attributes:
        local: the tensor of this process.
        shape: the shape of the whole tensor.
        stride: the stride of the whole tensor.
        splits: the splits in the order of the mesh's dimensions, without dimensions of one process.
    """

    local: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    splits: tuple[Split, ...]

    def travels(self, feature_dim: int) -> bool:
        """True if processes must exchange features or summands to get whole rows."""
        return any(split.op or split.dim == feature_dim for split in self.splits)

    def row_dims(self, feature_dim: int) -> list[int]:
        """The sharded dimensions other than the features."""
        return sorted({each.dim for each in self.splits if each.dim is not None} - {feature_dim})

    def spans(self, dim: int, before: int | None = None) -> Span:
        """This process' range of a dimension, after all splits or only those before number ``before``.

        Processes in turn get equal shares, rounded up, until nothing is left.
        """
        start, stop = 0, self.shape[dim]
        for split in self.splits[:before]:
            if split.dim == dim:
                chunk = -(-(stop - start) // split.size)
                start = min(start + chunk * split.rank, stop)
                stop = min(start + chunk, stop)
        return Span(start, stop, self.shape[dim])

    def sizes(self, number: int) -> list[int]:
        """The size of each process' shard along the dimension of a split, for all processes of its group."""
        split = self.splits[number]
        assert split.dim is not None
        whole = self.spans(split.dim, number)
        total = whole.stop - whole.start
        chunk = -(-total // split.size)
        return [max(0, min(chunk, total - chunk * index)) for index in range(split.size)]

    def standing_in(self) -> Tensor:
        """A tensor with the shape of the whole, on the same device, that takes no memory."""
        return self.local.new_zeros(()).expand(self.shape)

    def meta(self) -> Tensor:
        """A meta tensor with the shape and strides of the whole."""
        return torch.empty_strided(self.shape, self.stride, device="meta", dtype=self.local.dtype)

    def words(self) -> str:
        """The placements as PyTorch writes them."""
        return f"({', '.join(map(str, self.splits))})"


class Cut(NamedTuple):
    """The form of a part that is divided along one dimension and one mesh.

    Attributes:
        shape: the shape of this process' tensor.
        dim: the dimension, not negative.
        whole: its size in the whole tensor.
    """

    shape: tuple[int, ...]
    dim: int
    whole: int

    @classmethod
    def of(cls, part: Part) -> Cut | None:
        """The form of a part; None if it is divided otherwise or not at all."""
        if len(part.splits) != 1 or (dim := part.splits[0].dim) is None:
            return None
        return cls(tuple(part.local.shape), dim % part.local.ndim, part.shape[dim])


def is_dtensor(values: Any) -> bool:
    """True if this is a DTensor; there is none before PyTorch's module of DTensors has been imported."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(values, tensors.DTensor)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a layer, and DTensors in the place of parameters while it runs."""
    yield from module.parameters(recurse=False)
    yield from (each for each in vars(module).values() if isinstance(each, Tensor) and is_dtensor(each))


def dtensors_of(module: nn.Module) -> list[Any]:
    """The weights of a layer that are DTensors, or may be, or are parts of them between forwards."""
    return [
        each
        for each in weights_of(module)
        if type(each) is not nn.Parameter or is_dtensor(each.data) or spec_of_part(each) is not None
    ]


def part_of(values: Any) -> Part:
    """This process' part of a DTensor.

    Raises:
        LeftOut: for a placement other than ``Shard``, ``Replicate`` and ``Partial``.
    """
    mesh = values.device_mesh
    local = waited(values.to_local())
    local, placements = masked_parts(local, values.placements)
    # Along a dimension of one process nothing is divided, whatever its placement is called.
    divided = [(dim, each) for dim, each in enumerate(placements) if mesh.size(dim) > 1]
    splits = tuple(_split_of(mesh.get_group(dim), each, values.ndim) for dim, each in divided)
    return Part(local, tuple(values.shape), tuple(values.stride()), splits)


PLACED = "placed "
"""Prefix of the kind of a DTensor that was taken apart."""

_KINDS = ("Shard", "Replicate", "Partial")


def take_dtensor_apart(values: Any) -> tuple[list[Tensor], str]:
    """Plain tensors of a DTensor and a kind, from which :func:`part_from` makes a part; traced by Dynamo.

    The second tensor has no element: it carries the shape of the whole, which may be symbolic.
    """
    kinds, mesh = [], values.device_mesh
    for dim, placement in enumerate(values.placements):
        kind = type(placement).__name__ if mesh.size(dim) > 1 else "Replicate"
        if kind not in _KINDS:
            return [], f"a compiled layer whose output is placed as {kind} cannot be observed"
        detail = placement.dim if kind == "Shard" else placement.reduce_op if kind == "Partial" else ""
        kinds.append(f"{kind}:{detail}")
    names = [mesh.get_group(dim).group_name for dim in range(len(kinds))]
    local = values.detach().to_local()
    return [local, local.new_empty((*values.shape, 0))], f"{PLACED}{','.join(kinds)} {','.join(names)}"


def part_from(parts: Sequence[Tensor], kind: str) -> Part:
    """The part of a DTensor that :func:`take_dtensor_apart` has taken apart."""
    local, form = parts
    kinds, names = kind.removeprefix(PLACED).split(" ")
    splits = []
    for each, name in zip(kinds.split(","), names.split(","), strict=True):
        placement, detail = each.split(":")
        dim = int(detail) % local.ndim if placement == "Shard" else None
        splits.append(Split.along(group_named(name), dim, detail if placement == "Partial" else ""))
    shape = tuple(form.shape[:-1])
    stride = torch.empty(shape, device="meta").stride()
    return Part(waited(local), shape, stride, tuple(split for split in splits if split.size > 1))


def _split_of(group: Any, placement: Any, ndim: int) -> Split:
    if type(placement).__name__ not in _KINDS:
        raise LeftOut(
            f"its placement is {placement}; of a DTensor, Shard, Replicate and Partial can be observed"
        )
    dim = getattr(placement, "dim", None)
    return Split.along(group, None if dim is None else dim % ndim, getattr(placement, "reduce_op", ""))


def exchange(rows: Tensor, split: Split, widths: Sequence[int] | None) -> Tensor:
    """This process' share of rows, made whole from the features or summands of all processes of a group.

    It takes one collective, which sends as many bytes as the rows have.

    Args:
        rows: (n, …, d), n the same on all processes.
        split: the split along the group.
        widths: the number of features d of each process; None to reduce summands.

    Returns:
        Shape (m, …, Σd) or (m, …, d); the m of all processes add up to n.
    """
    number, size = len(rows), split.size
    cuts = [own_of(number, split._replace(rank=rank)) for rank in range(size)]
    counts = [cut.stop - cut.start for cut in cuts]
    inner = rows.shape[1:-1]
    each = math.prod(inner)
    widths_in = [rows.shape[-1]] * size if widths is None else list(widths)
    own = counts[split.rank]
    incoming = [own * each * width for width in widths_in]
    received = _swapped(rows, incoming, [count * each * rows.shape[-1] for count in counts], split.group)
    pieces = [
        piece.view(own, *inner, width) for piece, width in zip(received.split(incoming), widths_in, strict=True)
    ]
    return torch.cat(pieces, -1) if widths is not None else _reduced(torch.stack(pieces), split.op)


def sent_rows(rows: Tensor, incoming: Sequence[int], outgoing: Sequence[int], group: Any) -> Tensor:
    """The rows (n, d) that each process in turn has sent to this one, for the rows for each; one collective."""
    width = rows.shape[1]
    sizes = [number * width for number in incoming], [number * width for number in outgoing]
    return _swapped(rows, *sizes, group).view(-1, width)


def _swapped(values: Tensor, incoming: Sequence[int], outgoing: Sequence[int], group: Any) -> Tensor:
    """Flat values from each process, in exchange for values for each; the numbers are given; one collective."""
    item = values.element_size()
    sent = values.contiguous().view(-1).view(torch.uint8)  # not every backend supports every dtype
    received = sent.new_empty(sum(incoming) * item)
    sizes = [number * item for number in incoming], [number * item for number in outgoing]
    dist.all_to_all_single(received, sent, *sizes, group=group)
    return received.view(values.dtype)


def whole_of(part: Part) -> Tensor:
    """The whole tensor, on every process that has a part of it; a collective for each split of it."""
    values = part.local
    for number in reversed(range(len(part.splits))):
        split = part.splits[number]
        if split.op:
            values = _reduced(torch.stack(_of_all(values, split, 0, [1] * split.size)), split.op)
        elif split.dim is not None:
            values = torch.cat(_of_all(values, split, split.dim, part.sizes(number)), split.dim)
    return values


def _of_all(values: Tensor, split: Split, dim: int, sizes: Sequence[int]) -> list[Tensor]:
    """The parts of all processes of a group; only the size of one dimension may differ."""
    rows = values[None] if split.op else values.movedim(dim, 0)
    shape = rows.shape[1:]
    incoming = [size * math.prod(shape) for size in sizes]
    # An all-gather would need parts of equal sizes.
    sent = rows.repeat(split.size, *[1] * (rows.ndim - 1))
    received = _swapped(sent, incoming, [rows.numel()] * split.size, split.group)
    pieces = [piece.view(size, *shape) for piece, size in zip(received.split(incoming), sizes, strict=True)]
    return [piece[0] if split.op else piece.movedim(0, dim) for piece in pieces]


def ranks_of(part: Part) -> list[int]:
    """The processes that share a tensor."""
    rank = dist.get_rank()
    others = [[each - rank for each in dist.get_process_group_ranks(split.group)] for split in part.splits]
    return [rank + sum(offsets) for offsets in itertools.product(*others)]


def first_rank(part: Part) -> int:
    """The first of the processes that share a tensor; it identifies them."""
    return ranks_of(part)[0]


# Name of a reduction of DTensors -> name of the method of a tensor.
_REDUCTIONS = {"sum": "sum", "avg": "mean", "max": "amax", "min": "amin", "product": "prod"}


def _reduced(pieces: Tensor, op: str) -> Tensor:
    if op not in _REDUCTIONS:
        raise LeftOut(f"its placement is Partial({op!r}), which is not known here")
    reduced: Tensor = getattr(pieces, _REDUCTIONS[op])(0)
    return reduced


def own_of(number: int, split: Split) -> Span:
    """The process' own range of a number of rows."""
    return Span(number * split.rank // split.size, number * (split.rank + 1) // split.size, number)
