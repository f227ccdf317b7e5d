"""Plain definitions in extended precision, the reference for everything else."""

import numpy as np
import torch


def two_pass_covariance(rows, *, center=True, unbiased=False):
    """Covariance by the textbook formula in long double (80 bits)."""
    x = np.asarray(rows.detach().to(torch.float64)).astype(np.longdouble)
    deviations = x - x.mean(0) if center else x
    return deviations.T @ deviations / (len(x) - int(unbiased))


def relative_error(actual, expected):
    """Frobenius norm of the difference, relative to the norm of ``expected``."""
    difference = np.asarray(actual).astype(np.longdouble) - expected
    return float(np.sqrt((difference**2).sum()) / np.sqrt((expected**2).sum()))


def random_rows(seed, count, features, *, rank=None, mean=0.0, decay=1.0, dtype=torch.float64):
    """Rows with a decaying spectrum of the given rank about a mean."""
    generator = torch.Generator().manual_seed(seed)
    rank = features if rank is None else min(rank, features)
    scales = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    latent = torch.randn(count, rank, generator=generator, dtype=torch.float64) * scales
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    return (latent @ basis[:rank] + mean).to(dtype)


def rotation(seed, features):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]


# Independent definitions of every statistic in numpy, from eigenvalues and covariance.
def _dimension(values, threshold=0.99):
    values = np.clip(np.sort(values)[::-1], 0, None)
    if values.sum() == 0:
        return 0
    for k in range(1, len(values) + 1):
        if values[:k].sum() >= threshold * values.sum() * (1 - 1e-14):
            return k
    return len(values)


def _entropy_rank(values):
    singular = np.sqrt(np.clip(values, 0, None))
    if singular.sum() == 0:
        return 0.0
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _slope(values):
    values = np.sort(values)[::-1]
    values = values[values > 0]
    if len(values) < 2:
        return np.nan
    return -np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)[0]


def _second_moments(rows):
    return (rows**2).mean(0)


# Definitions from rows (n, D) in extended precision, where eigenvalues and covariance do not suffice.
OF_ROWS = {
    "rms": lambda rows: np.sqrt((rows**2).mean()),
    "spread": lambda rows: ((rows - rows.mean(0)) ** 2).sum() / (rows**2).sum(),
    "signal_to_noise": lambda rows: (rows.mean(0) ** 2).sum() / rows.var(0).sum(),
    "max_abs": lambda rows: np.abs(rows).max(),
    "zero_share": lambda rows: (rows == 0).mean(),
    "dead_features": lambda rows: (rows == rows[0]).all(0).mean(),
    "dormant_features": lambda rows: (
        np.abs(rows).mean(0) / np.abs(rows).mean() <= np.longdouble(0.025)
    ).mean(),
    "outlier_features": lambda rows: (_second_moments(rows) ** 2).mean() / _second_moments(rows).mean() ** 2,
}

STATISTICS = {
    "covariance": lambda values, covariance: covariance,
    "spectrum": lambda values, covariance: values,
    "intrinsic_dimension": lambda values, covariance: _dimension(values),
    "saturation": lambda values, covariance: _dimension(values) / len(values),
    "covariance_trace": lambda values, covariance: np.trace(covariance),
    "covariance_determinant": lambda values, covariance: np.linalg.det(covariance),
    "diagonal_trace": lambda values, covariance: np.clip(values, 0, None).sum(),
    "effective_rank": lambda values, covariance: _entropy_rank(values),
    "participation_ratio": lambda values, covariance: values.sum() ** 2 / (values**2).sum(),
    "stable_rank": lambda values, covariance: values.sum() / values.max(),
    "power_law_exponent": lambda values, covariance: _slope(values),
}
