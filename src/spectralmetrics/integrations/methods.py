"""Methods of one object, run inside contexts of our own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Methods:
    """Surrounds methods of an object, for what it has no events for.

    Args:
        owner: the owner of the methods.

    >>> import torch
    >>> class Owner:
    ...     def run(self):
    ...         return torch.is_grad_enabled()
    >>> owner = Owner()
    >>> methods = Methods(owner)
    >>> methods.surround("run", torch.no_grad)
    >>> owner.run()
    False
    >>> methods.restore()
    >>> owner.run()
    True
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._surrounded: list[tuple[str, Any, Any]] = []

    def surround(self, name: str, context: Callable[..., AbstractContextManager[Any]]) -> None:
        """Run a method inside a context from now on, which gets the method's arguments."""
        method, before = getattr(self._owner, name), vars(self._owner).get(name)

        @functools.wraps(method)
        def surrounded(*args: Any, **kwargs: Any) -> Any:
            with context(*args, **kwargs):
                return method(*args, **kwargs)

        setattr(self._owner, name, surrounded)
        self._surrounded.append((name, surrounded, before))

    def restore(self) -> None:
        """Put the methods back, except those that other code has wrapped since."""
        while self._surrounded:
            name, surrounded, before = self._surrounded.pop()
            if vars(self._owner).get(name) is not surrounded:
                continue
            if before is None:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, before)
