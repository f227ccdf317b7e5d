"""The forwards of a run for a page, from its ``history.csv``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from spectralmetrics.probing.movers import HistoryRow

QUANTITIES = {"rms": "root mean square", "max_abs": "largest magnitude", "zero_share": "share of zeros"}
MOST_COLUMNS = 400
"""The most columns of the picture; with more forwards, several share a column."""


def of_history(rows: Sequence[HistoryRow], layers: Sequence[str]) -> dict[str, Any]:
    """Arrays of layers by forwards; a column of several forwards has their largest value.

    Args:
        rows: the rows of a stage.
        layers: the layers of the page, in its order.

    Returns:
        ``"layers"``, indices into the page's list; ``"forwards"`` and ``"steps"``, the first and the last of
        each column, -1 for an unknown step; and for each of :data:`QUANTITIES` an array (layer, column), NaN
        where nothing was observed.
    """
    present = {row.layer for row in rows}
    shown = [place for place, layer in enumerate(layers) if layer in present]
    of_layer = {layers[place]: index for index, place in enumerate(shown)}
    steps = {row.forward: -1 if row.step is None else row.step for row in rows}
    forwards = sorted(steps)
    size = -(-len(forwards) // MOST_COLUMNS)
    place = {forward: index for index, forward in enumerate(forwards)}
    columns = -(-len(forwards) // size)
    ends = [(forwards[at * size], forwards[min((at + 1) * size, len(forwards)) - 1]) for at in range(columns)]
    content: dict[str, Any] = {
        "layers": shown,
        "forwards": [list(each) for each in ends],
        "steps": [[steps[first], steps[last]] for first, last in ends],
    }
    for name in QUANTITIES:
        values = np.full((len(shown), columns * size), np.nan)
        for row in rows:
            if row.layer in of_layer:
                values[of_layer[row.layer], place[row.forward]] = getattr(row, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # for columns without a value
            content[name] = np.nanmax(values.reshape(len(shown), columns, size), axis=2)
    return content
