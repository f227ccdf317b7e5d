"""Damaged tables of a run are refused, with the line."""

import math

import pytest

from spectralmetrics import Alarm, Finding, read_records
from spectralmetrics.probing.movers import HistoryRow
from spectralmetrics.recording.manifest import read_alarms, write_alarms
from spectralmetrics.recording.writers.history_file import HISTORY_COLUMNS, HistoryWriter, read_history

RECORDS = "epoch,stage,layer,statistic,value,low,high,step\n0,eval,a,saturation,0.5,,,\n"


def records(folder, line):
    (folder / "records.csv").write_text(RECORDS + line, newline="")
    return list(read_records(folder))


def alarms(folder, line):
    finding = Finding("train", "a, \r b", "scale", "problem", "of one", 2.0)
    write_alarms(folder, [Alarm(3, finding, math.nan)])
    path = folder / "alarms.csv"
    path.write_bytes(path.read_bytes() + line.encode())
    return read_alarms(folder)


def forwards(folder, line):
    names = ",".join(("epoch", "stage", *HistoryRow._fields))
    (folder / "history.csv").write_text(f"{names}\r\n0,train,7,,a,4,0.5,0.1,2.0,0.0,1\r\n{line}", newline="")
    return read_history(folder).get("train", [])


LINES = {
    forwards: ("a forward in line 3", "1,train,8,3,a,4,0.5,0.1,2.0,0.0,1"),
    records: ("a record in line 3", "1,eval,a,saturation,0.5,0.4,0.6,7"),
    alarms: ("an alarm in line 4", "5,train,b,dead,problem,of two,0.9,,,0.1"),  # one name spans two lines
}


@pytest.mark.parametrize("read", LINES)
def test_a_line_is_read(read, tmp_path):
    assert len(read(tmp_path, LINES[read][1] + "\n")) == 2


@pytest.mark.parametrize("change", ["{},8", "{},", "{first}", "x{}"], ids=["more", "empty", "fewer", "word"])
@pytest.mark.parametrize("read", LINES)
def test_a_damaged_line_is_quoted(read, change, tmp_path):
    where, line = LINES[read]
    damaged = change.format(line, first=line.rpartition(",")[0])
    with pytest.raises(ValueError, match=rf"expected {where} of .*, got '{damaged}'"):
        read(tmp_path, damaged + "\n")


@pytest.mark.parametrize("read", LINES)
def test_another_header(read, tmp_path):
    read(tmp_path, "")
    (path,) = tmp_path.glob("*.csv")
    path.write_bytes(b"more," + path.read_bytes())
    with pytest.raises(ValueError, match=r"to begin with .*, got 'more,"):
        {alarms: read_alarms, records: read_records, forwards: read_history}[read](tmp_path)


@pytest.mark.parametrize(("after", "left"), [(None, []), (0, [0]), (1, [0, 1]), (5, [0, 1, 2])])
def test_what_is_discarded_of_a_history(after, left, tmp_path):
    lines = "".join(f"{epoch},train,{epoch},,a,4,0.5,0.1,2.0,0.0,1\r\n" for epoch in range(3))
    (tmp_path / "history.csv").write_text(f"{','.join(HISTORY_COLUMNS)}\r\n{lines}", newline="")
    HistoryWriter.discard(tmp_path, after)
    assert (tmp_path / "history.csv").exists() == (after is not None)
    assert [row.forward for row in read_history(tmp_path).get("train", [])] == left
