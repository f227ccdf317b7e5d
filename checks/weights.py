"""The spectra of weights, compared with WeightWatcher's, on a small network trained on real digits.

    python -m pip install weightwatcher scikit-learn
    python checks/weights.py

Prints both for each layer. Asserts that they agree for linear layers with 50 values or more, and for
convolutions whose eigenvalues are pooled as WeightWatcher pools them. docs/parity.md explains the differences.
"""

import math
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

from spectralmetrics import weight_spectra
from spectralmetrics.functional import power_law_tail

STATISTICS = ("stable_rank", "effective_rank", "alpha")
FEWEST = 50  # with fewer values WeightWatcher fits in another way, and weight_spectra not at all


def trained():
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    convolutions = (
        nn.Conv2d(1, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    model = nn.Sequential(
        *convolutions, nn.Linear(576, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(60):
        part = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model


def main():
    import weightwatcher  # prints on import

    model = trained()
    ours = {row.layer: row for row in weight_spectra(model, STATISTICS).rows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = weightwatcher.WeightWatcher(model=model).analyze(min_evals=1)
    theirs = {row["longname"]: row for _, row in frame.iterrows()}
    print(f"{'layer':>5} {'shape':>10} {'values':>10} {'statistic':>12} {'ours':>9} {'WeightWatcher':>13}")
    for layer, row in ours.items():
        weight = model.get_submodule(layer).weight.detach().double()
        compare(layer, row.shape, "of matrix", weight.flatten(1)[None], theirs[layer], weight.ndim == 2)
        if weight.ndim == 4:  # one matrix for each position of the kernel, scaled as WeightWatcher scales it
            positions = weight.flatten(2).permute(2, 0, 1) / 2**0.5
            compare(layer, row.shape, "pooled", positions, theirs[layer], True)


def compare(layer, shape, which, matrices, other, is_same):
    values = torch.linalg.svdvals(matrices).square().flatten()
    tail = power_law_tail(values)
    pairs = {
        "values": (len(values), other["num_evals"]),
        "largest": (float(values.max()), other["lambda_max"]),
        "stable_rank": (float(values.sum() / values.max()), other["stable_rank"]),
        "alpha": (float(tail.alpha), other["alpha"]),
        "x_min": (float(tail.x_min), other["xmin"]),
        "distance": (float(tail.distance), other["D"]),
        "in the tail": (int(tail.tail), other["num_pl_spikes"]),
    }
    for name, (mine, its) in pairs.items():
        size = "x".join(map(str, shape))
        print(f"{layer:>5} {size:>10} {which:>10} {name:>12} {mine:>9.4g} {its:>13.4g}")
        is_fitted = len(values) >= FEWEST or name in ("values", "largest", "stable_rank")
        assert not is_same or not is_fitted or math.isclose(mine, its, rel_tol=1e-4), (layer, name)


if __name__ == "__main__":
    main()
