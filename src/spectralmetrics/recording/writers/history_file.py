"""``history.csv``: the history of the last forwards as a tidy table."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from spectralmetrics.probing.movers import History, HistoryRow
from spectralmetrics.recording.files import (
    blank_missing,
    csv_text,
    lengthen,
    read_table,
    replace_file,
    size_of,
    sweep,
)
from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums import ForwardHistory

HISTORY = "history.csv"
HISTORY_COLUMNS = ("epoch", "stage", *HistoryRow._fields)

_Recorded: TypeAlias = dict[tuple[str, str], dict[int, HistoryRow]]
"""(Stage, layer) -> recorded number of a forward -> its row, with its number in the whole run."""


class HistoryWriter(Writer):
    """Writes the forwards that a :class:`~spectralmetrics.HistoryMetric` remembers to one ``history.csv``.

    A row for each record, stage, forward and layer, with the columns of :class:`~spectralmetrics.HistoryRow`
    after ``epoch`` and ``stage``; unknown steps and values without observations are empty. Forwards have the
    probe's numbers, which begin at 0 in a process that does not load the state of the probe. The file is
    replaced as a whole by a copy that is one record longer: at any moment it holds whole records only.
    """

    name = "history"
    keeps_records = True

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._path = directory / HISTORY
        self._size = size_of(self._path)

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        histories: dict[str, dict[str, ForwardHistory]] = {}
        for stage, layer in record.sums:
            kept = next((each for each in record.sums[stage, layer] if isinstance(each, ForwardHistory)), None)
            if kept is not None:
                histories.setdefault(stage, {})[layer] = kept
        lines = [
            [record.epoch, stage, *blank_missing(row)]
            for stage, layers in histories.items()
            for row in History.of_sums(stage, layers)
        ]
        if size_of(self._path) not in (0, self._size):  # a record was taken back, or an editor saved the table
            earlier = [cells for epoch, cells in _lines(self._path.parent) if epoch < record.epoch]
            replace_file(self._path, csv_text([HISTORY_COLUMNS, *earlier]))
        self._size = lengthen(self._path, csv_text(lines), head=csv_text([HISTORY_COLUMNS]))

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """See :class:`Writer`."""
        return max((epoch for epoch, _ in _lines(directory)), default=None)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return (directory / HISTORY).exists()

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`."""
        path = directory / HISTORY
        sweep(directory, HISTORY)
        if after is None:
            path.unlink(missing_ok=True)
            return
        lines = _lines(directory)
        kept = [cells for epoch, cells in lines if epoch <= after]
        if len(kept) < len(lines):
            replace_file(path, csv_text([HISTORY_COLUMNS, *kept]))


def _lines(directory: Path) -> list[tuple[int, list[str]]]:
    """(Epoch, cells) of all lines."""
    return read_table(directory / HISTORY, "a forward", lambda cells: (int(cells[0]), cells), HISTORY_COLUMNS)


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
