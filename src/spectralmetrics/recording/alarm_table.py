"""``alarms.csv``: the alarms of a :class:`~spectralmetrics.Monitor` while the run was recorded."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

from spectralmetrics.findings import Finding
from spectralmetrics.monitoring import Alarm
from spectralmetrics.recording.files import read_table, replacing, sweep

FILE_NAME = "alarms.csv"
COLUMNS = ("step", *Finding._fields, "before")


def read_alarms(directory: Path) -> list[Alarm]:
    """The alarms of a run, in the order in which they were raised; none without the file.

    Raises:
        ValueError: if it is not a table of alarms.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return []
    return read_table(path, "an alarm", _alarm, COLUMNS)


def write_alarms(directory: Path, alarms: Iterable[Alarm]) -> None:
    """Replace the alarms of a run by these alarms; an error leaves the earlier ones."""
    sweep(directory, FILE_NAME)
    lines = [
        [alarm.step, *("" if each != each else each for each in alarm.finding), _text(alarm.before)]
        for alarm in alarms
    ]
    if not lines:
        (directory / FILE_NAME).unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # it quotes a name with a line break
    writer.writerows([COLUMNS, *lines])
    with replacing(directory / FILE_NAME) as file:
        file.write(text.getvalue().encode())


def _text(number: float) -> float | str:
    return "" if math.isnan(number) else number


def _alarm(cells: list[str]) -> Alarm:
    step, stage, layer, kind, severity, message, *values = cells
    value, low, high, before = (float(each) if each else math.nan for each in values)
    if severity not in ("problem", "note"):
        raise ValueError
    return Alarm(int(step), Finding(stage, layer, kind, severity, message, value, low, high), before)  # type: ignore[arg-type]
