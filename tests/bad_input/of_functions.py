"""Bad input to the functions of numbers."""

import torch

import spectralmetrics as sm
from spectralmetrics import functional as F  # noqa: N812
from spectralmetrics.functional import Observations
from spectralmetrics.sums import Reservoir, empty_labelled
from tests.bad_input.table import Given, refuses

NAN = float("nan")
RIDGES = [
    (each, ValueError, f"expected ridge to be a number of at least 0, got {each!r}")
    for each in (-1.0, "1", True, float("nan"), float("inf"))
]
VALUES, SQUARE, ROWS = torch.tensor([3.0, 2.0, 1.0]), torch.eye(3), torch.eye(8, 3)
COMPLEX = torch.ones(2, 2, dtype=torch.complex64)
SHARES = [
    (share, ValueError, f"expected a threshold in (0, 1], the share of variance to explain, got {share!r}")
    for share in (0, 1.5, NAN, "0.9", True, None)
]
RULES = [
    (rule, ValueError, f"expected a rule among ('explained', 'delve'), got {rule!r}") for rule in ("mine", 3)
]
EIGENVALUES = [
    ([3.0, 2.0], TypeError, "expected eigenvalues as a tensor of real numbers, got list"),
    (COMPLEX, TypeError, "expected eigenvalues as a tensor of real numbers, got torch.complex64"),
    (torch.tensor(3.0), ValueError, "expected eigenvalues of shape (..., D) with D >= 1, got shape ()"),
    (torch.ones(2, 0), ValueError, "expected eigenvalues of shape (..., D) with D >= 1, got shape (2, 0)"),
]
TAUS = [
    (tau, ValueError, f"expected tau to be a number that is not negative, got {tau!r}")
    for tau in (-0.1, NAN, float("inf"), "0.1", True, None)
]


def _of_features(words):
    return [
        ([3.0, 2.0], TypeError, f"expected {words} as a tensor of real numbers, got list"),
        (COMPLEX, TypeError, f"expected {words} as a tensor of real numbers, got torch.complex64"),
        (torch.tensor(3.0), ValueError, f"expected {words} of shape (..., D), got ()"),
        (torch.ones(2, 0), ValueError, f"expected {words} of shape (..., D), got (2, 0)"),
    ]


FINITE = [(torch.tensor([1.0, NAN]), ValueError, "expected finite eigenvalues, got NaN or infinite ones")]
COVARIANCES = [
    ("x", TypeError, "expected a covariance as a tensor of real numbers, got str"),
    (COMPLEX, TypeError, "expected a covariance as a tensor of real numbers, got torch.complex64"),
    (torch.ones(3), ValueError, "expected a covariance of shape (..., D, D), got (3,)"),
    (torch.ones(2, 3), ValueError, "expected a covariance of shape (..., D, D), got (2, 3)"),
    (torch.ones(0, 0), ValueError, "expected a covariance of shape (..., D, D), got (0, 0)"),
]
FINITE_COVARIANCES = [
    *COVARIANCES,
    (SQUARE * NAN, ValueError, "expected a finite covariance, got one that holds NaN or infinite values"),
]
MOMENTS = [
    (torch.eye(3), TypeError, "expected moments to be a Moments, got Tensor"),
    (None, TypeError, "expected moments to be a Moments, got NoneType"),
]


def _sides(name):
    return [
        ("x", TypeError, f"expected {name} to be a floating tensor, got str"),
        (
            torch.ones(8, 3, dtype=torch.int64),
            TypeError,
            f"expected {name} to be a floating tensor, got torch.int64",
        ),
        (torch.ones(8), ValueError, f"expected {name} rows of shape (N, D), got (8,)"),
        (torch.ones(7, 3), ValueError, "expected rows of the same samples, got … and"),
    ]


def _valid(size):
    return [
        ("x", TypeError, "expected valid as a boolean tensor, True for samples to use, got str"),
        (
            torch.ones(size),
            TypeError,
            "expected valid as a boolean tensor, True for samples to use, got torch.float32",
        ),
        (torch.ones(2, dtype=torch.bool), ValueError, f"expected valid of shape ({size},), got (2,)"),
    ]


FIT = {
    "first": [
        (first, ValueError, f"expected indices 1 <= first < last for the fit, got first={first!r}")
        for first in (0, 1.5, "1", None, True)
    ],
    "last": [
        (last, ValueError, f"expected indices 1 <= first < last for the fit, got first=1, last={last!r}")
        for last in (1, 2.5, "3", True)
    ],
}
OBSERVATIONS = [
    (Observations([1.0]), TypeError, "expected rows as a floating tensor of shape (N, D), got list"),
    (
        Observations(ROWS.to(torch.int64)),
        TypeError,
        "expected observations of a floating dtype, got torch.int64",
    ),
    (Observations(torch.tensor(1.0)), ValueError, "expected at least one feature, got rows of shape ()"),
    (Observations(ROWS, 5), ValueError, "expected feature_dim among the 2 dimensions of (8, 3), got 5"),
    (Observations(ROWS, "1"), TypeError, "expected feature_dim to be an integer, got '1'"),
    (
        Observations(ROWS, valid="x"),
        TypeError,
        "expected valid as a boolean tensor, True for rows that count, got str",
    ),
    (
        Observations(ROWS, valid=torch.ones(8)),
        TypeError,
        "expected valid as a boolean tensor … got torch.float32",
    ),
    (Observations(ROWS, valid=torch.ones(2).bool()), ValueError, "expected valid of shape (8,), got (2,)"),
    (Observations(ROWS, group="a"), TypeError, "expected group to be an integer, got 'a'"),
]
MEANS = "expected means (..., D) and covariances (..., D, D) of one width, got"

ROWS_OF_FUNCTIONS = [
    *refuses("root_mean_square", F.root_mean_square, second_moments=_of_features("second moments")),
    *refuses("spread", F.spread, {"second_moments": VALUES}, variances=_of_features("variances")),
    *refuses("spread", F.spread, {"variances": VALUES}, second_moments=_of_features("second moments")),
    *refuses("signal_to_noise", F.signal_to_noise, {"variances": VALUES}, mean=_of_features("means")),
    *refuses(
        "signal_to_noise",
        F.signal_to_noise,
        {"mean": VALUES},
        variances=[
            *_of_features("variances"),
            (VALUES[:1], ValueError, "expected means and variances of the same features, got"),
        ],
    ),
    *refuses("max_abs", F.max_abs, largest=_of_features("largest magnitudes")),
    *refuses("zero_share", F.zero_share, zero_shares=_of_features("shares of zeros")),
    *refuses("dead_features", F.dead_features, variances=_of_features("variances")),
    *refuses("dormant_features", F.dormant_features, magnitudes=_of_features("magnitudes")),
    *refuses("dormant_features", F.dormant_features, {"magnitudes": VALUES}, tau=TAUS),
    *refuses("outlier_features", F.outlier_features, second_moments=_of_features("second moments")),
    *refuses(
        "intrinsic_dimension",
        F.intrinsic_dimension,
        {"eigenvalues": VALUES},
        eigenvalues=[*EIGENVALUES, *FINITE],
        threshold=SHARES,
        rule=RULES,
    ),
    *refuses(
        "saturation",
        F.saturation,
        {"eigenvalues": VALUES},
        eigenvalues=[*EIGENVALUES, *FINITE],
        threshold=SHARES,
        rule=RULES,
    ),
    *refuses("effective_rank", F.effective_rank, eigenvalues=[*EIGENVALUES, *FINITE]),
    *refuses("participation_ratio", F.participation_ratio, eigenvalues=[*EIGENVALUES, *FINITE]),
    *refuses("stable_rank", F.stable_rank, eigenvalues=[*EIGENVALUES, *FINITE]),
    *refuses(
        "power_law_exponent",
        F.power_law_exponent,
        {"eigenvalues": VALUES},
        eigenvalues=[*EIGENVALUES, *FINITE],
        **FIT,
    ),
    *refuses(
        "power_law_tail",
        F.power_law_tail,
        eigenvalues=[
            *EIGENVALUES[:3],
            *FINITE,
            (torch.ones(2, 3), ValueError, "expected eigenvalues of shape (D,), got shape (2, 3)"),
        ],
    ),
    *refuses("diagonal_trace", F.diagonal_trace, eigenvalues=EIGENVALUES),
    *refuses("trace", F.trace, covariance=COVARIANCES),
    *[
        row
        for name in ("ridge_explained_variance", "neural_collapse")
        for row in refuses(
            name,
            getattr(F, name),
            {"covariance": SQUARE, "class_means": SQUARE[:2], "class_counts": torch.tensor([2, 3])},
            covariance=FINITE_COVARIANCES,
            class_means=[
                (3, TypeError, "expected class_means as a tensor of real numbers, got int"),
                (torch.zeros(2, 4), ValueError, "expected class_means of shape (K, 3), got (2, 4)"),
                (torch.zeros(3), ValueError, "expected class_means of shape (K, 3), got (3,)"),
            ],
            class_counts=[
                ([2, 3], TypeError, "expected class_counts as a tensor of real numbers, got list"),
                (torch.ones(3), ValueError, "expected class_counts of shape (2,), got (3,)"),
            ],
        )
    ],
    *refuses(
        "ridge_explained_variance",
        F.ridge_explained_variance,
        {"covariance": SQUARE, "class_means": SQUARE[:2], "class_counts": torch.tensor([2, 3])},
        ridge=RIDGES,
    ),
    *refuses(
        "held_out_explained_variance",
        F.held_out_explained_variance,
        {"labelled": empty_labelled(2, 3, folds=2)},
        labelled=[
            ("x", TypeError, "expected labelled to be a Labelled, got str"),
            (Given(lambda w: empty_labelled(2, 3)), ValueError, "expected at least 2 folds, got 1"),
        ],
        ridge=RIDGES,
    ),
    *refuses("determinant", F.determinant, covariance=FINITE_COVARIANCES),
    *refuses("eigenvalues", F.eigenvalues, covariance=FINITE_COVARIANCES),
    *refuses("eigenvectors", F.eigenvectors, covariance=FINITE_COVARIANCES),
    *refuses("covariance", F.covariance, moments=MOMENTS),
    *refuses("mean", F.mean, moments=MOMENTS),
    *refuses("variances", F.variances, moments=MOMENTS),
    *refuses(
        "empty_moments",
        F.empty_moments,
        {"num_features": 2},
        num_features=[
            (width, ValueError, f"expected num_features as an integer that is not negative, got {width!r}")
            for width in (-1, 1.5, "2", None, True)
        ],
        device=[("warp", RuntimeError, "device string: warp")],
    ),
    *refuses(
        "accumulate",
        F.accumulate,
        {"moments": Given(lambda w: w.moments), "observations": Observations(ROWS)},
        observations=[
            ("x", TypeError, "expected observations to be a Observations, got str"),
            (ROWS, TypeError, "expected observations to be a Observations, got Tensor"),
            (
                Observations(torch.ones(4, 2)),
                ValueError,
                "expected observations with 3 features, got 2 (shape (4, 2)",
            ),
            *OBSERVATIONS,
        ],
        gram_dtype=[
            (dtype, ValueError, f"expected gram_dtype torch.float64 or torch.float32, got {dtype!r}")
            for dtype in (torch.float16, "float32", None)
        ],
    ),
    *refuses(
        "merge",
        F.merge,
        {"left": Given(lambda w: w.moments), "right": Given(lambda w: w.moments)},
        left=[
            ("x", TypeError, "expected left to be a Moments, got str"),
            (F.empty_moments(2), ValueError, "expected moments of one width, got 2 and 3"),
        ],
        right=[
            (None, TypeError, "expected right to be a Moments, got NoneType"),
            (F.empty_moments(2), ValueError, "expected moments of one width, got 3 and 2"),
        ],
    ),
    *refuses(
        "rebase",
        F.rebase,
        {"moments": Given(lambda w: w.moments), "origin": torch.zeros(3, dtype=torch.float64)},
        moments=MOMENTS,
        origin=[
            ([0.0] * 3, TypeError, "expected an origin as a tensor of real numbers, got list"),
            (torch.zeros(1), ValueError, "expected an origin of shape (3,), got (1,)"),
        ],
    ),
    *refuses(
        "unbiased_participation_ratio",
        F.unbiased_participation_ratio,
        folds=[
            (Given(lambda w: [w.moments]), ValueError, "expected at least 2 folds, got 1"),
            (Given(lambda w: [w.moments, "x"]), TypeError, "expected a fold to be a Moments, got str"),
            (
                Given(lambda w: [w.moments, F.empty_moments(2)]),
                ValueError,
                "expected folds of one width, got [3, 2]",
            ),
            (
                Given(lambda w: [w.moments, F.empty_moments(3)]),
                ValueError,
                "expected at least 2 folds of 2 observations or more, got folds of [40, 0]",
            ),
        ],
    ),
    *refuses(
        "held_out_eigenvalues",
        F.held_out_eigenvalues,
        folds=[
            ([], ValueError, "expected at least 2 folds, got 0: nothing is held out of one"),
            (Given(lambda w: [w.moments]), ValueError, "expected at least 2 folds, got 1"),
            (Given(lambda w: [w.moments, "x"]), TypeError, "expected a fold to be a Moments, got str"),
            (
                Given(lambda w: [w.moments, F.empty_moments(2)]),
                ValueError,
                "expected folds of one width, got [3, 2]",
            ),
            (
                Given(lambda w: [w.moments, F.empty_moments(3)]),
                ValueError,
                "expected observations in every fold, got [40, 0]",
            ),
        ],
    ),
    *refuses(
        "sampling_margin",
        F.sampling_margin,
        values=[
            ([], ValueError, "expected at least 2 values of one shape, got 0"),
            ([VALUES], ValueError, "expected at least 2 values of one shape, got 1 of shapes [(3,)]"),
            (
                [VALUES, VALUES[:1]],
                ValueError,
                "expected at least 2 values of one shape, got 2 of shapes [(3,), (1,)]",
            ),
            ([1.0, 2.0], TypeError, "expected values as a tensor of real numbers, got float"),
        ],
    ),
    *refuses(
        "subspace_overlap",
        F.subspace_overlap,
        {"left": SQUARE, "right": SQUARE},
        left=[
            ("x", TypeError, "expected left to be a floating tensor, got str"),
            (torch.ones(3), ValueError, "expected left of shape (..., D, k) with k >= 1, got (3,)"),
            (torch.ones(3, 0), ValueError, "expected left of shape (..., D, k) with k >= 1, got (3, 0)"),
            (torch.eye(4), ValueError, "expected subspaces of one space, got vectors of 4 and 3 features"),
        ],
        right=[
            (SQUARE.to(torch.int64), TypeError, "expected right to be a floating tensor, got torch.int64"),
            (
                2 * torch.ones(1, 1),
                ValueError,
                "expected right to have orthonormal columns, got inner products that deviate from 0 and 1 by 3",
            ),
        ],
    ),
    *refuses(
        "frechet_distance",
        F.frechet_distance,
        {"mean_1": torch.zeros(3), "cov_1": SQUARE, "mean_2": torch.zeros(3), "cov_2": SQUARE},
        mean_1=[
            ("x", TypeError, "expected mean_1 to be a floating tensor, got str"),
            (torch.zeros(2), ValueError, f"{MEANS} mean_1 (2,)"),
        ],
        cov_1=[
            (None, TypeError, "expected cov_1 to be a floating tensor, got NoneType"),
            (torch.zeros(3), ValueError, f"{MEANS} mean_1 (3,), cov_1 (3,)"),
            (
                SQUARE * NAN,
                ValueError,
                "expected a finite covariance, got one that holds NaN or infinite values",
            ),
        ],
        mean_2=[
            (
                torch.zeros(3).to(torch.int64),
                TypeError,
                "expected mean_2 to be a floating tensor, got torch.int64",
            ),
            (
                torch.full((3,), NAN),
                ValueError,
                "expected a finite mean_2, got one that holds NaN or infinite values",
            ),
        ],
        cov_2=[
            ("x", TypeError, "expected cov_2 to be a floating tensor, got str"),
            (torch.eye(2), ValueError, f"{MEANS} … cov_2 (2, 2)"),
        ],
    ),
    *refuses(
        "debiased_hsic",
        F.debiased_hsic,
        {"left": ROWS, "right": ROWS},
        left=_sides("left"),
        right=_sides("right"),
        valid=_valid(8),
    ),
    *refuses(
        "linear_cka", F.linear_cka, {"left": ROWS, "right": ROWS}, left=_sides("left"), right=_sides("right")
    ),
    *refuses(
        "cka",
        F.cka,
        {"cross": VALUES, "left": VALUES, "right": VALUES},
        **{
            name: [(0.5, TypeError, f"expected {name} as a tensor of real numbers, got float")]
            for name in ("cross", "left", "right")
        },
    ),
    *refuses(
        "gram",
        F.gram,
        rows=[
            ("x", TypeError, "expected rows to be a floating tensor, got str"),
            (torch.ones(8), ValueError, "expected rows of shape (N, D), got (8,)"),
        ],
    ),
    *refuses(
        "u_centred",
        F.u_centred,
        {"grams": torch.eye(8)},
        grams=[
            ("x", TypeError, "expected grams to be a floating tensor, got str"),
            (torch.ones(8), ValueError, "expected grams of shape (..., N, N), got (8,)"),
            (torch.ones(2, 3), ValueError, "expected grams of shape (..., N, N), got (2, 3)"),
        ],
        valid=_valid(8),
    ),
    *refuses(
        "Spectrum",
        sm.Spectrum,
        sums=[
            (SQUARE, TypeError, "expected sums to be a SpectralSum, got Tensor"),
            (None, TypeError, "expected sums to be a SpectralSum, got NoneType"),
        ],
    ),
    *refuses(
        "Spectrum.of_covariance",
        sm.Spectrum.of_covariance,
        {"covariance": SQUARE, "mean": torch.zeros(3), "count": 9},
        covariance=FINITE_COVARIANCES,
        mean=[
            ("x", TypeError, "expected a mean as a tensor of real numbers, got str"),
            (torch.zeros(2), ValueError, "expected a mean of shape (3,), got (2,)"),
        ],
        count=[
            (count, ValueError, f"expected count to be a positive integer, got {count!r}")
            for count in (0, -1, 2.5, "9", torch.tensor(0))
        ],
    ),
    *refuses(
        "Spectrum.coordinates",
        Given(lambda w: w.spectrum.coordinates),
        {"rows": ROWS},
        rows=[
            ("x", TypeError, "expected rows as a tensor of real numbers, got str"),
            (torch.ones(3), ValueError, "expected rows of shape (N, 3), got (3,)"),
            (torch.ones(4, 2), ValueError, "expected rows of shape (N, 3), got (4, 2)"),
        ],
        num_components=[
            (number, ValueError, f"expected num_components to be a positive integer or None, got {number!r}")
            for number in (0, -1, 1.5, "x")
        ],
    ),
    *refuses(
        "Spectrum.part",
        Given(lambda w: w.spectrum.part),
        kind=[
            (int, TypeError, "expected a kind of sum, a subclass of Sum, got <class 'int'>"),
            ("x", TypeError, "expected a kind of sum, a subclass of Sum, got 'x'"),
            (Reservoir, ValueError, "expected a sample beside the moments; none was kept"),
        ],
    ),
]
