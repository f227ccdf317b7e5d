"""Rates at which `History.first_movers` names the disturbed layer, in trainings whose cause is known.

    python checks/first_movers.py [--runs 50] [--models mlp,gpt] [--plants scale,rate,quiet]

The script trains small networks. At a random step it disturbs one of their linear layers, drawn at random:

- `scale`: its weights are multiplied by 3, 5 or 10; all layers behind it move in the same forward;
- `rate`: its learning rate is multiplied by 30 from then on, which moves it little by little, or not at all;
- `quiet`: nothing happens.

It reads the first movers ten steps later, in quiet runs at the end. It prints how often the first mover was
that layer ("it"), another one, or none, and how often a layer moved before the cause. The number of a run is
its seed.
"""

import argparse
import collections
import random

import torch
from torch import nn
from torch.nn import functional

from spectralmetrics import HistoryMetric, LayerProbe

STEPS, AFTER = 120, 10


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        samples, steps, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        heads = (samples, steps, self.heads, width // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(samples, steps, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width=24, depth=3, tokens=24):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x))))


def mlp():
    """A network that learns the largest of ten random projections; a function: its loss on a new batch."""
    hidden = (layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU()))
    model = nn.Sequential(*hidden, nn.Linear(32, 10))
    projections = torch.randn(32, 10)

    def loss():
        rows = torch.randn(64, 32)
        return functional.cross_entropy(model(rows), (rows @ projections).argmax(1))

    return model, loss


def gpt():
    """A transformer that learns to predict the next token, four times in five; a function: its loss."""
    model = Transformer()
    follower = torch.randint(0, 24, (24,))

    def loss():
        tokens = torch.randint(0, 24, (8, 13))
        for step in range(1, 13):
            follows = torch.rand(8) < 0.8
            tokens[:, step] = torch.where(follows, follower[tokens[:, step - 1]], tokens[:, step])
        return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


MODELS = {"mlp": mlp, "gpt": gpt}
PLANTS = ("scale", "rate", "quiet")


def run(model_name, plant, seed):
    """The history of one training, the disturbed layer, and the step of the disturbance."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model, loss = MODELS[model_name]()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name, at, factor = draw.choice(names), draw.randrange(40, STEPS - AFTER), draw.choice((3, 5, 10))
    layer = model.get_submodule(name)
    own = set(layer.parameters())
    groups = [{"params": [each for each in model.parameters() if each not in own]}, {"params": list(own)}]
    optimizer = torch.optim.Adam(groups, 1e-3)
    with LayerProbe(model, HistoryMetric()) as probe:
        for probe.step in range(STEPS if plant == "quiet" else at + AFTER + 1):
            if probe.step == at and plant == "scale":
                with torch.no_grad():
                    layer.weight.mul_(factor)
            if probe.step == at and plant == "rate":
                optimizer.param_groups[1]["lr"] *= 30
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return probe.history(), name, at


def verdict(history, name, at):
    """First mover: ``"it"``, ``"another"`` layer, ``"none"``, or a layer ``"before"`` the cause."""
    movers = history.first_movers()
    if not movers:
        return "none"
    if movers[0].forward < at:
        return "before"
    return "it" if movers[0].layer == name else "another"


def count(model_name, plant, seeds):
    """Verdict -> number of runs."""
    return collections.Counter(verdict(*run(model_name, plant, seed)) for seed in seeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plants", default=",".join(PLANTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for model_name in options.models.split(","):
        for plant in options.plants.split(","):
            counted = count(model_name, plant, range(options.runs))
            print(f"{model_name}, {plant}: {dict(counted)} of {options.runs} runs", flush=True)


if __name__ == "__main__":
    main()
