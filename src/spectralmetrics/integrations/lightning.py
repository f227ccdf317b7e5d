"""A Lightning callback that probes the model and logs what it sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralmetrics.extras import from_extra
from spectralmetrics.integrations.forwards import Forwards, Stage
from spectralmetrics.integrations.keeping import Keeping, MakesMonitor, MakesRecorder, Watching
from spectralmetrics.integrations.values import with_means
from spectralmetrics.metrics.groups import Metrics
from spectralmetrics.monitoring import Monitor
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.hooks import warn_user

with from_extra("lightning", "this callback needs lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class LayerProbeCallback(Callback):
    """Probes a LightningModule and logs one value per metric, stage and layer, and their means over the layers.

    Values go through ``log_dict``, so that every Lightning logger gets them and ``EarlyStopping`` or
    ``ModelCheckpoint`` can monitor them, as ``"saturation/eval/model.0"`` or ``"saturation/eval/mean"``. On
    several devices, values are computed from the observations of all devices.

    - Training values of an epoch are logged at its end. Whenever the trainer logs, the means over the layers
      are logged too, of what was observed since it last logged.
    - Values of a validation or test are logged at its end. With several loaders, ``"/dataloader_idx_0"`` and so
      on name the values of each; those without this suffix are of all loaders together.

    Only the trainer's batches are observed: training batches as ``"train"``, frozen layers in eval mode
    included, batches of a validation or test as ``"eval"``. The sanity check, trials of a batch size, an
    evaluation inside a training step, and ``generate`` of a model of transformers are left out.

    After a fit or an evaluation ``probe`` still holds what was last observed in each stage:
    ``callback.probe.summary("eval")``.

    A checkpoint holds what has been observed on all devices and is in no record yet. A fit that goes on from it
    has the values and records of one that was not cut off, whenever the checkpoint was saved. On another number
    of devices the sums are right, and other rows may be drawn.

    Args:
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars (a spectrum) are not
            logged; read them from ``probe`` in a callback of your own.
        generation: True observes the forwards of ``generate`` of a model of transformers, too.
        recorder: a directory for records and arrays, or a function from the probe to a
            :class:`~spectralmetrics.Recorder`. Each epoch of a fit becomes a record, with its last validation,
            and so does a validation outside of a fit, and what each layer showed since the trainer last logged,
            where it logs within an epoch. A directory may hold records only if the fit goes on from
            a checkpoint; those that it holds from there on stay, and are not recorded again. The function is
            called once, and again for another fit from scratch; validations, and fits that go on, open
            its recorder again. Where the strategy starts processes for each fit and validation, it is called
            in each: give a directory.
        each_layer: True logs the values of each layer at steps, too; False their means alone.
        monitor: True for a :class:`~spectralmetrics.Monitor` of the training, or a function from the probe to
            one: ``lambda probe: Monitor(probe, every=50, on_alarm="stop")``. Where it is to stop, the fit ends.
            The recorder keeps its alarms.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model while the trainer runs; None before. Where
            the strategy starts processes (``"ddp_spawn"``, ``"ddp_notebook"``), it is theirs, and not yours.
        monitor: the :class:`~spectralmetrics.Monitor` of the probe; None without one.

    Raises:
        TypeError: for a recorder or monitor of another type; when the trainer starts, for what
            :class:`~spectralmetrics.LayerProbe` and :class:`~spectralmetrics.Recorder` raise.
        ValueError: when the trainer starts, if two callbacks have metrics of the same name.
        ModuleNotFoundError: on import, without ``lightning``.

    >>> from spectralmetrics import SaturationMetric
    >>> callback = LayerProbeCallback(SaturationMetric(threshold=0.99), rows_per_feature=4)
    >>> # lightning.Trainer(callbacks=[callback]).fit(module, data)
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        *,
        generation: bool = False,
        recorder: str | Path | MakesRecorder | None = None,
        each_layer: bool = False,
        monitor: bool | MakesMonitor = False,
        **arguments: Any,
    ) -> None:
        self.probe: LayerProbe | None = None
        arguments |= {"metrics": metrics, "generation": generation, "each_layer": each_layer}
        self._make_forwards: Callable[[nn.Module], Forwards] = functools.partial(Forwards, **arguments)
        self._keeping = Keeping(recorder)
        self._watching = Watching(monitor)
        self._forwards: Forwards | None = None  # while the trainer runs
        self._left: Forwards | None = None  # as a fit has left them, for checkpoints that are saved afterwards
        self._saved: dict[str, Any] | None = None  # of the checkpoint from which a fit goes on
        self._begun: int | None = None  # the trainer's epoch that has begun and whose end has yet to be seen
        self._step = 0  # of the optimizers, when the batch began
        self._loaders: list[dict[str, Tensor]] = []  # values of the loaders that an evaluation is through with
        self._number: int | None = None  # among the callbacks of this class in the trainer

    @property
    def monitor(self) -> Monitor | None:
        """See the class."""
        return self._watching.monitor

    @property
    def state_key(self) -> str:
        """The name in a checkpoint: that of the class for a trainer's first callback of this class."""
        name = type(self).__qualname__
        if self._number is None:  # no trainer has set it up, and Lightning asks for names that differ
            return f"{name}_{id(self):#x}"
        return f"{name}_{self._number}" if self._number else name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the callbacks of this class before this one."""
        alike = [each for each in trainer.callbacks if type(each) is type(self)]  # type: ignore[attr-defined]
        self._number = alike.index(self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe."""
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, or go on from a checkpoint."""
        self._go_on(trainer, pl_module)
        if self._begun is not None and self._begun < trainer.current_epoch:
            self._end_epoch(pl_module)  # the checkpoint is of its last batch: the trainer does not end it again

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch of a checkpoint behind which there is nothing to train."""
        if self._saved is not None:
            self._go_on(trainer, pl_module)
            if self._begun is not None:
                self._end_epoch(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Observe the batch."""
        self._step, self._begun = trainer.global_step, trainer.current_epoch
        forwards = self._attach(pl_module)
        forwards.begin("train", pl_module.training or None)
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        forwards.scale_by(getattr(trainer.precision_plugin, "scaler", None), engine)
        forwards.probe.step = self._step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop observing; after an optimizer step, run the monitor, and log and record if the trainer logs."""
        forwards = self._attach(pl_module)
        forwards.end(observes=False)
        step = trainer.global_step
        if step == self._step:  # no optimizer stepped
            return
        trainer.should_stop = self._watching.step() or trainer.should_stop
        if trainer._logger_connector.should_update_logs:  # as Lightning's own callbacks ask
            values = forwards.compute_step(lambda: self._keeping.record_step(step))
            self._hand_over(pl_module, "train", values, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the epoch's training forwards showed, and record it with the last validation."""
        if self._begun is not None:  # or it had ended when the checkpoint was saved
            self._log(pl_module, "train")
            self._end_epoch(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with what the validation or test shows."""
        self._loaders = []
        self._attach(pl_module).reset("eval")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Observe the batch, unless it is one of the sanity check."""
        if trainer.sanity_checking:
            return
        forwards = self._attach(pl_module)
        while len(self._loaders) < dataloader_idx:
            self._loaders.append(forwards.compute_window("eval"))
        forwards.begin("eval")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop observing."""
        self._attach(pl_module).end(observes=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the validation or test showed; record a validation that is not part of a fit."""
        if trainer.sanity_checking:
            return
        self._log(pl_module, "eval")
        if trainer.state.fn == "validate":
            forwards = self._attach(pl_module)
            self._open(trainer, forwards)
            self._keeping.record(forwards)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        if self._forwards is not None:
            self._forwards.leave()  # a checkpoint may still be saved
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if self._forwards is not None:
            self._forwards.close()
        self._detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The observations of all processes that are in no record, and how far the fit is."""
        forwards = self._forwards or self._left
        saved = None if forwards is None else forwards.saved(bool(self._keeping))
        if saved is None:
            return {}
        return saved | {"begun": self._begun} | ({"epoch": self._keeping.epoch} if self._keeping else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's observations until the fit goes on."""
        self._saved = dict(state_dict)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forwards = self._attach(pl_module)
        entries = forwards.load(self._saved)
        self._saved = None
        epoch = None if trainer.ckpt_path is None else trainer.current_epoch
        progress = trainer.fit_loop.epoch_loop.batch_progress
        is_within = epoch is not None and progress.current.ready and not progress.is_last_batch
        if entries is None and is_within and trainer.is_global_zero:
            warn_user(
                f"the checkpoint {str(trainer.ckpt_path)!r} has no observations of this callback: values and"
                f" record of epoch {epoch} are of what comes after it alone"
            )
        number = epoch if entries is None else entries.get("epoch", epoch)
        # Earlier releases did not save it, but their records are numbered as the trainer's epochs.
        self._begun = None if entries is None else entries.get("begun", number)
        self._open(trainer, forwards, trainer.global_step, number)
        self._watching.keep(self._keeping)

    def _end_epoch(self, pl_module: LightningModule) -> None:
        forwards = self._attach(pl_module)
        forwards.finish("train")
        self._keeping.record(forwards)
        self._begun = None

    def _attach(self, pl_module: LightningModule) -> Forwards:
        if self._forwards is None:
            self._forwards = self._make_forwards(pl_module)
            self._forwards.end(observes=False)
            self.probe = self._forwards.probe
            self._check_names(pl_module.trainer)
            self.probe.persistent()
            self._watching.begin(self.probe)
        return self._forwards

    def _check_names(self, trainer: Trainer) -> None:
        """Raise a ValueError for a name in two callbacks: Lightning would log the mean of both values."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        alike = [each for each in callbacks if isinstance(each, LayerProbeCallback)]
        probes = [each._forwards.probe for each in alike if each._forwards is not None]
        names = [name for probe in probes for name in probe.statistics]
        both = next((name for name in names if names.count(name) > 1), None)
        if both is not None:
            raise ValueError(
                f"expected callbacks whose metrics have different names, got {both!r} in two; name the metrics"
                f" of one: metrics={{'other {both}': ...}}"
            )

    def _open(
        self, trainer: Trainer, forwards: Forwards, trained: int | None = None, epoch: int | None = None
    ) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which keeps nothing: neither logs nor checkpoints
            self._keeping.open(forwards, trained, epoch)

    def _detach(self, trainer: Trainer) -> None:
        self._keeping.close()
        self._saved = None
        if self._forwards is not None:
            self._left = self._forwards if trainer.state.fn == "fit" else None
            self._forwards = None

    def _log(self, pl_module: LightningModule, stage: Stage) -> None:
        forwards = self._attach(pl_module)
        if forwards.is_empty(stage):
            return
        if stage == "eval" and self._loaders:
            for number, values in enumerate([*self._loaders, forwards.compute_window(stage)]):
                suffix = f"/dataloader_idx_{number}"  # as Lightning names what each loader shows
                self._hand_over(pl_module, stage, with_means(values), suffix, add_dataloader_idx=False)
        self._hand_over(pl_module, stage, forwards.compute_stage(stage))

    def _hand_over(
        self,
        pl_module: LightningModule,
        stage: Stage,
        values: Mapping[tuple[str, str], float],
        suffix: str = "",
        **how: Any,
    ) -> None:
        named = {
            f"{metric}/{stage}/{layer}{suffix}": torch.tensor(value, dtype=torch.float64)
            for (metric, layer), value in values.items()
        }
        # All processes have the same values, in different orders. These two arguments together keep Lightning
        # from reducing the values and from a warning. Each process logs them, so that callbacks can monitor
        # them.
        pl_module.log_dict(named, sync_dist=True, rank_zero_only=True, **how)
