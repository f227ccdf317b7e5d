"""Rates of findings: broken networks that they find, and healthy networks in which they report a problem.

    python checks/findings.py --set calibration --seeds 20     # the networks that the thresholds were chosen on
    python checks/findings.py --set judged --seeds 20          # others, run once the thresholds were frozen

Each network is trained on real digits. A probe with folds on every layer with weights and every activation then
reads validation digits: healthy networks when new, early and at the end of training, broken ones at the end.
The script prints the share of healthy readings with any problem, and the share of broken networks in which the
broken layer has a problem of the expected kind.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics import Finding, LayerProbe
from spectralmetrics.demo import load_digits as load_mnist

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.LeakyReLU)
WATCHED = (nn.Linear, nn.Conv2d, *ACTIVATIONS)
COLLAPSED = 5e-4  # a collapsed embedding's variance is a smaller share of its mean square


class Digits(NamedTuple):
    images: Tensor  # (N, pixels)
    labels: Tensor
    validation: Tensor
    validation_labels: Tensor


def small_digits() -> Digits:
    """1,797 real digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels, classes = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return Digits(pixels[:1200], classes[:1200], pixels[1200:], classes[1200:])


def mnist() -> Digits:
    """5,000 digits of MNIST, 16 x 16 pixels."""
    images, labels, validation, validation_labels = load_mnist(seed=0)

    def small(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2).flatten(1)

    return Digits(small(images), labels, small(validation), validation_labels)


# -- networks -------------------------------------------------------------------------------------------------


def mlp(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    width, depth = rng.choice([32, 64, 128, 256]), rng.choice([2, 3, 4])
    activation = rng.choice([nn.ReLU, nn.ReLU, nn.GELU, nn.Tanh])
    return stacked(pixels, [width] * depth, outputs, activation, dropout=rng.choice([0, 0.2]))


def tapered(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    widths = rng.choice([[200, 100, 50], [96, 96, 48, 24], [300, 60]])
    return stacked(
        pixels, widths, outputs, rng.choice([nn.ReLU, nn.SiLU, nn.LeakyReLU]), norm=rng.random() < 0.5
    )


def stacked(
    inputs: int,
    widths: list[int],
    outputs: int,
    activation: type[nn.Module],
    dropout: float = 0,
    norm: bool = False,
) -> nn.Module:
    layers: list[nn.Module] = []
    for left, right in zip([inputs, *widths], widths, strict=False):
        layers += [nn.Linear(left, right), *([nn.LayerNorm(right)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def cnn(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    c, side = rng.choice([8, 16]), int(pixels**0.5)
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d if rng.random() < 0.5 else nn.Identity
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for left, right in ((1, c), (c, 2 * c), (2 * c, 2 * c)):
        layers += [nn.Conv2d(left, right, 3, padding=1), norm(right), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if right == 2 * c and left == c else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, outputs))


def strided(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    c, side = rng.choice([12, 24]), int(pixels**0.5)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for left, right, stride in ((1, c, 1), (c, c, 2), (c, 2 * c, 1), (2 * c, 2 * c, 2)):
        norm = nn.GroupNorm(4, right) if rng.random() < 0.5 else nn.Identity()
        layers += [nn.Conv2d(left, right, 3, stride, 1), norm, rng.choice([nn.ReLU, nn.GELU])()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, outputs))


class Transformer(nn.Module):
    def __init__(self, rng: random.Random, pixels: int, outputs: int, norm_first: bool, patch: int) -> None:
        super().__init__()
        width = rng.choice([32, 48])
        self.side, self.patch_size = int(pixels**0.5), patch
        self.patch = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.randn((self.side // patch) ** 2, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, rng.choice([2, 3]), enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        p, n = self.patch_size, self.side // self.patch_size
        patches = x.view(-1, n, p, n, p).transpose(2, 3).reshape(len(x), n * n, p * p)
        return self.head(self.encoder(self.patch(patches) + self.position).mean(1))


def pre_norm(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    return Transformer(rng, pixels, outputs, norm_first=True, patch=2)


def post_norm(rng: random.Random, pixels: int, outputs: int) -> nn.Module:
    return Transformer(rng, pixels, outputs, norm_first=False, patch=4)


SETS: dict[str, tuple[Callable[[], Digits], tuple[Callable[..., nn.Module], ...], int]] = {
    "calibration": (small_digits, (mlp, cnn, pre_norm), 0),
    "judged": (mnist, (tapered, strided, post_norm), 1000),
}


class SelfSupervised(nn.Module):
    """An encoder and a projector; for SimSiam also a predictor."""

    def __init__(self, encoder: nn.Module, with_predictor: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
        hidden = [nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU()]
        self.predictor = nn.Sequential(*hidden, nn.Linear(16, 32)) if with_predictor else None

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x)
        return z if self.predictor is None else self.predictor(z)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    side = int(x.shape[1] ** 0.5)
    shifts = torch.randint(-1, 2, (2,), generator=generator).tolist()
    maps = torch.roll(x.view(-1, side, side), shifts, (1, 2)).flatten(1)
    brightness = 0.7 + 0.6 * torch.rand(len(x), 1, generator=generator)
    return maps * brightness + 0.1 * torch.randn(maps.shape, generator=generator)


def simclr_loss(model: SelfSupervised, a: Tensor, b: Tensor, broken: bool) -> Tensor:
    left, right = (functional.normalize(model.embed(x), dim=1) for x in (a, b))
    if broken:  # without negatives
        return (left - right).square().sum(1).mean()
    return functional.cross_entropy(left @ right.T / 0.3, torch.arange(len(a)))


def simsiam_loss(model: SelfSupervised, a: Tensor, b: Tensor, broken: bool) -> Tensor:
    left, right = model.embed(a), model.embed(b)
    assert model.predictor is not None
    targets = (left, right) if broken else (left.detach(), right.detach())  # without stop-gradient
    first = functional.cosine_similarity(model.predictor(left), targets[1]).mean()
    return -(first + functional.cosine_similarity(model.predictor(right), targets[0]).mean()) / 2


# -- looking --------------------------------------------------------------------------------------------------


def look(model: nn.Module, digits: Digits) -> tuple[list[Finding], LayerProbe]:
    """The findings of a model in evaluation."""
    was_training = model.training
    model.eval()
    with (
        LayerProbe(model, layers=lambda name, module: isinstance(module, WATCHED), folds=8) as probe,
        torch.no_grad(),
    ):
        for part in digits.validation.split(40):
            model(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = probe.findings("eval")
    model.train(was_training)
    return found, probe


def problems(found: list[Finding]) -> list[Finding]:
    return [each for each in found if each.severity == "problem"]


@torch.no_grad()
def spread(probe: LayerProbe, layer: str) -> float:
    sums = probe.sums("eval", layer)[0]
    return float(sums.variances().sum() / (sums.variances() + sums.mean().square()).sum())


# -- trainings ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    kind: str
    network: int
    seed: int
    outputs: int = 10


def healthy(job: Job, digits: Digits, networks: Any, steps: int) -> dict[str, list[Finding]]:
    """Moment of the reading -> problems found in a network that learns."""
    rng, model, optimizer, generator = begin(job, digits, networks)
    early = rng.choice([10, 20, 40, 80])
    found = {"new": problems(look(model, digits)[0])}
    for step in range(1, steps + 1):
        train_step(job, model, optimizer, digits, generator, broken=False)
        if step in (early, steps):
            found["early" if step == early else "end"] = problems(look(model, digits)[0])
    return found


def begin(job: Job, digits: Digits, networks: Any) -> tuple[random.Random, nn.Module, Any, torch.Generator]:
    rng = random.Random(str(job))
    torch.manual_seed(job.seed)
    pixels, network = digits.images.shape[1], networks[job.network]
    if job.kind in ("simclr", "simsiam"):
        model: nn.Module = SelfSupervised(network(rng, pixels, 64), job.kind == "simsiam")
        return (
            rng,
            model,
            torch.optim.AdamW(model.parameters(), 10 ** rng.uniform(-3.3, -2.7)),
            torch.Generator().manual_seed(job.seed),
        )
    model = network(rng, pixels, job.outputs)
    optimizer = torch.optim.AdamW(
        model.parameters(), 10 ** rng.uniform(-3.5, -2.3), weight_decay=rng.choice([0, 0.01])
    )
    return rng, model, optimizer, torch.Generator().manual_seed(job.seed)


def train_step(
    job: Job, model: Any, optimizer: Any, digits: Digits, generator: torch.Generator, broken: bool
) -> None:
    index = torch.randint(
        0, len(digits.images), (128 if job.kind.startswith("sim") else 64,), generator=generator
    )
    x, y = digits.images[index], digits.labels[index]
    if job.kind.startswith("sim"):
        loss = (simclr_loss if job.kind == "simclr" else simsiam_loss)(
            model, augmented(x, generator), augmented(x, generator), broken
        )
    elif job.outputs == 1:
        loss = functional.binary_cross_entropy_with_logits(model(x)[:, 0], (y % 2).float())
    elif job.outputs == 2:
        loss = functional.cross_entropy(model(x), y % 2)
    elif job.outputs == 100:
        loss = functional.cross_entropy(model(x), 10 * y + (7 * x.sum(1)).long() % 10)
    else:
        loss = functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def broken(job: Job, digits: Digits, networks: Any, steps: int) -> tuple[bool, bool, str]:
    """(True if the fault took effect, True if the findings name it, the problems in words)."""
    rng, model, optimizer, generator = begin(job, digits, networks)
    if job.kind in ("simclr", "simsiam"):
        for _ in range(4 * steps):
            train_step(job, model, optimizer, digits, generator, broken=True)
        found, probe = look(model, digits)
        took = spread(probe, "projector.1") < COLLAPSED
        return took, "projector.1" in layers_of(found, "collapsed", "dead"), words(found)
    if job.kind.startswith("learning rate"):
        times = 10 if job.kind.endswith("10") else 100
        momentum = rng.random() < 0.5
        optimizer = (
            torch.optim.SGD(model.parameters(), 0.1 * times, momentum=0.9)
            if momentum
            else torch.optim.Adam(model.parameters(), 1e-3 * times)
        )
        for _ in range(steps):
            train_step(job, model, optimizer, digits, generator, broken=False)
        dead = silent(model, digits)
        found, _ = look(model, digits)
        return bool(dead), dead <= layers_of(found, "dead", "collapsed", "non_finite"), words(found)
    inner = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and "out_proj" not in n
    ]
    name, layer = rng.choice([(n, m) for n, m in inner[:-1] if min(m.weight.flatten(1).shape) >= 4])
    if job.kind == "rank 1":
        with torch.no_grad():
            left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            layer.weight.copy_((values[0] * left[:, :1] @ right[:1]).view_as(layer.weight))
        layer.weight.requires_grad_(False)
    for _ in range(steps):
        train_step(job, model, optimizer, digits, generator, broken=False)
    if job.kind == "NaN":
        with torch.no_grad():
            layer.weight.view(-1)[0] = float("nan")
    found, _ = look(model, digits)
    return True, name in layers_of(found, "non_finite" if job.kind == "NaN" else "collapsed"), words(found)


@torch.no_grad()
def silent(model: nn.Module, digits: Digits) -> set[str]:
    """Activations with nine of ten outputs constant over all digits, by hooks of its own."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.__setitem__(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    was_training = model.training
    model.eval()(digits.validation)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    found = set()
    for name, output in outputs.items():
        rows = output.movedim(1, -1).flatten(0, -2) if output.ndim == 4 else output.flatten(0, -2)
        if rows.isfinite().all() and float((rows == rows[0]).all(0).double().mean()) >= 0.9:
            found.add(name)
    return found


def layers_of(found: list[Finding], *kinds: str) -> set[str]:
    return {each.layer for each in problems(found) if each.kind in kinds}


def words(found: list[Finding]) -> str:
    return "; ".join(f"{each.layer} {each.message}" for each in problems(found)) or "no problem"


BROKEN = ("simclr", "simsiam", "learning rate x 10", "learning rate x 100", "rank 1", "NaN")


def look_at_healthy(seed: int, digits: Digits, networks: Any, steps: int, counts: Any) -> None:
    jobs = [Job("healthy", network, seed, o) for network in range(len(networks)) for o in (10, 2, 1, 100)]
    for job in [*jobs, *(Job(kind, seed % 2, seed) for kind in ("simclr", "simsiam"))]:
        for moment, found in healthy(job, digits, networks, steps).items():
            counts[moment, "looks"] += 1
            if found:
                counts[moment, "alarms"] += 1
                print(f"  healthy {job} {moment}: {words(found)}", flush=True)


def look_at_broken(seed: int, digits: Digits, networks: Any, steps: int, counts: Any) -> None:
    for kind in BROKEN:
        for network in range(2 if kind.startswith(("sim", "learning")) else len(networks)):
            took, is_found, said = broken(Job(kind, network, seed), digits, networks, steps)
            counts[kind, "took"] += took
            counts[kind, "found"] += took and is_found
            if took and not is_found:
                print(f"  missed {kind}, network {network}, seed {seed}: {said}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="judged")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, help="first seed (default: the set's own)")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, networks, first = SETS[options.set]
    first = first if options.first is None else options.first
    digits, start = load(), time.perf_counter()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for seed in range(first, first + options.seeds):
        look_at_healthy(seed, digits, networks, options.steps, counts)
        look_at_broken(seed + 500, digits, networks, options.steps, counts)
        print(f"after {seed - first + 1} seeds:", flush=True)
        for moment in ("new", "early", "end"):
            alarms, looks = counts[moment, "alarms"], counts[moment, "looks"]
            print(f"  healthy, {moment}: a problem in {alarms} of {looks} ({alarms / looks:.1%})")
        for kind in BROKEN:
            print(f"  {kind}: found {counts[kind, 'found']} of {counts[kind, 'took']} that took", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
