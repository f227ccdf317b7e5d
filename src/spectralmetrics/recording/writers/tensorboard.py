"""Numbers as curves in TensorBoard."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmetrics.recording.record import Record
from spectralmetrics.recording.writer import Writer

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER_NAME = "tensorboard"


class TensorBoardWriter(Writer):
    """Curves for TensorBoard in the folder ``tensorboard``; extra ``spectralmetrics[tensorboard]``.

    Steps are epochs. Tags are ``"{statistic}/{stage}/{layer}"``, which TensorBoard groups by statistic.

    Raises:
        ModuleNotFoundError: without tensorboard.
    """

    name = "tensorboard"
    takes_back = True

    def __init__(self) -> None:
        try:
            importlib.import_module("tensorboard")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'the tensorboard writer needs tensorboard: pip install "spectralmetrics[tensorboard]"'
            ) from error
        self._events: SummaryWriter | None = None

    def open(self, directory: Path, last_epoch: int | None) -> None:
        """See :class:`Writer`."""
        self._folder = directory / FOLDER_NAME
        # TensorBoard itself hides what was written of later epochs, by a process that was killed, say.
        self._purge: Any = 0 if last_epoch is None else last_epoch + 1
        # It reads files in the order of their names, which begin with the second in which they were made and
        # go on with the process: made in the same second as a killed process' file, ours might come first.
        newest = max((int(path.name.split(".")[3]) for path in _event_files(directory)), default=0)
        time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        from torch.utils.tensorboard.writer import SummaryWriter

        if self._events is None:
            self._events = SummaryWriter(str(self._folder), purge_step=self._purge)
        for row in record.rows:
            tag = "/".join(filter(None, (row.statistic, row.stage, row.layer)))
            self._events.add_scalar(tag, row.value, record.epoch)
        self._events.flush()

    def close(self) -> None:
        """See :class:`Writer`."""
        if self._events is not None:
            self._events.close()
            self._events = None

    @classmethod
    def holds_records(cls, directory: Path) -> bool:
        """See :class:`Writer`."""
        return any(_event_files(directory))

    @classmethod
    def discard(cls, directory: Path, after: int | None) -> None:
        """See :class:`Writer`; later epochs are hidden when the next process opens the folder."""
        if after is None:
            for path in _event_files(directory):
                path.unlink()


def _event_files(directory: Path) -> list[Path]:
    return list((directory / FOLDER_NAME).glob("events.out.tfevents.[0-9]*"))
