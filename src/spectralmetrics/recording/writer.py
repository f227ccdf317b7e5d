"""The base class of writers, which keep or show records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from spectralmetrics.recording.record import Record, RecordKey


class Writer:
    """Keeps or shows records; subclass it and define :meth:`write`.

    A writer is used on the first process only, and reads ``record.sums`` inside :meth:`write`. A writer that
    shows records (prints, draws, sends) needs ``write`` alone. A writer that keeps records sets
    ``keeps_records = True`` and also defines the class methods :meth:`last_epoch` and :meth:`discard`: a record
    is whole once all these writers have kept it, and ``mode="resume"`` removes the parts of a record that a
    killed process left incomplete. To get records at steps, too, set ``at_steps = True`` and define
    :meth:`last_record` and :meth:`discard_after` instead.

    >>> class LargestWriter(Writer):
    ...     def write(self, record):
    ...         row = max((row for row in record.rows if row.layer != "mean"), key=lambda row: row.value)
    ...         print(record.epoch, row.layer, row.value)
    >>> from spectralmetrics.recording.record import Row
    >>> LargestWriter().write(Record(3, {}, [Row(3, "eval", "a", "saturation", 0.5)]))
    3 a 0.5
    """

    name: ClassVar[str]
    """The writer's name in the recorder's own file; the class' name unless set."""
    keeps_records: ClassVar[bool] = False
    """True if a record is whole only with this writer's part."""
    takes_back: ClassVar[bool] = False
    """True if :meth:`open` hides later epochs. Such a writer writes before those that keep records, so that it
    has no gap if the process is killed."""
    at_steps: bool = False
    """True if the writer also gets the records at steps, not only the records at the end of an epoch."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """Called before the first record, and again when a trainer's callback goes on after :meth:`close`.

        Args:
            directory: the directory of the run; it exists.
            last_epoch: the last epoch whose end has been recorded, or None.
        """

    def open_after(self, directory: Path, last: RecordKey | None) -> None:
        """Like :meth:`open`, but with the key of the last record; calls :meth:`open` unless overridden."""
        self.open(directory, None if last is None else last.ended_epoch)

    def write(self, record: Record) -> None:
        """Write one record; whole or, if it raises, not at all."""
        raise NotImplementedError(f"{type(self).__name__} must define `write(self, record)`")

    def restore(self, record: Record) -> None:
        """Called after :meth:`open` in a resumed run, to show what a killed process had not shown.

        Args:
            record: the last record, read from the files: its ``rows`` if the run has a table and, if it has
                arrays, the values that are no single numbers, rebuilt when one is first read. No moments.
        """

    def close(self) -> None:
        """Called after the last record."""

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """The last epoch of this writer in the directory, or None."""
        return None

    @classmethod
    def last_record(cls, directory: Path) -> RecordKey | None:
        """The key of this writer's last record in the directory, or None."""
        epoch = cls.last_epoch(directory)
        return None if epoch is None else RecordKey(epoch)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """True if the directory has records of this writer."""
        return cls.last_record(directory) is not None

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """Remove this writer's part of all records after an epoch; None: of all records."""

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """Remove this writer's part of all records after the given one; None: of all records."""
        cls.discard(directory, None if after is None else after.ended_epoch)
