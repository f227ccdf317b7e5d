"""The tables of a run: ``records.csv``, ``alarms.csv`` of a monitor, ``history.csv`` of the last forwards."""

from __future__ import annotations

import csv
import io
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from spectralmetrics.findings import Finding
from spectralmetrics.monitoring import Alarm
from spectralmetrics.probing.movers import HistoryRow
from spectralmetrics.recording.files import replace_file, sweep
from spectralmetrics.recording.record import Row

T = TypeVar("T")

RECORDS, ALARMS, HISTORY = "records.csv", "alarms.csv", "history.csv"
COLUMNS = Row._fields
# The columns of 0.1.0, without intervals, and of 0.2.0, without steps.
_EARLIER_COLUMNS = (COLUMNS[:5], COLUMNS[:7])
ALARM_COLUMNS = ("step", *Finding._fields, "before")
HISTORY_COLUMNS = ("epoch", "stage", *HistoryRow._fields)

_Recorded: TypeAlias = dict[tuple[str, str], dict[int, HistoryRow]]
"""(Stage, layer) -> recorded number of a forward -> its row, with its number in the whole run."""


def read_table(
    path: Path, what: str, parse: Callable[[list[str]], T], columns: tuple[str, ...], *earlier: tuple[str, ...]
) -> list[T]:
    """The lines of a CSV file behind its header; none without the file.

    Args:
        path: the path of the file.
        what: the content of a line, with its article, for errors.
        parse: makes an object of the cells of a line; raises a ValueError if it cannot.
        columns: the header.
        earlier: headers of earlier releases.

    Raises:
        ValueError: if it is not such a table; names the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text: {error}") from error
    parsed = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = tuple(next(reader, ()))
        if header not in (columns, *earlier):
            raise ValueError(f"expected {path} to begin with {','.join(columns)}, got {','.join(header)!r}")
        for cells in reader:
            try:
                if len(cells) != len(header):
                    raise ValueError
                parsed.append(parse(cells))
            except ValueError:
                line = f"line {reader.line_num} of {path}"
                raise ValueError(f"expected {what} in {line}, got {','.join(cells)!r}") from None
    except csv.Error as error:
        raise ValueError(f"expected {what} in line {reader.line_num} of {path}: {error}") from None
    return parsed


def csv_text(lines: Iterable[Iterable[Any]]) -> bytes:
    """Lines of cells as CSV; cells with line breaks are quoted."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def blank_missing(values: Iterable[Any]) -> list[Any]:
    """The values of a line, with empty cells for None and NaN."""
    return ["" if value is None or value != value else value for value in values]


# -- records.csv -----------------------------------------------------------------------------------------------


def format_rows(rows: Iterable[Row | Mapping[str, Any]], *, header: bool = True) -> bytes:
    """Rows as CSV text; floats with all their digits."""
    lines: list[Iterable[Any]] = [COLUMNS] if header else []
    lines += [row.values() if isinstance(row, Mapping) else row for row in rows]
    return b"".join(csv_text([line]).removesuffix(b"\r\n") + b"\n" for line in lines)


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``records.csv``; none without one.

    Raises:
        ValueError: if it is not a table of records.
    """
    return read_table(path, "a record", _row, COLUMNS, *_EARLIER_COLUMNS)


def _row(cells: list[str]) -> Row:
    epoch, stage, layer, statistic, value, *more = cells
    *ends, step = (*more, "", "", "")[:3]
    low, high = (_number(end) if end else None for end in ends)
    return Row(int(epoch), stage, layer, statistic, _number(value), low, high, int(step) if step else None)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


# -- alarms.csv ------------------------------------------------------------------------------------------------


def read_alarms(directory: Path) -> list[Alarm]:
    """The alarms of a run, in the order in which they were raised; none without the file.

    Raises:
        ValueError: if it is not a table of alarms.
    """
    return read_table(directory / ALARMS, "an alarm", _alarm, ALARM_COLUMNS)


def write_alarms(directory: Path, alarms: Iterable[Alarm]) -> None:
    """Replace the alarms of a run by these alarms; an error leaves the earlier ones."""
    sweep(directory, ALARMS)
    lines = [blank_missing((alarm.step, *alarm.finding, alarm.before)) for alarm in alarms]
    if lines:
        replace_file(directory / ALARMS, csv_text([ALARM_COLUMNS, *lines]))
    else:
        (directory / ALARMS).unlink(missing_ok=True)


def _alarm(cells: list[str]) -> Alarm:
    step, stage, layer, kind, severity, message, *values = cells
    value, low, high, before = (float(each) if each else math.nan for each in values)
    if severity not in ("problem", "note"):
        raise ValueError
    return Alarm(int(step), Finding(stage, layer, kind, severity, message, value, low, high), before)  # type: ignore[arg-type]


# -- history.csv -----------------------------------------------------------------------------------------------


def read_history(directory: Path) -> dict[str, list[HistoryRow]]:
    """Stage -> the rows of a run's ``history.csv``, each forward of a layer once; empty without the file.

    The numbers of the forwards rise over the whole run. If the run was resumed without the state of the probe,
    which then counts from 0 again, the numbers continue after the last ones.

    Raises:
        ValueError: if the file is damaged or was not written by a recorder.
    """
    by_stage: dict[str, dict[tuple[int, str], HistoryRow]] = {}
    recorded: _Recorded = {}
    offsets: dict[str, int] = {}  # stage -> added to the numbers since they began anew
    forwards = read_table(directory / HISTORY, "a forward", _forward, HISTORY_COLUMNS)
    for _, lines in itertools.groupby(forwards, lambda line: line[0]):
        record = [(stage, row) for _, stage, row in lines]
        begins_anew, remembers = _compare(recorded, record)
        earlier = recorded
        if begins_anew:
            recorded, offsets = {}, {}
        for stage, row in record:
            of_stage, place = by_stage.setdefault(stage, {}), (stage, row.layer)
            same = earlier.get(place, {}).get(row.forward)
            if same is not None and (not begins_anew or (remembers and _is_same(same, row))):
                number = same.forward
            else:
                if stage not in offsets:
                    last = max((each for each, _ in of_stage), default=-1)
                    offsets[stage] = max(last + 1 - row.forward, 0)
                number = row.forward + offsets[stage]
            renumbered = row._replace(forward=number)
            recorded.setdefault(place, {})[row.forward] = of_stage[number, row.layer] = renumbered
    by_forward = operator.attrgetter("forward")
    return {stage: sorted(rows.values(), key=by_forward) for stage, rows in by_stage.items()}


def _forward(cells: list[str]) -> tuple[int, str, HistoryRow]:
    epoch, stage, forward, step, layer, observations, *values, left_out = cells
    rms, mean, most, zeros = (float(cell) if cell else math.nan for cell in values)
    when = int(forward), int(step) if step else None
    return int(epoch), stage, HistoryRow(*when, layer, int(observations), rms, mean, most, zeros, int(left_out))


def _compare(recorded: _Recorded, record: Iterable[tuple[str, HistoryRow]]) -> tuple[bool, bool]:
    """Compare a record with earlier ones: (its numbers begin anew, its first forwards were recorded before).

    A history reaches back beyond the record before it, and the same forwards are in both. All numbers begin
    anew if a forward of some layer differs from the recorded one of its number, or comes before recorded ones.
    """
    begins_anew = False
    firsts: dict[tuple[str, str], bool] = {}  # True if the first forward with a number in both is the same
    for stage, row in record:
        before = recorded.get((stage, row.layer), {})
        earlier = before.get(row.forward)
        if earlier is None:
            begins_anew = begins_anew or row.forward < next(reversed(before), 0)
            continue
        is_same = _is_same(earlier, row)
        # More rows of a forward may have come after the record, so that its counts have grown.
        has_grown = firsts.get((stage, row.layer), False) and _offered(row) > _offered(earlier)
        begins_anew = begins_anew or not (is_same or has_grown)
        firsts.setdefault((stage, row.layer), is_same)
    return begins_anew, bool(firsts) and all(firsts.values())


def _is_same(left: HistoryRow, right: HistoryRow) -> bool:
    """True if both are rows of the same forward; sums over processes may be rounded differently."""
    # Missing values are one and the same NaN object, which tuples compare as equal.
    exact = [each._replace(forward=0, rms=0.0, mean=0.0) for each in (left, right)]
    return exact[0] == exact[1] and (not left.observations or math.isclose(left.rms, right.rms))


def _offered(row: HistoryRow) -> int:
    return row.observations + row.non_finite
