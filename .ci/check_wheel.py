"""Use an installed package once, and check that its sums are `compiled` or `pure`, as the argument says."""

import sys
from unittest import mock

import torch

import spectralmetrics
from spectralmetrics.sums import compiled

expected = sys.argv[1]
rows = torch.randn(256, 16)
rows[:, 4:] *= 1e-3
metric = spectralmetrics.SaturationMetric()
with mock.patch.object(compiled, "add", wraps=compiled.add) as add:
    metric.update(rows)
    value = metric.compute()
used = "compiled" if add.called else "pure"
print(f"{spectralmetrics.__file__}: saturation {value}, {used}, instructions {compiled.instruction_set()}")
if used != expected or value != 4 / 16:
    sys.exit(f"expected a {expected} wheel and saturation 0.25")
