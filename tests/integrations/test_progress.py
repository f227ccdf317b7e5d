"""Progress while layers are read: shown only if it takes long and there is a screen."""

import io
import sys
import time

import pytest

from spectralmetrics.integrations.progress import LateBar


class Screen(io.StringIO):
    def __init__(self, is_there=True):
        super().__init__()
        self.is_there = is_there

    def isatty(self):
        return self.is_there


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_comes_after_three_seconds_and_leaves_nothing_behind(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = LateBar("reading layers")
    clock[0] += 2.9
    bar(1, 5)
    assert screen.getvalue() == ""
    clock[0] += 0.2
    bar(2, 5)
    assert screen.getvalue() == "\rreading layers: 2 of 5"
    bar(5, 5)
    assert screen.getvalue().endswith("\rreading layers: 5 of 5\r\x1b[K")
    shown = screen.getvalue()
    clock[0] -= 2  # the next layer is quick
    bar(5, 5)
    assert screen.getvalue() == shown


@pytest.mark.parametrize("screen", [Screen(is_there=False), None])
def test_it_is_not_written_to_files_or_where_there_is_nothing(screen, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen)
    bar = LateBar("reading layers")
    clock[0] += 10
    bar(1, 2)
    bar(2, 2)
    assert screen is None or screen.getvalue() == ""
