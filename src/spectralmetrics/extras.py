"""Packages that the extras of this package install."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def from_extra(extra: str, need: str) -> Iterator[None]:
    """Import a package of an extra inside; where it is missing, the error says how to install it.

    Args:
        extra: the extra that installs the package.
        need: a sentence about what needs which package.

    >>> with from_extra("plot", "plots need a_package"):
    ...     import a_package
    Traceback (most recent call last):
    ModuleNotFoundError: plots need a_package: pip install "spectralmetrics[plot]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{need}: pip install "spectralmetrics[{extra}]"') from error
