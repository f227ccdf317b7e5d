"""Recorder: what a user keeps of a run."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.functional.together import Progress
from spectralmetrics.metrics import Interval
from spectralmetrics.probing import LayerProbe
from spectralmetrics.recording.record import Record, Row, Settings, describe, tidy_rows
from spectralmetrics.recording.run import Mode, Run
from spectralmetrics.recording.writer import Writer
from spectralmetrics.recording.writers import make_writers
from spectralmetrics.sums import Sum
from spectralmetrics.tail import MEAN_LAYER

T = TypeVar("T")


class Recorder:
    """Keeps what a probe sees, epoch by epoch, in a directory; a record is whole or absent.

    Epochs count from 0, as in ``for epoch in range(recorder.next_epoch, epochs)``, unless :meth:`record` is
    given other numbers. A process killed at any moment leaves all earlier records readable. A directory has one
    recorder at a time, until that is closed or collected or its process ends. On several processes make the
    recorder and call :meth:`record` on all of them: they merge, and the first one writes.

    Args:
        directory: of the run; made if it is not there.
        probe: whose values to record; None records added scalars only.
        writers: names among ``"csv"``, ``"arrays"``, ``"history"``, ``"console"``, ``"tensorboard"`` and
            ``"plot"``, or instances of :class:`Writer`.
        mode: ``"create"`` refuses a directory that holds records and leaves it as it is; ``"resume"`` goes on
            after the last whole record, also of a directory that holds none yet, and draws the pictures of that
            record that are missing; ``"overwrite"`` removes earlier records at once (not other files), and logs
            how many there were.

    Raises:
        FileExistsError: in mode ``"create"``, if the directory holds records.
        TypeError, ValueError: for other arguments; for a layer named ``"mean"``; in mode ``"resume"``, for
            metrics with other settings than those recorded.
        BlockingIOError: while another recorder of the directory is open, in this process or another.
        OSError: if the directory cannot be written to.
        ModuleNotFoundError: if a writer's extra is not installed.

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
        if probe is not None and MEAN_LAYER in probe.layers:
            raise ValueError(
                f"expected no probed layer to be named {MEAN_LAYER!r}, the name of the mean over layers; rename"
                " or exclude it"
            )
        self.directory = Path(directory).absolute()  # a later `os.chdir` must not split the run
        self.probe = probe
        self.writers = make_writers(writers)
        self._scalars: dict[tuple[str, str, str], float] = {}
        self._statistics: dict[str, Settings] = {}
        if probe is not None:
            self._statistics = {name: describe(metric) for name, metric in probe.statistics.items()}
        self._run: Run | None = None  # on the first process
        self._last_epoch = _on_first_process(lambda: self._open(mode))
        self._is_open = True

    @property
    def next_epoch(self) -> int:
        """The number of the next record, unless it is given another."""
        return 0 if self._last_epoch is None else self._last_epoch + 1

    def add_scalar(self, name: str, value: float | Tensor, *, stage: str = "", layer: str = "") -> None:
        """Add a number of your own to the next record, such as accuracy or loss.

        The first process' number counts. A name given twice before a record keeps the later value.

        Args:
            name: its statistic.
            value: a number, or a tensor of one element.
            stage: such as ``"eval"``.
            layer: of a metric kept by hand.

        Raises:
            TypeError: if the value is no number, or ``stage`` or ``layer`` no string.
            ValueError: if the name is empty or that of a probed statistic, or the layer is ``"mean"``.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected the name of a scalar, got {name!r}")
        for part, text in (("stage", stage), ("layer", layer)):
            if not isinstance(text, str):
                raise TypeError(f"expected {part} to be a string, got {text!r}")
        if name in self._statistics:
            raise ValueError(f"expected a name that no probed metric has, got {name!r}")
        if layer == MEAN_LAYER:
            raise ValueError(f"expected the name of a layer, got {layer!r}, the name of the mean over layers")
        try:
            self._scalars[name, stage, layer] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"expected {name!r} to be a number, got {value!r}") from error

    def record(
        self, epoch: int | None = None, reset: bool = True, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Compute, write and reset.

        If it raises an OSError, nothing of this epoch was kept and nothing was forgotten: mend the cause and
        call it again. If it raises a RuntimeError because a writer that only shows records has failed (console,
        plot or one of your own), the record has been kept, and the next call records the next epoch.

        Args:
            epoch: its number, above that of the last record; None: :attr:`next_epoch`.
            reset: False goes on accumulating over the next epoch.
            progress: see :meth:`LayerProbe.compute`. What it raises ends the record, of which nothing is kept
                then, and nothing is forgotten.

        Returns:
            What :meth:`LayerProbe.compute` returns, the mean of each statistic over the layers as
            ``"{statistic}/{stage}/mean"`` (NaN if one is), and the added scalars. Empty, with a warning and
            without a record, if there is nothing at all.

        Raises:
            ValueError: for an epoch that is not above the last.
            RuntimeError: after :meth:`close`; for what :meth:`LayerProbe.compute` or a writer raises.
            OSError: if the record cannot be written; earlier records are intact.
        """
        if not self._is_open:
            raise RuntimeError(f"the recorder of {self.directory} is closed")
        epoch = self._check_epoch(epoch)
        is_kept, failed = False, None
        try:
            with contextlib.nullcontext() if self.probe is None else self.probe.merged(sharing=True):
                record = self._make_record(epoch, progress)
                run: Any = self._run
                is_kept = _on_first_process(lambda: run.keep(record))
                if is_kept:
                    failed = _on_first_process(lambda: run.show(record))
        finally:
            if is_kept:  # whatever happens then, an interrupt from the keyboard too
                self._last_epoch = epoch
                self._scalars.clear()
                if self.probe is not None and reset:
                    self.probe.reset()
        if not is_kept:
            message = "nothing to record: the probe has seen nothing and no scalar was added"
            warnings.warn(message, UserWarning, stacklevel=2)
            return {}
        if failed is not None:
            name, error = failed
            raise RuntimeError(
                f"the record of epoch {epoch} is kept, but the writer {name!r} failed: {error}"
            ) from error
        return dict(record.values)

    def close(self) -> None:
        """Close the writers. What was added after the last record is not kept, and a warning says so."""
        if not self._is_open:
            return
        self._is_open = False
        if self._run is not None:
            self._run.close()
        if self._scalars:
            names = ", ".join(repr(name) for name, _, _ in self._scalars)
            warnings.warn(f"added after the last record, and not kept: {names}", UserWarning, stacklevel=2)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, mode: Mode) -> int | None:
        self._run = Run(self.directory, self.writers, self._statistics, mode)
        return self._run.last_epoch

    def _check_epoch(self, epoch: int | None) -> int:
        if epoch is None:
            return self.next_epoch
        if not hasattr(epoch, "__index__") or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(f"expected an epoch as an integer that is not negative, got {epoch!r}")
        epoch = int(epoch)
        if epoch < self.next_epoch:
            raise ValueError(f"expected an epoch above the last recorded one, {self._last_epoch}, got {epoch}")
        return epoch

    def _make_record(self, epoch: int, progress: Progress | None) -> Record:
        values: dict[str, Tensor] = {}
        sums: dict[tuple[str, str], list[Sum]] = {}
        rows: list[Row] = []
        if self.probe is not None:
            where: dict[tuple[str, str, str], Tensor] = {}
            for key, found in self.probe.compute(progress=progress).items():
                statistic, stage, layer = key.split("/", 2)
                # Metrics of other libraries may return several numbers by name.
                parts: Any = found if isinstance(found, Mapping) else {"": found}
                for part, value in parts.items():
                    if isinstance(value, (Tensor, int, float)):
                        name = f"{statistic}_{part}" if part else statistic
                        where[name, stage, layer] = torch.as_tensor(value)
            values = {"/".join(key): value for key, value in where.items()}
            rows = tidy_rows(epoch, where, self._intervals())
            for stage in ("train", "eval"):
                for layer in self.probe.layers:
                    if found_sums := self.probe.sums(stage, layer):
                        sums[stage, layer] = found_sums
        for row in rows:
            if row.layer == MEAN_LAYER:
                values[f"{row.statistic}/{row.stage}/{MEAN_LAYER}"] = torch.tensor(
                    row.value, dtype=torch.float64
                )
        for (name, stage, layer), scalar in self._scalars.items():
            rows.append(Row(epoch, stage, layer, name, scalar))
            values["/".join(filter(None, (name, stage, layer)))] = torch.tensor(scalar, dtype=torch.float64)
        facts = {} if self.probe is None else self.probe.facts
        return Record(epoch, values, rows, sums, self._statistics, facts)

    def _intervals(self) -> dict[tuple[str, str, str], Interval]:
        """Of all values that have one, by statistic, stage and layer."""
        if self.probe is None or not self.probe.has_intervals:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the values have said it all
            found = self.probe.intervals()
        parts = {tuple(key.split("/", 2)): interval for key, interval in found.items()}
        return {(statistic, stage, layer): each for (statistic, stage, layer), each in parts.items()}


def _on_first_process(function: Callable[[], T]) -> T:
    """Call on the first process; on all of them return what it returned, or raise what it raised."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except Exception as error:
            outcome = [None, error]
        try:
            pickle.dumps(outcome)
        except Exception:
            told = outcome[1] or outcome[0][1]
            replacement = RuntimeError(f"{type(told).__name__}: {told}")
            outcome = [None, replacement] if outcome[1] else [(outcome[0][0], replacement), None]
    dist.broadcast_object_list(outcome)
    result, raised = outcome
    if raised is not None:
        raise raised
    return result  # type: ignore[no-any-return]
