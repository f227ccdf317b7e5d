"""Small models of every kind, and a training loop."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8), nn.Dropout2d(0.2), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer1(self.stem(x)).mean((2, 3)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 7, num_layers=2, dropout=0.3, bidirectional=True)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][-1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


MODELS = {
    "resnet": (ResNet, lambda: torch.randn(6, 3, 40, 9)),
    "lstm": (Tagger, lambda: torch.randn(4, 6, 6)),
    "transformer": (Transformer, lambda: torch.randn(6, 4, 8)),
}


def train(kind, probe_with=None, steps=3):
    """Train for a few steps; return everything that a probe must leave unchanged, and the probe."""
    make, data = MODELS[kind]
    torch.manual_seed(3)
    model = make()
    probe = probe_with(model) if probe_with else None
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trace = []
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        output = model(data())
        loss = F.cross_entropy(output, torch.arange(len(output)) % 5)
        loss.backward()
        optimizer.step()
        trace += [loss.detach(), output.detach()] + [p.grad.clone() for p in model.parameters()]
        if step == 1:
            model.eval()
            with torch.no_grad():
                # With hooks, TransformerEncoderLayer does not take its fused path.
                if kind != "transformer":
                    trace.append(model(data()))
    trace += [value.clone() for value in model.state_dict().values()]
    trace += [torch.get_rng_state(), torch.rand(3)]
    return trace, model, probe


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
