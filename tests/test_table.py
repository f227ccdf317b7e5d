"""Tables on the screen: names stay whole while there is room, and always stay distinct."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from spectralmetrics.table import shorten_names, text_table

NAMES = (
    "contracting_path.stage_one.first_convolution",
    "contracting_path.stage_one.second_convolution",
    "bottleneck.first_convolution",
    "expanding_path.stage_one.first_convolution",
    "layers.1.q",
    "layers.11.q",
    "layer",
    "head_of_classes",
    "head_of_boxes",
)
HEADS = ["layer", "type", "width", "ceiling", "n", "dimension", "saturation", "what stands out"]


def rows(words):
    return [[name, "Conv2d", "16", "16", "16384", "13 (13-13)", "0.812", words] for name in NAMES]


@pytest.mark.parametrize("width", [1, 5, 12, 20, 30, 45, 100])
def test_short_names_differ_and_fit_where_siblings_differ_early(width):
    short = shorten_names(NAMES, width)
    assert len(set(short.values())) == len(NAMES)
    assert all(len(each) <= max(width, 13) for each in short.values())
    assert all(short[name] == name for name in NAMES if len(name) <= 10)


def test_names_that_fit_stay_whole_unless_they_share_a_part_with_one_that_does_not():
    short = shorten_names(["encoder.attention", "encoder.projection_of_queries", "decoder.attention"], 24)
    assert list(short.values()) == ["e.attention", "e.projection_of_queries", "decoder.attention"]


def test_a_name_of_an_inner_and_an_outer_module_is_told_apart():
    names = ["encoder", "encoder.a", "encoders.a", "enc.a", "encoder.attention_of_queries"]
    assert len(set(shorten_names(names, 8).values())) == len(names)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("words", ["", "at its ceiling", "few observations, in the tail, few directions"])
def test_each_layer_has_one_line_with_its_name_and_numbers(width, words):
    lines = text_table(HEADS, rows(words), left=("type",), spare=("type", "ceiling", "width", "n"), width=width)
    assert max(map(len, lines)) <= width
    numbers = [line for line in lines if "13 (13-13)" in line]
    assert len(numbers) == len(NAMES)
    assert len({line.split()[0] for line in numbers}) == len(NAMES)
    assert " ".join(" ".join(lines).split()).count("few directions") == (len(NAMES) if "few" in words else 0)


def test_names_keep_their_room_and_what_is_left_out_is_named():
    lines = text_table(HEADS, rows("at its ceiling"), spare=("type", "ceiling", "width", "n"), width=80)
    assert all(any(line.startswith(name) for line in lines) for name in NAMES if len(name) <= 40)
    assert lines[-1] == "No room here for: type, ceiling"
    assert not any("Conv2d" in line for line in lines)


@pytest.mark.parametrize("columns", [60, 90])
def test_a_terminal_sets_the_width(columns):
    parent, child = pty.openpty()
    os.set_inheritable(child, True)
    code = "from spectralmetrics.table import screen_width; print(screen_width())"
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run([sys.executable, "-c", code], stdout=child, env=environment, check=True)
    os.close(child)
    assert os.read(parent, 100).decode().strip() == str(columns)
    os.close(parent)


def test_elsewhere_it_is_100_or_what_is_asked_for():
    code = "from spectralmetrics.table import screen_width; print(screen_width())"
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    for given, expected in (({}, "100"), ({"COLUMNS": "72"}, "72")):
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == expected


def test_a_file_keeps_whole_names():
    name = "a_module_with_a_long_name.a_block_with_a_long_name.a_layer_with_a_rather_long_name"
    lines = text_table(HEADS, [[name, *rows("")[0][1:]]], spare=("type", "ceiling"), width=100)
    assert name in "".join(line.split(" ")[0] for line in lines)
