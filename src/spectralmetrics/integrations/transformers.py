"""A callback for the Hugging Face ``Trainer`` that probes the model and logs what it sees."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

try:
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
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'this callback needs transformers: pip install "spectralmetrics[transformers]"'
    ) from error

from spectralmetrics.integrations.forwards import Forwards, Stage
from spectralmetrics.integrations.masking import Masking
from spectralmetrics.integrations.values import with_means
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.collections import Metrics
from spectralmetrics.probing.progress import LateBar
from spectralmetrics.probing.selection import unwrap
from spectralmetrics.tail import MEAN_LAYER


class LayerProbeCallback(TrainerCallback):
    """Probes a Trainer's model and logs one value per metric, stage and layer, and their means over the layers.

    - Training values are logged at the end of an epoch, as ``"saturation/{layer}"`` and ``"saturation/mean"``.
    - Evaluation values are part of the metrics that ``trainer.evaluate()`` returns, under its prefix:
      ``"eval_saturation/{layer}"``, ``"eval_saturation/mean"``. ``EarlyStoppingCallback`` finds them there, and
      so do callbacks of your own that are added later.
    - All of them are in ``trainer.state.log_history`` and reach TensorBoard, Weights & Biases, MLflow and
      whatever else the trainer reports to. The progress bar and the printed log show the means alone.

    On several devices values are those of all together. In the trainer's work a training step is observed as
    ``"train"``, with frozen layers that are in eval mode, and an evaluation or prediction as ``"eval"``. What
    ``generate`` runs in either, an evaluation inside a training step, and an attempt with a batch size that did
    not fit are left out.

    Padding is left out, by the masks that the model is called with. In an encoder-decoder model the encoder's
    layers and the keys and values of cross-attention go by ``attention_mask``, all others by
    ``decoder_attention_mask`` or, without one, by the labels: steps after a sequence's last label other than
    −100 are padding.

    Args:
        trainer: the trainer that the callback is added to; its model is probed at once.
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars are not logged.
        attention_mask: name of the model's argument that tells valid tokens, (N, T), non-zero for valid; None
            counts padding, too.
        decoder_attention_mask: likewise for the decoder of an encoder-decoder model; None counts its padding.
        generation: whether to observe what ``generate`` runs: it runs an encoder again, and counts tokens that
            are not in the data.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model until :meth:`remove`.

    Raises:
        TypeError: for a trainer of another type, or a mask that is no name; for what
            :class:`~spectralmetrics.LayerProbe` raises.
        ValueError: for a layer named ``"mean"``.
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
        **arguments: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"expected trainer to be a Trainer, got {type(trainer).__name__}")
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        for argument, name in masks.items():
            if name is not None and not (isinstance(name, str) and name):
                raise TypeError(f"expected {argument} to be the name of an argument or None, got {name!r}")
        self._trainer = trainer
        self._metrics = metrics
        self._attention_mask = attention_mask
        self._decoder_attention_mask = decoder_attention_mask
        self._generation = generation
        self._arguments = arguments
        self._evaluations = 0  # that run, one inside another
        self._forwards: Forwards | None = None
        self._masking: Masking | None = None
        self._model: nn.Module | None = None
        self._surrounded: list[tuple[str, Any, Any]] = []
        if trainer.model is not None:
            self._attach(trainer.model)
        # No event tells that an evaluation begins, and none comes at its end if it fails.
        self._surround("training_step", self._training)
        for name in ("evaluation_loop", "prediction_loop"):
            if hasattr(trainer, name):  # the second is gone since 5.0
                self._surround(name, self._evaluating)

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
        else:  # maybe after an attempt with a batch size that was too large
            self.probe.reset()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the epoch's training forwards showed."""
        self._log("train")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what the evaluation showed, and add it to the evaluation's metrics."""
        self._log_evaluation(metrics, "eval")

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what the prediction showed, and add it to its metrics."""
        self._log_evaluation(metrics, "test")

    def remove(self) -> None:
        """Take the probe off the model."""
        for name, method, before in reversed(self._surrounded):
            if vars(self._trainer).get(name) is method:  # otherwise another has surrounded it in turn
                if before is None:
                    delattr(self._trainer, name)
                else:
                    setattr(self._trainer, name, before)
        self._surrounded = []
        self._detach()

    def _attach(self, model: nn.Module) -> None:
        self._detach()
        self._forwards = Forwards(model, self._metrics, self._generation, **self._arguments)
        self.probe = self._forwards.probe
        self._model = unwrap(model)
        if self._attention_mask is not None:
            self._masking = Masking(self.probe, self._model, self._attention_mask, self._decoder_attention_mask)

    def _detach(self) -> None:
        if self._masking is not None:
            self._masking.remove()
            self._masking = None
        if self._forwards is not None:
            self._forwards.end()
            self.probe.remove()
        self._forwards = self._model = None

    def _surround(self, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Run a method of the trainer inside a context."""
        method, before = getattr(self._trainer, name), vars(self._trainer).get(name)

        @functools.wraps(method)
        def surrounded(*args: Any, **kwargs: Any) -> Any:
            with context():
                return method(*args, **kwargs)

        setattr(self._trainer, name, surrounded)
        self._surrounded.append((name, surrounded, before))

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        if self._forwards is None:
            yield
            return
        self._forwards.begin("train", mode=True)
        try:
            yield
        finally:
            if self._forwards is not None:
                self._forwards.end()

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        forwards, self._evaluations = self._forwards, self._evaluations + 1
        try:
            if forwards is None:
                yield
            elif self._evaluations > 1:  # by `compute_metrics`, say; the values are those of the outer one
                with self.probe.paused():
                    yield
            else:
                self.probe.reset("eval")
                forwards.begin("eval")
                try:
                    yield
                finally:
                    forwards.end()
        finally:
            self._evaluations -= 1

    def _log(self, stage: Stage, prefix: str = "") -> dict[str, float]:
        """Log the values of a stage and forget what they were made of."""
        found = self.probe.compute(stage, LateBar("reading layers"))
        if self._forwards is not None:
            self._forwards.explain(stage, found)
        values = with_means(found)
        self.probe.reset(stage)
        # A trainer's own keys name the stage once, in front, and its loggers read it there.
        named = {f"{prefix}{metric}/{layer}": value for (metric, layer), value in values.items()}
        if named:
            means = {key: value for key, value in named.items() if key.endswith(f"/{MEAN_LAYER}")}
            self._send(named, means)
        return named

    def _log_evaluation(self, metrics: dict[str, float] | None, default: str) -> None:
        if self._evaluations:  # of one inside another
            return
        # Of one of several data sets it is "eval_" and the name of the set.
        clocks = [key for key in metrics or {} if key.endswith("_runtime")]
        prefix = clocks[-1].removesuffix("_runtime") if clocks else default
        values = self._log("eval", f"{prefix}_")
        if metrics is not None:
            metrics.update(values)

    def _send(self, values: dict[str, float], means: dict[str, float]) -> None:
        """Log values everywhere, but show only the means of them on the screen."""
        trainer, handler = self._trainer, self._trainer.callback_handler
        callbacks = handler.callbacks
        printing = [each for each in callbacks if isinstance(each, (PrinterCallback, ProgressCallback))]
        try:
            handler.callbacks = [each for each in callbacks if each not in printing]
            trainer.log(dict(values))
            handler.callbacks = printing
            shown = dict(means) if trainer.state.epoch is None else {**means, "epoch": trainer.state.epoch}
            handler.on_log(trainer.args, trainer.state, trainer.control, shown)
        finally:
            handler.callbacks = callbacks

    def _go_before_early_stopping(self) -> None:
        """Whoever stops early reads the metrics when it is its turn, and must find the values there."""
        callbacks = self._trainer.callback_handler.callbacks
        first = next((k for k, each in enumerate(callbacks) if isinstance(each, EarlyStoppingCallback)), None)
        if first is not None and self in callbacks and callbacks.index(self) > first:
            # The handler, which is going through the list, has passed both places.
            callbacks.remove(self)
            callbacks.insert(first, self)
