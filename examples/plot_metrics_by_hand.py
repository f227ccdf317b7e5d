"""
Metrics by hand, without a probe
================================

Every statistic is a ``torchmetrics.Metric``. This example updates them in plain forward hooks, adds a statistic
of its own, and draws each layer's spectrum. For most purposes ``LayerProbe`` does the same with less code, and
handles stages, masks, sampling and checkpointing.
"""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from spectralmetrics import (
    CovarianceTraceMetric,
    EffectiveRankMetric,
    Observations,
    SaturationMetric,
    SpectralMetric,
    SpectrumMetric,
)
from spectralmetrics.demo import load_digits
from spectralmetrics.plotting import plot_spectrum

# %%
# A trained network
# -----------------
#
# Two convolutions and a hidden layer, trained for three epochs on 4,000 handwritten digits.

torch.manual_seed(0)
images, labels, validation_images, validation_labels = load_digits(seed=0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(16, 32, 5, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 5 * 5, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(3):
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

# %%
# A statistic of your own
# -----------------------
#
# A statistic needs a name, and a function of a ``Spectrum``, which has the eigenvalues, eigenvectors, mean and
# covariance, each computed when it is first used.


class LeadingShareMetric(SpectralMetric):
    """The share of the variance along the first eigenvector."""

    short_name = "leading_share"

    def statistic(self, spectrum):
        return spectrum.eigenvalues[0] / spectrum.eigenvalues.sum()


# %%
# One collection per layer
# ------------------------
#
# Metrics of a collection that need the same sums share them: one accumulation per batch and one decomposition
# serve all five.

layers = {"conv1": model[0], "conv2": model[2], "hidden": model[5], "output": model[7]}
collections = {
    name: MetricCollection(
        [
            SaturationMetric(threshold=0.99),
            EffectiveRankMetric(),
            CovarianceTraceMetric(),
            LeadingShareMetric(),
            SpectrumMetric(),
        ]
    )
    for name in layers
}

# %%
# Updating them in hooks
# ----------------------
#
# ``update`` takes rows, (N, D). In feature maps, (N, C, height, width), every position is an observation of C
# features: ``Observations`` says which dimension holds the features, and makes no copy.


def update(collection: MetricCollection) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output = output.detach()
        collection.update(Observations(output, feature_dim=1) if output.ndim == 4 else output)

    return hook


model.eval()
handles = [layer.register_forward_hook(update(collections[name])) for name, layer in layers.items()]
with torch.no_grad():
    logits = torch.cat([model(batch) for batch in validation_images.split(100)])
for handle in handles:
    handle.remove()

# %%
# Reading them
# ------------
#
# ``compute`` returns a dict with the class names as keys. ``reset`` would start the next epoch.

spectra = {}
for name, collection in collections.items():
    values = collection.compute()
    spectra[name] = values.pop("SpectrumMetric")
    print(f"{name}, {len(spectra[name])} features, {collection['SaturationMetric'].count} observations")
    for key, value in values.items():
        print(f"    {key}: {value:.3f}")
print(f"accuracy {(logits.argmax(1) == validation_labels).float().mean():.1%}")
print("metrics that share their sums:")
for names in collections["hidden"].compute_groups.values():
    print("   ", ", ".join(names))

# %%
# The spectra
# -----------
#
# A dashed line marks the number of directions with 99 % of the variance. Divided by the number of features it
# is the saturation.

figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
plot_spectrum(list(spectra.values()), threshold=0.99, labels=list(spectra), ax=axis)
axis.get_legend().set_loc("lower left")
plt.show()

# %%
# The hidden layer uses the most directions, but the smallest share of its directions. Its eigenvalues are also
# the largest, but that is a matter of scale: total variances of two layers cannot be compared. Follow the total
# variance of one layer over the epochs. The output, for ten classes, has ten features and uses most of them.
