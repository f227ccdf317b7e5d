"""The directory of a run: which records it holds, and how one more is kept whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from spectralmetrics.monitoring import Alarm
from spectralmetrics.probing.processes import portable
from spectralmetrics.recording.lock import DirectoryLock
from spectralmetrics.recording.manifest import (
    ALARMS,
    MODULE,
    Manifest,
    read_alarms,
    read_manifest,
    write_alarms,
    write_manifest,
)
from spectralmetrics.recording.record import Record, RecordKey, Settings
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers import WRITERS

Mode = Literal["create", "resume", "overwrite"]

_logger = logging.getLogger("spectralmetrics")
_NOTHING = (-1, 0.0)  # before all records


def _reach(last: RecordKey | None, at_steps: bool) -> tuple[int, float]:
    """The last record that a writer has completely."""
    if at_steps:
        return _NOTHING if last is None else last.order
    # The next that it is given is the end of an epoch.
    return (0 if last is None else last.epoch + (last.step is None)), sys.maxsize


class RunDirectory:
    """A run's directory in the hands of its recorder, on the first process; locked until it is closed.

    For the arguments and what is raised see :class:`~spectralmetrics.Recorder`. ``last`` is the key of the last
    whole record, or None.
    """

    def __init__(
        self, directory: Path, writers: Sequence[Writer], statistics: Mapping[str, Settings], mode: Mode
    ) -> None:
        self.directory = directory
        self.writers = writers
        self._statistics = dict(statistics)
        self._manifest = Manifest()
        own = {writer.name: writer for writer in writers}
        self._known: dict[str, Writer | type[Writer]] = {**WRITERS, **own}
        self._unfinished: list[Writer] = []  # which may hold a part of a record that failed
        self.last: RecordKey | None = None
        if mode == "create":
            self._refuse_records()  # and leave the directory as it is
        directory.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(directory)
        try:
            self._prepare(mode)
        except BaseException:
            lock.release()
            raise
        self._unlock = weakref.finalize(self, lock.release)

    @property
    def trained(self) -> set[str]:
        """The layers whose weights were found trained."""
        return {name for name, key in self._manifest.trained.items() if key is not None}

    def keep(self, record: Record) -> bool:
        """Write to all that keep records, or to none; return whether there was anything to keep."""
        if not record.values and not record.sums:
            return False
        counting = [each for each in self._takers(record) if each.keeps_records or each.takes_back]
        try:
            self._learn_untrained(record)
            for writer in self._unfinished:
                self._take_back(writer)
            # Writers that can take back come first, and the table last: it has a record only if the others do.
            for writer in sorted(counting, key=lambda each: (not each.takes_back, each.name == "csv")):
                writer.write(record)
            if not any(writer.keeps_records for writer in counting):
                self._update_manifest(record)
        except BaseException as error:
            self._unfinished = list(counting)
            for writer in counting:
                with contextlib.suppress(OSError):  # the next record does it, or the next recorder
                    self._take_back(writer)
            if not isinstance(error, OSError):
                raise
            message = f"cannot record {record.key}, earlier records are intact: {error.strerror or error}"
            where = self.directory if error.filename is None else os.fsdecode(error.filename)
            raise OSError(error.errno, message, str(where)) from error
        self.last = record.key
        with contextlib.suppress(OSError):  # the record is there: what the manifest says is a lower bound
            self._update_manifest(record)
        return True

    def show(self, record: Record) -> tuple[str, BaseException] | None:
        """Write to all that only show records; return the first that failed."""
        failed = None
        for writer in self._takers(record):
            if not writer.keeps_records and not writer.takes_back:
                try:
                    writer.write(record)
                except Exception as error:
                    failed = failed or (writer.name, portable(error))
        return failed

    def _takers(self, record: Record) -> list[Writer]:
        return [writer for writer in self.writers if record.step is None or writer.at_steps]

    def add_alarm(self, alarm: Alarm) -> None:
        """Keep an alarm."""
        write_alarms(self.directory, [*read_alarms(self.directory), alarm])

    def drop_alarms(self, step: int) -> None:
        """Forget the alarms from a step on."""
        alarms = read_alarms(self.directory)
        kept = [alarm for alarm in alarms if alarm.step < step]
        if len(kept) < len(alarms):
            write_alarms(self.directory, kept)

    def close(self) -> None:
        """Close the writers and let go of the directory."""
        with contextlib.ExitStack() as stack:  # all are closed, also if one fails
            stack.callback(self._unlock)
            for writer in reversed(self.writers):
                stack.callback(writer.close)

    def _refuse_records(self) -> None:
        holding = [name for name, writer in self._known.items() if writer.holds_records(self.directory)]
        if (self.directory / ALARMS).exists():
            holding.append(ALARMS)
        if holding:
            raise FileExistsError(
                f"{self.directory} already holds records ({', '.join(holding)}); mode='resume' goes on after"
                " them, mode='overwrite' removes them (arguments of Recorder); or choose another directory"
            )

    def _prepare(self, mode: Mode) -> None:
        directory, known = self.directory, self._known
        last: RecordKey | None = None
        if mode == "create":
            self._refuse_records()  # also what another recorder has written meanwhile
        if mode == "resume":
            self._manifest = read_manifest(directory)
            self._check_settings()
            last = self._last_whole()
        if mode == "overwrite":
            with contextlib.suppress(ValueError):
                ends = [end for each in known.values() if (end := each.last_record(directory)) is not None]
                if end := max(ends, key=lambda key: key.order, default=None):
                    _logger.warning("removing the records of %s, up to %s", directory, end)
            for writer in known.values():
                writer.discard_after(directory, None)
            write_alarms(directory, [])
        joined = self._manifest.writers
        self._manifest = Manifest(
            # One that pauses for a while joins anew.
            {each.name: joined.get(each.name, last) for each in self.writers if each.keeps_records},
            self._manifest.statistics | self._statistics,
            last,
            self._manifest.layers,
            self._trained_until(last),
        )
        write_manifest(directory, self._manifest)
        if mode == "resume":
            for writer in known.values():
                writer.discard_after(directory, last)
        for each in self.writers:
            each.open_after(directory, last)
        self.last = last
        if last is not None:
            self._restore(last)

    def _trained_until(self, last: RecordKey | None) -> dict[str, RecordKey | None]:
        """The trained layers at the last record; what later ones have shown may no longer hold."""
        if last is None:
            return {}
        known = self._manifest.trained.items()
        return {name: key if key is not None and key.order <= last.order else None for name, key in known}

    def _restore(self, key: RecordKey) -> None:
        """Have shown what a process that was killed after it had kept its last record did not show."""
        for writer in self.writers:
            if type(writer).restore is Writer.restore or (key.step is not None and not writer.at_steps):
                continue
            try:
                writer.restore(SavedRun(self.directory).record(key))
            except Exception as error:  # as when it is shown at once, this costs no record
                _logger.warning("the writer %r cannot show %s now: %s", writer.name, key, error)

    def _last_whole(self) -> RecordKey | None:
        directory, known, manifest = self.directory, self._known, self._manifest
        names = {writer.name for writer in self.writers}
        if not manifest.writers:  # records without a manifest: records of any writer count
            keeping = [name for name, writer in known.items() if writer.keeps_records]
            manifest.writers = {name: None for name in keeping if known[name].holds_records(directory)}
        keys = [manifest.last, *manifest.writers.values(), *SavedRun(directory).records]
        keys += [writer.last_record(directory) for writer in known.values()]
        has_epochs = any(key is not None and key.step is None for key in keys)
        ends: list[tuple[int, float]] = []
        for name, before in manifest.writers.items():
            if name not in known or (not known[name].holds_records(directory) and name not in names):
                continue  # its files were removed, and it is not wanted any more
            end = _reach(known[name].last_record(directory), known[name].at_steps)
            end = max(end, _NOTHING if before is None else before.order)
            if manifest.last is not None and end < manifest.last.order:
                if not known[name].holds_records(directory) and (has_epochs or known[name].at_steps):
                    raise ValueError(
                        f"expected {directory} to hold the records of the writer {name!r} up to"
                        f" {manifest.last}, got none: restore its files, leave the writer out, or record to"
                        " another directory"
                    )
                end = manifest.last.order  # the last records had nothing for this writer
            ends.append(end)
        if not ends:
            return manifest.last
        whole = [key for key in keys if key is not None and key.order <= min(ends)]
        return max(whole, key=lambda key: key.order, default=None)

    def _check_settings(self) -> None:
        for name, settings in self._statistics.items():
            recorded = self._manifest.statistics.get(name, settings)
            for key in settings.keys() - {MODULE}:  # a class may move
                if recorded.get(key) != settings[key]:
                    raise ValueError(
                        f"expected {name!r} as it was recorded in {self.directory}, with"
                        f" {key}={recorded.get(key)!r}, got {key}={settings[key]!r}"
                    )

    def _take_back(self, writer: Writer) -> None:
        if writer.takes_back:
            with contextlib.suppress(Exception):  # what could not be written is not needed any more
                writer.close()
            writer.open_after(self.directory, self.last)
        else:
            writer.discard_after(self.directory, self.last)
        self._unfinished = [each for each in self._unfinished if each is not writer]

    def _learn_untrained(self, record: Record) -> None:
        """Keep which layers are trained; before the record, so that no reader finds it without this."""
        trained = dict(self._manifest.trained)
        for layer, is_new in record.untrained.items():
            known = trained.get(layer) or record.key
            trained[layer] = None if is_new else min(known, record.key, key=lambda key: key.order)
        if trained != self._manifest.trained:
            manifest = replace(self._manifest, trained=trained)
            write_manifest(self.directory, manifest)
            self._manifest = manifest

    def _update_manifest(self, record: Record) -> None:
        layers = self._manifest.layers | {name: facts.saved() for name, facts in record.layers.items()}
        manifest = replace(self._manifest, last=record.key, layers=layers)
        write_manifest(self.directory, manifest)
        self._manifest = manifest
