"""
How wide should the layers of a regression be?
==============================================

A fully connected network predicts the progression of diabetes from ten measurements of 442 people. Three widths
of its hidden layers are compared: how many of their directions do the layers use, and does the width pay on
people that the network has not seen?
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, SaturationMetric, layer_profile
from spectralmetrics.plotting import plot_profile

# %%
# The data
# --------
#
# 300 people are for training and 142 for validation. Inputs and targets are standardised with the training
# people's mean and standard deviation. To predict the mean for everybody then costs a mean squared error of
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
# The network has two hidden layers of the same width. Nothing in the training knows of a probe.


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


models = {width: train(width) for width in (8, 32, 128)}

# %%
# Looking at the layers
# ---------------------
#
# The trained networks predict the validation people while a probe is attached. It observes the outputs of the
# linear layers, before the ReLU. The output layer has a width of one and nothing to tell, so it is left out.

profiles, losses = {}, {}
for width, model in models.items():
    metrics = [SaturationMetric(), IntrinsicDimensionMetric()]
    with LayerProbe(model, metrics, exclude="output") as probe, torch.no_grad():
        losses[width] = nn.functional.mse_loss(model(validation_inputs), validation_targets).item()
    values = probe.compute("eval")
    profiles[f"width {width}"] = layer_profile(values, "saturation", "eval")
    dimensions = layer_profile(values, "intrinsic_dimension", "eval")
    training_loss = nn.functional.mse_loss(model(inputs[:300]), targets[:300])
    print(f"width {width}: training loss {training_loss:.3f}, validation loss {losses[width]:.3f}")
    for layer, dimension in dimensions.items():
        print(f"    {layer} uses {int(dimension)} of {width} directions")

# %%
# Were 142 people enough?
# -----------------------
#
# The covariance of 142 observations has at most 141 directions, hardly more than the widest layer has units.
# Let the widest network see all 442 people, although it was trained on most of them, to learn how much was
# missing.

with LayerProbe(models[128], IntrinsicDimensionMetric(), exclude="output") as probe, torch.no_grad():
    models[128](inputs)
for layer, dimension in layer_profile(probe.compute("eval"), "intrinsic_dimension", "eval").items():
    print(f"{layer} uses {int(dimension)} of 128 directions")

# %%
# At most a few directions more: the comparison stands.
#
# The result
# ----------

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
plot_profile(profiles, title="Saturation on validation data", ax=left)
right.bar([str(width) for width in losses], list(losses.values()), color="#0072B2")
right.set_xlabel("width of the hidden layers")
right.set_ylabel("mean squared error")
right.set_title("Validation loss", fontsize=10)
right.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# The wider the layers, the smaller the share of their directions that they use. The number of directions grows,
# but more slowly than the width. In the first layer it cannot grow beyond ten, whatever the width, because the
# layer's output is a linear function of ten measurements. It stays below ten, since some of the measurements go
# together.
#
# The validation loss does not fall along with the saturation. The widest network has the largest here, and by
# far the smallest training loss: it has begun to learn its 300 people by heart.
#
# What to do with it
# ------------------
#
# Low saturation together with a loss that does not fall says that width is not what the network lacks. Take a
# narrower one, which is cheaper and here no worse. High saturation says that a layer's directions are in use.
# It is a reason to try a wider one and no proof that it will be better: compare the validation losses, over
# several seeds if they are close.
