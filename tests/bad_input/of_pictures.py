"""Bad input to the plotting functions; nothing is drawn into the given axes then."""

import torch

from spectralmetrics import plotting
from tests.bad_input.of_functions import COMPLEX, SHARES
from tests.bad_input.table import Given, refuses

AXIS = Given(lambda w: w.axis)
AXES = [(each, TypeError, f"expected ax to be a matplotlib axis or None, got {each!r}") for each in ("left", 3)]
PROFILES = [
    (each, TypeError, f"expected a dict of dicts, each of layers and values, got {each!r}")
    for each in ("x", None, [0.5], {"eval": 0.5})
] + [
    ({}, ValueError, "expected at least one value to draw, got none"),
    ({"eval": {"conv": "high"}}, TypeError, "expected a value that is a number, got 'high' for 'conv'"),
    (
        {"eval": {"conv": torch.ones(2)}},
        TypeError,
        "expected a value that is a number, got tensor([1., 1.]) for",
    ),
]
TEXTS = [(each, TypeError, f"expected statistic to be a string, got {each!r}") for each in (3, None)]


def _names(name):
    return [
        ("conv", TypeError, f"expected {name} as a sequence of names, got 'conv'"),
        (3, TypeError, f"expected {name} as a sequence of names, got 3"),
        (["a"], ValueError, "named layers, got (2, 2)"),
    ]


ROWS_OF_PICTURES = [
    *refuses(
        "plot_profile",
        plotting.plot_profile,
        {"profiles": {"eval": {"conv": 0.5}}, "ax": AXIS},
        profiles=PROFILES,
        statistic=TEXTS,
        ax=AXES,
        tail=[
            ("conv", TypeError, "expected tail as a sequence of layers, got 'conv'"),
            (3, TypeError, "expected tail as a sequence of layers, got 3"),
        ],
        bands=[
            ("x", TypeError, "expected bands as a dict, got 'x'"),
            ({"eval": 3}, TypeError, "expected bands of 'eval' as a dict of (low, high), got 3"),
            (
                {"eval": {"conv": 3}},
                TypeError,
                "expected bands of 'eval' as a dict of (low, high), got {'conv': 3}",
            ),
        ],
        ceilings=[
            ([3], TypeError, "expected ceilings as a dict, got [3]"),
            ({"conv": "x"}, TypeError, "expected a ceiling that is a number, got 'x' for 'conv'"),
        ],
    ),
    *refuses(
        "plot_heatmap",
        plotting.plot_heatmap,
        {"profiles": {0: {"conv": 0.5}}, "ax": AXIS},
        profiles=PROFILES,
        statistic=TEXTS,
        ax=AXES,
    ),
    *refuses(
        "plot_history",
        plotting.plot_history,
        {"series": {"fc": [(0, 1.0), (1, 2.0)]}},
        series=[
            ([1.0], TypeError, "expected a dict of layers and pairs, got [1.0]"),
            ({}, ValueError, "expected at least one value to draw, got none"),
            ({"fc": []}, ValueError, "expected at least one value to draw, got none"),
        ],
        quantity=[("variance", ValueError, "expected a quantity among … got 'variance'")],
        along=[(3, TypeError, "expected along to be a string, got 3")],
        columns=[(0, ValueError, "expected columns to be a positive integer, got 0")],
        ax=AXES,
    ),
    *refuses(
        "plot_similarity",
        plotting.plot_similarity,
        {"matrix": torch.eye(2), "layers": ["a", "b"], "ax": AXIS},
        matrix=[
            ([[1.0]], TypeError, "expected matrix as a tensor of real numbers, got list"),
            (torch.ones(2), ValueError, "expected a matrix of 2 x 2 named layers, got (2,)"),
            (torch.eye(3), ValueError, "expected a matrix of 2 x 2 named layers, got (3, 3)"),
        ],
        layers=_names("layers"),
        other_layers=_names("other_layers"),
        ax=AXES,
    ),
    *refuses(
        "plot_spectrum",
        plotting.plot_spectrum,
        {"eigenvalues": torch.ones(3), "ax": AXIS},
        eigenvalues=[
            *(
                (each, TypeError, f"expected eigenvalues as a tensor, or a sequence of them, got {each!r}")
                for each in ("x", 3, None, [])
            ),
            ([3.0], TypeError, "expected eigenvalues as a tensor of real numbers, got float"),
            (COMPLEX[0], TypeError, "expected eigenvalues as a tensor of real numbers, got torch.complex64"),
            (torch.ones(2, 2), ValueError, "expected eigenvalues of shape (D,), got shape (2, 2)"),
        ],
        threshold=[row for row in SHARES if row[0] is not None],
        labels=[
            ("step", TypeError, "expected labels as a sequence of names, got 'step'"),
            (3, TypeError, "expected labels as a sequence of names, got 3"),
            (["a", "b"], ValueError, "expected 1 labels, got 2"),
        ],
        ax=AXES,
    ),
    *refuses(
        "plot_covariance",
        plotting.plot_covariance,
        {"covariance": torch.eye(2), "ax": AXIS},
        covariance=[
            ("x", TypeError, "expected a covariance as a tensor of real numbers, got str"),
            (COMPLEX, TypeError, "expected a covariance as a tensor of real numbers, got torch.complex64"),
            *(
                (torch.ones(shape), ValueError, f"expected a covariance of shape (D, D), got {shape}")
                for shape in ((3,), (2, 3), (0, 0))
            ),
        ],
        ax=AXES,
    ),
    *refuses(
        "plot_embedding",
        plotting.plot_embedding,
        {"points": torch.ones(4, 2), "ax": AXIS},
        points=[
            ("x", TypeError, "expected points as a tensor of real numbers, got str"),
            *(
                (torch.ones(shape), ValueError, f"expected points of shape (m, k) with k >= 1, got {shape}")
                for shape in ((3,), (2, 0), (2, 3, 4))
            ),
        ],
        labels=[
            (["a"], ValueError, "expected 4 labels, one for each point, got shape (1,)"),
            ("x", ValueError, "expected 4 labels, one for each point, got 'x'"),
            (3, ValueError, "expected 4 labels, one for each point, got 3"),
        ],
        ax=AXES,
    ),
    *refuses(
        "plot_layers",
        plotting.plot_layers,
        {"values": {"conv": torch.ones(3)}, "draw": plotting.plot_spectrum},
        values=[
            (
                [torch.ones(1)],
                TypeError,
                "expected a dict of layers and what to draw of them, got [tensor([1.])]",
            ),
            (None, TypeError, "expected a dict of layers and what to draw of them, got None"),
            ({}, ValueError, "expected at least one value to draw, got none"),
        ],
        draw=[
            (each, TypeError, f"expected draw to be a function such as plot_spectrum, got {each!r}")
            for each in ("spectrum", None)
        ],
        title=[(3, TypeError, "expected title to be a string, got 3")],
        colour=[("red", TypeError, "got an unexpected keyword argument 'colour'")],
    ),
    *refuses("Similarity.plot", Given(lambda w: w.compared.plot), ax=AXES),
    *refuses("literal", plotting.literal, text=[(3, TypeError, "expected text to be a string, got 3")]),
]
