"""Added time of metrics without a matrix (marginals, the history of forwards), and of loggers written by hand.

    python benchmarks/marginals.py [--models gpt,resnet] [--rounds 15] [--settle 3]

Training steps of a GPT-like network (width 256, 6 blocks, 4 sequences of 128 tokens) and of a ResNet-18 (8
images of 32 x 32), all linear or convolutional layers watched, in one thread. One network is trained; each
round runs a step of every arm in turn, with the hooks of the other arms off, and an arm's cost is its step less
that round's step without hooks, as a share of it. Time is the thread's own processor time, so that other
programs on the machine count only by their effect on the caches. The script reports medians over the rounds
with quartiles, and the time added to the fastest of all steps, which a busy machine disturbs least.

The loggers imitate composer's `ActivationMonitor` (L2 norm over features, mean, largest, kurtosis and skewness
of each output, copied to the host) and OLMo-core's monitor of activations (mean, standard deviation and largest
magnitude, kept on the device). Delve computes its cheapest statistic.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import delve
import torch
import training_step
from common import MARGINALS, Parser, table, write_result
from torch import nn
from torch.nn import functional

import spectralmetrics as sm
from spectralmetrics.functional import compiled

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks.first_movers import Transformer

WATCHED = (nn.Linear, nn.Conv2d)


class Logger:
    """A hook on each watched layer, which can be switched off."""

    def __init__(self, model):
        self.is_on = False
        self.seen = {}
        for name, module in model.named_modules():
            if isinstance(module, WATCHED):
                module.register_forward_hook(lambda module, args, output, name=name: self.hook(name, output))

    def hook(self, name, output):
        if self.is_on:
            with torch.no_grad():
                self.log(name, output.detach())

    def log(self, name, output):
        pass


class LikeComposer(Logger):
    def log(self, name, output):
        x = output.flatten(1) if output.ndim == 4 else output
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        standard = (x - mean) / (deviation + 1e-8)
        values = (
            torch.linalg.vector_norm(x, dim=-1).mean(),
            x.mean(),
            x.amax(-1).mean(),
            standard.pow(4).mean(-1).mean(),
            standard.pow(3).mean(-1).mean(),
        )
        self.seen[name] = [value.item() for value in values]


class LikeOlmo(Logger):
    def log(self, name, output):
        x = output.float()
        self.seen[name] = torch.stack([x.mean(), x.std(), x.abs().max()])


def gpt():
    tokens = torch.randint(0, 256, (4, 129))
    model = Transformer(width=256, depth=6, tokens=256)
    return model, lambda: functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def resnet():
    model, images = training_step.resnet()
    images, labels = images[:8], torch.randint(0, 10, (8,))
    return model, lambda: functional.cross_entropy(model(images), labels)


def switchable(model, metrics, folder):
    """Arms by name: functions that switch one on or off."""
    probes = {
        "seven marginals": [metric() for metric in MARGINALS],
        "history": [sm.HistoryMetric()],
        "seven marginals and history": [*(metric() for metric in MARGINALS), sm.HistoryMetric()],
        "seven marginals and history, PyTorch only": [*(metric() for metric in MARGINALS), sm.HistoryMetric()],
        "rms beside saturation (exact)": [sm.SaturationMetric(), sm.RootMeanSquareMetric()],
    }
    arms = {"no hook": lambda on: None}
    for name, chosen in probes.items():
        probe = sm.LayerProbe(model, chosen)
        probe.pause()
        arms[name] = lambda on, probe=probe: probe.resume() if on else probe.pause()
    for name, kind in {
        "a hook that does nothing": Logger,
        "as composer writes it": LikeComposer,
        "as OLMo-core writes it": LikeOlmo,
    }.items():
        logger = kind(model)
        arms[name] = lambda on, logger=logger: setattr(logger, "is_on", on)
    tracker = delve.SaturationTracker(
        folder, save_to="csv", modules=model, stats=["lsat"], device="cpu", writer_args={}, max_samples=None
    )
    tracker.stop()
    arms["Delve, lsat"] = lambda on: tracker.resume() if on else tracker.stop()
    return arms


def measure(name, rounds, settle):
    torch.manual_seed(0)
    model, loss = {"gpt": gpt, "resnet": resnet}[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step():
        start = time.thread_time()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.thread_time() - start

    with tempfile.TemporaryDirectory() as folder:
        arms = switchable(model, MARGINALS, folder)
        seconds = {arm: [] for arm in arms}
        for number in range(rounds + settle):
            for arm, switch in arms.items():
                switch(True)
                with compiled.using(None if "PyTorch only" in arm else "avx512"):
                    taken = step()
                switch(False)
                if number >= settle:
                    seconds[arm].append(taken)
    plain = seconds.pop("no hook")
    added = {arm: [t / p - 1 for t, p in zip(times, plain, strict=True)] for arm, times in seconds.items()}
    return min(plain), added, {arm: min(times) / min(plain) - 1 for arm, times in seconds.items()}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--models", default="gpt,resnet")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settle", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # Delve logs each layer
    torch.set_num_threads(1)
    results = {}
    for name in options.models.split(","):
        plain, added, least = measure(name, options.rounds, options.settle)
        print(f"{name}: a step takes at least {1e3 * plain:.0f} ms of processor time")
        cells = []
        for arm, shares in added.items():
            low, middle, high = statistics.quantiles(shares, n=4)
            cells.append([arm, *(f"{100 * each:.1f} %" for each in (least[arm], middle, low, high))])
        heads = ["arm", "added to the fastest step", "median", "lower quartile", "upper quartile"]
        print(table(heads, cells), flush=True)
        results[name] = {"milliseconds": 1e3 * plain, "least": least, "added": added}
    write_result("marginals", results)


if __name__ == "__main__":
    main()
