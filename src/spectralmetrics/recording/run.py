"""The directory of a run: which records it holds, and how one more is kept whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from spectralmetrics.recording.lock import DirectoryLock
from spectralmetrics.recording.manifest import Manifest, read_manifest, write_manifest
from spectralmetrics.recording.record import Record, Settings
from spectralmetrics.recording.restore import saved_record
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers import WRITERS

Mode = Literal["create", "resume", "overwrite"]

_logger = logging.getLogger("spectralmetrics")


class Run:
    """A run's directory in the hands of its recorder, on the first process; locked until it is closed.

    Args:
        directory: absolute; made if it is not there.
        writers: of the recorder.
        statistics: name -> settings of those that the recorder computes.
        mode: see :class:`~spectralmetrics.Recorder`, as for what is raised.

    Attributes:
        last_epoch: of the last whole record, or None.
    """

    def __init__(
        self, directory: Path, writers: Sequence[Writer], statistics: Mapping[str, Settings], mode: Mode
    ) -> None:
        self.directory = directory
        self.writers = writers
        self._statistics = dict(statistics)
        self._manifest = Manifest()
        self._known: dict[str, Writer | type[Writer]] = {
            **WRITERS,
            **{writer.name: writer for writer in writers},
        }
        self.last_epoch: int | None = None
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

    def keep(self, record: Record) -> bool:
        """Write to all that keep records, or to none; return whether there was anything to keep."""
        if not record.values and not record.sums:
            return False
        counting = [writer for writer in self.writers if writer.keeps_records or writer.takes_back]
        try:
            # Those that can take back come first, and the table last: it has a record only if the others do.
            for writer in sorted(counting, key=lambda each: (not each.takes_back, each.name == "csv")):
                writer.write(record)
            if not any(writer.keeps_records for writer in counting):
                self._tell_manifest(record)
        except BaseException as error:
            for writer in counting:
                self._take_back(writer)
            if not isinstance(error, OSError):
                raise
            message = (
                f"cannot record epoch {record.epoch}, earlier records are intact: {error.strerror or error}"
            )
            raise OSError(error.errno, message, str(error.filename or self.directory)) from error
        self.last_epoch = record.epoch
        with contextlib.suppress(OSError):  # the record is there: what the manifest says is a lower bound
            self._tell_manifest(record)
        return True

    def show(self, record: Record) -> tuple[str, Exception] | None:
        """Write to all that only show records; return the first that failed."""
        failed = None
        for writer in self.writers:
            if not writer.keeps_records and not writer.takes_back:
                try:
                    writer.write(record)
                except Exception as error:
                    failed = failed or (writer.name, error)
        return failed

    def close(self) -> None:
        """Close the writers and let go of the directory."""
        with contextlib.ExitStack() as stack:  # all are closed, also if one fails
            stack.callback(self._unlock)
            for writer in reversed(self.writers):
                stack.callback(writer.close)

    def _refuse_records(self) -> None:
        holding = [name for name, writer in self._known.items() if writer.holds_records(self.directory)]
        if holding:
            raise FileExistsError(
                f"{self.directory} already holds records ({', '.join(holding)}); mode='resume' goes on after"
                " them, mode='overwrite' removes them"
            )

    def _prepare(self, mode: Mode) -> None:
        directory, known = self.directory, self._known
        last_epoch = None
        if mode == "create":
            self._refuse_records()  # also what another recorder has written meanwhile
        if mode == "resume":
            self._manifest = read_manifest(directory)
            self._check_settings()
            last_epoch = self._last_whole_epoch()
        if mode == "overwrite":
            with contextlib.suppress(ValueError):
                ends = [end for each in known.values() if (end := each.last_epoch(directory)) is not None]
                if ends:
                    _logger.warning("removing the records of %s, up to epoch %d", directory, max(ends))
            for writer in known.values():
                writer.discard(directory, None)
        joined = self._manifest.writers
        self._manifest = Manifest(
            # One that pauses for a while joins anew.
            {each.name: joined.get(each.name, last_epoch) for each in self.writers if each.keeps_records},
            self._manifest.statistics | self._statistics,
            last_epoch,
            self._manifest.layers,
        )
        write_manifest(directory, self._manifest)
        if mode == "resume":
            for writer in known.values():
                writer.discard(directory, last_epoch)
        for each in self.writers:
            each.open(directory, last_epoch)
        self.last_epoch = last_epoch
        if last_epoch is not None:
            self._restore(last_epoch)

    def _restore(self, epoch: int) -> None:
        """Have shown what a process that was killed after it had kept its last record did not show."""
        for writer in self.writers:
            if type(writer).restore is Writer.restore:
                continue
            try:
                writer.restore(saved_record(self.directory, epoch, self._manifest))
            except Exception as error:  # as when it is shown at once, this costs no record
                _logger.warning("the writer %r cannot show epoch %d now: %s", writer.name, epoch, error)

    def _last_whole_epoch(self) -> int | None:
        directory, known, manifest = self.directory, self._known, self._manifest
        names = {writer.name for writer in self.writers}
        if not manifest.writers:  # records without a manifest: those of any writer count
            manifest.writers = {
                name: None
                for name, writer in known.items()
                if writer.keeps_records and writer.holds_records(directory)
            }
        ends = {}
        for name, before in manifest.writers.items():
            if name not in known or (not known[name].holds_records(directory) and name not in names):
                continue  # its files were removed, and it is not wanted any more
            last = known[name].last_epoch(directory)
            end = max(-1 if last is None else last, -1 if before is None else before)
            if manifest.last_epoch is not None and end < manifest.last_epoch:
                if not known[name].holds_records(directory):
                    raise ValueError(
                        f"expected {directory} to hold the records of the writer {name!r} up to epoch"
                        f" {manifest.last_epoch}, got none: restore its files, leave the writer out, or record"
                        " to another directory"
                    )
                end = manifest.last_epoch  # the last epochs had nothing for this writer
            ends[name] = end
        if not ends:
            return manifest.last_epoch
        whole = min(ends.values())
        return None if whole < 0 else whole

    def _check_settings(self) -> None:
        for name, settings in self._statistics.items():
            recorded = self._manifest.statistics.get(name, settings)
            for key in settings:
                if recorded.get(key) != settings[key]:
                    raise ValueError(
                        f"expected {name!r} as it was recorded in {self.directory}, with"
                        f" {key}={recorded.get(key)!r}, got {key}={settings[key]!r}"
                    )

    def _take_back(self, writer: Writer) -> None:
        with contextlib.suppress(OSError):
            if writer.takes_back:
                writer.close()
                writer.open(self.directory, self.last_epoch)
            else:
                writer.discard(self.directory, self.last_epoch)

    def _tell_manifest(self, record: Record) -> None:
        layers = self._manifest.layers | {name: facts._asdict() for name, facts in record.layers.items()}
        manifest = replace(self._manifest, last_epoch=record.epoch, layers=layers)
        write_manifest(self.directory, manifest)
        self._manifest = manifest
