"""A small LightningModule on real digits, and a run on two processes as a script."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
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


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1], LayerProbeCallback(metrics()), strategy="ddp_spawn", devices=2)
    trainer.fit(Classifier(0.0))
