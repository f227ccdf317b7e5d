"""The base class of sums about an origin near the data, whatever they keep of the products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor

from spectralmetrics.sums.merging import Piece, Pieces, agree
from spectralmetrics.sums.sum import SpectralSum

MOST_BYTES = 2**25
"""The most bytes of one collective, unless a single row of a matrix is larger."""
_ROWS_BYTES = 2**22  # the most bytes of matrix rows that are moved to another origin at a time

Slot: TypeAlias = tuple[int, Callable[[Tensor], None]]
"""A number of values, and the function that stores them in their tensors."""


class AboutOrigin(SpectralSum):
    """A sum over deviations from an origin, with their exact number, vector sum and squares.

    Attributes:
        count: the number of finite observations n, shape (), int64.
        non_finite: the number of observations left out, shape (), int64.
        origin: shape (D,), float64.
        first: the vector sum about the origin, shape (D,), float64.
    """

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first: Tensor

    @property
    def num_observations(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.count

    @property
    def num_left_out(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.non_finite

    @abstractmethod
    def squares(self) -> Tensor:
        """The sum of the squares of each feature about the origin, shape (D,), float64."""

    @abstractmethod
    def about(self, origin: Tensor) -> Self:
        """Return the same sums about another origin, exact up to rounding; these stay unchanged.

        Args:
            origin: shape (D,), float64.
        """

    def _pieces(self, origin: Tensor) -> Iterator[Piece]:
        """The additive sums about a common origin, piece by piece.

        Subclasses with a large matrix yield it some rows at a time, so that memory never holds it twice.
        """
        moved = self.about(origin)
        for name in sorted(self.additive):
            yield Piece.of(getattr(moved, name))

    def _slots(self) -> Iterator[Slot]:
        """The slots of this sum's tensors, in the order of the :meth:`_pieces`."""
        for name in sorted(self.additive):
            yield slot_of(getattr(self, name))

    def exchange(
        self, known: Self | None, rank: int, world_size: int
    ) -> Generator[Tensor | Pieces, Tensor | None, Self | None]:
        """See :class:`.Sum`."""
        width = yield from agree(self.num_features, known is not None, rank, world_size)
        if not width:
            return known if width is None else None
        mine = self if self.num_features else self.empty(width, self.count.device)

        def room() -> tuple[Self, Sequence[Self]]:
            merged = self.empty(width, self.count.device)
            return merged, [merged]

        merged: Self | None = yield from exchange_about_origins([mine], room)
        return merged

    def together_with(self, other: Self) -> Self:
        """Add sums of two disjoint sets of observations of one width, on one device; both stay unchanged."""
        # The origin of the larger side lies nearer to the common mean.
        origin = torch.where(self.count >= other.count, self.origin, other.origin)
        left: Any
        left, right = self.about(origin), other.about(origin)
        added = {name: getattr(left, name) + getattr(right, name) for name in self.additive}
        return cast("Self", replace(left, **added))

    def merged(self, other: Self) -> Self:
        """See :class:`.Sum`."""
        if other.settings() != self.settings():
            raise ValueError(f"expected a state of {self.settings()} to merge, got one of {other.settings()}")
        other = other.map(lambda tensor: tensor.to(self.count.device))
        if other.num_features == 0:
            return replace(self, non_finite=self.non_finite + other.non_finite)  # type: ignore[type-var]
        if self.num_features == 0:
            copied = other.map(torch.clone)
            return replace(copied, non_finite=copied.non_finite + self.non_finite)  # type: ignore[type-var]
        return self.together_with(other)

    def in_range(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.squares().isfinite().all()

    def mean(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.origin + self.first / self.count

    def centred(self, rows: Tensor) -> Tensor:
        """See :class:`.SpectralSum`."""
        return (rows.to(torch.float64) - self.origin) - self.first / self.count

    def variances(self, *, center: bool = True) -> Tensor:
        """See :class:`.SpectralSum`."""
        offset = self.first / self.count
        about_mean = self._given.get("variances")
        if about_mean is None:
            about_mean = (self.squares() / self.count - offset.square()).clamp_(min=0)
        return about_mean if center else about_mean + (self.origin + offset).square()


def exchange_about_origins(
    parts: Sequence[AboutOrigin], room: Callable[[], tuple[Any, Sequence[AboutOrigin]]]
) -> Generator[Tensor | Pieces, Tensor | None, Any]:
    """Add sums up across processes: agree on an origin for each, move the sums there, add the additive tensors.

    The size of a message does not grow with the number of processes.

    Args:
        parts: this process' sums, of one width.
        room: returns an empty result and the sums in it, one for each part; not called where the result is for
            another process.

    Returns:
        The result; None where it is for another process.
    """
    counts = torch.stack([each.count for each in parts]).to(torch.float64)[:, None]
    means = [each.count * each.origin + each.first for each in parts]
    # The origin need only lie near the data, so this mean may be rounded: the sums about it are exact.
    sums = yield torch.cat([counts, torch.stack(means)], 1)
    assert sums is not None
    origins = sums[:, 1:] / sums[:, :1].clamp(min=1)
    pieces = (piece for each, origin in zip(parts, origins, strict=True) for piece in each._pieces(origin))
    result: Any = None
    slots: Iterator[Slot] = iter(())
    for batch in _batches(pieces, parts[0].count.device):
        received = yield batch
        if received is None:
            continue
        if result is None:
            with torch.inference_mode(False):
                result, targets = room()
                for target, origin in zip(targets, origins, strict=True):
                    target.origin.copy_(origin)
            slots = (slot for target in targets for slot in target._slots())
        while len(received):
            size, put = next(slots)
            put(received[:size])
            received = received[size:]
    return result


def _batches(pieces: Iterator[Piece], home: torch.device) -> Iterator[Pieces]:
    """Group whole pieces, as many as fit into one collective."""
    waiting = Pieces(home)
    for piece in pieces:
        if waiting and 8 * (waiting.size + piece.size) > MOST_BYTES:
            yield waiting
            waiting = Pieces(home)
        waiting.append(piece)
    yield waiting


def slot_of(tensor: Tensor) -> Slot:
    """The slot of a whole tensor."""

    def put(numbers: Tensor) -> None:
        tensor.copy_(numbers.reshape(tensor.shape))

    return tensor.numel(), put


def rows_at_a_time(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """Slices of a matrix' rows, each of limited bytes and at most ``most`` rows."""
    step = max(min(_ROWS_BYTES // (8 * max(columns, 1)), most or rows), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
