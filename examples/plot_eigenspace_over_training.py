"""
Find the epoch at which layers settle
=====================================

Saturation gives the number of directions that a layer uses, but not which ones. This example records a training
and shows, for every layer, when its leading eigenspace stops turning.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from torch import nn

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, Recorder, compare
from spectralmetrics.demo import load_digits
from spectralmetrics.plotting import plot_profile

# %%
# Record a training
# -----------------
#
# The writer ``arrays`` keeps every layer's covariance for each epoch. Epoch 0 is the network before its first
# step.

torch.manual_seed(0)
images, labels, validation_images, validation_labels = load_digits(seed=0)
model = nn.Sequential()
channels = 1
for number, (width, stride) in enumerate([(16, 2), (32, 2), (32, 1), (64, 2), (64, 1)], start=1):
    model.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
    model.add_module(f"norm{number}", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()))
    channels = width
model.add_module("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
model.add_module("head", nn.Linear(channels, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)

epochs = 6
run = tempfile.mkdtemp()
probe = LayerProbe(model, IntrinsicDimensionMetric(threshold=0.9))
with probe, Recorder(run, probe, ["csv", "arrays"]) as recorder:
    for epoch in range(epochs + 1):
        if epoch:
            model.train()
            with probe.paused():
                for batch in torch.randperm(len(images)).split(64):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                    optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(validation_images).argmax(1) == validation_labels).float().mean()
        recorder.add_scalar("accuracy", accuracy, stage="eval")
        recorder.record(epoch)
        print(f"epoch {epoch}: accuracy {accuracy:.1%}")

# %%
# Compare each epoch with the last
# --------------------------------
#
# ``compare`` reads two epochs of the run. The overlap of two eigenspaces is 1 if one contains the other. The
# black markers show the overlap of two random ones. The eigenspaces explain 90 % of the variance here.

settling = {}
for epoch in range(epochs):
    rows = compare(run, epochs=(epoch, epochs), threshold=0.9)
    settling[f"epoch {epoch}"] = {row["layer"]: row["subspace_overlap"] for row in rows}
settling["by chance"] = {row["layer"]: row["overlap_by_chance"] for row in rows}

figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
plot_profile(settling, statistic="overlap with the last epoch", ax=axis)
axis.set_ylim(0, 1.02)
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
plt.show()

# %%
# The first layer has its eigenspace before the first step, because the pixels decide it. All other layers turn
# in the first epoch. The last convolution, with few directions, keeps them from then on; the layers in the
# middle go on turning for some epochs more.
#
# Read the black markers before the others. With 90 % of the variance, the ten outputs use seven directions: any
# two spaces of seven among ten dimensions share 70 %, so that the output's 0.7 at epoch 0 means nothing.
