"""
Compare the layers of two seeds
===============================

Train one network twice, from different random weights. Their units do not correspond to each other. Linear CKA
needs no such correspondence: it measures whether two layers tell the same digits apart.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from spectralmetrics import LayerSimilarity
from spectralmetrics.demo import load_digits

# %%
# Two networks
# ------------
#
# The digits and the architecture are the same. Only the initial weights and the order of the digits differ.

images, labels, validation_images, validation_labels = load_digits(seed=0)


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    channels = 1
    for number, (width, stride) in enumerate([(16, 2), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)], start=1):
        model.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
        model.add_module(f"norm{number}", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    model.add_module("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("head", nn.Linear(channels, 10))
    return model


def train(model: nn.Sequential) -> nn.Sequential:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(2):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


first, second = train(build(seed=0)), train(build(seed=1))

# %%
# All layers with all layers
# --------------------------
#
# ``LayerSimilarity`` hooks both models. Run both on each batch. It keeps three numbers
# for each pair of layers, however much data there is. Its estimator is debiased: wide layers and small batches
# do not make layers look more alike than they are.

with LayerSimilarity(first, second) as similarity, torch.no_grad():
    correct = torch.zeros(2)
    for batch, truth in zip(validation_images.split(125), validation_labels.split(125), strict=True):
        for index, model in enumerate((first, second)):
            correct[index] += (model(batch).argmax(1) == truth).sum()
print("accuracy of the two:", ", ".join(f"{share:.1%}" for share in correct / len(validation_images)))
between = similarity.compute()

figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
between.plot(title="Two seeds on 1,000 digits", ax=axis)
axis.set_xlabel("second network")
axis.set_ylabel("first network")
plt.show()

# %%
# The diagonal is high: most layers of one network are closest to the same layer of the other.

for name in between.layers:
    row = between.matrix[between.layers.index(name)]
    closest = between.other_layers[int(row.argmax())]
    print(f"{name} of the first: {between[name, name]:.2f} to its counterpart, closest to {closest}")

# %%
# Within one network
# ------------------
#
# With one model, the layers are compared with each other. Two neighbours near 1 tell the same digits apart, and
# one of them may add little.

with LayerSimilarity(first) as similarity, torch.no_grad():
    for batch in validation_images.split(125):
        first(batch)
within = similarity.compute()
for name, following in zip(within.layers, within.layers[1:], strict=False):
    print(f"{name} and {following}: {within[name, following]:.2f}")

# %%
# Untrained networks
# ------------------
#
# Two untrained networks show how much of the similarity comes from the architecture, without training.

untrained = [build(seed) for seed in (0, 1)]
with LayerSimilarity(*untrained) as similarity, torch.no_grad():
    for batch in validation_images.split(125):
        for model in untrained:
            model(batch)
before = similarity.compute()
for name in between.layers:
    print(f"{name}: {before[name, name]:.2f} untrained, {between[name, name]:.2f} trained")

# %%
# The first layers are as similar before training as after it, since random filters of the same pixels tell the
# same digits apart. The deeper the layer, the more of its similarity is learned: the two untrained outputs have
# next to nothing in common.
