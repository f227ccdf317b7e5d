"""Time that a probe on every layer adds to a training step: Delve and ours, arms in turn in one run.

    python benchmarks/training_step.py [--models mlp vgg resnet vit] [--rounds 5] [--arms plain …]

Each round runs every arm for some steps, after a few that are not timed (allocations, and first updates, which
move the origin). The mean step counts, so that delayed work counts; added time is relative to the same round's
plain arm. The script reports medians over rounds, with the least and the largest. In the vision transformer
Delve reads only the last token; ours reads every token. The arms "by PyTorch" do without the compiled
accumulation. The arms "compiled" train under `torch.compile`; their added time is relative to the compiled step
without a probe. The arms "gradients" observe gradients in place of outputs. Results are written only if all
arms run.
"""

import itertools
import statistics
import tempfile
import time
import warnings

import delve
import torch
from common import Parser, write_result
from torch import nn

import spectralmetrics as sm
from spectralmetrics import demo
from spectralmetrics.functional import compiled


def mlp():
    widths = [784, 1024, 1024, 1024, 1024]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 784)


def vgg():
    layers, channels = [], 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), torch.randn(64, 3, 32, 32)


def resnet():
    model = demo.ResidualNetwork(width=64)
    model.stem, model.pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, torch.randn(32, 3, 32, 32)


class VisionTransformer(nn.Module):
    """Six blocks over 64 patches and a class token."""

    def __init__(self, width=192):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 3, batch_first=True) for _ in range(6))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(6))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(12))
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        patches = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        for index, (attention, wide, narrow) in enumerate(
            zip(self.attention, self.wide, self.narrow, strict=True)
        ):
            y = self.norms[2 * index](x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + narrow(nn.functional.gelu(wide(self.norms[2 * index + 1](x))))
        return self.head(x[:, 0])


def vit():
    return VisionTransformer(), torch.randn(32, 3, 32, 32)


MODELS = {"mlp": mlp, "vgg": vgg, "resnet": resnet, "vit": vit}
STEPS = {"mlp": 32, "vgg": 16, "resnet": 8, "vit": 16}  # multiples of 8: a sampled probe sees one in eight
UNTIMED_STEPS = 8
METRIC = {"float64": sm.SaturationMetric(), "float32": sm.SaturationMetric(gram_dtype=torch.float32)}
ARMS = {
    "plain": None,
    "delve": "delve",
    "exact, float64 products": {"metrics": METRIC["float64"]},
    "exact, float32 products": {"metrics": METRIC["float32"]},
    "exact, float64 products, by PyTorch": {"metrics": METRIC["float64"]},
    "exact, float32 products, by PyTorch": {"metrics": METRIC["float32"]},
    "sampled": {"metrics": METRIC["float32"], "rows_per_feature": 4, "every_n_steps": 8},
    "budget of 3 %": {"metrics": METRIC["float32"], "budget": 0.03},
    "gradients, float32 products": {"metrics": METRIC["float32"], "observe": "gradients"},
    "compiled, plain": None,
    "compiled, exact, float32 products": {"metrics": METRIC["float32"]},
    "compiled, gradients, float32 products": {"metrics": METRIC["float32"], "observe": "gradients"},
}


def base_of(arm):
    """The arm without a probe that an arm is compared with."""
    return "compiled, plain" if arm.startswith("compiled") else "plain"


def mean_step(model, inputs, arm, steps, folder, is_compiled):
    runs = model
    if is_compiled:
        torch.compiler.reset()
        runs = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    targets = torch.arange(len(inputs)) % 10
    tracker = None
    if arm == "delve":
        tracker = delve.SaturationTracker(
            folder, save_to="csv", modules=model, stats=["lsat"], device="cpu", writer_args={}, max_samples=None
        )
    elif arm is not None:
        tracker = sm.LayerProbe(model, max_map_size=None, **arm)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(runs(inputs), targets).backward()
        optimizer.step()

    for _ in range(UNTIMED_STEPS):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    if arm == "delve":
        for module in model.modules():
            module._forward_hooks.clear()
    elif tracker is not None:
        tracker.remove()
    return seconds


def main():
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="besides plain and delve")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    print(f"{'model':>7}  {'arm':<35}  {'step ms':>8}  {'added %':>8}  {'least':>6}  {'most':>6}  of Delve's")
    for name in options.models:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        chosen = {arm: ARMS[arm] for arm in ARMS if arm in ("plain", "delve", *options.arms)}
        seconds = {arm: [] for arm in chosen}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(options.rounds):
                for arm, settings in chosen.items():
                    with compiled.using(None if "PyTorch" in arm else compiled.instruction_set()):
                        seconds[arm].append(
                            mean_step(model, inputs, settings, STEPS[name], folder, "compiled," in arm)
                        )
        added = {
            arm: [100 * (t / p - 1) for t, p in zip(times, seconds[base_of(arm)], strict=True)]
            for arm, times in seconds.items()
        }
        reference = statistics.median(added["delve"])
        for arm, values in added.items():
            share = statistics.median(values) / reference
            print(
                f"{name:>7}  {arm:<35}  {1e3 * statistics.median(seconds[arm]):>8.1f}"
                f"  {statistics.median(values):>8.1f}  {min(values):>6.1f}  {max(values):>6.1f}  {share:.2f}",
                flush=True,
            )
        results.append({"model": name, "seconds per step": seconds, "added percent": added})
    if len(chosen) == len(ARMS):
        write_result("training_step", results)


if __name__ == "__main__":
    main()
