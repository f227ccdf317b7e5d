"""A Lightning callback that probes the model and logs what it sees."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'this callback needs lightning: pip install "spectralmetrics[lightning]"'
    ) from error

from spectralmetrics.integrations.values import scalars
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.collections import Metrics
from spectralmetrics.probing.progress import LateBar


class LayerProbeCallback(Callback):
    """Probes a LightningModule and logs one value per metric, stage and layer at the end of every epoch.

    Values go through ``log_dict``, so that every Lightning logger gets them and ``EarlyStopping`` or
    ``ModelCheckpoint`` can monitor them, as ``"saturation/eval/model.0"``. Training values are logged at the
    end of an epoch, those of a validation or test at its end. The sanity check is not observed. On several
    devices values are those of all of them together.

    A checkpoint holds what has been observed since the last values, on all devices, so that an epoch can go on
    from its middle.

    Args:
        metrics: as for :class:`~spectralmetrics.LayerProbe`. Values that are no scalars (a spectrum) are not
            logged; read them from ``probe`` in a callback of your own.
        **arguments: everything else that :class:`~spectralmetrics.LayerProbe` takes, such as ``layers``.

    Attributes:
        probe: the :class:`~spectralmetrics.LayerProbe`, on the model while the trainer runs; None before.

    Raises:
        ModuleNotFoundError: on import, without ``lightning``.

    >>> from spectralmetrics import SaturationMetric
    >>> callback = LayerProbeCallback(SaturationMetric(threshold=0.99), rows_per_feature=4)
    >>> # lightning.Trainer(callbacks=[callback]).fit(module, data)
    """

    def __init__(self, metrics: Metrics | None = None, **arguments: Any) -> None:
        self.probe: LayerProbe | None = None
        self._metrics = metrics
        self._arguments = arguments
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe."""
        self._attach(pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look away."""
        self._attach(pl_module).pause()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again."""
        self._attach(pl_module).resume()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint."""
        probe = self._attach(pl_module)
        if self._saved is not None:
            # It holds what all processes saw together; one of them carries it on.
            if trainer.is_global_zero:
                probe.load_state_dict(self._saved)
            self._saved = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe, for a validation without a fit."""
        self._attach(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe, for a test without a fit."""
        self._attach(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the epoch's training forwards showed."""
        self._log(trainer, pl_module, "train")

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

    def _attach(self, pl_module: LightningModule) -> LayerProbe:
        if self.probe is None or not self._attached:
            self.probe = LayerProbe(pl_module, self._metrics, **self._arguments)
            self.probe.persistent()
            self._attached = True
        return self.probe

    _attached = False

    def _detach(self) -> None:
        if self.probe is not None:
            self.probe.remove()
            self._attached = False

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        probe = self._attach(pl_module)
        # All processes have the same values; Lightning cannot know and asks for a synchronisation.
        pl_module.log_dict(
            scalars(probe.compute(stage, LateBar("reading layers"))), sync_dist=trainer.world_size > 1
        )
        probe.reset(stage)
