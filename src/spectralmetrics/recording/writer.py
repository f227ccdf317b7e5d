"""The base class of what keeps or shows records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from spectralmetrics.recording.record import Record


class Writer:
    """Keeps or shows records; subclass it and define :meth:`write`.

    A writer is used on the first process only. One that shows records (prints, draws, sends) needs ``write``
    alone. One that keeps them sets ``keeps_records = True`` and defines the class methods :meth:`last_epoch`
    and :meth:`discard` as well: a record is whole once all that keep it have it, and ``mode="resume"`` takes
    back what a killed process had written of one that was not.

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """Called once, before the first record.

        Args:
            directory: of the run; it exists.
            last_epoch: the last record that is already there, or None.
        """

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
    def holds_records(cls, directory: Path) -> bool:
        """Whether the directory holds anything of this writer."""
        return cls.last_epoch(directory) is not None

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """Remove this writer's part of all records after an epoch; None: of all records."""
