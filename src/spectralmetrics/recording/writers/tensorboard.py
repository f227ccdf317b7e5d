"""Numbers as curves in TensorBoard."""

from __future__ import annotations

import contextlib
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmetrics.extras import from_extra
from spectralmetrics.recording.record import Record, RecordKey
from spectralmetrics.recording.writer import Writer

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER_NAME = "tensorboard"
STEPS_NAME = "steps"


class TensorBoardWriter(Writer):
    """Curves for TensorBoard in the folder ``tensorboard``; extra ``spectralmetrics[tensorboard]``.

    Steps are epochs. Tags are ``"{statistic}/{stage}/{layer}"``, which TensorBoard groups by statistic. Records
    at steps are curves of a separate run, ``steps``.

    Raises:
        ModuleNotFoundError: without tensorboard.
    """

    name = "tensorboard"
    takes_back = True
    at_steps = True

    def __init__(self) -> None:
        with from_extra("tensorboard", "the tensorboard writer needs tensorboard"):
            importlib.import_module("tensorboard")
        self._events: dict[bool, SummaryWriter] = {}

    def open_after(self, directory: Path, last: RecordKey | None) -> None:
        """See :class:`Writer`."""
        self._folder = directory / FOLDER_NAME
        # TensorBoard itself hides later records, which a killed process may have written.
        ended = None if last is None else last.ended_epoch
        step = -1 if last is None else last.step
        self._purge: Any = {False: 0 if ended is None else ended + 1, True: None if step is None else step + 1}
        # It reads files in the order of their names: the second in which a file was made, then the process. In
        # the same second as a killed process' file, the new file might come first.
        newest = max((int(path.name.split(".")[3]) for path in _event_files(directory)), default=0)
        time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        from torch.utils.tensorboard.writer import SummaryWriter

        at_step = record.step is not None
        if at_step not in self._events:
            folder = self._folder / STEPS_NAME if at_step else self._folder
            self._events[at_step] = SummaryWriter(str(folder), purge_step=self._purge[at_step])
        for row in record.rows:
            tag = "/".join(filter(None, (row.statistic, row.stage, row.layer)))
            self._events[at_step].add_scalar(tag, row.value, record.step if at_step else record.epoch)
        self._events[at_step].flush()

    def close(self) -> None:
        """See :class:`Writer`."""
        opened, self._events = list(self._events.values()), {}
        with contextlib.ExitStack() as stack:  # all are closed, also if one fails
            for events in opened:
                if events.file_writer is not None:  # its thread must end, even if flushing fails
                    stack.callback(events.file_writer.close)
                stack.callback(events.close)

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
    return list((directory / FOLDER_NAME).rglob("events.out.tfevents.[0-9]*"))
