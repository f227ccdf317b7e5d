"""Train for 10,000 steps with everything on, and check memory, records and every number.

    python checks/soak.py                    # some minutes on two cores
    python checks/soak.py --steps 1000 --kills 10

A small convolutional network learns real digits while three probes watch it, each with a recorder: one keeps
folds and labels, one sketches, one has a budget. It is trained three times with the same data:

1. in one go; the script reads resident memory and the open files a hundred times,
2. killed at random moments and resumed from its checkpoints,
3. without any probe, while plain hooks keep the outputs of its layers.

All three must end with the same weights, bit by bit. The first two must record the same, and must agree with
one pass over the kept outputs: covariances in extended precision by numpy; labels, folds and sketches by
metrics that are updated by hand. The script prints what is wrong, and its exit status is then 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics import Metric

import spectralmetrics as sm
from spectralmetrics.functional import Observations

BATCH = 32
LAYERS = {"0": 8, "3": 48, "5": 10}  # widths
STEPS_PER_RECORD = 150  # none after the last step: it would reset sums that are compared
STEPS_PER_CHECKPOINT = 20
SKETCHED = {"max_features": 32, "sketch_size": 24}  # the middle layer is wider
THRESHOLD = 0.9
HALF = 0.5  # of the variance, which fits into a sketch
CLOSE = 1e-9


class KeepRows(Metric):
    """Writes its rows to a file, from the position of the last reset or checkpoint."""

    full_state_update = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.add_state("length", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)

    def update(self, rows: Tensor) -> None:
        path = self.folder / str(rows.shape[1])
        path.touch()
        with open(path, "r+b") as file:
            file.seek(int(self.length))
            file.write(rows.contiguous().numpy().tobytes())
            file.truncate()
            self.length.fill_(file.tell())

    def compute(self) -> Tensor:
        return self.length


class Training:
    """The network and its optimizer; with a folder, also probes and recorders."""

    def __init__(self, folder: Path | None) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 48),
            nn.ReLU(),
            nn.Linear(48, 10),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.probes: dict[str, sm.LayerProbe] = {}
        self.folder = folder
        if folder is None:
            return
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        of_eigenvalues = {
            "saturation": sm.SaturationMetric(threshold=THRESHOLD),
            "effective_rank": sm.EffectiveRankMetric(),
            "trace": sm.CovarianceTraceMetric(),
        }
        of_labels = {"linear_probe": sm.LinearProbeMetric(10), "collapse": sm.NeuralCollapseMetric(10)}
        of_sketches = {
            "saturation": sm.SaturationMetric(threshold=HALF),
            "stable_rank": sm.StableRankMetric(),
        }
        kept = {"trace": sm.CovarianceTraceMetric(), "rows": KeepRows(folder / "rows")}
        self.probes = {
            "labels": sm.LayerProbe(self.model, {**of_eigenvalues, **of_labels}, folds=8),
            "sketch": sm.LayerProbe(self.model, of_sketches, **SKETCHED),
            "budget": sm.LayerProbe(self.model, kept, budget=0.1),
        }
        for probe in self.probes.values():
            probe.persistent()
        self.recorders = {
            name: sm.Recorder(folder / name, probe, ["csv", "arrays", "tensorboard"], mode="resume")
            for name, probe in self.probes.items()
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels that depend on the step alone."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=torch.Generator().manual_seed(step))
        return self.images[chosen], self.labels[chosen]

    def run(self, steps: int) -> Iterator[int]:
        """Train from the checkpoint up to a step; yields after each step."""
        for step in range(self.resume(), steps):
            images, labels = self.batch(step)
            self.optimizer.zero_grad()
            if self.probes:
                with self.probes["labels"].labels(labels):
                    logits = self.model(images)
            else:
                logits = self.model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.step()
            done = step + 1
            if self.probes and done % STEPS_PER_RECORD == 0 and done < steps:
                self.record(done // STEPS_PER_RECORD - 1, loss.item())
            if self.probes and done % STEPS_PER_CHECKPOINT == 0:
                self.save(done)
            yield done

    def record(self, epoch: int, loss: float) -> None:
        for name, recorder in self.recorders.items():
            is_reset = name == "budget"  # the other probes keep their sums
            if epoch >= recorder.next_epoch:
                recorder.add_scalar("loss", loss)
                recorder.record(epoch, reset=is_reset)
            elif is_reset:  # recorded, but killed before the checkpoint
                self.probes[name].reset()

    def save(self, step: int) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, **self.probes}
        torch.save(
            {name: part.state_dict() for name, part in parts.items()} | {"step": step}, self.folder / "new.pt"
        )
        os.replace(self.folder / "new.pt", self.folder / "checkpoint.pt")

    def resume(self) -> int:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return 0
        saved = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        for name, part in {"model": self.model, "optimizer": self.optimizer, **self.probes}.items():
            part.load_state_dict(saved[name])
        return saved["step"]

    def read(self) -> dict[str, Any]:
        """The weights, and the values of the probes."""
        found: dict[str, Any] = {"weights": self.model.state_dict()}
        for name, probe in self.probes.items():
            found[name] = probe.compute("train")
            if probe.has_intervals:
                found[f"{name}, intervals"] = probe.intervals("train")
            if name != "sketch":
                found[f"{name}, covariances"] = probe.covariances("train")
        return found

    def close(self) -> None:
        for recorder in self.recorders.values():
            recorder.close()
        for probe in self.probes.values():
            probe.remove()


def train_until_killed(folder: Path, steps: int, started: Any) -> None:
    """Run in a process that may be killed; if training ends, save the results."""
    prepare()
    training = Training(folder)
    for _ in training.run(steps):
        started.set()
    torch.save(training.read(), folder / "read.pt")
    training.close()


def prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # other libraries warn
    warnings.filterwarnings("ignore", message=".*the budget of 10 % has paid for no forward yet")


def in_one_go(folder: Path, steps: int, wrong: list[str]) -> dict[str, Any]:
    """Train, and read memory and open files a hundred times."""
    training = Training(folder)
    seen, files = [], set()
    start = time.perf_counter()
    for step in training.run(steps):
        if step % max(steps // 100, 1) == 0:
            seen.append(resident_memory())
            files.add(len(os.listdir("/proc/self/fd")))
    seconds = time.perf_counter() - start
    first, last = np.median(seen[20:30]), np.median(seen[-10:])
    print(
        f"{steps} steps in {seconds:.0f} s; resident memory after a quarter {first / 2**20:.1f} MiB, at the end"
        f" {last / 2**20:.1f} ({last / first - 1:+.2%}), least and most in between"
        f" {min(seen[20:]) / 2**20:.1f}, {max(seen[20:]) / 2**20:.1f}; open files {sorted(files)}"
    )
    if not abs(last / first - 1) < 0.01:
        wrong.append(f"memory went from {first} to {last} bytes")
    if len(files) > 1:
        wrong.append(f"the number of open files was not constant: {sorted(files)}")
    found = training.read()
    training.close()
    return found


def resident_memory() -> int:
    """Resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def killed(folder: Path, steps: int, kills: int, seed: int, seconds: float, wrong: list[str]) -> dict[str, Any]:
    """Train in processes that are killed at random moments, until one reaches the last step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spectralmetrics", "sklearn.datasets", "torch.utils.tensorboard"])
    moments = random.Random(seed)
    records, number, lives = 0, 0, 0
    start = time.perf_counter()
    while not (folder / "read.pt").exists():
        started = context.Event()
        life = context.Process(target=train_until_killed, args=(folder, steps, started))
        life.start()
        lives += 1
        while not started.wait(1) and life.is_alive():
            pass
        # After all kills, the next process trains to the end.
        life.join(moments.uniform(0, 1.4 * seconds / kills) if number < kills else None)
        if life.is_alive():
            life.kill()
            number += 1
        life.join()
        if life.exitcode > 0:
            raise RuntimeError(f"a life has failed with exit code {life.exitcode}")
        for name in ("labels", "sketch", "budget"):
            rows = sm.read_records(folder / name) if (folder / name / "records.csv").exists() else []
            epochs = sorted({row["epoch"] for row in rows})
            if epochs != list(range(len(epochs))) or len(epochs) < records - 1:
                wrong.append(f"after kill {number} the records of {name!r} are {epochs}")
            records = max(records, len(epochs)) if name == "labels" else records
    print(f"killed {number} times in {time.perf_counter() - start:.0f} s, {lives} lives")
    if number < kills:
        wrong.append(f"came to the end after {number} kills, before all {kills}")
    return torch.load(folder / "read.pt", weights_only=False)


def without_probe(steps: int) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Train with plain hooks that keep outputs, (steps, N, D, …), and labels, (steps, N)."""
    training = Training(None)
    outputs: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name, kept in outputs.items():
        training.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, kept=kept: kept.append(output.detach().clone())
        )
    for _ in training.run(steps):
        pass
    labels = torch.stack([training.batch(step)[1] for step in range(steps)])
    return training.read(), {name: torch.stack(kept) for name, kept in outputs.items()}, labels


def in_extended_precision(rows: Tensor) -> np.ndarray:
    """The covariance of rows (N, D)."""
    values = rows.numpy()
    mean = sum(part.astype(np.longdouble).sum(0) for part in np.array_split(values, 100)) / len(values)
    total = np.zeros((values.shape[1],) * 2, np.longdouble)
    for part in np.array_split(values, 100):
        deviations = part - mean
        total += deviations.T @ deviations
    return total / len(values)


def by_hand(outputs: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """Expected values of the probes, in the form of :meth:`Training.read`."""
    found: dict[str, Any] = {name: {} for name in ("labels", "labels, intervals", "sketch")}
    for layer, kept in outputs.items():
        sketch = SKETCHED["sketch_size"] if LAYERS[layer] > SKETCHED["max_features"] else None
        in_folds = {
            "saturation": sm.SaturationMetric(threshold=THRESHOLD, folds=8),
            "effective_rank": sm.EffectiveRankMetric(folds=8),
            "trace": sm.CovarianceTraceMetric(folds=8),
        }
        of_labels = {
            "linear_probe": sm.LinearProbeMetric(10, folds=8),
            "collapse": sm.NeuralCollapseMetric(10, folds=8),
        }
        sketched = {
            "saturation": sm.SaturationMetric(threshold=HALF, sketch_size=sketch),
            "stable_rank": sm.StableRankMetric(sketch_size=sketch),
        }
        for step, (values, classes) in enumerate(zip(kept, labels, strict=True)):
            pooled = values.flatten(2).mean(2) if values.ndim > 2 else values
            for metric in in_folds.values():
                metric.update(Observations(values, feature_dim=1, group=step))
            for metric in of_labels.values():
                metric.update(Observations(pooled, group=step), classes)
            for metric in sketched.values():
                metric.update(Observations(values, feature_dim=1))
        for name, metric in (in_folds | of_labels).items():
            found["labels"][f"{name}/train/{layer}"] = metric.compute()
            if metric.has_interval:
                found["labels, intervals"][f"{name}/train/{layer}"] = metric.interval()
        for name, metric in sketched.items():
            found["sketch"][f"{name}/train/{layer}"] = metric.compute()
    return found


class Comparison:
    """Collects differences, and the largest distance between compared numbers."""

    def __init__(self, wrong: list[str]) -> None:
        self.wrong = wrong
        self.numbers = 0
        self.furthest = 0.0

    def same(self, what: str, actual: Any, expected: Any) -> None:
        """Compare numbers, or mappings and tuples of numbers: each must agree to 1e-9."""
        if isinstance(expected, dict):
            if set(actual) != set(expected):
                self.wrong.append(f"{what}: {sorted(actual)} are not {sorted(expected)}")
            for key in expected:
                self.same(f"{what}, {key}", actual[key], expected[key])
        elif isinstance(expected, tuple):
            for one, other in zip(actual, expected, strict=True):
                self.same(what, one, other)
        else:
            one, other = (np.asarray(each, dtype=np.longdouble) for each in (actual, expected))
            apart = float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-300))
            self.numbers += other.size
            self.furthest = max(self.furthest, apart) if apart == apart else apart
            if not apart < CLOSE:
                self.wrong.append(f"{what}: {actual} and {expected}, {apart:.1e} apart")


def main() -> int:
    """Train three times, compare, report; return the exit status."""
    parser = argparse.ArgumentParser(description="Train with everything on; check memory and all numbers.")
    parser.add_argument("--steps", type=int, default=10_000, help="(default: 10,000)")
    parser.add_argument("--kills", type=int, default=100, help="(default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
    options = parser.parse_args()
    prepare()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        found = {"whole": in_one_go(folder / "whole", options.steps, wrong)}
        seconds = time.perf_counter() - start
        (folder / "killed").mkdir()
        found["killed"] = killed(folder / "killed", options.steps, options.kills, options.seed, seconds, wrong)
        plain, outputs, labels = without_probe(options.steps)
        compared = Comparison(wrong)
        expected = by_hand(outputs, labels)
        exact = {
            layer: in_extended_precision(outputs[layer].movedim(2, -1).reshape(-1, width))
            for layer, width in LAYERS.items()
        }
        for name, each in found.items():
            for weight, values in plain["weights"].items():
                if not torch.equal(values, each["weights"][weight]):
                    wrong.append(f"{name}: the weights {weight!r} differ from training without a probe")
            for kind, values in expected.items():
                compared.same(f"{name}, {kind}", each[kind], values)
            for layer, width in LAYERS.items():
                compared.same(f"{name}, covariance", each["labels, covariances"][layer], exact[layer])
                file = folder / name / "rows" / str(width)
                kept = torch.from_numpy(np.fromfile(file, np.float32)).reshape(-1, width)
                seen = in_extended_precision(kept)
                compared.same(f"{name}, of a budget", each["budget, covariances"][layer], seen)
                print(f"{name}, layer {layer}: {len(kept)} rows within the budget since the last record")
        records = {name: recorded(folder / name / "labels") for name in found}
        compared.same("records", records["killed"], records["whole"])
    print(f"{compared.numbers} numbers compared, at most {compared.furthest:.1e} apart")
    print(*wrong, sep="\n")
    return int(bool(wrong))


def recorded(folder: Path) -> dict[str, float]:
    """All values of a run."""
    return {
        f"{row['epoch']} {row['statistic']} {row['stage']} {row['layer']}": row["value"]
        for row in sm.read_records(folder)
    }


if __name__ == "__main__":
    sys.exit(main())
