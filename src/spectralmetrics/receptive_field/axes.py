"""Axes of receptive fields: the input positions that a position along one axis sees, and ways of operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

Way: TypeAlias = tuple[Fraction, Callable[[int], Iterable[int]]]
"""The way of an operation along an axis, (ratio, window): position i behind it sees the positions ``window(i)``
before it; where i grows by the ratio's denominator, these move on by its numerator."""

_MOST_PHASES = 4096


@dataclass(frozen=True)
class Axis:
    """The input positions that the positions of a tensor along one axis see.

    Position i < P sees the input positions ``first[i]`` to ``last[i]``, which go on beyond the borders;
    position i + P sees the same extent, ``step`` further on. P is above 1 where neighbours see different
    extents, as behind a transposed convolution.
    """

    first: tuple[float, ...] = (0,)
    last: tuple[float, ...] = (0,)
    step: Fraction = Fraction(1)

    @property
    def jump(self) -> Fraction:
        """Mean distance between neighbouring positions, in input positions."""
        return self.step / len(self.first)

    @property
    def extent(self) -> float:
        """Extent of the position that sees most; 0 if none sees anything."""
        return max(0, *(last - first + 1 for first, last in zip(self.first, self.last, strict=True)))

    def at(self, position: int) -> tuple[float, float]:
        """First and last input position that a position sees."""
        periods, phase = divmod(position, len(self.first))
        moved = periods * self.step
        return self.first[phase] + moved, self.last[phase] + moved

    def through(self, ratio: Fraction, window: Callable[[int], Iterable[int]]) -> Axis:
        """The axis behind an operation that takes it this way."""
        period = len(self.first)
        repeats = period // math.gcd(period, ratio.numerator)
        if repeats > 1 and ratio.denominator * repeats > _MOST_PHASES:
            alike = Axis(self.first[:1], (self.first[0] + self.extent - 1,), self.jump)
            return alike.through(ratio, window)
        seen = [[self.at(i) for i in window(o)] for o in range(ratio.denominator * repeats)]
        return Axis(
            tuple(min((first for first, _ in each), default=math.inf) for each in seen),
            tuple(max((last for _, last in each), default=-math.inf) for each in seen),
            self.step * ratio.numerator * repeats / period,
        )

    def everything(self) -> Axis:
        """This axis where each position sees the whole input."""
        return Axis((-math.inf,), (math.inf,), self.jump)

    def union(self, other: Axis) -> Axis:
        """The axis of this path and another one together, at the same positions."""
        if self.jump != other.jump:
            return self.either(other, max)
        seen = [(self.at(i), other.at(i)) for i in range(math.lcm(len(self.first), len(other.first)))]
        first = tuple(min(one[0], two[0]) for one, two in seen)
        return Axis(first, tuple(max(one[1], two[1]) for one, two in seen), self.jump * len(seen))

    def either(self, other: Axis, pick: Callable[[float, float], float]) -> Axis:
        """This axis or another one, by their extents, at the positions of the finer one.

        Axes with different jumps join where one was pooled to a single position, which is broadcast.
        """
        fine, coarse = (self, other) if self.jump <= other.jump else (other, self)
        if pick(fine.extent, coarse.extent) == fine.extent:
            return fine
        if fine.jump == coarse.jump:
            return coarse
        return replace(fine, last=tuple(first + coarse.extent - 1 for first in fine.first))


def window(kernel: int, stride: int, padding: int, dilation: int = 1) -> Way:
    """A convolution or a pool."""

    def seen(position: int) -> range:
        first = position * stride - padding
        return range(first, first + (kernel - 1) * dilation + 1, dilation)

    return Fraction(stride), seen


def transposed(kernel: int, stride: int, padding: int, dilation: int) -> Way:
    """A transposed convolution: a position sees those whose kernels cover it."""

    def seen(position: int) -> list[int]:
        last = position + padding
        taps = range(last - (kernel - 1) * dilation, last + 1, dilation)
        return [tap // stride for tap in taps if tap % stride == 0]

    return Fraction(1, stride), seen


def adaptive(before: int, after: int) -> Way:
    """An adaptive pool, whose windows overlap where the sizes do not divide each other."""
    return Fraction(before, after), lambda i: range(i * before // after, -(-(i + 1) * before // after))


def resized(ratio: Fraction, mode: str, antialias: bool) -> Way:
    """An interpolation between corners that are not aligned; those of aligned ones lie a fraction apart."""
    if mode.startswith("nearest"):
        middle = Fraction(1, 2) if mode == "nearest-exact" else 0
        return ratio, lambda i: [math.floor((i + middle) * ratio)]
    reach = (2 if mode == "bicubic" else 1) * (max(ratio, Fraction(1)) if antialias else 1)

    def seen(position: int) -> range:
        centre = (position + Fraction(1, 2)) * ratio - Fraction(1, 2)
        if not antialias and centre.denominator == 1:
            return range(int(centre), int(centre) + 1)
        return range(math.floor(centre - reach) + 1, math.ceil(centre + reach))

    return ratio, seen


def moved(start: int, step: int) -> Way:
    """A slice or a shift."""
    return Fraction(step), lambda i: [start + step * i]
