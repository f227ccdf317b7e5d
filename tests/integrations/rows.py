"""Number of rows that each layer has shown, as a value that the callbacks log."""

import torch
from torchmetrics import Metric


class Rows(Metric):
    """The number of observations."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, rows):
        """Count them."""
        self.count += len(rows)

    def compute(self):
        """Their number."""
        return self.count
