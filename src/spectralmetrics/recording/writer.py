"""The base class of what keeps or shows records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from spectralmetrics.recording.record import Record, RecordKey


class Writer:
    """Keeps or shows records; subclass it and define :meth:`write`.

    A writer is used on the first process only, and reads ``record.sums`` inside :meth:`write`.
    One that shows records (prints, draws, sends) needs ``write``
    alone. One that keeps them sets ``keeps_records = True`` and defines the class methods :meth:`last_epoch`
    and :meth:`discard` as well: a record is whole once all that keep it have it, and ``mode="resume"`` takes
    back what a killed process had written of one that was not. One that takes records at steps, too, sets
    ``at_steps = True`` and defines :meth:`last_record` and :meth:`discard_after` in their place.

    >>> class LargestWriter(Writer):
    ...     def write(self, record):
    ...         row = max((row for row in record.rows if row.layer != "mean"), key=lambda row: row.value)
    ...         print(record.epoch, row.layer, row.value)
    >>> from spectralmetrics.recording.record import Row
    >>> LargestWriter().write(Record(3, {}, [Row(3, "eval", "a", "saturation", 0.5)]))
    3 a 0.5
    """

    name: ClassVar[str]
    """By which the recorder's own file knows it; the class' name unless set."""
    keeps_records: ClassVar[bool] = False
    """Whether a record is not whole without this writer's part."""
    takes_back: ClassVar[bool] = False
    """Whether :meth:`open` hides what was written of later epochs, so that this writer can go before those that
    keep records, and has no gap where a process was killed."""
    at_steps: bool = False
    """Whether it is given the records at steps, besides those at the end of an epoch."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """Called once, before the first record.

        Args:
            directory: the directory of the run; it exists.
            last_epoch: the last epoch of which the end has been recorded, or None.
        """

    def open_after(self, directory: Path, last: RecordKey | None) -> None:
        """As :meth:`open`, which it calls, with the key of the last record."""
        self.open(directory, None if last is None else last.ended_epoch)

    def write(self, record: Record) -> None:
        """Write one record; whole or, if it raises, not at all."""
        raise NotImplementedError(f"{type(self).__name__} must define `write(self, record)`")

    def restore(self, record: Record) -> None:
        """Called after :meth:`open` in a run that is resumed; show what a killed process had not shown.

        Args:
            record: the last one, as the files hold it: its ``rows`` if the run has a table, and its values that
                are no single numbers, rebuilt when one is first read, if the run has arrays. No moments.
        """

    def close(self) -> None:
        """Called once, after the last record."""

    @classmethod
    def last_epoch(cls, directory: Path) -> int | None:
        """The last epoch that the directory holds of this writer, or None."""
        return None

    @classmethod
    def last_record(cls, directory: Path) -> RecordKey | None:
        """The key of the last record that the directory holds of this writer, or None."""
        epoch = cls.last_epoch(directory)
        return None if epoch is None else RecordKey(epoch)

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """True if the directory holds anything of this writer."""
        return cls.last_record(directory) is not None

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """Remove this writer's part of all records after an epoch; None: of all records."""

    @classmethod
    def discard_after(cls, directory: Path, after: RecordKey | None) -> None:
        """Remove this writer's part of all records after one; None: of all records."""
        cls.discard(directory, None if after is None else after.ended_epoch)
