"""The recorder of a callback, open while its trainer runs, and the monitor of its probe."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from spectralmetrics.integrations.forwards import Forwards
from spectralmetrics.integrations.progress import LateBar
from spectralmetrics.monitoring import Monitor
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.probe import group_of
from spectralmetrics.probing.processes import from_first_process, is_first
from spectralmetrics.probing.windows import take_over
from spectralmetrics.recording import Recorder
from spectralmetrics.recording.record import RecordKey
from spectralmetrics.recording.saved import SavedRun

MakesRecorder: TypeAlias = Callable[[LayerProbe], Recorder]
MakesMonitor: TypeAlias = Callable[[LayerProbe], Monitor]
_WRITERS = ("csv", "arrays")
_MONITOR = "layer_probe_monitor.json"


class Keeping:
    """Records what a callback's probe sees: each epoch of a training, and each evaluation outside of one.

    Args:
        recorder: a directory, which gets records and arrays, or a function from the probe to a recorder; None
            records nothing. The function is called once, and again whenever another training begins from
            scratch; evaluations, and trainings that go on, open the last recorder again. A directory is one
            run of all trainings.

    Raises:
        TypeError: for a recorder of another type.
    """

    def __init__(self, recorder: str | Path | MakesRecorder | None) -> None:
        if not (recorder is None or isinstance(recorder, (str, os.PathLike)) or callable(recorder)):
            raise TypeError(
                "expected recorder to be a directory, a function from the probe to a Recorder, or None, got"
                f" {recorder!r}"
            )
        self._made_by = recorder
        self._process = os.getpid()
        self._was_empty = isinstance(recorder, (str, os.PathLike)) and not (
            os.path.isdir(recorder) and os.listdir(recorder)
        )
        self._last: Recorder | None = None  # the recorder that was last made, open or closed
        self._has_trained = False  # with that recorder
        self.recorder: Recorder | None = None  # while it is open
        self.epoch = 0  # of the next record
        self._is_failing = False  # as of the last record
        self._outside: list[int] = []  # epochs whose records are of evaluations outside of the training

    def open(self, forwards: Forwards, trained: int | None = None, epoch: int | None = None) -> None:
        """Open the recorder, unless it is open.

        Args:
            forwards: the forwards of the model; its probe is recorded.
            trained: for a training, the number of its steps so far; None for an evaluation.
            epoch: with which a training goes on from a checkpoint; its records of this and later epochs that
                are there already stay, and the numbers of evaluations outside of it are passed over. None
                begins with the next epoch.

        Raises:
            TypeError: if the function returns no recorder of this probe; for what :class:`.Recorder` raises.
            ValueError: if the records that are there cannot be read.
        """
        if self._made_by is None:
            return
        if self.recorder is None:
            is_another = trained == 0 and self._has_trained and callable(self._made_by)
            if self._last is None or is_another:
                self._last, self._has_trained = self._made(forwards.probe, epoch is not None), False
            else:
                self._last._open(forwards.probe, "resume")
            self.recorder = self._last
        self._has_trained = self._has_trained or trained is not None
        self.epoch, self._outside = self.recorder.next_epoch, []
        if trained == 0 and self.recorder.last is not None:  # its steps do not join an epoch that was cut off
            self.epoch = self.recorder.last.epoch + 1
        if epoch is not None:
            directory = self.recorder.directory
            group = group_of(forwards.probe)
            self._outside = from_first_process(lambda: _evaluations(directory, epoch), group)
            self._go_to(epoch)

    def _made(self, probe: LayerProbe, goes_on: bool) -> Recorder:
        if not callable(self._made_by):
            assert self._made_by is not None
            # A process that a trainer starts for each fit and evaluation knows no earlier recorder.
            goes_on = goes_on or (self._was_empty and os.getppid() == self._process)
            return Recorder(self._made_by, probe, _WRITERS, mode="resume" if goes_on else "create")
        made = self._made_by(probe)
        if not isinstance(made, Recorder) or made.probe is not probe:
            raise TypeError(f"expected recorder to return a Recorder of the probe, got {made!r}")
        return made

    def __bool__(self) -> bool:
        """True if anything is recorded."""
        return self._made_by is not None

    def record(self, forwards: Forwards) -> None:
        """Record an epoch, with the stages that have been observed since the last record."""
        if self.recorder is None:
            return
        with forwards.unrecorded():
            if self.epoch >= self.recorder.next_epoch:  # or it was recorded before a crash
                self._keep(self.recorder)
        self._go_to(self.epoch + 1)

    def record_step(self, step: int) -> None:
        """Record what the probe holds, of the training within an epoch.

        Args:
            step: the number of optimiser steps so far.
        """
        if self.recorder is None:
            return
        last = self.recorder.last
        if last is None or RecordKey(self.epoch, step).order > last.order:  # or it was recorded before a crash
            self._keep(self.recorder, step)

    def close(self) -> None:
        """Close the recorder."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    def _keep(self, recorder: Recorder, step: int | None = None) -> None:
        """Record; a file that cannot be written, or a writer that fails, must not end the training."""
        failures: list[Exception] = []
        recorder._on_failure = failures.append
        try:
            recorder.record(self.epoch, reset=False, progress=LateBar("recording layers"), step=step)
        finally:
            recorder._on_failure = None
        if failures and not self._is_failing and is_first(group_of(recorder.probe)):
            warn_user(f"{failures[0]}. The training goes on, and further failures in a row raise no warning")
        self._is_failing = bool(failures)

    def _go_to(self, epoch: int) -> None:
        self.epoch = next(each for each in itertools.count(epoch) if each not in self._outside)


def _evaluations(directory: Path, first: int) -> list[int]:
    """The epochs, from the first one on, whose records are of an evaluation alone."""
    run = SavedRun(directory)
    of_rows: dict[RecordKey, set[str]] = {}
    for row in run.rows:
        of_rows.setdefault(row.key, set()).add(row.stage)
    found = []
    for key in run.records:
        if key.step is None and key.epoch >= first:
            stages = of_rows.get(key) or {stage for stage, _ in run.layers_in(key)}
            if "eval" in stages and "train" not in stages:
                found.append(key.epoch)
    return found


class Watching:
    """Steps a monitor with a trainer: one that a function makes of the probe, one with its defaults, or none.

    Raises:
        TypeError: for a monitor of another type.
    """

    def __init__(self, monitor: bool | MakesMonitor) -> None:
        if not (isinstance(monitor, bool) or callable(monitor)):
            raise TypeError(
                f"expected monitor to be True, False or a function from the probe to a Monitor, got {monitor!r}"
            )
        self._made_by: MakesMonitor | None = Monitor if monitor is True else monitor or None
        self._keeps = False
        self.monitor: Monitor | None = None

    def begin(self, probe: LayerProbe) -> None:
        """Watch a probe, or begin anew with it.

        Raises:
            TypeError: if the function returns no monitor of this probe; for what :class:`.Monitor` raises.
        """
        if self._made_by is None:
            return
        if self.monitor is not None:
            self.monitor.close()
        made = self._made_by(probe)
        if not isinstance(made, Monitor) or made.probe is not probe:
            raise TypeError(f"expected monitor to return a Monitor of the probe, got {made!r}")
        self.monitor = made
        self._keeps = made.recorder is None

    def keep(self, keeping: Keeping) -> None:
        """Have the callback's recorder keep the alarms, unless the monitor has one of its own."""
        if self.monitor is not None and self._keeps:
            self.monitor.recorder = keeping.recorder

    def step(self) -> bool:
        """After a step of the optimiser; whether the training is to stop."""
        if self.monitor is None:
            return False
        self.monitor.step()
        return self.monitor.should_stop

    def load(self, folders: Iterable[Path]) -> None:
        """Go on with what the first of the folders has that has any."""
        files = (folder / _MONITOR for folder in folders)
        found = next((each for each in files if each.is_file()), None)
        if self.monitor is not None and found is not None:
            probe = self.monitor.probe
            take_over(json.loads(found.read_text(encoding="utf-8")), probe._remembered, probe._steps)
