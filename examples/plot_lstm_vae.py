"""
Latent directions of a variational auto-encoder
===============================================

A variational LSTM auto-encoder describes a digit by a normal distribution in a latent space of 16 dimensions.
The weight of its Kullback-Leibler term decides how many of them it can afford to use. This example counts them,
for three weights, and shows two ways of counting that mislead.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from spectralmetrics import CovarianceTraceMetric, IntrinsicDimensionMetric, LayerProbe
from spectralmetrics.plotting import plot_spectrum

# %%
# The data
# --------
#
# 1,797 small handwritten digits, sequences of eight rows with eight pixels each: 1,400 for training, 397 for
# validation.

torch.manual_seed(0)
images = torch.from_numpy(load_digits().images).float() / 16
images = images[torch.randperm(len(images))]
training_images, validation_images = images[:1400], images[1400:]

# %%
# The model
# ---------
#
# The encoder's last hidden state gives the mean and the variance of the latent vector. A vector drawn from this
# distribution goes to the decoder at every step. The module ``sampled`` does nothing: it is there to give the
# drawn vectors a name under which a probe observes them.


class VariationalAutoencoder(nn.Module):
    def __init__(self, latents: int = 16, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.LSTM(8, width, batch_first=True)
        self.mean = nn.Linear(width, latents)
        self.log_variance = nn.Linear(width, latents)
        self.sampled = nn.Identity()
        self.decoder = nn.LSTM(latents, width, batch_first=True)
        self.rows = nn.Linear(width, 8)

    def decode(self, latent: Tensor) -> Tensor:
        outputs, _ = self.decoder(latent[:, None].expand(-1, 8, -1))
        return self.rows(outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the pixels, and the Kullback-Leibler divergence from the standard normal distribution."""
        _, (hidden, _) = self.encoder(images)
        mean, log_variance = self.mean(hidden[-1]), self.log_variance(hidden[-1])
        latent = self.sampled(mean + torch.randn_like(mean) * torch.exp(log_variance / 2))
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return self.decode(latent), divergence.mean()


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def train(weight: float) -> VariationalAutoencoder:
    torch.manual_seed(0)
    model = VariationalAutoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(30):
        for batch in torch.randperm(len(training_images)).split(50):
            logits, divergence = model(training_images[batch])
            loss = reconstruction_loss(logits, training_images[batch]) + weight * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


models = {weight: train(weight) for weight in (0.1, 1.0, 3.0)}

# %%
# Counting directions
# -------------------
#
# The probe observes the posterior means and the vectors drawn about them. A weight of 1 is the plain
# variational bound.

means = {}
for weight, model in models.items():
    metrics = [IntrinsicDimensionMetric(), CovarianceTraceMetric()]
    with LayerProbe(model, metrics, layers=["mean", "sampled"]) as probe, torch.no_grad():
        logits, divergence = model(validation_images)
    values = probe.compute("eval")
    means[weight] = probe["eval", "mean"]["intrinsic_dimension"].spectrum
    loss = reconstruction_loss(logits, validation_images)
    print(f"weight {weight}: reconstruction loss {loss:.1f}, divergence {divergence:.2f}")
    for layer in ("mean", "sampled"):
        dimension = int(values[f"intrinsic_dimension/eval/{layer}"])
        variance = float(values[f"covariance_trace/eval/{layer}"])
        print(f"    {layer}: {dimension} of 16 directions, total variance {variance:.2g}")

# %%
# At weight 0.1 the means spread over nearly twice as many directions as at weight 1: each direction costs
# divergence, and the larger weight leaves only those that are worth it.
#
# Two traps
# ---------
#
# **The drawn vectors fill the space.** A direction that the model does not use is filled by the prior's noise,
# of variance one. So the drawn vectors have 16 directions at all three weights. Observe the means.
#
# **A dimension does not depend on scale.** At weight 3 the posterior has collapsed: the divergence is all but
# zero, every digit gets nearly the same distribution, and the means' total variance is less than a thousandth
# of its value at weight 0.1. The remaining variance still has a shape, and its dimension is no smaller than
# at weight 1. Read the total variance next to any dimension. The eigenvalues show both. The grey line is the
# variance of the prior.

figure, axis = plt.subplots(layout="constrained")
eigenvalues = [spectrum.eigenvalues for spectrum in means.values()]
axis.axhline(1, color="0.6", linewidth=1, zorder=0)
labels = [f"weight {weight}" for weight in means]
figure, axis = plot_spectrum(eigenvalues, threshold=0.99, labels=labels, title="Posterior means", ax=axis)

# %%
# Generated digits
# ----------------
#
# The same ten vectors, drawn from the prior, go through all three decoders.

torch.manual_seed(0)
latent = torch.randn(10, 16)
figure, axes = plt.subplots(3, 10, figsize=(8, 2.7), layout="constrained")
for row_axes, (weight, model) in zip(axes, models.items(), strict=True):
    with torch.no_grad():
        generated = model.decode(latent).sigmoid()
    for axis, image in zip(row_axes, generated.numpy(), strict=True):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row_axes[0].set_ylabel(f"weight {weight}", fontsize=8)
plt.show()

# %%
# At weight 3 the decoder has learnt to do without the latent vector, and writes the same blurred average for
# each. The others vary with it. After a training this short some look like digits and others do not.
