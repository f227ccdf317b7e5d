"""Checks of arguments, with one message for each kind of argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_type(name: str, value: object, kind: type) -> None:
    """Raise a TypeError unless a value is of a type.

    >>> check_type("model", 3, Tensor)
    Traceback (most recent call last):
    TypeError: expected model to be a Tensor, got int
    """
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} to be a {kind.__name__}, got {type(value).__name__}")


def check_real(name: str, value: object) -> None:
    """Raise a TypeError unless a value is a tensor of real numbers.

    >>> check_real("eigenvalues", [1.0])
    Traceback (most recent call last):
    TypeError: expected eigenvalues as a tensor of real numbers, got list
    """
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"expected {name} as a tensor of real numbers, got {dtype_or_type(value)}")


def dtype_or_type(value: object) -> object:
    """The dtype of a tensor, or the name of the type of anything else, for messages."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def are_all_finite(values: Tensor) -> bool:
    """True if a tensor of real numbers holds no NaN and no infinity; reads from the device once, or twice.

    >>> import torch
    >>> are_all_finite(torch.tensor([1e38, 3e38])), are_all_finite(torch.tensor([0.0, torch.nan]))
    (True, False)
    """
    # A finite sum proves in a tenth of the time that all values are finite. Finite values may overflow in it.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def check_names(argument: str, names: object, what: str = "names") -> None:
    """Raise a TypeError unless these are a sequence; a string alone is a common mistake.

    >>> check_names("layers", "conv1")
    Traceback (most recent call last):
    TypeError: expected layers as a sequence of names, got 'conv1'
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"expected {argument} as a sequence of {what}, got {names!r}")


def is_integer(value: Any, least: int) -> bool:
    """True if a value is an integer of at least ``least``, also numpy's; a boolean is not an integer here.

    >>> is_integer(3, 1), is_integer(0, 1), is_integer(2.0, 1), is_integer(True, 1)
    (True, False, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def check_positive_integer(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise a ValueError unless a value is an integer above zero.

    Args:
        name: the name of the argument.
        value: the value of the argument.
        or_none: True if None is allowed, too.

    >>> check_positive_integer("dpi", 0)
    Traceback (most recent call last):
    ValueError: expected dpi to be a positive integer, got 0
    """
    if not is_integer(value, 1) and not (or_none and value is None):
        raise ValueError(
            f"expected {name} to be a positive integer{' or None' if or_none else ''}, got {value!r}"
        )


def check_seed(value: object) -> None:
    """Raise a ValueError unless a value is an integer that is not negative.

    >>> check_seed(-1)
    Traceback (most recent call last):
    ValueError: expected a seed as an integer that is not negative, got -1
    """
    if not is_integer(value, 0):
        raise ValueError(f"expected a seed as an integer that is not negative, got {value!r}")
