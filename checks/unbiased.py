"""The unbiased participation ratio over folds, compared with the package ``dimensionality`` on the same rows.

    python -m pip install dimensionality
    python checks/unbiased.py [--draws 200]

Gaussian rows of width 192 with known spectra, at n = D/8, D/2 and 2D. Theirs averages over distinct rows
("row" of Chun et al., ICLR 2026), and needs all rows at once; ours averages over pairs of folds, from sums.
Then six similar rows per input: our folds hold whole inputs, theirs has no argument for inputs. The script
prints the mean over the draws relative to the truth, and the spread of a draw.
"""

import argparse

import numpy as np
import torch
from dimensionality import participation_ratio

from spectralmetrics.functional import unbiased_participation_ratio
from spectralmetrics.sums import Moments

WIDTH = 192
SPECTRA = {
    "flat": np.ones(WIDTH),
    "twelve large": np.where(np.arange(WIDTH) < 12, 1.0, 0.01),
    "1/i": 1 / np.arange(1, WIDTH + 1),
}
HEADS = ["spectrum", "n", "truth", "plain", "ours, 4 folds", "ours, 8 folds", "dimensionality"]


def of_folds(rows, folds):
    parts = [
        Moments.of_covariance(torch.cov(part.T, correction=0), part.mean(0), len(part), 0)
        for part in rows.chunk(folds)
    ]
    return float(unbiased_participation_ratio(parts))


def values_of(rows):
    theirs = participation_ratio(rows.numpy(), return_all=True)
    return theirs["naive"], of_folds(rows, 4), of_folds(rows, 8), theirs["row"]


def independent(variances, count, generator):
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=generator) * variances.sqrt()


def in_groups(variances, count, generator):
    """Six rows per input, with 0.8 of their variance in common."""
    inputs = torch.randn(count // 6, 1, WIDTH, dtype=torch.float64, generator=generator)
    own = torch.randn(count // 6, 6, WIDTH, dtype=torch.float64, generator=generator)
    return ((0.8**0.5 * inputs + 0.2**0.5 * own) * variances.sqrt()).reshape(-1, WIDTH)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    cases = [(name, independent, count) for name in SPECTRA for count in (WIDTH // 8, WIDTH // 2, 2 * WIDTH)]
    for name, draw, count in [*cases, ("flat", in_groups, WIDTH)]:
        variances = torch.tensor(SPECTRA[name])
        truth = float(variances.sum() ** 2 / (variances**2).sum())
        generator = torch.Generator().manual_seed(0)
        found = np.array([values_of(draw(variances, count, generator)) for _ in range(draws)]) / truth
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(found.mean(0), found.std(0), strict=True)]
        label = f"{name}, six rows of each input" if draw is in_groups else name
        print("| " + " | ".join([label, str(count), f"{truth:.1f}", *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
