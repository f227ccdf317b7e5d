"""
Find a low-saturation tail
==========================

If the first layers of a convolutional network shrink the image early, a few layers later each position sees all
of it. The layers behind that point tend to add little. This example finds them, compares the place with the
receptive field, and tests whether the network needs them.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from spectralmetrics import (
    IntrinsicDimensionMetric,
    LayerProbe,
    SaturationMetric,
    border_layer,
    layer_profile,
    low_saturation_tail,
    receptive_fields,
)
from spectralmetrics.demo import load_digits
from spectralmetrics.plotting import plot_profile

# %%
# The data and the model
# ----------------------
#
# 4,000 digits are for training and 1,000 for validation, padded to 32 x 32 pixels. The stem, a 7x7 convolution
# with stride 2, and the pooling behind it make maps of 8 x 8 positions. Eight 3x3 convolutions follow, the
# third with another stride of 2.

torch.manual_seed(0)
images, labels, validation_images, validation_labels = load_digits(seed=0)


def build(widths: list[int]) -> nn.Sequential:
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
    return model


def train(model: nn.Module, epochs: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * 63)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


widths = [24, 24, 48, 48, 96, 96, 96, 96]
model = build(widths)
train(model)

# %%
# The profile on validation data
# ------------------------------
#
# A probe observes the validation forward. Each of the last convolutions shows it 16 positions of 1,000 digits,
# many more observations than channels. ``low_saturation_tail`` names the last layers before the output whose
# saturation is less than half of the largest one.

with LayerProbe(model, [SaturationMetric(), IntrinsicDimensionMetric()]) as probe, torch.no_grad():
    accuracy = (model(validation_images).argmax(1) == validation_labels).float().mean()
values = probe.compute("eval")
profile = layer_profile(values, "saturation", "eval")
dimensions = layer_profile(values, "intrinsic_dimension", "eval")
tail = low_saturation_tail(profile)
for layer, saturation in profile.items():
    mark = "  tail" if layer in tail else ""
    print(f"{layer}: saturation {saturation:.2f}, {dimensions[layer]} directions{mark}")
print(f"accuracy {accuracy:.1%}")

# %%
# Where the receptive field outgrows the image
# --------------------------------------------
#
# ``receptive_fields`` follows one forward pass and returns how much of the input each position of a layer's
# output can see. The border layer is the first that can see more than the whole image. From there on, layers
# cannot gather anything from the image that the layers before them could not see together, and a tail can be
# expected (`arXiv:2106.12307 <https://arxiv.org/abs/2106.12307>`_).

fields = receptive_fields(model, validation_images[:1])
for layer, field in fields.items():
    print(f"{layer}: {field.largest}")
border = border_layer(fields, input_size=32)
print(f"border layer: {border}")

# %%
# In this network the saturation stays high at the border layer itself, and the number of directions in use
# still grows for two layers, along with the widths. Behind these it falls from layer to layer, and only the
# last convolutions are below half of the largest saturation. A tail may begin anywhere from the border layer
# on.
#
# The network without its tail
# ----------------------------
#
# Low saturation means that the last layers use few directions, not that they are useless. To find out whether
# the network needs them, train it without them and compare on validation data.

shortened = build(widths[: len(widths) - len(tail)])
train(shortened)
with LayerProbe(shortened, SaturationMetric()) as probe, torch.no_grad():
    accuracy = (shortened(validation_images).argmax(1) == validation_labels).float().mean()
shortened_profile = layer_profile(probe.compute("eval"), "saturation", "eval")
print(f"accuracy without {', '.join(tail)}: {accuracy:.1%}")

# %%
# The picture has a gap where the shorter network has no layers.

with_gap = {layer: shortened_profile.get(layer, float("nan")) for layer in profile}
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
plot_profile({"all layers": profile, "without the tail": with_gap}, tail=tail, ax=axis)
axis.axvline(list(profile).index(border), color="0.4", linestyle=":", label="border layer")
axis.legend(frameon=False, loc="lower left")
plt.show()

# %%
# The shorter network is no worse on these 1,000 digits, give or take a per cent that another seed would
# change as well: the tail was not needed. Now the last convolution of the shorter network has a low
# saturation. That does not mean that it should go, too: the last layer before an output of ten classes needs
# hardly more than ten directions, which are few of 96. Check the accuracy on validation data after each cut.
