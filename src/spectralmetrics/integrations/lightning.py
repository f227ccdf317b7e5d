"""A Lightning callback that probes the model and logs what it sees."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'this callback needs lightning: pip install "spectralmetrics[lightning]"'
    ) from error

from spectralmetrics.integrations.forwards import Forwards, Stage
from spectralmetrics.integrations.values import scalars
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.collections import Metrics
from spectralmetrics.probing.progress import LateBar


class LayerProbeCallback(Callback):
    """Probes a LightningModule and logs one value per metric, stage and layer at the end of every epoch.

    Values go through ``log_dict``, so that every Lightning logger gets them and ``EarlyStopping`` or
    ``ModelCheckpoint`` can monitor them, as ``"saturation/eval/model.0"``. Training values are logged at the
    end of an epoch, those of a validation or test at its end. On several devices values are those of all of
    them together.

    Only the trainer's batches are observed: training batches as ``"train"``, frozen layers in eval mode
    included, those of a validation or test as ``"eval"``. The sanity check, trials of a batch size, an
    evaluation inside a training step, and ``generate`` of a model of transformers are left out.

    A checkpoint holds what has been observed since the last values, on all devices, so that an epoch can go on
    from its middle.

    Args:
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars (a spectrum) are not
            logged; read them from ``probe`` in a callback of your own.
        generation: whether to observe what ``generate`` of a model of transformers runs.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model while the trainer runs; None before.

    Raises:
        ValueError: when the trainer starts, for a layer named ``"mean"``; for what
            :class:`~spectralmetrics.LayerProbe` raises.
        ModuleNotFoundError: on import, without ``lightning``.

    >>> from spectralmetrics import SaturationMetric
    >>> callback = LayerProbeCallback(SaturationMetric(threshold=0.99), rows_per_feature=4)
    >>> # lightning.Trainer(callbacks=[callback]).fit(module, data)
    """

    def __init__(self, metrics: Metrics | None = None, *, generation: bool = False, **arguments: Any) -> None:
        self.probe: LayerProbe | None = None
        self._metrics = metrics
        self._generation = generation
        self._arguments = arguments
        self._forwards: Forwards | None = None  # while the trainer runs
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe."""
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, or go on from a checkpoint."""
        probe = self._attach(pl_module).probe
        probe.reset()
        if self._saved is not None:
            # It holds what all processes saw together; one of them carries it on.
            if trainer.is_global_zero:
                probe.load_state_dict(self._saved)
            self._saved = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observe the batch."""
        self._attach(pl_module).begin("train", pl_module.training)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look away."""
        self._attach(pl_module).end(observes=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the epoch's training forwards showed."""
        self._log(trainer, pl_module, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with what the validation shows."""
        self._begin_evaluation(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with what the test shows."""
        self._begin_evaluation(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Observe the batch, unless it is one of the sanity check."""
        if not trainer.sanity_checking:
            self._attach(pl_module).begin("eval")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look away."""
        self._attach(pl_module).end(observes=False)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Observe the batch."""
        self._attach(pl_module).begin("eval")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look away."""
        self._attach(pl_module).end(observes=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the validation showed."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "eval")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the test showed."""
        self._log(trainer, pl_module, "eval")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """What has been observed since the last values, by all processes."""
        if self.probe is None:
            return {}
        with self.probe.merged():
            return {"probe": {key: value.clone() for key, value in self.probe.state_dict().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's observations until the fit goes on."""
        self._saved = state_dict.get("probe")

    def _attach(self, pl_module: LightningModule) -> Forwards:
        if self._forwards is None:
            self._forwards = Forwards(pl_module, self._metrics, self._generation, **self._arguments)
            self._forwards.end(observes=False)
            self.probe = self._forwards.probe
            self.probe.persistent()
        return self._forwards

    def _detach(self) -> None:
        if self._forwards is not None:
            self._forwards.end()
            self._forwards.probe.remove()
            self._forwards = None

    def _begin_evaluation(self, pl_module: LightningModule) -> None:
        self._attach(pl_module).probe.reset("eval")

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        forwards = self._attach(pl_module)
        values = scalars(forwards.probe.compute(stage, LateBar("reading layers")))
        forwards.explain(stage, values)
        # All processes have the same values, in orders of their own. Lightning reduces and warns unless it is
        # told that a value is to be reduced, but belongs to one process alone; each process logs it all the
        # same, so that callbacks can monitor it.
        pl_module.log_dict(values, sync_dist=True, rank_zero_only=True)
        forwards.probe.reset(stage)
