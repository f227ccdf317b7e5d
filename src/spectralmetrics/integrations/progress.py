"""A progress line on the screen for long work."""

from __future__ import annotations

import sys
import time

_PATIENCE = 3.0


class LateBar:
    """Prints progress on a terminal once the work has taken more than a few seconds.

    Args:
        label: name of the work.

    >>> bar = LateBar("reading layers")
    >>> bar(1, 3)
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._is_shown = False

    def __call__(self, done: int, total: int) -> None:
        """See :data:`~spectralmetrics.functional.together.Progress`."""
        stream = sys.stderr
        if stream is None or not stream.isatty():
            return
        if time.monotonic() - self._start > _PATIENCE:
            self._is_shown = True
            print(f"\r{self._label}: {done} of {total}", end="", file=stream, flush=True)
        if self._is_shown and done >= total:
            print("\r\x1b[K", end="", file=stream, flush=True)  # leaves no line behind
            self._is_shown = False
