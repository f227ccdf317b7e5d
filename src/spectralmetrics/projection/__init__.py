r"""PCA projections: restrict a layer's output to its leading eigenspace and see if the network is worse.

While the network trains, or inside ``with projections.collect():`` while it stays in evaluation, a
:class:`PCAProjection` passes its input through and accumulates its covariance. In evaluation it projects onto
the leading eigenvectors :math:`V` about the mean :math:`\mu`,

.. math:: x \mapsto \mu + V V^\top (x - \mu),

which removes at most a share :math:`1 - \delta` of the variance, where :math:`\delta` is the threshold.
If the network is as good as before, the directions left out were not needed
(`arXiv:1907.08589 <https://arxiv.org/abs/1907.08589>`_).

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
>>> with insert_projections(model.eval(), layers="0", threshold=0.9) as projections:
...     with projections.collect():
...         _ = model(torch.randn(64, 8))
...     projected = model(torch.randn(4, 8))
...     [row.name for row in set_projection_threshold(model, 0.5)]
['0']
"""

from spectralmetrics.projection.insertion import (
    InsertedProjections,
    ProjectionRow,
    insert_projections,
    randomize_projections,
    set_projection_threshold,
)
from spectralmetrics.projection.layer import PCAProjection

__all__ = [
    "InsertedProjections",
    "PCAProjection",
    "ProjectionRow",
    "insert_projections",
    "randomize_projections",
    "set_projection_threshold",
]
