"""The numbers behind the metrics, as pure functions of a covariance or of its eigenvalues.

>>> import torch
>>> from spectralmetrics.functional import eigenvalues, saturation
>>> saturation(eigenvalues(torch.diag(torch.tensor([8.0, 1.0, 1.0, 0.0]))), threshold=0.9)
tensor(0.5000, dtype=torch.float64)
"""

from spectralmetrics.functional.dimension import (
    effective_rank,
    intrinsic_dimension,
    participation_ratio,
    power_law_exponent,
    saturation,
    stable_rank,
)
from spectralmetrics.functional.dispersion import determinant, diagonal_trace, trace
from spectralmetrics.functional.held_out import (
    held_out_eigenvalues,
    sampling_margin,
    unbiased_participation_ratio,
)
from spectralmetrics.functional.labels import (
    held_out_explained_variance,
    neural_collapse,
    ridge_explained_variance,
)
from spectralmetrics.functional.marginals import (
    dead_features,
    dormant_features,
    max_abs,
    outlier_features,
    root_mean_square,
    signal_to_noise,
    spread,
    zero_share,
)
from spectralmetrics.functional.power_law import PowerLawTail, power_law_tail
from spectralmetrics.functional.relations import (
    cka,
    debiased_hsic,
    frechet_distance,
    gram,
    linear_cka,
    subspace_overlap,
    u_centred,
)
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.sums import (
    Moments,
    Observations,
    accumulate,
    covariance,
    eigenvalues,
    eigenvectors,
    empty_moments,
    mean,
    merge,
    rebase,
    variances,
)

__all__ = [
    "Moments",
    "Observations",
    "PowerLawTail",
    "Spectrum",
    "accumulate",
    "cka",
    "covariance",
    "dead_features",
    "debiased_hsic",
    "determinant",
    "diagonal_trace",
    "dormant_features",
    "effective_rank",
    "eigenvalues",
    "eigenvectors",
    "empty_moments",
    "frechet_distance",
    "gram",
    "held_out_eigenvalues",
    "held_out_explained_variance",
    "intrinsic_dimension",
    "linear_cka",
    "max_abs",
    "mean",
    "merge",
    "neural_collapse",
    "outlier_features",
    "participation_ratio",
    "power_law_exponent",
    "power_law_tail",
    "rebase",
    "ridge_explained_variance",
    "root_mean_square",
    "sampling_margin",
    "saturation",
    "signal_to_noise",
    "spread",
    "stable_rank",
    "subspace_overlap",
    "trace",
    "u_centred",
    "unbiased_participation_ratio",
    "variances",
    "zero_share",
]
