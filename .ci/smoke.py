"""Use the package once, as a user does, on any torch and any system: the quick start, and a compiled model.

    python .ci/smoke.py

Needs only ``pip install ".[demo]"``.
"""

import platform
import re
from pathlib import Path

import numpy
import scipy
import torch
import torchmetrics
from torch import nn

from spectralmetrics import LayerProbe

readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(quick_start,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
names: dict = {}
exec(quick_start, names)
saturations = {key: round(float(value), 3) for key, value in names["probe"].compute("eval").items()}
assert len(saturations) == 4, saturations
assert all(0 < value <= 1 for value in saturations.values()), saturations

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
with LayerProbe(model) as probe:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # this backend needs no C++ compiler
    for rows in (4, 4, 6):
        compiled(torch.randn(rows, 3, 8, 8)).sum().backward()
    counted = {layer: int(probe["train", layer]["saturation"].count) for layer in ("0", "3")}
assert counted == {"0": 14 * 36, "3": 14}, counted

versions = {each.__name__: each.__version__ for each in (torch, torchmetrics, numpy, scipy)}
print(f"works: Python {platform.python_version()} on {platform.platform()}, {versions}")
