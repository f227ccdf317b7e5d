"""Bad input to everything that inspects models."""

import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.probing import select_layers
from tests.bad_input.of_functions import NAN, SHARES
from tests.bad_input.of_metrics import SEEDS, _integers
from tests.bad_input.table import Given, refuses

MODEL = Given(lambda w: w.model)
MODELS = [
    (None, TypeError, "got NoneType"),
    ("resnet", TypeError, "got str"),
    ([nn.Linear(2, 2)], TypeError, "got list"),
]
NAMES = "names are 'Sequential', '0', '1', '2'"


def _selectors(names=NAMES):
    return [
        ("decoder.*", ValueError, f"no layer matches 'decoder.*'; {names}"),
        (nn.LSTM, ValueError, "no layer matches LSTM; the model has"),
        (3, TypeError, "expected a pattern, a module type or a callable to select layers, got 3"),
        (["0", 3], TypeError, "expected a pattern, a module type or a callable to select layers, got 3"),
        (nn.ReLU(), TypeError, "expected a pattern, a module type or a callable to select layers, got ReLU()"),
    ]


def _choices(name, *choices):
    known = "(" + ", ".join(map(repr, choices)) + ")"
    return [(each, ValueError, f"expected {name} among {known}, got {each!r}") for each in ("sum", None, 3)]


FEATURE_MAPS = _choices("feature_maps", "positions", "mean", "max", "median", "flatten")
SEQUENCES = _choices("sequences", "timesteps", "last", "mean", "flatten")
INTERPOLATIONS = ("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact")
STAGES = [
    (stage, ValueError, f"expected a stage among ('train', 'eval'), got {stage!r}")
    for stage in ("test", 3, ["train"])
]
DEVICES = [("warp", RuntimeError, "device string: warp")]
GENERATORS = [
    (3, TypeError, "expected generator to be a torch.Generator or None, got 3"),
    ("x", TypeError, "expected generator to be a torch.Generator or None, got 'x'"),
]
DIMENSIONS = [
    (dim, ValueError, f"expected dim to be an integer or None, got {dim!r}") for dim in ("1", 1.5, True)
]
ROWWISE = "expected feature_maps and sequences that make one row of each sample"
METRIC_NAME = "expected a metric name without '.' and '/', no attribute of torch.nn.Module, got"

ROWS_OF_MODELS = [
    *refuses(
        "select_layers",
        select_layers,
        {"model": MODEL},
        model=MODELS,
        layers=_selectors(),
        exclude=_selectors(),
    ),
    *refuses(
        "register_layer",
        sm.register_layer,
        {"layer": nn.Linear, "dim": -1},  # its dim anyway
        layer=[
            (each, TypeError, "expected layer to be a subclass of torch.nn.Module, got")
            for each in ("Linear", None, dict, nn.ReLU())
        ],
        dim=[
            (each, ValueError, f"expected dim as the dimension of the features, 1 or -1 say, … got {each!r}")
            for each in (0, None, 1.5, True, "last")
        ],
        in_features=[(3, TypeError, "expected in_features as the name of an attribute or a function, got 3")],
        out_features=[(3, TypeError, "expected out_features as the name of an attribute or a function, got 3")],
        batch_first=[
            (each, ValueError, f"expected batch_first to be True, False or None, got {each!r}")
            for each in ("yes", 3)
        ],
        ceiling=[(3, TypeError, "expected ceiling to be a function of a layer or None, got 3")],
    ),
    *refuses(
        "weight_spectra",
        sm.weight_spectra,
        {"model": MODEL},
        model=[("model", TypeError, "expected model to be a torch.nn.Module, got str")],
        statistics=[
            (["rank"], ValueError, "expected statistics among … got 'rank'"),
            (["spectrum"], ValueError, "expected a statistic that is one number, got 'spectrum'"),
        ],
        layers=_selectors(),
        since=[
            ([1], TypeError, "expected since to be a state dict, got list"),
            ({"0.weight": torch.ones(7, 7)}, ValueError, "expected '0.weight' of shape … in since, got (7, 7)"),
        ],
        progress=[(3, TypeError, "expected progress to be a function of two numbers or None, got 3")],
    ),
    *refuses(
        "LayerProbe",
        sm.LayerProbe,
        {"model": MODEL},
        model=MODELS,
        metrics=[
            ("saturation", TypeError, "expected a metric, a sequence or dict of metrics, got str"),
            (sm.SaturationMetric, TypeError, "got the class SaturationMetric; call it"),
            ([], ValueError, "expected at least one metric, got none"),
            ({}, ValueError, "expected at least one metric, got none"),
            ([3], TypeError, "expected metric 'int' to be a torchmetrics.Metric, got int"),
            ({"a": 3}, TypeError, "expected metric 'a' to be a torchmetrics.Metric, got int"),
            ({"a.b": sm.SaturationMetric()}, ValueError, f"{METRIC_NAME} 'a.b'"),
            ({"items": sm.SaturationMetric()}, ValueError, f"{METRIC_NAME} 'items'"),
            ({3: sm.SaturationMetric()}, ValueError, f"{METRIC_NAME} 3"),
            (
                [sm.SaturationMetric(), sm.SaturationMetric(threshold=0.9)],
                ValueError,
                "expected each metric name once, got ['saturation'] more than once",
            ),
        ],
        layers=[*_selectors(), ([], ValueError, "0 selected by layers=[]")],
        exclude=_selectors(),
        feature_maps=FEATURE_MAPS,
        sequences=SEQUENCES,
        interpolation=_choices("interpolation", *INTERPOLATIONS),
        max_map_size=_integers("max_map_size", or_none=True),
        every_n_steps=_integers("every_n_steps", bad=(0, 1.5, "2", None, True)),
        max_samples=_integers("max_samples", or_none=True),
        sketch_size=_integers("sketch_size", or_none=True),
        max_features=_integers("max_features", bad=(0, 1.5, "2", None, True)),
        rows_per_feature=[
            (each, ValueError, f"expected rows_per_feature to be a positive number or None, got {each!r}")
            for each in (0, -1.0, "2", NAN, float("inf"))
        ],
        select=[
            ("0", TypeError, "expected select to be a dict of patterns and functions, got '0'"),
            (["0"], TypeError, "expected select to be a dict of patterns and functions, got ['0']"),
            ({"0": 3}, TypeError, "expected select to be a dict of patterns and functions, got {'0': 3}"),
            ({"decoder": len}, ValueError, f"no layer matches 'decoder'; {NAMES}"),
        ],
        seed=SEEDS,
        folds=_integers("folds", bad=(0, -1, 2.0, "2", True)),
        batch_first=[
            (each, ValueError, f"expected batch_first to be True, False or None, got {each!r}")
            for each in ("yes", 3)
        ],
        observe=[
            (each, ValueError, f"expected observe among ('outputs', 'inputs', 'gradients'), got {each!r}")
            for each in ("input", None)
        ],
        budget=[
            (each, ValueError, f"expected budget to be a share of the time between 0 and 1, got {each!r}")
            for each in (0, 1, -0.1, NAN, "3 %")
        ],
    ),
    *[
        row
        for method in ("compute", "intervals")
        for row in refuses(
            f"LayerProbe.{method}",
            Given(lambda w, method=method: getattr(w.probe, method)),
            progress=[
                ("bar", TypeError, "expected progress to be a function of two numbers or None, got 'bar'")
            ],
        )
    ],
    *[
        row
        for method in (
            "compute",
            "intervals",
            "summary",
            "findings",
            "reset",
            "covariances",
            "iter_merged",
            "history",
        )
        for row in refuses(
            f"LayerProbe.{method}", Given(lambda w, method=method: getattr(w.probe, method)), stage=STAGES
        )
    ],
    *refuses(
        "History.together",
        sm.History.together,
        histories=[
            ([1], TypeError, "expected a dict of histories, got [1]"),
            ({"outputs": 1}, TypeError, "expected a dict of histories, got {'outputs': 1}"),
        ],
    ),
    *refuses(
        "History.plot",
        Given(lambda w: w.history.plot),
        quantity=[("variance", ValueError, "expected a quantity among … got 'variance'")],
        layers=[(["fc"], ValueError, "expected layers among ['0', '2'], got ['fc']")],
    ),
    *refuses(
        "History.first_movers",
        Given(lambda w: w.history.first_movers),
        at=[
            (each, ValueError, f"to be the number of a forward in the history, from 0 to … got {each!r}")
            for each in (-1, 99, 1.5, "0")
        ],
        threshold=[
            (each, ValueError, f"expected threshold to be a positive number, got {each!r}")
            for each in (0, -1.0, "6", True, None, float("nan"), float("inf"))
        ],
    ),
    *refuses(
        "LayerProbe.labels",
        Given(lambda w: lambda labels: w.probe.labels(labels).__enter__()),
        labels=[
            (torch.zeros(4), TypeError, "expected labels as an integer tensor, … got torch.float32"),
            ([0, 1], TypeError, "expected labels as an integer tensor, … got list"),
            (torch.tensor(3), ValueError, "expected labels of shape (N,) or (N, T), got ()"),
        ],
    ),
    *refuses(
        "LayerProbe.summary",
        Given(lambda w: w.probe.summary),
        statistic=[
            ("width", ValueError, "expected a statistic among [ … got 'width'"),
            (3, ValueError, "expected a statistic among [ … got 3"),
            ("spectrum", ValueError, "expected a statistic that is one number, got 'spectrum' of shape (3,)"),
        ],
    ),
    *refuses(
        "LayerProbe.merge_state",
        Given(lambda w: w.probe.merge_state),
        other=[
            (3, TypeError, "expected another LayerProbe to merge, got int"),
            (
                sm.LayerProbe(nn.ModuleDict({"a": nn.Linear(2, 2)})),
                ValueError,
                "expected `other` to probe layers of this probe, got 'a'; layers are '0', '2'",
            ),
        ],
    ),
    *refuses(
        "LayerProbe.sums",
        Given(lambda w: w.probe.sums),
        {"stage": "eval", "layer": "0"},
        stage=STAGES[:2],
        layer=[
            ("1", KeyError, "'1' is not probed; probed layers are '0', '2'"),
            (3, KeyError, "3 is not probed; probed layers are '0', '2'"),
        ],
    ),
    *refuses(
        "LayerProbe.__getitem__",
        Given(lambda w: w.probe.__getitem__),
        key=[
            ("0", KeyError, "expected a stage and a layer, such as probe['train', '0'], got '0'"),
            (None, KeyError, "expected a stage and a layer, such as probe['train', '0'], got None"),
            (("test", "0"), ValueError, "expected a stage among ('train', 'eval'), got 'test'"),
            (("eval", "1"), KeyError, "'1' is not probed; probed layers are '0', '2'"),
        ],
    ),
    *refuses(
        "LayerProbe.mask",
        Given(lambda w: w.entering(w.probe.mask)),
        mask=[
            ([True], TypeError, "expected a boolean mask, True for valid tokens, got list"),
            (torch.ones(2, 3), TypeError, "for valid tokens, got torch.float32; mask.bool() makes one of ones"),
            (torch.ones(3).bool(), ValueError, "expected a mask of shape (N, T), got (3,)"),
        ],
    ),
    *refuses("LayerProbe.to", Given(lambda w: lambda args: w.probe.to(args)), args=DEVICES),
    *refuses(
        "LayerProbe.cuda",
        Given(lambda w: w.probe.cuda),
        device=[("warp", TypeError, "must be int, not str")],
    ),
    *refuses(
        "LayerSimilarity",
        sm.LayerSimilarity,
        {"model": MODEL},
        model=MODELS,
        other=[
            ("x", TypeError, "expected other to be a torch.nn.Module, got str"),
            (
                nn.DataParallel(nn.Linear(2, 2)),
                TypeError,
                "expected other to see whole batches, got nn.DataParallel",
            ),
        ],
        layers=_selectors(),
        exclude=_selectors(),
        feature_maps=[*FEATURE_MAPS, ("positions", ValueError, f"{ROWWISE} … got feature_maps='positions'")],
        sequences=[*SEQUENCES, ("timesteps", ValueError, f"{ROWWISE} … sequences='timesteps'")],
    ),
    *refuses(
        "Similarity.__getitem__",
        Given(lambda w: w.compared.__getitem__),
        pair=[
            ("0", KeyError, "expected the names of two layers, got '0'"),
            (("0",), KeyError, "expected the names of two layers, got ('0',)"),
            (("1", "0"), KeyError, "'1' was not compared; layers are '0', '2'"),
            (("0", "1"), KeyError, "'1' was not compared; layers are '0', '2'"),
        ],
    ),
    *refuses(
        "PCAProjection",
        sm.PCAProjection,
        {"num_features": 3},
        num_features=_integers("num_features", or_none=True),
        threshold=SHARES,
        dim=DIMENSIONS,
        sketch_size=_integers("sketch_size", or_none=True),
    ),
    *refuses("PCAProjection.threshold", Given(lambda w: w.set_threshold), threshold=SHARES),
    *refuses(
        "PCAProjection.forward",
        Given(lambda w: w.projection.forward),
        input=[
            ("x", TypeError, "expected a floating tensor to project, got str"),
            (
                torch.ones(8, 3).to(torch.int64),
                TypeError,
                "expected a floating tensor to project, got torch.int64",
            ),
            (torch.ones(3), ValueError, "expected an input that has dimension 1, got shape (3,)"),
            (torch.ones(8, 4), ValueError, "expected 3 features along dimension 1, got 4 (shape (8, 4))"),
        ],
    ),
    *refuses("PCAProjection.randomize", Given(lambda w: w.projection.randomize), generator=GENERATORS),
    *refuses(
        "insert_projections",
        sm.insert_projections,
        {"model": MODEL},
        model=MODELS,
        layers=_selectors(),
        exclude=_selectors(),
        threshold=SHARES,
        dim=DIMENSIONS,
    ),
    *refuses(
        "insert_projections",
        sm.insert_projections,
        {"layers": "*"},
        model=[
            (
                nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])),
                ValueError,
                "expected layers with an output of their own, got '0' (ModuleList)",
            ),
            (
                Given(lambda w: w.projected),
                ValueError,
                "expected layers with an output of their own, got '1' (PCAProjection)",
            ),
        ],
    ),
    *refuses(
        "set_projection_threshold",
        sm.set_projection_threshold,
        {"model": Given(lambda w: w.projected), "threshold": 0.9},
        model=[*MODELS, (nn.ReLU(), ValueError, "expected a model with projections, got ReLU without any")],
        threshold=SHARES,
    ),
    *refuses(
        "set_projection_threshold",
        sm.set_projection_threshold,
        {"threshold": 0.5},
        model=[(Given(lambda w: w.unseen), RuntimeError, "no projection of this Sequential has seen data")],
    ),
    *refuses(
        "randomize_projections",
        sm.randomize_projections,
        {"model": Given(lambda w: w.projected)},
        model=[*MODELS, (nn.ReLU(), ValueError, "expected a model with projections, got ReLU without any")],
        generator=GENERATORS,
    ),
    *refuses(
        "receptive_fields",
        sm.receptive_fields,
        {"model": Given(lambda w: w.convolutions), "example": torch.zeros(1, 1, 8, 8)},
        model=MODELS,
        example=[
            (None, TypeError, "an example that it takes, a tensor, got Sequential and NoneType"),
            (torch.zeros(3, 3), ValueError, "expected an example of shape (N, C, *spatial), … got (3, 3)"),
            (torch.zeros(1, 3, 8, 8), RuntimeError, "expected input[1, 3, 8, 8] to have 1 channels"),
        ],
        layers=_selectors(),
    ),
    *refuses(
        "border_layer",
        sm.border_layer,
        {"fields": Given(lambda w: w.fields), "input_size": 8},
        fields=[
            ([3, 5], TypeError, "expected fields as receptive_fields returns them, got [3, 5]"),
            ({"conv": 3}, TypeError, "expected fields as receptive_fields returns them, got {'conv': 3}"),
        ],
        input_size=[
            ((8, 8, 8), ValueError, "expected an input size of 2 axes, got (8, 8, 8)"),
            *(
                (
                    size,
                    ValueError,
                    f"expected input_size as a positive integer, or one for each axis, got {size!r}",
                )
                for size in (0, -1, 1.5, None, "8", (8, -1), ("a", "b"))
            ),
        ],
        paths=[
            (each, ValueError, f"expected paths to be 'largest' or 'smallest', got {each!r}")
            for each in ("middle", None)
        ],
    ),
]
