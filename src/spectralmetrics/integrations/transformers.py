"""A callback for the Hugging Face ``Trainer`` that probes the model and logs what it sees."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'this callback needs transformers: pip install "spectralmetrics[transformers]"'
    ) from error

from spectralmetrics.integrations.values import scalars
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.collections import Metrics
from spectralmetrics.probing.selection import unwrap


class LayerProbeCallback(TrainerCallback):
    """Probes a Trainer's model and logs one value per metric, stage and layer.

    What the training forwards showed is logged at the end of every epoch, what an evaluation showed when it
    ends, through ``trainer.log``: values are in ``trainer.state.log_history`` and reach TensorBoard, Weights &
    Biases, MLflow and whatever else the trainer reports to. On several devices they are those of all together.

    Padding is left out: the ``attention_mask`` that the model is called with masks every output of its shape.

    Args:
        trainer: the trainer that the callback is added to; its model is probed at once.
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars are not logged.
        attention_mask: name of the model's argument that tells valid tokens, (N, T), non-zero for valid; None
            counts padding, too.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model until :meth:`remove`.

    Raises:
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
        **arguments: Any,
    ) -> None:
        self._trainer = trainer
        self._metrics = metrics
        self._attention_mask = attention_mask
        self._arguments = arguments
        self._handles: list[Any] = []
        self._model: nn.Module | None = None
        if trainer.model is not None:
            self._attach(trainer.model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Follow the trainer to a new model, as its ``model_init`` makes one."""
        if model is not None and unwrap(model) is not self._model:
            self._attach(model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the epoch's training forwards showed."""
        self._log("train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the evaluation showed."""
        self._log("eval")

    def remove(self) -> None:
        """Take the probe off the model."""
        while self._handles:
            self._handles.pop().remove()
        if self._model is not None:
            self.probe.remove()
            self._model = None

    def _attach(self, model: nn.Module) -> None:
        self.remove()
        self.probe = LayerProbe(model, self._metrics, **self._arguments)
        self._model = unwrap(model)
        if self._attention_mask is not None:
            masking = _Masking(self.probe, self._attention_mask)
            self._handles = [
                self._model.register_forward_pre_hook(masking.enter, with_kwargs=True),
                self._model.register_forward_hook(masking.leave, always_call=True),
            ]

    def _log(self, stage: str) -> None:
        values = scalars(self.probe.compute(stage))
        self.probe.reset(stage)
        if values:
            self._trainer.log({key: float(value) for key, value in values.items()})


class _Masking:
    """Hooks that put a probe's mask around a model's forward."""

    def __init__(self, probe: LayerProbe, argument: str) -> None:
        self._probe = probe
        self._argument = argument
        self._entered: list[contextlib.ExitStack] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = contextlib.ExitStack()
        mask = kwargs.get(self._argument)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            stack.enter_context(self._probe.mask(mask != 0))
        self._entered.append(stack)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._entered:
            self._entered.pop().close()
