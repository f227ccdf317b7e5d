"""Bad input to the metrics."""

import torch

import spectralmetrics as sm
from tests.bad_input.of_functions import FIT, OBSERVATIONS, RIDGES, ROWS, RULES, SHARES, TAUS
from tests.bad_input.table import Given, refuses


def _integers(name, *, or_none=False, bad=(0, -1, 1.5, "2", True)):
    kind = "a positive integer or None" if or_none else "a positive integer"
    return [(each, ValueError, f"expected {name} to be {kind}, got {each!r}") for each in bad]


SEEDS = [
    (seed, ValueError, f"expected a seed as an integer that is not negative, got {seed!r}")
    for seed in (-1, 1.5, "0", None)
]
NAN_STRATEGIES = [
    (each, ValueError, f"expected nan_strategy among ('warn', 'error', 'ignore'), got {each!r}")
    for each in ("drop", None, ["warn"])
]
UNKNOWN = [(1, ValueError, "Unexpected keyword arguments: `colour`")]
PAIRS = [
    ("x", TypeError, "to be a floating tensor, got str"),
    (ROWS.to(torch.int64), TypeError, "to be a floating tensor, got torch.int64"),
    (torch.ones(8), ValueError, "rows of shape (N, D), got (8,)"),
    (torch.ones(7, 3), ValueError, "expected rows of the same samples, got … 8"),
]
WIDTHS = _integers("num_features", or_none=True)

ROWS_OF_METRICS = [
    *refuses(
        "ParticipationRatioMetric",
        sm.ParticipationRatioMetric,
        unbiased=[
            (each, TypeError, f"expected unbiased to be True or False, got {each!r}") for each in (1, "yes")
        ],
    ),
    *refuses(
        "ParticipationRatioMetric",
        sm.ParticipationRatioMetric,
        {"unbiased": True},
        sketch_size=[(8, ValueError, "expected no sketch with unbiased=True, got sketch_size=8")],
    ),
    *refuses(
        "SpectralMetric",
        sm.SpectralMetric,
        num_features=WIDTHS,
        gram_dtype=[
            (dtype, ValueError, f"expected gram_dtype torch.float64, torch.float32 or None, got {dtype!r}")
            for dtype in (torch.float16, "float32")
        ],
        nan_strategy=NAN_STRATEGIES,
        folds=_integers("folds", bad=(0, 2.0, "2", True, None)),
    ),
    *[
        row
        for kind in sm.statistics().values()
        if kind.__module__.startswith("spectralmetrics.")
        for row in refuses(
            kind.__name__,
            kind,
            {"num_classes": 3} if kind.needs_labels else {},
            sketch_size=[(0, ValueError, "sketch_size … got 0")]
            if not kind.needs_labels
            else [(8, ValueError, "expected sketch_size=None … got 8")],
            num_features=[(0, ValueError, "a positive integer or None, got 0")],
            folds=[("2", ValueError, "expected folds to be a positive integer, got '2'")],
        )
    ],
    *[
        row
        for kind in (sm.LinearProbeMetric, sm.NeuralCollapseMetric)
        for row in (
            *refuses(
                kind.__name__,
                kind,
                num_classes=[
                    *_integers("num_classes", bad=(0, 2.0, "2", True, None)),
                    (1, ValueError, "expected num_classes to be at least 2, got 1"),
                ],
            ),
            *refuses(
                f"{kind.__name__}.update",
                Given(lambda w, kind=kind: kind(3).update),
                {"rows": torch.eye(4)},
                labels=[
                    (None, ValueError, "expected labels for … got None: update(rows, labels)"),
                    (
                        Given(lambda w: torch.arange(4)),
                        ValueError,
                        "expected labels below num_classes=3, got 3",
                    ),
                    (torch.tensor([0, 1]), ValueError, "expected labels of shape (4,), got (2,)"),
                    (torch.zeros(4), TypeError, "expected labels as an integer tensor, … got torch.float32"),
                    ([0, 1, 2, 0], TypeError, "expected labels as an integer tensor, … got list"),
                ],
            ),
        )
    ],
    *refuses(
        "LinearProbeMetric",
        sm.LinearProbeMetric,
        {"num_classes": 3},
        ridge=RIDGES,
    ),
    *[
        row
        for kind in (sm.IntrinsicDimensionMetric, sm.SaturationMetric)
        for row in refuses(kind.__name__, kind, threshold=SHARES, rule=RULES)
    ],
    *refuses("PowerLawExponentMetric", sm.PowerLawExponentMetric, **FIT),
    *refuses(
        "EigenspaceEmbeddingMetric",
        sm.EigenspaceEmbeddingMetric,
        num_components=_integers("num_components", bad=(0, 1.5, "2", None, True)),
        max_samples=_integers("max_samples", bad=(0, 1.5, "2", None)),
        seed=SEEDS,
    ),
    *[
        row
        for kind in (sm.MaxAbsMetric, sm.HistoryMetric)
        for row in refuses(
            kind.__name__,
            kind,
            center=[(False, ValueError, "expected center=True for … got False")],
            sketch_size=[
                (8, ValueError, "expected sketch_size=None for … which keeps no matrix at any width, got 8")
            ],
            folds=[(4, ValueError, "expected folds=1 for … of which there are no intervals, got 4")],
        )
    ],
    *refuses(
        "MarginalMetric.with_folds",
        Given(lambda w: sm.MaxAbsMetric().with_folds),
        folds=_integers("folds", bad=(0, "2", None, 2.0)),
    ),
    *refuses(
        "DormantFeaturesMetric",
        sm.DormantFeaturesMetric,
        tau=TAUS,
    ),
    *refuses(
        "HistoryMetric",
        sm.HistoryMetric,
        num_features=WIDTHS,
        steps=_integers("steps", bad=(0, -1, 1.5, "2", True, None)),
    ),
    *refuses("LinearCKAMetric", sm.LinearCKAMetric, nan_strategy=NAN_STRATEGIES),
    *refuses("LinearCKAMetric", sm.LinearCKAMetric, colour=UNKNOWN),
    *refuses("SpectralMetric", sm.SpectralMetric, colour=UNKNOWN),
    *[
        row
        for metric in ("metric", "folded", "embedding")
        for row in refuses(
            "SpectralMetric.update",
            Given(lambda w, metric=metric: getattr(w, metric).update),
            rows=[
                ("x", TypeError, "expected rows as a floating tensor of shape (N, D), got str"),
                ([[1.0, 2.0, 3.0]], TypeError, "expected rows as a floating tensor of shape (N, D), got list"),
                (
                    ROWS.to(torch.int64),
                    TypeError,
                    "of a floating dtype, got torch.int64; cast them to float first",
                ),
                (ROWS.to(torch.complex64), TypeError, "of a floating dtype, got torch.complex64"),
                (torch.ones(3), ValueError, "expected rows of shape (N, D), got shape (3,); give each"),
                (torch.ones(2, 2, 3), ValueError, "expected rows of shape (N, D), got shape (2, 2, 3)"),
                (torch.ones(2, 4), ValueError, "expected rows with 3 features, got 4 (shape (2, 4))"),
                (torch.ones(2, 0), ValueError, "expected at least one feature, got rows of shape (2, 0)"),
                *OBSERVATIONS,
            ],
        )
    ],
    *refuses(
        "SpectralMetric.update",
        Given(lambda w: lambda others: w.metric.update(ROWS, others)),
        others=[(2, TypeError, "expected rows alone, got 2 positional arguments")],
    ),
    *refuses(
        "SpectralMetric.with_folds",
        Given(lambda w: w.metric.with_folds),
        folds=_integers("folds", bad=(0, "2", None, 2.0)),
    ),
    *refuses(
        "SpectralMetric.merge_state",
        Given(lambda w: w.metric.merge_state),
        incoming_state=[
            (
                "x",
                ValueError,
                "Expected incoming state to be a dict or an instance of Metric but got <class 'str'>",
            ),
            ({"a": 1}, ValueError, "expected the states … in the incoming state, got ['a'], missing"),
            (
                Given(lambda w: w.folded),
                ValueError,
                "Expected incoming state to be an instance of CovarianceMetric",
            ),
        ],
    ),
    *refuses(
        "SpectralMetric.to",
        Given(lambda w: lambda args: w.metric.to(args)),
        args=[("warp", RuntimeError, "device string: warp")],
    ),
    *refuses(
        "SpectralMetric.cuda",
        Given(lambda w: w.metric.cuda),
        device=[("warp", RuntimeError, "device string: warp")],
    ),
    *refuses(
        "LinearCKAMetric.update",
        Given(lambda w: w.pair.update),
        {"left": ROWS, "right": ROWS},
        left=PAIRS,
        right=[*PAIRS[:3], (torch.ones(7, 3), ValueError, "of the same samples, got 8 and 7")],
    ),
    *refuses(
        "LinearCKAMetric.update",
        Given(lambda w: lambda left: w.pair.update(left, left)),
        left=[(ROWS[:3], ValueError, "expected a batch of at least 4 samples, got 3: the unbiased")],
    ),
]
