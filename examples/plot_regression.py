"""
Choose the width of a regression's layers
=========================================

A fully connected network predicts the progression of diabetes from ten measurements of 442 people. This
example compares six widths of its hidden layers: the number of directions that the layers use, and the error
on held-out people.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, SaturationMetric, layer_profile

# %%
# The data
# --------
#
# 300 people are for training and 142 for validation. Inputs and targets are standardised with the training
# people's mean and standard deviation. Predicting the mean for everybody then has a mean squared error of
# about 1.

torch.manual_seed(0)
inputs, targets = (torch.from_numpy(values).float() for values in load_diabetes(return_X_y=True))
order = torch.randperm(len(inputs))
inputs, targets = inputs[order], targets[order, None]
inputs = (inputs - inputs[:300].mean(0)) / inputs[:300].std(0)
targets = (targets - targets[:300].mean()) / targets[:300].std()
validation_inputs, validation_targets = inputs[300:], targets[300:]

# %%
# Training
# --------
#
# The network has two hidden layers of the same width. The training does not use a probe.


def train(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("hidden1", nn.Linear(10, width))
    model.add_module("relu1", nn.ReLU())
    model.add_module("hidden2", nn.Linear(width, width))
    model.add_module("relu2", nn.ReLU())
    model.add_module("output", nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        for batch in torch.randperm(300).split(32):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    return model.eval()


models = {width: train(width) for width in (4, 8, 16, 32, 64, 128)}

# %%
# Probing the layers
# ------------------
#
# The trained networks predict the validation people while a probe is attached. It observes the outputs of the
# linear layers, before the ReLU. The output layer is left out, since it has a width of one.

dimensions, losses = {}, {}
for width, model in models.items():
    metrics = [SaturationMetric(), IntrinsicDimensionMetric()]
    with LayerProbe(model, metrics, exclude="output") as probe, torch.no_grad():
        validation_loss = nn.functional.mse_loss(model(validation_inputs), validation_targets).item()
    values = probe.compute("eval")
    dimensions[width] = layer_profile(values, "intrinsic_dimension", "eval")
    saturation = layer_profile(values, "saturation", "eval")
    with torch.no_grad():
        training_loss = nn.functional.mse_loss(model(inputs[:300]), targets[:300]).item()
    losses[width] = training_loss, validation_loss
    print(f"width {width}: training loss {training_loss:.3f}, validation loss {validation_loss:.3f}")
    for layer, dimension in dimensions[width].items():
        share = float(saturation[layer])
        print(f"    {layer} uses {int(dimension)} of {width} directions, saturation {share:.2f}")

# %%
# Check that 142 people are enough
# --------------------------------
#
# The covariance of 142 observations has at most 141 directions, hardly more than the widest layer has units.
# To find out how much is missing, let the widest network predict all 442 people, although it was trained on
# most of them.

with LayerProbe(models[128], IntrinsicDimensionMetric(), exclude="output") as probe, torch.no_grad():
    models[128](inputs)
for layer, dimension in layer_profile(probe.compute("eval"), "intrinsic_dimension", "eval").items():
    print(f"{layer} uses {int(dimension)} of 128 directions")

# %%
# At most a few directions more: the comparison stands.
#
# The result
# ----------

widths = list(models)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for layer, marker in (("hidden1", "o"), ("hidden2", "s")):
    left.plot(widths, [int(dimensions[width][layer]) for width in widths], marker=marker, label=layer)
left.plot(widths, widths, ":", color="#666666", label="all directions")
left.set(ylabel="directions in use", ylim=(0, 30))
for name, column, style in (("training", 0, "s--"), ("validation", 1, "o-")):
    right.plot(widths, [losses[width][column] for width in widths], style, label=name)
right.set(ylabel="mean squared error", ylim=0)
for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, map(str, widths))
    axis.set_xlabel("width of the hidden layers")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
plt.show()

# %%
# Over all, wider layers use a smaller share of their directions. The number of directions grows, but more
# slowly than the width. In the first layer it cannot exceed ten at any width, because the layer's output is a
# linear function of ten measurements. It stays below ten, since some measurements go together.
#
# The validation loss does not fall along with the saturation. The widest network has the largest validation
# loss here, and by far the smallest training loss: it has begun to fit its 300 people alone.
#
# What to do with it
# ------------------
#
# Low saturation together with a loss that does not fall means that the network does not lack width. Take a
# narrower one, which is cheaper and here no worse. High saturation means that a layer's directions are in
# use. It is a reason to try a wider layer, but no proof that it will be better: compare the validation
# losses, over several seeds if they are close.
