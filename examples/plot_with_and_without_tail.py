"""
Compare a network with and without its tail
===========================================

Some networks end in layers that add little, see `Find a low-saturation tail <plot_tail_detection.html>`_.
This example trains one network with such a tail and one without, records both, and compares the runs.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from spectralmetrics import (
    IntrinsicDimensionMetric,
    LayerProbe,
    LayerSimilarity,
    Recorder,
    SaturationMetric,
)
from spectralmetrics.demo import load_digits
from spectralmetrics.recording import describe_comparison

# %%
# Two runs
# --------
#
# Both networks begin with the same stem and four convolutions. One has four more behind them.

images, labels, validation_images, validation_labels = load_digits(seed=0)
folder = Path(tempfile.mkdtemp())


def train(name: str, widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(1, 24, 7, stride=2, padding=3))
    model.add_module("pool", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    channels = 24
    for number, width in enumerate(widths, start=1):
        stride = 2 if number == 3 else 1
        model.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
        model.add_module(f"norm{number}", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    model.add_module("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("head", nn.Linear(channels, 10))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=2 * 63)
    for _ in range(2):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    probe = LayerProbe(model, [SaturationMetric(), IntrinsicDimensionMetric()])
    with probe, Recorder(folder / name, probe, ["csv", "arrays"]) as recorder, torch.no_grad():
        accuracy = (model(validation_images).argmax(1) == validation_labels).float().mean()
        recorder.add_scalar("accuracy", accuracy, stage="eval")
        recorder.record(0)
    return model


with_tail = train("with tail", [24, 24, 48, 48, 96, 96, 96, 96])
without = train("without", [24, 24, 48, 48])

# %%
# The runs side by side
# ---------------------
#
# The command ``spectralmetrics compare "with tail" without`` prints the same text, and ``compare`` returns the
# rows of its table.

print(describe_comparison(folder / "with tail", folder / "without"))

# %%
# Similar layers of both networks
# -------------------------------
#
# Linear CKA compares layers by the digits that they tell apart, and needs no correspondence of units or widths.

with LayerSimilarity(with_tail, without) as similarity, torch.no_grad():
    for batch in validation_images.split(125):
        with_tail(batch)
        without(batch)
result = similarity.compute()

figure, axis = plt.subplots(figsize=(5.2, 5.0), layout="constrained")
result.plot(title="Linear CKA on 1,000 digits", ax=axis)
axis.set_xlabel("without the tail")
axis.set_ylabel("with the tail")
plt.show()

# %%
# The last convolution of the short network is closest to the last one of the long network, not to the layer
# of the same name: with four layers fewer it gets nearly as far, and reaches the same accuracy. It also uses
# fewer directions than the long network's layer of that name, since the last layer before ten outputs uses
# few in both.
