"""Sums about an origin near the data, whatever they keep of the products, and how the origin follows the data.

The origin moves to the mean of new rows, and the sums move with it, exactly. They are exact about any origin,
so that it need not be the mean to the last digit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from spectralmetrics.sums.arithmetic import as_rows, block_rows, clear, row_flags, workspace
from spectralmetrics.sums.merging import Piece, Pieces, agree
from spectralmetrics.sums.sum import Exchange, SpectralSum

MOST_BYTES = 2**25
"""The most bytes of one collective, unless a single row of a matrix is larger."""
_ROWS_BYTES = 2**22  # the most bytes of matrix rows that are moved to another origin at a time
_BLOCK = 256  # features of dense sums that are moved at once


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
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.origin.shape[0]

    @property
    def num_observations(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.count

    @property
    def num_left_out(self) -> Tensor:
        """See :class:`.SpectralSum`."""
        return self.non_finite

    @property
    def each(self) -> tuple[Self, ...]:
        """The parts that are exchanged: this sum alone."""
        return (self,)

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

    def _slots(self) -> Iterator[Tensor]:
        """The tensors, or parts of them, that take what the :meth:`_pieces` add up to, in their order."""
        for name in sorted(self.additive):
            yield getattr(self, name)

    def exchange(self, known: Self | None, rank: int, world_size: int) -> Exchange:
        """See :class:`.Sum`."""
        return exchange_about_origins(self, known, rank, world_size)

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


class DenseSums(AboutOrigin):
    """Sums about an origin that hold the products of all features, as :class:`.Moments` do.

    Attributes:
        second: the sum of products about the origin, shape (D, D), float64; only the upper triangle counts.
    """

    second: Tensor

    def moved_by(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two factors whose product moves ``second`` to the origin minus ``shift``, and ``first`` about it."""
        # S + s d' + d s' + n d d'  =  S + (s + n d / 2) d' + d (s + n d / 2)'
        count = self.count.to(torch.float64)
        half = self.first + 0.5 * count * shift
        return torch.stack([half, shift], dim=1), torch.stack([shift, half], dim=0), self.first + count * shift


def recentre(moments: DenseSums, piece: Tensor, dim: int, valid: Tensor | None, dtype: torch.dtype) -> None:
    """Move the origin, and the sums with it, to the mean of rows, unless these are too few.

    Args:
        moments: the sums so far.
        piece: shape (N, D) with the features in dimension -1, or (D, b, p) with them in dimension 0.
        dim: the dimension of the features.
        valid: shape (N,), boolean; None if all rows count.
        dtype: the dtype to compute the mean in.
    """
    rounded = piece.dtype != torch.float64
    rows = as_rows(workspace(piece, "rows", piece.shape, dtype).copy_(piece), dim)
    if is_read_freely(rows) and valid is None:
        # Finite rows take half of the passes.
        pivot = rows[0].to(torch.float64, copy=True)
        total = rows.new_ones(len(rows)) @ rows.sub_(pivot.to(dtype))
        if total.isfinite().all():
            kept = torch.full((), len(rows), device="cpu")
            move(moments, next_origin(moments, pivot, total, kept, rounded=rounded))
            return
        rows = as_rows(workspace(piece, "rows", piece.shape, dtype).copy_(piece), dim)
    mask = row_flags(rows)
    mask = mask if valid is None else mask & valid.unsqueeze(1)
    pivot = rows.index_select(0, first_of(mask[:, 0]))[0].to(torch.float64)
    rows.sub_(pivot.to(dtype))
    clear(rows, mask)
    move(moments, next_origin(moments, pivot, rows.sum(0), mask.sum(), rounded=rounded))


def next_origin(
    sums: AboutOrigin, pivot: Tensor, total: Tensor, kept: Tensor, *, rounded: bool = False
) -> Tensor:
    """The next origin: the mean of the rows, or the present origin if the rows are too few.

    Args:
        sums: the sums so far.
        pivot: one of the rows, so that constant features are centred to exactly zero; shape (D,), float64.
        total: the sum of the rows minus ``pivot``, shape (D,).
        kept: the number of rows, shape ().
        rounded: True rounds the origin to float32, so that float32 rows minus the origin is one subtraction.
    """
    about_pivot = total.to(torch.float64) / kept.clamp(min=1)
    origin = pivot + torch.where(about_pivot.isfinite(), about_pivot, 0)
    if rounded:
        nearest = origin.to(torch.float32).to(torch.float64)
        origin = torch.where(nearest.isfinite(), nearest, origin)
    # A few rows that are unlike the rest, such as a last incomplete batch, must not move the origin far.
    return torch.where((kept > 0) & (kept.square() >= sums.count), origin, sums.origin)


def move(moments: DenseSums, origin: Tensor) -> None:
    """Move sums to another origin, in place."""
    # Without observations the sums are zero and the origin has no meaning: a shift must leave them zero.
    shift = torch.where(moments.count > 0, moments.origin - origin, 0)
    if not is_read_freely(shift) or shift.any():
        left, right, first = moments.moved_by(shift)
        for start, stop in block_rows(shift, _BLOCK):
            moments.second[start:stop, start:].addmm_(left[start:stop], right[:, start:])
        moments.first.copy_(first)
    moments.origin.copy_(origin)


def first_of(flags: Tensor) -> Tensor:
    """The index of the first set flag, or 0 if none is set, shape (1,); reads nothing from a device."""
    return flags.to(torch.uint8).argmax().reshape(1)


def is_read_freely(values: Tensor) -> bool:
    """True if the program may branch on values, because reading them waits for no device."""
    return values.is_cpu


def exchange_about_origins(sums: Any, known: Any, rank: int, world_size: int) -> Exchange:
    """The exchange of a sum whose parts (``each``) are about origins; see :meth:`.Sum.exchange`.

    Processes agree on an origin for each part, move their sums there and add the additive tensors. The size of
    a message does not grow with the number of processes.
    """
    width, _ = yield from agree(sums.num_features, known is not None, rank, world_size)
    if not width:
        return known if width is None else None
    home = sums.anchor.device
    parts: tuple[AboutOrigin, ...] = (sums if sums.num_features else sums.empty(width, home)).each
    counts = torch.stack([each.count for each in parts]).to(torch.float64)[:, None]
    means = [each.count * each.origin + each.first for each in parts]
    # The origin need only lie near the data, so this mean may be rounded: the sums about it are exact.
    total = yield torch.cat([counts, torch.stack(means)], 1)
    origins = total[:, 1:] / total[:, :1].clamp(min=1)
    pieces = (piece for each, origin in zip(parts, origins, strict=True) for piece in each._pieces(origin))
    result: Any = None  # made only where it is read
    slots: Iterator[Tensor] = iter(())
    for batch in _batches(pieces, home):
        received = yield batch
        if received is None:
            continue
        if result is None:
            with torch.inference_mode(False):
                result = sums.empty(width, home)
                for target, origin in zip(result.each, origins, strict=True):
                    target.origin.copy_(origin)
            slots = (slot for target in result.each for slot in target._slots())
        while len(received):
            slot = next(slots)
            slot.copy_(received[: slot.numel()].reshape(slot.shape))
            received = received[slot.numel() :]
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


def rows_at_a_time(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """Slices of a matrix' rows, each of limited bytes and at most ``most`` rows."""
    step = max(min(_ROWS_BYTES // (8 * max(columns, 1)), most or rows), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
