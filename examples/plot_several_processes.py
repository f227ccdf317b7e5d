"""
One profile of several processes
================================

In data-parallel training each process sees its own part of the data. The saturation of all data differs from
the saturation of one part, and from the mean over the parts. ``probe.compute()`` merges the sums behind the
statistics and returns the values of all the data on every process.
"""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from spectralmetrics import layer_profile
from spectralmetrics.plotting import plot_profile

# %%
# The script
# ----------
#
# ``several_processes.py`` lies beside this example; a downloaded notebook needs it in the same folder. It
# trains a small network with ``DistributedDataParallel`` on handwritten digits; each process has half of
# them. The probe takes the wrapped model and observes one forward of all digits in evaluation.

folder = Path(__file__).parent if "__file__" in globals() else Path.cwd()
script = folder / "several_processes.py"
print(script.read_text())

# %%
# Running it on two processes
# ---------------------------
#
# On the command line this is ``torchrun --nproc-per-node=2 several_processes.py``. Both processes compute,
# since the merge needs both, and the first one prints.

command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
environment = os.environ | {"OMP_NUM_THREADS": "1"}
run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
print(run.stdout)

# %%
# Two all-reduces for all layers
# ------------------------------
#
# However many layers and metrics a probe has, ``compute`` exchanges messages twice.
#
# 1. A few numbers per layer: its width, and whether anything was added since the last merge. A process whose
#    part of the data did not reach a layer gets its width here.
# 2. Everything else in one message: each layer's count, mean and scatter matrix, of which one triangle is sent.
#    From these every process adds the spread within the parts and the spread between their means, so the result
#    is the covariance of all the data, up to round-off.
#
# Metrics that share their sums, as the two here, travel once. (With more than 64 processes a third all-reduce
# keeps the messages small.) All processes must call ``compute``: a process that calls it alone waits for the
# others for ever.
#
# The values
# ----------

values = {}
for line in run.stdout.splitlines():
    name, is_value, value = line.partition(": ")
    if is_value:
        values[name] = torch.tensor(float(value))

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
for axis, statistic in ((left, "saturation"), (right, "effective_rank")):
    profile = layer_profile(values, statistic, "eval")
    plot_profile({"both processes": profile}, statistic=statistic, ax=axis)
plt.show()

# %%
# The first layer maps 64 pixels to 128 features. It is linear, so no more than 64 directions can be in use, and
# its saturation cannot exceed a half. Many pixels at the borders are always white and neighbours are alike: far
# fewer directions hold 99 % of the variance. Both processes print how many digits they have seen themselves;
# the values describe all 1,797.
