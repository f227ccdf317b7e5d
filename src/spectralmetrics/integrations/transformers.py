"""A callback for the Hugging Face ``Trainer`` that probes the model and logs what it sees."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spectralmetrics.extras import from_extra
from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.integrations.forwards import Forwards, Stage
from spectralmetrics.integrations.keeping import Keeping, MakesMonitor, MakesRecorder, Watching
from spectralmetrics.integrations.masking import Masking
from spectralmetrics.integrations.methods import Methods
from spectralmetrics.integrations.resuming import file_name, read_state, write_state
from spectralmetrics.metrics.groups import Metrics
from spectralmetrics.monitoring import Monitor
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.processes import from_first_process, is_first
from spectralmetrics.probing.selection import unwrap
from spectralmetrics.sums.checks import check_type

with from_extra("transformers", "this callback needs transformers"):
    from transformers import (
        EarlyStoppingCallback,
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


class LayerProbeCallback(TrainerCallback):
    """Probes a Trainer's model and logs one value per metric, stage and layer, and their means over the layers.

    - Training values are logged at the end of an epoch, as ``"saturation/{layer}"`` and ``"saturation/mean"``.
      At the steps at which the trainer logs, the means are logged too, of what was observed since the last such
      step.
    - Evaluation values are part of the metrics that ``trainer.evaluate()`` returns, under its prefix:
      ``"eval_saturation/{layer}"``, ``"eval_saturation/mean"``. ``EarlyStoppingCallback`` finds them there, and
      so do callbacks of your own that are added later.
    - All of them are in ``trainer.state.log_history`` and reach TensorBoard, Weights & Biases, MLflow and
      every other logger of the trainer. The progress bar and the printed log show the means alone.

    On several devices, values are computed from the observations of all devices. A training step of the trainer
    is observed as ``"train"``, with frozen layers that are in eval mode, and an evaluation or prediction as
    ``"eval"``. The forwards of ``generate`` in either, an evaluation inside a training step, and an attempt
    with a batch size that did not fit are left out.

    Padding is left out, by the masks that the model is called with. In an encoder-decoder model the encoder's
    layers and the keys and values of cross-attention go by ``attention_mask``, all others by
    ``decoder_attention_mask`` or, without one, by the labels: steps after a sequence's last label other than
    −100 are padding. In a model of texts and images, or sounds, the masks are those of the texts, and tokens of
    the others all count. A model of sounds alone makes a mask of frames, which holds in its transformer.

    After a training or an evaluation ``probe`` still holds what was last observed in each stage:
    ``callback.probe.summary("eval")``.

    The trainer's checkpoints hold what has been observed on all devices and is in no record yet, in
    ``layer_probe_state.pt``. A training that goes on from one (``resume_from_checkpoint``) has the values and
    records of one that was not cut off, whenever the checkpoint was saved. On another number of devices the
    sums are right, and other rows may be drawn. With ``save_only_model=True`` there is no such file.

    Args:
        trainer: the trainer that the callback is added to; its model is probed at once.
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars are not logged.
        attention_mask: name of the model's argument that marks valid tokens, (N, T), non-zero for valid; None
            counts padding, too.
        decoder_attention_mask: likewise for the decoder of an encoder-decoder model; None counts its padding.
        generation: True observes the forwards of ``generate``, too: it runs an encoder again, and feeds tokens
            that are not in the data.
        recorder: a directory for records and arrays, or a function from the probe to a
            :class:`~spectralmetrics.Recorder`. Each epoch of a training becomes a record, with the evaluation
            that follows it (of several data sets the last), and so does an evaluation outside of a training,
            and what was observed since the trainer last logged, at steps at which it logs. A directory may hold
            records only if training goes on from a checkpoint; those that it holds from there on stay, and are
            not recorded again. The function is called once, and again for another training from scratch;
            evaluations, and trainings that go on, open its recorder again.
        each_layer: True logs the values of each layer at steps, too; False their means alone.
        monitor: True for a :class:`~spectralmetrics.Monitor`, or a function from the probe to one, which may
            end the training: ``lambda probe: Monitor(probe, on_alarm="stop")``. The recorder keeps its alarms.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model until :meth:`remove`.
        monitor: the :class:`~spectralmetrics.Monitor` of the probe; None without one.

    Raises:
        TypeError: for a trainer of another type, or a mask that is no name; for what
            :class:`~spectralmetrics.LayerProbe` raises.
        ModuleNotFoundError: on import, without ``transformers``.

    Example::

        trainer = Trainer(model, arguments, train_dataset=digits)
        trainer.add_callback(LayerProbeCallback(trainer, SaturationMetric(), layers="*.output.dense"))
        trainer.train()
    """

    probe: LayerProbe

    def __init__(
        self,
        trainer: Trainer,
        metrics: Metrics | None = None,
        *,
        attention_mask: str | None = "attention_mask",
        decoder_attention_mask: str | None = "decoder_attention_mask",
        generation: bool = False,
        recorder: str | Path | MakesRecorder | None = None,
        each_layer: bool = False,
        monitor: bool | MakesMonitor = False,
        **arguments: Any,
    ) -> None:
        check_type("trainer", trainer, Trainer)
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        for argument, name in masks.items():
            if name is not None and not (isinstance(name, str) and name):
                raise TypeError(f"expected {argument} to be the name of an argument or None, got {name!r}")
        arguments |= {"metrics": metrics, "generation": generation, "each_layer": each_layer}
        self._make_forwards: Callable[[nn.Module], Forwards] = functools.partial(Forwards, **arguments)
        self._trainer = trainer
        self._attention_mask = attention_mask
        self._decoder_attention_mask = decoder_attention_mask
        self._keeping = Keeping(recorder)
        self._watching = Watching(monitor)
        self._awaited = 0  # evaluations that belong to the epoch that has ended
        self._given: Any = None  # the checkpoint that `train` was given
        self._evaluations = 0  # that run, one inside another
        self._forwards: Forwards | None = None
        self._masking: Masking | None = None
        self._model: nn.Module | None = None
        self._methods = Methods(trainer)
        if trainer.model is not None:
            self._attach(trainer.model)
        # There is no event at the beginning of an evaluation, and none at the end of one that fails.
        self._methods.surround("train", self._going_on)
        self._methods.surround("training_step", self._training)
        self._methods.surround("compute_loss", self._computing_loss)
        for name in ("evaluation_loop", "prediction_loop"):
            if hasattr(trainer, name):  # the second is gone since 5.0
                self._methods.surround(name, self._evaluating)

    @property
    def monitor(self) -> Monitor | None:
        """See the class."""
        return self._watching.monitor

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin anew; follow the trainer to a new model, as its ``model_init`` makes one."""
        self._go_before_early_stopping()
        if model is not None and unwrap(model) is not self._model:
            self._attach(model)
        elif self._forwards is not None:  # maybe after an attempt with a batch size that was too large
            self._forwards.reset()
            self._watching.begin(self.probe)
        self._awaited = 0
        if (forwards := self._forwards) is None:
            return
        folders = self._resumed_from(args, state) if state.global_step else []
        entries = forwards.load(from_first_process(lambda: read_state(folders, self._number()), None))
        if entries is None:
            self._watching.load(folders)  # of a checkpoint that has only the memory of a monitor
        going_on = (
            {"epoch": int(state.epoch or 0), "awaited": 0, **(entries or {})} if state.global_step else {}
        )
        self._awaited = going_on.get("awaited", 0)
        self._keeping.open(forwards, state.global_step, going_on.get("epoch"))
        self._watching.keep(self._keeping)
        if entries is None and is_first(None):
            self._warn_of_lost(state)
        if entries is not None and "train" not in entries["finished"] and float(state.epoch or 0).is_integer():
            self._end_epoch()  # the checkpoint is of its last step: the trainer does not end it again

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what is in no record yet beside the trainer's state; all processes have seen a part of it."""
        if self._forwards is None or args.save_only_model:
            return
        saved = self._forwards.saved(bool(self._keeping))
        folder = _checkpoint(args, state)

        def write() -> None:
            if saved is not None and args.should_save and folder.is_dir():
                epoch = {"epoch": self._keeping.epoch} if self._keeping else {}
                write_state(folder, saved | epoch | {"awaited": self._awaited}, self._number())

        from_first_process(write, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the monitor; log the means over the layers, and record, if the trainer logs at this step."""
        if (forwards := self._forwards) is None:
            return
        control.should_training_stop = self._watching.step() or control.should_training_stop
        if control.should_log:
            values = forwards.compute_step(lambda: self._keeping.record_step(state.global_step))
            self._hand_over(values, "")

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the last epoch, if an evaluation that was to come did not."""
        self._record_epoch()

    on_train_end = on_epoch_begin

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the epoch's training forwards showed; record it, with the evaluations that follow."""
        sets = self._trainer.eval_dataset
        evaluations = len(sets) if isinstance(sets, dict) else 1
        self._end_epoch(evaluations if control.should_evaluate else 0)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Log what the evaluation showed, and add it to the evaluation's metrics; record it."""
        if self._evaluations:  # of one inside another
            return
        self._log_evaluation(metrics, "eval")
        if self._trainer.is_in_train:
            if self._awaited > 1:
                self._awaited -= 1
            else:
                self._record_epoch()
        elif self._forwards is not None:
            with contextlib.closing(self._keeping):
                self._keeping.open(self._forwards)
                self._keeping.record(self._forwards)

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Log what the prediction showed, and add it to its metrics."""
        if not self._evaluations:
            self._log_evaluation(metrics, "test")

    def remove(self) -> None:
        """Take the probe off the model."""
        self._methods.restore()
        self._keeping.close()
        self._detach()

    def _attach(self, model: nn.Module) -> None:
        self._detach()
        self._forwards = self._make_forwards(model)
        self.probe = self._forwards.probe
        self._watching.begin(self.probe)
        self._model = unwrap(model)
        if self._attention_mask is not None:
            self._masking = Masking(self.probe, self._model, self._attention_mask, self._decoder_attention_mask)

    def _detach(self) -> None:
        if self._masking is not None:
            self._masking.remove()
            self._masking = None
        if self._forwards is not None:
            self._forwards.close()
        self._forwards = self._model = None

    @contextlib.contextmanager
    def _training(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self._forwards is None:
            yield
            return
        self._forwards.begin("train", mode=True)
        accelerator = self._trainer.accelerator
        wrapper = getattr(accelerator, "deepspeed_engine_wrapped", None)
        self._forwards.scale_by(accelerator.scaler, getattr(wrapper, "engine", None))
        self.probe.step = self._trainer.state.global_step
        try:
            yield
        finally:
            if self._forwards is not None:
                self._forwards.end()

    @contextlib.contextmanager
    def _computing_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        # The trainer keeps the labels from the model where it smooths them, or has a function for the loss.
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        with contextlib.nullcontext() if self._masking is None else self._masking.labelled(labels):
            yield

    @contextlib.contextmanager
    def _evaluating(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        forwards, self._evaluations = self._forwards, self._evaluations + 1
        try:
            if forwards is None:
                yield
            elif self._evaluations > 1:  # by `compute_metrics`, for example; only the outer one counts
                with self.probe.paused():
                    yield
            else:
                forwards.reset("eval")
                forwards.begin("eval")
                try:
                    yield
                finally:
                    forwards.end()
        finally:
            self._evaluations -= 1

    @contextlib.contextmanager
    def _going_on(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Iterator[None]:
        self._given = resume_from_checkpoint
        with contextlib.closing(self._keeping):
            yield

    def _number(self) -> int:
        """The number of this callback among those like it, which save beside one another."""
        callbacks = self._trainer.callback_handler.callbacks
        alike = [each for each in callbacks if isinstance(each, LayerProbeCallback)]
        return alike.index(self) if self in alike else 0

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """The folders that may be the checkpoint from which the trainer goes on."""
        given = [self._given] if self._given else [args.resume_from_checkpoint]
        folders = [Path(each) for each in given if isinstance(each, (str, os.PathLike))]
        return folders if folders and self._given else [*folders, _checkpoint(args, state)]

    def _warn_of_lost(self, state: TrainerState) -> None:
        """Warn of an epoch of which the checkpoint should have observations, but has none."""
        epoch, recorder = int(state.epoch or 0), self._keeping.recorder
        if epoch != (state.epoch or 0):
            lost = f"values and record of epoch {epoch} are of what comes after it alone"
        elif recorder is not None and recorder.next_epoch < epoch:
            lost = f"epoch {epoch - 1} gets no record"
        else:
            return
        warn_user(
            f"the checkpoint of step {state.global_step} has no {file_name(self._number())} with the"
            f" observations before it: {lost}"
        )

    def _end_epoch(self, awaited: int = 0) -> None:
        self._log("train")
        self._awaited = max(awaited, 1)
        if not awaited:
            self._record_epoch()

    def _record_epoch(self) -> None:
        if self._awaited and self._forwards is not None:
            self._awaited = 0
            self._keeping.record(self._forwards)

    def _log(self, stage: Stage, prefix: str = "") -> dict[str, float]:
        """Log the values of a stage, which the probe keeps until it observes that stage again."""
        return {} if self._forwards is None else self._hand_over(self._forwards.compute_stage(stage), prefix)

    def _hand_over(self, values: dict[tuple[str, str], float], prefix: str) -> dict[str, float]:
        """Log values everywhere, but show only the means of them on the screen."""
        # A trainer's own keys name the stage once, in front, and its loggers read it there.
        named = {f"{prefix}{metric}/{layer}": value for (metric, layer), value in values.items()}
        if not named:
            return named
        trainer, handler = self._trainer, self._trainer.callback_handler
        shown = {key: value for key, value in named.items() if key.endswith(f"/{MEAN_LAYER}")}
        callbacks = handler.callbacks
        printing = [each for each in callbacks if isinstance(each, (PrinterCallback, ProgressCallback))]
        try:
            handler.callbacks = [each for each in callbacks if each not in printing]
            trainer.log(dict(named))
            handler.callbacks = printing
            shown |= {} if trainer.state.epoch is None else {"epoch": trainer.state.epoch}
            handler.on_log(trainer.args, trainer.state, trainer.control, shown)
        finally:
            handler.callbacks = callbacks
        return named

    def _log_evaluation(self, metrics: dict[str, float] | None, default: str) -> None:
        # Of one of several data sets it is "eval_" and the name of the set.
        clocks = [key for key in metrics or {} if key.endswith("_runtime")]
        prefix = clocks[-1].removesuffix("_runtime") if clocks else default
        values = self._log("eval", f"{prefix}_")
        if metrics is not None:
            metrics.update(values)

    def _go_before_early_stopping(self) -> None:
        """Move this callback before early stopping, which reads the metrics in its turn."""
        callbacks = self._trainer.callback_handler.callbacks
        first = next((k for k, each in enumerate(callbacks) if isinstance(each, EarlyStoppingCallback)), None)
        if first is not None and self in callbacks and callbacks.index(self) > first:
            # The handler, which is going through the list, has passed both places.
            callbacks.remove(self)
            callbacks.insert(first, self)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which a trainer saves itself at this step."""
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
