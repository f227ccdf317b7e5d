"""A small LightningModule on real digits, and a run on two processes as a script."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectralmetrics import EffectiveRankMetric, SaturationMetric, SpectrumMetric
from spectralmetrics.integrations.lightning import LayerProbeCallback


def digits(start, stop):
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)[start:stop] / 16
    return TensorDataset(images, torch.tensor(data.target)[start:stop])


class Classifier(LightningModule):
    def __init__(self, rate):
        super().__init__()
        torch.manual_seed(0)
        self.rate = rate
        self.model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, index):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)

    def train_dataloader(self):
        return DataLoader(digits(0, 320), 32)

    def val_dataloader(self):
        return DataLoader(digits(320, 480), 40)

    def test_dataloader(self):
        return DataLoader(digits(480, 560), 40)


def metrics():
    return [SaturationMetric(threshold=0.9), EffectiveRankMetric(), SpectrumMetric()]


def make_trainer(folder, callback, **arguments):
    return Trainer(
        **{
            "accelerator": "cpu",
            "logger": CSVLogger(folder, name="", version=""),
            "callbacks": [callback],
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
        }
        | arguments
    )


class Experts(Classifier):
    """Two experts, run in another order on each process; the second has outputs along one direction only."""

    def __init__(self):
        super().__init__(0.0)
        self.model = nn.ModuleList([nn.Linear(64, 12), nn.Linear(64, 12)])
        self.model[1].weight.data[1:] = self.model[1].weight.data[0]

    def validation_step(self, batch, index):
        for number in ((0, 1), (1, 0))[self.global_rank]:
            self.model[number](batch[0])


class Told(Callback):
    """Writes the values that callbacks of each process can read, and the number of `sync_dist` warnings."""

    def __init__(self, folder, warned):
        self.folder = folder
        self.warned = warned

    def on_validation_end(self, trainer, pl_module):
        values = dict(trainer.callback_metrics)
        values["warnings"] = sum("sync_dist" in str(each.message) for each in self.warned)
        lines = [f"{key} {float(values[key])}\n" for key in sorted(values)]
        Path(self.folder, f"{pl_module.global_rank}.txt").write_text("".join(lines))


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    two = {"strategy": "ddp_fork", "devices": 2}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        probing = LayerProbeCallback(SaturationMetric(threshold=0.9))
        make_trainer(folder, None, callbacks=[probing, Told(folder, warned)], **two).validate(Experts())
    warnings.simplefilter("ignore")
    make_trainer(folder, LayerProbeCallback(metrics()), **two).fit(Classifier(0.0))
