"""Rates of a monitor's alarms: collapses that it finds, and healthy trainings in which it raises one.

    python checks/alarms.py --set calibration        # the networks and data that the rules were chosen on
    python checks/alarms.py --runs checks/alarms.jsonl --seconds 0   # the rates of the stored runs, on others

The check causes collapses: SimCLR without negatives and SimSiam without stop-gradient (they count if the
embedding has collapsed at the end), a layer of dead rectifiers, a layer scaled by 30, a layer without gradients
that fades by 3 % a step. Partial collapses are a bottleneck that closes to 2 or 8 of 64 directions, and a deep
network whose weights fade. A collapse is found if there is an alarm of its kind at its layer, after its step. A
healthy run, with any schedule, dropout, weight decay and optimizer, should have no alarm; it counts if the
network has learned. The script prints rates and counts as it goes on. ``--runs`` names a file with a line for
each run. Runs in the file are not repeated, so the script can be stopped at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import findings as networks
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics import Alarm, LayerProbe, Monitor, SaturationMetric

COLLAPSED = 1e-3  # a collapsed embedding's variance is a smaller share of its mean square
PLANTED_STEPS = 1200
COMPLETE = ("simclr", "simsiam", "dead", "scale", "fading")
PARTIAL = ("bottleneck 2", "bottleneck 8", "vanishing")
HEALTHY = {  # number of runs in 1,000; fewer of the slow ones
    "mlp": 270,
    "plateau": 200,
    "cnn": 50,
    "cnn with batch norm": 40,
    "transformer": 40,
    "simsiam": 15,
    "binary": 210,
    "neural collapse": 175,
}


class Job(NamedTuple):
    kind: str
    seed: int


class Result(NamedTuple):
    """Result of a run.

    Attributes:
        took: True if the planted fault is there at the end; for a healthy run, if the network learned.
        found: True if an alarm of its kind was raised at its layer; for a healthy run, if any alarm was.
        delay: steps from the fault's beginning to that alarm.
        alarms: all alarms, as text.
    """

    took: bool
    found: bool
    delay: int | None
    alarms: list[str]


class Setting:
    """Data, networks and seeds of a set."""

    def __init__(self, name: str) -> None:
        self.is_judged = name == "judged"
        self.digits = networks.mnist() if self.is_judged else networks.small_digits()
        self.pixels = self.digits.images.shape[1]
        self.first = 20_000 if self.is_judged else 0  # seeds from 10,000 on were used to choose a rule

    def mlp(self, rng: random.Random, outputs: int, activation: type[nn.Module] | None = None) -> nn.Module:
        if self.is_judged:
            widths = rng.choice([[200, 100, 50], [96, 96, 48, 24], [300, 60]])
            activation = activation or rng.choice([nn.ReLU, nn.SiLU, nn.LeakyReLU])
        else:
            widths = [rng.choice([64, 128])] * rng.choice([2, 3, 4])
            activation = activation or rng.choice([nn.ReLU, nn.ReLU, nn.GELU, nn.Tanh])
        dropout = rng.choice([0, 0.1, 0.3])
        return networks.stacked(self.pixels, widths, outputs, activation, dropout, norm=rng.random() < 0.3)

    def plateau(self, rng: random.Random) -> nn.Module:
        """A deep network with small weights, which learns nothing for a while."""
        activation = nn.Tanh if self.is_judged else nn.GELU
        depth, width = (4, 48) if self.is_judged else (5, 64)
        model = networks.stacked(self.pixels, [width] * depth, 10, activation)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(rng.uniform(0.4, 0.8))
        return model

    def cnn(self, rng: random.Random, outputs: int, norm: bool) -> nn.Module:
        c, side = rng.choice([6, 12] if self.is_judged else [8, 16]), int(self.pixels**0.5)
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        strides = (2, 1, 2) if self.is_judged else (1, 2, 1)
        for left, right, stride in zip((1, c, 2 * c), (c, 2 * c, 2 * c), strides, strict=True):
            layers += [
                nn.Conv2d(left, right, 3, stride, 1),
                *([nn.BatchNorm2d(right)] if norm else []),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, outputs))

    def transformer(self, rng: random.Random) -> nn.Module:
        return (networks.post_norm if self.is_judged else networks.pre_norm)(rng, self.pixels, 10)


def optimizer_of(rng: random.Random, model: nn.Module, steps: int, constant: bool) -> tuple[Any, Any]:
    """An optimizer and its schedule."""
    decay, weights = rng.choice([0, 0.01, 0.1]), model.parameters()
    if constant:
        optimizer: Any = torch.optim.AdamW(weights, 10 ** rng.uniform(-3.3, -2.7), fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    if rng.random() < 0.7:
        rate = 10 ** rng.uniform(-3.7, -2.5)
        optimizer = torch.optim.AdamW(weights, rate, weight_decay=decay, fused=True)
    else:
        rate = 10 ** rng.uniform(-2, -1.3)
        optimizer = torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=decay * 0.01, fused=True)
    shape: Callable[[int], float] = {
        "constant": lambda t: 1.0,
        "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)),
        "warm-up": lambda t: min(1.0, (t + 1) / 100),
        "warm-up and cosine": lambda t: min(1.0, (t + 1) / 100) * 0.5 * (1 + math.cos(math.pi * t / steps)),
        "step": lambda t: 1.0 if t < 0.6 * steps else 0.1,
    }[rng.choice(["constant", "cosine", "warm-up", "warm-up and cosine", "step"])]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


class Run:
    """One training with a monitor."""

    def __init__(self, job: Job, setting: Setting, every: int) -> None:
        self.job, self.setting, self.every = job, setting, every
        self.rng = random.Random(str(job))
        torch.manual_seed(job.seed)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.alarms: list[Alarm] = []
        self.batch = self.rng.choice([32, 64])
        self.images, self.labels = setting.digits.images, setting.digits.labels

    def watch(self, model: nn.Module) -> None:
        self.model = model
        self.probe = LayerProbe(
            model,
            SaturationMetric(),
            layers=lambda name, module: isinstance(module, networks.WATCHED) and "out_proj" not in name,
            rows_per_feature=2,
        )
        self.monitor = Monitor(self.probe, every=self.every, on_alarm=self.alarms.append)

    def draw(self) -> tuple[Tensor, Tensor]:
        index = torch.randint(0, len(self.images), (self.batch,), generator=self.generator)
        return self.images[index], self.labels[index]

    def train(
        self,
        steps: int,
        loss: Callable[[int], Tensor],
        before: Callable[[int], None] | None = None,
        constant: bool = False,
    ) -> None:
        optimizer, schedule = optimizer_of(self.rng, self.model, steps, constant)
        for step in range(steps):
            if before is not None:
                before(step)
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            self.monitor.step()

    def classify(self, step: int) -> Tensor:
        x, y = self.draw()
        return functional.cross_entropy(self.model(x), y)

    def decide(self, step: int) -> Tensor:
        x, y = self.draw()
        return functional.binary_cross_entropy_with_logits(self.model(x)[:, 0], (y % 2).float())

    def separate(self, step: int) -> Tensor:
        x, y = self.draw()
        return functional.cross_entropy(self.model(x), y % 2)

    def similar(self, broken: bool) -> Callable[[int], Tensor]:
        loss = networks.simclr_loss if self.job.kind == "simclr" else networks.simsiam_loss

        def of(step: int) -> Tensor:
            x, _ = self.draw()
            views = [networks.augmented(x, self.generator) for _ in range(2)]
            return loss(self.model, *views, broken)  # type: ignore[arg-type]

        return of

    def result(self, took: bool, kinds: tuple[str, ...], layers: set[str], since: int) -> Result:
        found = [
            alarm
            for alarm in self.alarms
            if alarm.finding.kind in kinds and alarm.finding.layer in layers and alarm.step > since
        ]
        delay = found[0].step - since if found else None
        return Result(took, bool(found), delay, list(map(str, self.alarms)))

    @torch.no_grad()
    def output_of_embedding(self) -> Tensor:
        """The embedding of validation digits, as training sees it."""
        with self.probe.paused():
            embedding: Tensor = self.model.embed(self.setting.digits.validation[:256])  # type: ignore[operator]
        return embedding

    @torch.no_grad()
    def output(self, layer: str) -> Tensor:
        """A layer's output for the validation digits, by a hook of its own."""
        kept: list[Tensor] = []
        hook = dict(self.model.named_modules())[layer].register_forward_hook(lambda m, i, o: kept.append(o))
        self.model.eval()
        with self.probe.paused():
            self.model(self.setting.digits.validation[:256])
        self.model.train()
        hook.remove()
        rows = kept[0]
        return rows.movedim(1, -1).flatten(0, -2) if rows.ndim == 4 else rows.flatten(0, -2)


# -- healthy --------------------------------------------------------------------------------------------------


def healthy(run: Run, steps: int) -> Result:
    rng, kind, setting = run.rng, run.job.kind, run.setting
    loss: Callable[[int], Tensor] = run.classify
    if kind in ("mlp", "neural collapse"):
        run.watch(setting.mlp(rng, 10))
        if kind == "neural collapse":  # few digits, which the network soon fits exactly
            run.images, run.labels = run.images[:300], run.labels[:300]
    elif kind == "plateau":
        run.watch(setting.plateau(rng))
    elif kind.startswith("cnn"):
        run.watch(setting.cnn(rng, 10, "batch norm" in kind))
    elif kind == "transformer":
        run.batch = 16
        run.watch(setting.transformer(rng))
    elif kind == "binary":
        outputs = rng.choice([1, 2])
        network = (
            setting.mlp(rng, outputs) if rng.random() < 0.6 else setting.cnn(rng, outputs, rng.random() < 0.5)
        )
        run.watch(network)
        loss = run.decide if outputs == 1 else run.separate
    else:
        run.batch = 128
        run.watch(siamese(run))
        loss = run.similar(broken=False)
    with torch.no_grad(), run.probe.paused():
        at_first = accuracy(run.model.eval(), run)
    run.model.train()
    run.train(steps, loss, constant=kind == "simsiam")
    with torch.no_grad(), run.probe.paused():
        learned = accuracy(run.model.eval(), run) > at_first
    return Result(learned, bool(run.alarms), None, list(map(str, run.alarms)))


def encoder(run: Run) -> nn.Module:
    rng, setting = run.rng, run.setting
    return setting.mlp(rng, 64, nn.ReLU) if rng.random() < 0.6 else setting.cnn(rng, 64, rng.random() < 0.5)


def siamese(run: Run) -> nn.Module:
    """SimSiam with batch norm, which it needs according to its authors."""
    model = networks.SelfSupervised(encoder(run), with_predictor=True)
    norm = nn.BatchNorm1d(32, affine=False)
    model.projector = nn.Sequential(nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32, bias=False), norm)
    return model


def accuracy(model: nn.Module, run: Run) -> float:
    """Accuracy of the network, or of a linear probe of its encoder, on validation digits."""
    digits = run.setting.digits
    if not isinstance(model, networks.SelfSupervised):
        outputs, labels = model(digits.validation), digits.validation_labels
        if run.job.kind == "binary":
            labels = labels % 2
            outputs = torch.cat([-outputs, outputs], 1) if outputs.shape[1] == 1 else outputs
        return float((outputs.argmax(1) == labels).double().mean())
    train, test = (model.encoder(x).double() for x in (digits.images, digits.validation))
    centre, size = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - centre) / size for x in (train, test))
    targets = functional.one_hot(digits.labels, 10).double()
    ridge = 1e-2 * len(train) * torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(train.T @ train + ridge, train.T @ (targets - targets.mean(0)))
    return float(((test @ weights).argmax(1) == digits.validation_labels).double().mean())


# -- planted --------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A layer that fades out all but a few directions."""

    def __init__(self, width: int, kept: int) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(width, width))[0][:, :kept]
        self.register_buffer("projection", basis @ basis.T)
        self.rest = 1.0

    def forward(self, x: Tensor) -> Tensor:
        kept = x @ self.projection
        return kept + self.rest * (x - kept)


def planted(run: Run) -> Result:
    rng, kind, setting, steps = run.rng, run.job.kind, run.setting, PLANTED_STEPS
    at = rng.randrange(400, 700)
    if kind in ("simclr", "simsiam"):
        run.batch = 128
        run.watch(networks.SelfSupervised(encoder(run), with_predictor=kind == "simsiam"))
        spreads = []
        loss = run.similar(broken=True)

        def measured(step: int) -> Tensor:
            if step % 20 == 0:
                spreads.append((step, spread_of(run.output_of_embedding())))
            return loss(step)

        run.train(steps, measured, constant=True)
        spreads.append((steps, spread_of(run.output_of_embedding())))
        took = spreads[-1][1] < COLLAPSED
        since = next((s for s, value in reversed(spreads) if value >= COLLAPSED), 0)
        return run.result(took, ("collapsed", "dead"), {"projector.1"}, min(since, steps) if took else 0)
    if kind in ("dead", "scale", "fading"):
        model = (
            setting.mlp(rng, 10, nn.ReLU) if rng.random() < 0.5 else setting.cnn(rng, 10, rng.random() < 0.5)
        )
        run.watch(model)
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        name, layer = rng.choice(named[:-1])
        behind = list(itertools.dropwhile(lambda pair: pair[0] != name, model.named_modules()))
        rectifier = next(n for n, m in behind if isinstance(m, nn.ReLU))
        norm = next((m for _, m in behind[:2] if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))), None)

        def strike(step: int) -> None:
            if kind == "fading" and step >= at:
                layer.requires_grad_(False)
                layer.weight.mul_(0.97), layer.bias.mul_(0.97)
            elif step == at:
                with torch.no_grad():
                    if kind == "scale":
                        layer.weight.mul_(30), layer.bias.mul_(30)
                    else:
                        (norm or layer).bias.sub_(1e3)

        run.train(steps, run.classify, strike)
        if kind != "dead":
            return run.result(True, ("scale",), {name}, at)
        rows = run.output(rectifier)
        took = float((rows == rows[0]).all(0).double().mean()) >= 0.9
        return run.result(took, ("dead",), {rectifier}, at)
    if kind.startswith("bottleneck"):
        kept = int(kind.split()[1])
        bottleneck = Bottleneck(64, kept)
        activation = nn.SiLU if setting.is_judged else nn.GELU
        first = [nn.Linear(setting.pixels, 128), activation(), nn.Linear(128, 64)]
        model = nn.Sequential(*first, bottleneck, nn.Linear(64, 64), activation(), nn.Linear(64, 10))
        run.watch(model)

        def fade(step: int) -> None:
            bottleneck.rest = min(1.0, math.exp(-(step - at) / 60)) if step >= at else 1.0

        run.train(steps, run.classify, fade)
        return run.result(True, ("collapsed", "dead", "scale"), {"4", "5", "6"}, at)
    activation = nn.Tanh if setting.is_judged else nn.GELU
    run.watch(networks.stacked(setting.pixels, [48] * (8 if setting.is_judged else 6), 10, activation))

    def decay(step: int) -> None:
        if step >= at:
            with torch.no_grad():
                for module in run.model.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.mul_(0.98)

    run.train(steps, run.classify, decay)
    last = [n for n, m in run.model.named_modules() if isinstance(m, nn.Linear)][-1]
    layers = {n for n, m in run.model.named_modules() if isinstance(m, networks.WATCHED)}
    return run.result(spread_of(run.output(last)) < COLLAPSED, ("collapsed", "dead"), layers, at)


def spread_of(rows: Tensor) -> float:
    rows = rows.double()
    return float(rows.var(0, correction=0).sum() / rows.square().mean(0).sum().clamp(min=1e-300))


# -- rates ----------------------------------------------------------------------------------------------------


def jobs(first: int, healthy_runs: int, planted_seeds: int) -> Iterator[Job]:
    """All jobs, kinds mixed evenly, so that a stopped check has some of each."""
    planned = [
        *((Job(kind, first), math.ceil(healthy_runs * share / 1000)) for kind, share in HEALTHY.items()),
        *((Job(f"planted {kind}", first + 5_000), planted_seeds) for kind in (*COMPLETE, *PARTIAL)),
    ]
    placed = [
        (number / runs, job._replace(seed=job.seed + number)) for job, runs in planned for number in range(runs)
    ]
    return (job for _, job in sorted(placed, key=lambda pair: pair[0]))


def rates(results: dict[Job, Result]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({job.kind for job in results}):
        own = [result for job, result in results.items() if job.kind == kind]
        if kind.startswith("planted"):
            took = [each for each in own if each.took]
            delays = sorted(each.delay for each in took if each.delay is not None)
            found[kind] = {
                "runs": len(own),
                "took": len(took),
                "found": sum(each.found for each in took),
                "median steps": delays[len(delays) // 2] if delays else None,
                "most steps": delays[-1] if delays else None,
            }
        else:
            learned = [each for each in own if each.took]
            found[kind] = {
                "runs": len(own),
                "learned": len(learned),
                "with an alarm": sum(e.found for e in learned),
            }
    return found


def describe(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"  {kind}: {', '.join(f'{name} {value}' for name, value in own.items())}"
        for kind, own in found.items()
    ]
    healthy_kinds = [own for kind, own in found.items() if not kind.startswith("planted")]
    alarms, runs = (sum(own[key] for own in healthy_kinds) for key in ("with an alarm", "learned"))
    lines.append(f"  healthy together: {alarms} of {runs} with an alarm")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("calibration", "judged"), default="judged")
    parser.add_argument("--healthy", type=int, default=1000, help="healthy runs, of all kinds")
    parser.add_argument("--planted", type=int, default=20, help="seeds of each planted kind")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a healthy run")
    parser.add_argument("--every", type=int, default=100, help="steps from reading to reading")
    parser.add_argument("--runs", type=Path, help="JSON lines, one a run: read, and added to")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no training later than this")
    parser.add_argument("--only", nargs="+", help="kinds")
    options = parser.parse_args()
    start = time.perf_counter()
    done: dict[Job, Result] = {}
    if options.runs and options.runs.exists():
        for line in options.runs.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            job = Job(entry.pop("kind"), entry.pop("seed"))
            done[job] = Result(**entry)
    wanted = jobs(Setting(options.set).first, options.healthy, options.planted)
    chosen = [job for job in wanted if not options.only or job.kind in options.only]
    results = {job: done[job] for job in chosen if job in done}
    missing = [job for job in chosen if job not in done] if options.seconds > 0 else []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, prepare, (options,)) as pool:
        for number, (job, result) in enumerate(pool.imap_unordered(train, missing), 1):
            if time.perf_counter() - start > options.seconds:
                break
            results[job] = result
            if options.runs:
                with options.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**job._asdict(), **result._asdict()}) + "\n")
            is_missed = result.took and not result.found and job.kind.startswith("planted")
            if is_missed or (result.found and not job.kind.startswith("planted")):
                print(f"  {'missed' if is_missed else 'alarm in'} {job}: {result.alarms[:3]}", flush=True)
            if number % 15 == 0:
                print(f"after {time.perf_counter() - start:.0f} s:\n{describe(rates(results))}", flush=True)
    print(f"together:\n{describe(rates(results))}", flush=True)
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Set up a process for its trainings."""
    global _setting, _options
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _setting, _options = Setting(options.set), options


def train(job: Job) -> tuple[Job, Result]:
    kind = job.kind.removeprefix("planted ")
    run = Run(Job(kind, job.seed), _setting, _options.every)
    return job, planted(run) if kind != job.kind else healthy(run, _options.steps)


if __name__ == "__main__":
    sys.exit(main())
