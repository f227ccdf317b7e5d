"""Observations in the memory layout in which a layer produced them."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralmetrics.sums.checks import dtype_or_type


@dataclass(frozen=True)
class Observations:
    """Observations in the memory layout in which a layer produced them.

    Attributes:
        values: floating tensor; every dimension but ``feature_dim`` enumerates observations.
        feature_dim: the dimension of size D that holds the features of one observation.
        valid: shape (N,), boolean, False for rows to skip, such as padding; None if all count.
        group: number of the batch's group, for example its forward: folds keep a group together. None: no other
            batch belongs to it.
        labels: class of each row, shape (N,), int64, negative for rows without a class; None without labels.
        forward: number of the forward that produced them, for histories. None: each batch is a forward of its
            own; -1: histories skip the batch.
        step: the optimiser's step that the forward belongs to; None if it is unknown.
        start: number of the first observation, if its source numbers observations one by one; None otherwise.

    >>> Observations(torch.zeros(8, 3, 4, 4), feature_dim=1).rows().shape
    torch.Size([128, 3])
    """

    values: Tensor
    feature_dim: int = -1
    valid: Tensor | None = None
    group: int | None = None
    labels: Tensor | None = None
    forward: int | None = None
    step: int | None = None
    start: int | None = None

    @property
    def num_features(self) -> int:
        """The width D of an observation."""
        return self.values.shape[self.feature_dim]

    @property
    def num_observations(self) -> int:
        """The number of observations N, including rows to skip."""
        return self.values.numel() // max(self.num_features, 1)

    def check(self) -> None:
        """Raise unless these are floating observations of at least one feature, and ``valid`` fits them.

        Raises:
            TypeError: for values that are not a floating tensor, a ``valid`` that is not boolean, or labels
                that are not integers.
            ValueError: for values without features or ``feature_dim``, or ``valid`` or labels of another
                length.
        """
        values, valid = self.values, self.valid
        numbered = (self.feature_dim, self.group or 0, self.forward or 0, self.step or 0, self.start or 0)
        for name, number in zip(("feature_dim", "group", "forward", "step", "start"), numbered, strict=True):
            if type(number) is not int and not isinstance(number, numbers.Integral):  # the first test is faster
                raise TypeError(f"expected {name} to be an integer, got {number!r}")
        if not isinstance(values, Tensor):
            raise TypeError(f"expected rows as a floating tensor of shape (N, D), got {type(values).__name__}")
        if not values.is_floating_point():
            raise TypeError(
                f"expected observations of a floating dtype, got {values.dtype}; cast them to float first"
            )
        if values.layout != torch.strided or values.is_nested:
            raise TypeError(f"expected observations as a dense tensor, got {_described(values)}")
        if values.ndim and not -values.ndim <= self.feature_dim < values.ndim:
            raise ValueError(
                f"expected feature_dim among the {values.ndim} dimensions of {tuple(values.shape)}, got"
                f" {self.feature_dim!r}"
            )
        if values.ndim == 0 or self.num_features == 0:
            raise ValueError(f"expected at least one feature, got rows of shape {tuple(values.shape)}")
        if valid is not None and (not isinstance(valid, Tensor) or valid.dtype != torch.bool):
            kind = dtype_or_type(valid)
            raise TypeError(f"expected valid as a boolean tensor, True for rows that count, got {kind}")
        if valid is not None and valid.shape != (self.num_observations,):
            raise ValueError(
                f"expected valid of shape ({self.num_observations},), got {tuple(valid.shape)}; give each"
                " observation one flag"
            )
        if self.labels is not None:
            self._check_labels(self.labels)

    def _check_labels(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex:
            kind = dtype_or_type(labels)
            raise TypeError(f"expected labels as an integer tensor, the class of each row, got {kind}")
        if labels.shape != (self.num_observations,):
            raise ValueError(
                f"expected labels of shape ({self.num_observations},), got {tuple(labels.shape)}; give each"
                " observation one class"
            )

    def rows(self) -> Tensor:
        """All observations as a matrix of shape (N, D); a view where the layout allows it."""
        return self.values.movedim(self.feature_dim, -1).reshape(-1, self.num_features)

    def take(self, index: Tensor) -> Observations:
        """The observations at the positions ``index`` of :meth:`rows`, without building all rows."""
        valid = None if self.valid is None else self.valid[index]
        labels = None if self.labels is None else self.labels[index]
        fields = (valid, self.group, labels, self.forward, self.step)
        moved = self.values if self.feature_dim == -1 else self.values.movedim(self.feature_dim, -1)
        if moved.is_contiguous():
            rows = moved if moved.ndim == 2 else moved.reshape(-1, moved.shape[-1])
            rows = rows.index_select(0, index)
            is_plain = all(each is None for each in fields)
            return plain_observations(rows) if is_plain else Observations(rows, -1, *fields)
        if self.feature_dim == 1 and self.values.is_contiguous():  # (B, D, *positions) -> (B, P, D)
            moved = self.values.flatten(2).movedim(1, -1)
        positions = []
        for size in reversed(moved.shape[1:-1]):
            positions.append(index % size)
            index = index // size
        positions.append(index)
        return Observations(moved[tuple(reversed(positions))], -1, *fields)

    def to(self, device: torch.device) -> Observations:
        """The observations on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, values=self.values.to(device), valid=valid, labels=labels)


def _described(values: Tensor) -> str:
    if values.is_nested:
        return "a nested one; give `torch.cat(nested.unbind())`"
    return f"one of layout {values.layout}; give its `to_dense()`"


def plain_observations(values: Tensor, feature_dim: int = -1) -> Observations:
    """Like ``Observations(values, feature_dim)``, in a quarter of the time, which matters for small layers.

    >>> plain_observations(torch.zeros(8, 3)).rows().shape
    torch.Size([8, 3])
    """
    made = object.__new__(Observations)
    # A frozen dataclass sets each field by a call. Fields not set here have the defaults of the class.
    fields = made.__dict__
    fields["values"], fields["feature_dim"] = values, feature_dim
    return made


def detached(observations: Observations) -> Observations:
    """The observations outside of autograd's graph; fast, as :func:`plain_observations` is.

    >>> detached(plain_observations(torch.zeros(8, 3, requires_grad=True))).values.requires_grad
    False
    """
    if not observations.values.requires_grad:
        return observations
    made = object.__new__(Observations)
    made.__dict__.update(observations.__dict__, values=observations.values.detach())
    return made


def of_forward(observations: Observations, forward: int, step: int | None) -> Observations:
    """The same observations with a forward and a step; fast, as :func:`plain_observations` is.

    >>> of_forward(plain_observations(torch.zeros(8, 3)), 7, None).forward
    7
    """
    made = object.__new__(Observations)
    made.__dict__.update(observations.__dict__, forward=forward, step=step)
    return made


def as_maps(values: Tensor, dim: int) -> Tensor:
    """Values with features in dimension ``dim`` as (samples, features, positions), a view where there is one.

    >>> as_maps(torch.zeros(8, 3), -1).shape, as_maps(torch.zeros(8, 3, 4, 4), 1).shape
    (torch.Size([1, 3, 8]), torch.Size([8, 3, 16]))
    """
    if values.ndim == 2:
        if not dim % 2:  # (D, N) -> (1, D, N)
            return values[None]
        rows, columns = values.stride()  # (N, D) -> (1, D, N)
        return values.as_strided((1, values.shape[1], values.shape[0]), (0, columns, rows))
    if dim % values.ndim == values.ndim - 1:  # (..., D) -> (1, D, N)
        return values.reshape(-1, values.shape[-1]).t()[None]
    return values.movedim(dim, 1).flatten(2)  # (N, ..., D, ...) -> (N, D, positions)
