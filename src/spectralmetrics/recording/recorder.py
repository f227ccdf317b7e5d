"""Recorder: keeps a run in a directory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from spectralmetrics.functional.tail import MEAN_LAYER, recorded_name
from spectralmetrics.functional.together import Progress
from spectralmetrics.monitoring import Alarm
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.facts import Key, as_text
from spectralmetrics.probing.probe import ProbeReading, group_of, read_probe
from spectralmetrics.probing.processes import agreed, from_first_process, has_others, on_first_process
from spectralmetrics.recording.directory import Mode, RunDirectory
from spectralmetrics.recording.manifest import describe
from spectralmetrics.recording.record import (
    Record,
    RecordedSums,
    RecordKey,
    Row,
    Settings,
    check_recordable,
    tidy_rows,
    undefined_layers,
    warn_of_undefined,
)
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers import make_writers
from spectralmetrics.sums.checks import is_integer


class Recorder:
    """Keeps a probe's values in a directory, epoch by epoch; a record is whole or absent.

    Epochs count from 0, as in ``for epoch in range(recorder.next_epoch, epochs)``, unless :meth:`record` is
    given other numbers. A process killed at any moment leaves all earlier records readable. A directory has one
    recorder at a time, until it is closed or collected or its process ends. On several processes make the
    recorder and call :meth:`record` on all of them: they merge, and the first process writes. If all metrics of
    the probe are merged in one ``process_group``, use the processes of this group: its first process writes.
    Each group needs its own directory.

    Args:
        directory: the directory of the run; made if it does not exist.
        probe: the probe whose values to record; None records added scalars only.
        writers: names among ``"csv"``, ``"arrays"``, ``"history"``, ``"console"``, ``"tensorboard"``,
            ``"plot"`` and ``"report"``, or instances of :class:`Writer`.
        mode: ``"create"`` refuses a directory that holds records and leaves it as it is; ``"resume"`` goes on
            after the last whole record, if there is one, and draws missing pictures of this record;
            ``"overwrite"`` removes earlier records at once (not other files), and logs how many there were.

    Raises:
        FileExistsError: in mode ``"create"``, if the directory holds records.
        TypeError, ValueError: for other arguments; for layers or metrics whose names hold null characters or
            lone surrogates; in mode ``"resume"``, for metrics with other settings than recorded.
        BlockingIOError: while another recorder of the directory is open, in this process or another.
        OSError: if the directory cannot be written to.
        ModuleNotFoundError: if a writer's extra is not installed.

    Attributes:
        last: epoch and step of the last record, no step at the end of an epoch; None without a record.

    >>> import tempfile, torch
    >>> from spectralmetrics import LayerProbe, SaturationMetric
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> with LayerProbe(model, SaturationMetric()) as probe, Recorder(tempfile.mkdtemp(), probe) as recorder:
    ...     _ = model(torch.randn(32, 4))
    ...     recorder.add_scalar("loss", 0.5)
    ...     values = recorder.record()
    >>> list(values), recorder.next_epoch
    (['saturation/train/0', 'saturation/train/mean', 'loss'], 1)
    """

    def __init__(
        self,
        directory: str | Path,
        probe: LayerProbe | None = None,
        writers: str | Writer | Sequence[str | Writer] = ("csv",),
        *,
        mode: Mode = "create",
    ) -> None:
        if probe is not None and not isinstance(probe, LayerProbe):
            raise TypeError(f"expected probe to be a LayerProbe or None, got {type(probe).__name__}")
        if mode not in get_args(Mode):
            raise ValueError(f"expected a mode among {get_args(Mode)}, got {mode!r}")
        self.directory = Path(directory).absolute()  # a later `os.chdir` must not split the run
        self.writers = make_writers(writers)
        self._scalars: dict[Key, float] = {}
        self._undefined: set[str] = set()  # statistics with a warning that named their undefined layers
        self._run: RunDirectory | None = None  # on the first process, while it is open
        self.last: RecordKey | None = None
        # Takes the errors of files and writers where they must not end a training; None raises them.
        self._on_failure: Callable[[Exception], None] | None = None
        self._is_open = False
        self._open(probe, mode)

    @property
    def next_epoch(self) -> int:
        """The epoch of the next record, if :meth:`record` gets no other."""
        return 0 if self.last is None or (ended := self.last.ended_epoch) is None else ended + 1

    def add_scalar(self, name: str, value: float | Tensor, *, stage: str = "", layer: str = "") -> None:
        """Add a number of your own to the next record, such as accuracy or loss.

        The first process' number counts. A name given twice before a record keeps the later value.

        Args:
            name: the name of the number, in the column ``statistic``.
            value: a number, or a tensor of one element.
            stage: stage of the number, such as ``"eval"``.
            layer: the layer of a metric kept by hand.

        Raises:
            TypeError: if the value is no number, or ``stage`` or ``layer`` no string.
            ValueError: if the name is empty or names a probed statistic, if the layer is ``"mean"``, or for
                names that the files of a run cannot hold.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected the name of a scalar, got {name!r}")
        for part, text in (("stage", stage), ("layer", layer)):
            if not isinstance(text, str):
                raise TypeError(f"expected {part} to be a string, got {text!r}")
        for part, text in (("scalar", name), ("stage", stage), ("layer", layer)):
            check_recordable(part, text)
        if name in self._statistics:
            raise ValueError(f"expected a name that no probed metric has, got {name!r}")
        if layer == MEAN_LAYER:
            raise ValueError(f"expected the name of a layer, got {layer!r}, the name of the mean over layers")
        try:
            self._scalars[name, stage, layer] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"expected {name!r} to be a number, got {value!r}") from error

    def record(
        self,
        epoch: int | None = None,
        reset: bool = True,
        progress: Progress | None = None,
        *,
        step: int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the values, write them and reset the probe.

        After an OSError, nothing of this record was kept and no observation was lost: fix the cause and call
        this again. The same holds for an interrupt and for errors of other processes, a RuntimeError here. If
        this raises a RuntimeError because a writer that only shows records has failed (console, plot or one of
        your own), the record has been kept, and the next call records the next one.

        Args:
            epoch: number of the epoch, above the last recorded epoch; None: :attr:`next_epoch`.
            reset: False goes on accumulating over the next record.
            progress: see :meth:`LayerProbe.compute`. If it raises, nothing of the record is kept and no
                observation is lost.
            step: step of a record within an epoch, or in a training without epochs: the number of optimiser
                steps so far, above the last recorded step of the same epoch. Such records hold numbers;
                ``ArraysWriter(every_step=True)`` keeps their arrays, too. None: the end of the epoch.

        Returns:
            The values of :meth:`LayerProbe.compute`, the added scalars and, as ``"{statistic}/{stage}/mean"``,
            the mean of each statistic over the layers where it is defined. A layer that is itself called
            ``"mean"`` is recorded as ``"mean (layer)"``. If nothing was observed or added, the result is empty,
            a warning says so, and there is no record.

        Raises:
            ValueError: for an epoch or step that does not come after the last record, or that differs between
                processes; if a table of earlier records was damaged meanwhile.
            RuntimeError: after :meth:`close`; if :meth:`LayerProbe.compute` or a writer raises it.
            OSError: if the record cannot be written; earlier records are intact.
        """
        is_kept, failed = None, None
        error: BaseException | None = None
        key, call = RecordKey(0), ""
        try:
            self._check_open()
            key = self._next_key(epoch, step)
            call = f"record(epoch={key.epoch}, step={key.step}, reset={bool(reset)})"
        except Exception as raised:  # the other processes will read, and must get the error
            error = raised
        run: Any = self._run
        group = group_of(self.probe)
        try:
            with contextlib.ExitStack() as stack:

                def read() -> tuple[Record, ProbeReading | None]:
                    reading = None
                    if self.probe is not None:
                        reading = stack.enter_context(
                            read_probe(
                                self.probe, progress, error, lambda layer: recorded_name(layer) in self._trained
                            )
                        )
                    elif error is not None:
                        raise error
                    return self._make_record(key, reading), reading

                record, reading = agreed(read, [group] if has_others(group) else [], call)
                serve = None if reading is None else reading.serve
                is_kept, error = on_first_process(lambda: run.keep(record), group, serve)
                if is_kept and error is None:
                    failed, error = on_first_process(lambda: run.show(record), group, serve)
                if error is not None and not isinstance(error, Exception):
                    raise error  # an interrupt
        finally:
            if is_kept:  # even if an error or an interrupt from the keyboard came after it
                self.last = key
                self._scalars.clear()
                if self.probe is not None and reset:
                    self.probe.reset()
        if isinstance(error, Exception):
            self._fail(error)
            return {}
        if not is_kept:
            message = "nothing to record: the probe has seen nothing and no scalar was added"
            warnings.warn(message, UserWarning, stacklevel=2)
            return {}
        if failed is not None:
            name, cause = failed
            words = f"the record of {key} is kept, but the writer {name!r} failed: {cause}"
            self._fail(RuntimeError(words), cause)
        warn_of_undefined(record.rows, self._undefined)
        self._undefined.update(undefined_layers(record.rows))
        return dict(record.values)

    def add_alarm(self, alarm: Alarm) -> None:
        """Keep an alarm at once, in ``alarms.csv``; a :class:`~spectralmetrics.Monitor` calls this.

        On several processes, call it on all of them; the first process writes. A process killed at any moment
        leaves whole lines.

        Raises:
            TypeError: for anything but an alarm.
            RuntimeError: after :meth:`close`.
            OSError: if the alarm cannot be written; earlier alarms are intact.
        """
        if not isinstance(alarm, Alarm):
            raise TypeError(f"expected an Alarm, got {alarm!r}")
        self._on_first(lambda run: run.add_alarm(alarm))

    def drop_alarms(self, step: int) -> None:
        """Forget the alarms from a step on; a monitor that goes on from this step calls this.

        Raises:
            ValueError: for a step that is no integer, or negative.
            RuntimeError: after :meth:`close`.
        """
        if not is_integer(step, 0):
            raise ValueError(f"expected a step as an integer that is not negative, got {step!r}")
        self._on_first(lambda run: run.drop_alarms(int(step)))

    def close(self) -> None:
        """Close the writers. Scalars added after the last record are not kept, and a warning says so."""
        if not self._is_open:
            return
        self._is_open = False
        run, self._run = self._run, None
        if run is not None:
            run.close()
        if self._scalars:
            names = ", ".join(repr(name) for name, _, _ in self._scalars)
            warnings.warn(f"added after the last record, and not kept: {names}", UserWarning, stacklevel=2)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fail(self, error: Exception, cause: BaseException | None = None) -> None:
        """Raise an error of a file or a writer, the same on all processes, unless a callback takes it."""
        if self._on_failure is None:
            raise error from (cause or error.__cause__)
        self._on_failure(error)

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(f"the recorder of {self.directory} is closed")

    def _on_first(self, work: Callable[[Any], None]) -> None:
        self._check_open()
        from_first_process(lambda: work(self._run), group_of(self.probe))

    def _open(self, probe: LayerProbe | None, mode: Mode) -> None:
        """Open the directory: for the first time, or again after it was closed."""
        layers, metrics = ([], {}) if probe is None else (probe.layers, probe.statistics)
        for what, name in (*(("layer", each) for each in layers), *(("metric", each) for each in metrics)):
            check_recordable(what, name)
        self.probe = probe
        self._statistics: dict[str, Settings] = {name: describe(metric) for name, metric in metrics.items()}

        def open_directory() -> tuple[RecordKey | None, set[str]]:
            self._run = RunDirectory(self.directory, self.writers, self._statistics, mode)
            return self._run.last, self._run.trained

        self.last, self._trained = from_first_process(open_directory, group_of(probe))
        self._is_open = True

    def _next_key(self, epoch: int | None, step: int | None) -> RecordKey:
        for what, number in (("an epoch", epoch), ("a step", step)):
            is_integer = hasattr(number, "__index__") and not isinstance(number, bool)
            if number is not None and not (is_integer and number >= 0):
                raise ValueError(f"expected {what} as an integer that is not negative, got {number!r}")
        key = RecordKey(self.next_epoch if epoch is None else int(epoch), None if step is None else int(step))
        if self.last is None or key.order > self.last.order:
            return key
        if key.epoch == self.last.epoch and self.last.step is not None:
            raise ValueError(
                f"expected a step above the last recorded one of epoch {key.epoch}, {self.last.step}, got"
                f" {key.step}"
            )
        raise ValueError(
            f"expected an epoch above the last recorded one, {self.last.ended_epoch}, got {key.epoch}"
        )

    def _make_record(self, key: RecordKey, reading: ProbeReading | None) -> Record:
        values: dict[Key, Tensor] = {}
        rows: list[Row] = []
        sums: Mapping[Any, Any] = {}
        known, facts, untrained = {}, {}, {}
        if reading is not None:
            for (statistic, stage, layer), result in reading.values.items():
                # Metrics of other libraries may return several numbers by name.
                parts: Any = result if isinstance(result, Mapping) else {"": result}
                for part, value in parts.items():
                    if isinstance(value, (Tensor, int, float)):
                        name = f"{statistic}_{part}" if part else statistic
                        values[name, stage, recorded_name(layer)] = torch.as_tensor(value)
            intervals = {
                (name, stage, recorded_name(layer)): ends
                for (name, stage, layer), ends in reading.intervals.items()
            }
            rows = tidy_rows(key, values, intervals)
            sums = RecordedSums(reading.sums)
            known = {(stage, recorded_name(layer)): each for (stage, layer), each in reading.known.items()}
            facts = {recorded_name(layer): each for layer, each in reading.facts.items()}
            untrained = {recorded_name(layer): each for layer, each in reading.untrained.items()}
            self._trained |= {layer for layer, is_new in untrained.items() if not is_new}
        for row in rows:
            if row.layer == MEAN_LAYER:
                values[row.statistic, row.stage, row.layer] = torch.tensor(row.value, dtype=torch.float64)
        named = as_text(values)
        for (name, stage, layer), scalar in self._scalars.items():
            rows.append(Row(key.epoch, stage, layer, name, scalar, step=key.step))
            named["/".join(filter(None, (name, stage, layer)))] = torch.tensor(scalar, dtype=torch.float64)
        return Record(key.epoch, named, rows, sums, self._statistics, facts, key.step, known, untrained)
