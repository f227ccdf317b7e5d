"""A small run to record."""

import csv

import torch
from torch import nn

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, SaturationMetric


def make_model(layers=3, width=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def make_probe(model, metrics=None, **options):
    return LayerProbe(model, metrics or [SaturationMetric(), IntrinsicDimensionMetric()], **options)


def run_epoch(model, epoch, rows=20):
    """Train and eval forwards whose data depend only on the epoch."""
    generator = torch.Generator().manual_seed(epoch)
    width = model[0].in_features
    for training, shift in ((True, 0.0), (False, 3.0)):
        model.train(training)
        for _ in range(2):
            scale = torch.logspace(0, -2 - epoch % 3, width)
            model(torch.randn(rows, width, generator=generator) * scale + shift)


def read_csv(directory):
    with open(directory / "records.csv", newline="") as file:
        return list(csv.DictReader(file))
