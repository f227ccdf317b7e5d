"""Bad input to `measure` and its companions."""

from pathlib import Path

import numpy as np
import torch

import spectralmetrics as sm
from tests.bad_input.table import Given, refuses

ROWS = torch.randn(50, 3)
POSITIVE = [
    (each, ValueError, f"to be a positive integer, got {each!r}") for each in (0, -1, 1.5, True, "8", None)
]

ROWS_OF_FILES = [
    *refuses(
        "measure",
        sm.measure,
        {"source": ROWS},
        source=[
            (3, TypeError, "expected source to be a path, an array, … got int"),
            (None, TypeError, "expected source to be a path, an array, … got NoneType"),
            ([3], TypeError, "expected the items of source to be paths, … got int"),
            ("nowhere", FileNotFoundError, "expected a file, a folder or a glob, found no 'nowhere'"),
            (Path("nowhere"), FileNotFoundError, "found no 'nowhere'"),
            (Given(lambda w: w.empty), FileNotFoundError, "expected files among .npy … in …empty', got none"),
            (torch.zeros(0, 3), ValueError, "expected rows in `source`, got none"),
            ([], ValueError, "expected rows in `source`, got none"),
            (torch.ones(5), sm.ReadError, "got one array (5 float32); give each observation a row"),
            (torch.ones(5, 3, dtype=torch.int8), sm.ReadError, "got one array (5 x 3 int8)"),
            (torch.ones(5, 3, 2), sm.ReadError, "got one array (5 x 3 x 2 float32)"),
            (
                sm.sums.empty_moments(3),
                ValueError,
                "expected `source` to be the sums of some rows, got sums of no rows",
            ),
        ],
        metrics=[
            ("saturation", TypeError, "expected a metric, a sequence or dict of metrics, got str"),
            ([], ValueError, "expected at least one metric, got none"),
            (sm.NeuralCollapseMetric(2), ValueError, "expected labels for 'neural_collapse', got None"),
        ],
        column=[
            (3, TypeError, "expected column as a name, a pattern or None, got 3"),
            ("v", sm.ReadError, "expected a column 'v', got one array (50 x 3 float32)"),
        ],
        labels=[
            ("kind", sm.ReadError, "expected labels as a column 'kind' or a file of that name, got one array"),
            ("no.npy", FileNotFoundError, "expected a file of labels, found no 'no.npy'"),
            (np.ones(4, int), ValueError, "got 4 labels in 'labels' and 50 rows"),
            (torch.ones(50, 2), TypeError, "expected labels as integers of shape (N,), … got 50 x 2 float32"),
        ],
        folds=POSITIVE,
        block_rows=POSITIVE,
        record=[
            (3, TypeError, "expected record as a directory or None, got 3"),
            (Given(lambda w: w.run), FileExistsError, "…/run already holds records"),
        ],
        progress=[(3, TypeError, "expected progress to be a function of two numbers or None, got 3")],
    ),
    *refuses(
        "moments_of",
        sm.moments_of,
        {},
        rows=[
            (3, TypeError, "expected rows as an array, a tensor, a data frame or a series, got int"),
            (torch.ones(3), sm.ReadError, "got one array (3 float32)"),
            (torch.ones(3, 2, dtype=torch.int64), sm.ReadError, "got one array (3 x 2 int64)"),
        ],
    ),
]
