"""Accuracy of a network whose layers are restricted to their leading eigenspaces.

Trains a convolutional network on the real MNIST digits, puts a projection behind every convolution, lowers the
threshold from 1 to 0.5, and measures the accuracy on held-out digits; also for random directions of the same
ranks. Three seeds. Writes a table, a picture and JSON; takes about fifteen minutes on two cores.

    python benchmarks/projection.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from common import Parser, write_result
from torch import nn
from torch.nn import functional

from spectralmetrics import insert_projections, randomize_projections, set_projection_threshold
from spectralmetrics.demo import load_digits

THRESHOLDS = (1.0, 0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
RANDOM_DRAWS = 3
ROOT = Path(__file__).parents[1]


def make_network() -> nn.Sequential:
    """Six convolutions in three stages of 16, 32 and 64 channels."""
    layers: list[nn.Module] = []
    channels_in = 1
    for channels in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            channels_in = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return float((predicted == labels).double().mean())


def experiment(seed: int, epochs: int) -> list[dict[str, float]]:
    images, labels, test_images, test_labels = load_digits(seed)
    torch.manual_seed(seed)
    model = make_network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def train_epoch() -> None:
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    for _ in range(epochs):
        train_epoch()
    unprojected = accuracy(model.eval(), test_images, test_labels)
    found = []
    with insert_projections(model, nn.Conv2d) as projections:
        # The covariance of the final network's features on the training digits.
        with torch.no_grad(), projections.collect():
            for part in images.split(250):
                model(part)
        for threshold in THRESHOLDS:
            rows = set_projection_threshold(model, threshold)
            projected = accuracy(model, test_images, test_labels)
            generator = torch.Generator().manual_seed(seed)
            at_random = []
            for _ in range(RANDOM_DRAWS):
                randomize_projections(model, generator)
                at_random.append(accuracy(model, test_images, test_labels))
            found.append(
                {
                    "seed": seed,
                    "threshold": threshold,
                    "unprojected": unprojected,
                    "projected": projected,
                    "random": statistics.mean(at_random),
                    "saturation": statistics.mean(row.saturation or 0.0 for row in rows),
                    "dimensions": [row.dimension for row in rows],
                }
            )
    return found


def draw(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.add_subplot()
    looks = (
        ("projected", "leading eigenvectors", "#0072B2", "o"),
        ("random", "random directions", "#E69F00", "s"),
    )
    for key, label, colour, marker in looks:
        by_threshold = [[row[key] for row in rows if row["threshold"] == t] for t in THRESHOLDS]
        middle = [statistics.mean(values) for values in by_threshold]
        axis.plot(THRESHOLDS, middle, color=colour, marker=marker, markersize=4, label=label)
        least, most = [min(values) for values in by_threshold], [max(values) for values in by_threshold]
        axis.fill_between(THRESHOLDS, least, most, color=colour, alpha=0.2, lw=0)
    unprojected = statistics.mean(row["unprojected"] for row in rows)
    axis.axhline(unprojected, color="0.4", linestyle="--", label="no projection")
    axis.invert_xaxis()
    axis.set_xlabel("threshold δ: share of the variance that every convolution keeps")
    axis.set_ylabel("accuracy on held-out digits")
    axis.set_ylim(0, 1.02)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        "Six convolutions restricted to subspaces of the same ranks (mean and range of seeds)", fontsize=9
    )
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "projection.png")
    options = parser.parse_args()
    rows = [row for seed in range(options.seeds) for row in experiment(seed, options.epochs)]
    print(f"accuracy without projections: {statistics.mean(row['unprojected'] for row in rows):.3f}")
    print("threshold  saturation  projected (least, most)   random")
    for threshold in THRESHOLDS:
        of = [row for row in rows if row["threshold"] == threshold]
        values = [row["projected"] for row in of]
        print(
            f"{threshold:9.3f}  {statistics.mean(row['saturation'] for row in of):10.3f}"
            f"  {statistics.mean(values):9.3f} ({min(values):.3f}, {max(values):.3f})"
            f"   {statistics.mean(row['random'] for row in of):.3f}"
        )
    write_result("projection", rows)
    draw(rows, options.picture)


if __name__ == "__main__":
    main()
