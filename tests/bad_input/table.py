"""Rows of the table of bad input, and the check that a message quotes the bad value."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Given:
    """A part of the :class:`~tests.bad_input.world.World`."""

    of: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One bad value of one argument.

    Attributes:
        name: name of the function, class or method, as its user writes it.
        call: the function, or how to get it from the world.
        good: the other arguments.
        argument: name of the bad argument; a name with a dot is an attribute of the argument's own.
        value: the bad value.
        error: exact type of the error.
        words: words of the message, including the value; "…" stands for any others.
    """

    name: str
    call: Any
    good: Mapping[str, Any]
    argument: str
    value: Any
    error: type[Exception]
    words: str

    def arguments(self, world):
        """All arguments, including the bad one."""
        found = {**self.good, self.argument: self.value}
        return {name: value.of(world) if isinstance(value, Given) else value for name, value in found.items()}

    def function(self, world):
        return self.call.of(world) if isinstance(self.call, Given) else self.call

    def pattern(self):
        return ".*".join(re.escape(part.strip()) for part in self.words.split("…"))

    def __str__(self):
        value = "of the world" if isinstance(self.value, Given) else " ".join(repr(self.value).split())
        return f"{self.name}({self.argument}={value[:40]})"


def refuses(name, call, good=None, /, **arguments):
    """Rows for one function; each argument has its refused values as (value, error, words)."""
    return [
        Row(name, call, good or {}, argument, value, error, words)
        for argument, bad in arguments.items()
        for value, error, words in bad
    ]


def quotes(value, message):
    """True if a message shows the value or, for values without a short form, its type, a size or a part."""
    kind = type(value).__name__
    shown = {
        repr(value),
        repr(type(value)),
        f"'{kind}' object",
        *(f"{before} {kind}" for before in ("got", "got a", "not", "and")),
    }
    parts = []
    if isinstance(value, str):
        shown |= {value} if len(value) > 3 else set()  # a short one may be in any word
    elif isinstance(value, torch.Tensor):
        numbers = set(re.findall(r"\d+", message))
        shown |= {str(value.dtype), str(tuple(value.shape)), *(numbers & set(map(str, value.shape)))}
        shown |= set() if value.ndim else {str(value.item())}
        if value.numel() and not value.is_floating_point() and not value.is_complex():
            shown.add(f"got {int(value.max())}")
        shown |= set() if value.is_complex() or value.isfinite().all() else {"NaN or infinite"}
    elif isinstance(value, nn.Module):
        shown |= {type(module).__name__ for module in value.modules()} | {getattr(value, "short_name", kind)}
    elif isinstance(value, type) or callable(value):
        shown |= {value.__name__, getattr(value, "described", value.__name__)}
    elif isinstance(value, Path):
        shown.add(value.name)
    elif isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
        shown |= {f"got {len(value)}", f"of {len(value)} x", f"x {len(value)}", f"shape ({len(value)},)"}
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (Mapping, list)) and not value:
        shown |= {"got none", "got no "}
    if value is None:
        shown.add("got one run only")
    return any(text in message for text in shown) or any(quotes(part, message) for part in parts)
