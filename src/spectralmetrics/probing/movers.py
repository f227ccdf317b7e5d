"""The history of layers over the last forwards, and the layers that left their own range first."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from spectralmetrics.plotting import Quantity, plot_history
from spectralmetrics.sums import ForwardHistory
from spectralmetrics.sums.checks import is_integer
from spectralmetrics.sums.ring import COUNT, FORWARD, LARGEST, LEFT_OUT, NONZERO, SQUARES, STEP, TOTAL
from spectralmetrics.table import import_pandas

if TYPE_CHECKING:
    import pandas

# Number of changes that define the range of a layer. Learning, which brings larger outputs and larger changes,
# must not count as leaving the range. Calibrated by checks/first_movers.py.
_FEWEST_CHANGES, _MOST_CHANGES = 12, 32
_LEAST_DEVIATION = 0.03  # for one change of the logarithm of the scale; smaller ones are noise of small batches
# Share -> quantile of the magnitudes of a normal distribution, in standard deviations.
_QUANTILES = {0.5: 0.6745, 0.9: 1.6449}


Scales: TypeAlias = list[tuple[int, int | None, float]]
"""Forward, step of the optimiser (None if it is unknown), and the logarithm of the root mean square."""


class HistoryRow(NamedTuple):
    """One layer in one forward.

    Attributes:
        forward: number of the forward, counted for each stage from the making of the probe; for a recorded run,
            from the beginning of the run.
        step: the step of the optimiser; None if it is unknown, see :attr:`.LayerProbe.step`.
        layer: qualified name of the layer.
        observations: the number n of finite observations.
        rms: the root of the mean square of all n·D values; NaN without observations.
        mean: the mean of all values.
        max_abs: the largest magnitude.
        zero_share: share of the values that are zero.
        non_finite: number of observations left out for a NaN or an infinity.
    """

    forward: int
    step: int | None
    layer: str
    observations: int
    rms: float
    mean: float
    max_abs: float
    zero_share: float
    non_finite: int


class Mover(NamedTuple):
    """A layer that left its own range.

    Attributes:
        layer: qualified name of the layer.
        forward: number of the forward in which it left.
        distance: the change of its scale in robust deviations of its own changes; infinite if observations
            were not finite for the first time.
        tied: True if other layers left in the same forward, so that their order is only the execution order.
    """

    layer: str
    forward: int
    distance: float
    tied: bool


class History:
    """A table of forwards and layers, as :meth:`.LayerProbe.history` returns it.

    Args:
        stage: ``"train"`` or ``"eval"``, or another title.
        tables: layer -> its rows as a :class:`~spectralmetrics.HistoryMetric` returns them, in the order of
            execution.
        widths: layer -> its number of features D.

    >>> table = np.array([[0, -1, 2.0, 5, 0, 10, 40, 10], [1, -1, 3.0, 5, 0, 10, 90, 10]])
    >>> history = History("train", {"fc": table}, {"fc": 2})
    >>> [(row.forward, row.rms, row.mean) for row in history]
    [(0, 2.0, 1.0), (1, 3.0, 1.0)]
    """

    def __init__(
        self, stage: str, tables: Mapping[str, npt.NDArray[np.float64]], widths: Mapping[str, int]
    ) -> None:
        self.stage = stage
        self._tables = dict(tables)
        self._widths = dict(widths)

    @classmethod
    def of_sums(cls, stage: str, sums: Mapping[str, ForwardHistory]) -> History:
        """The history in these sums; layers that have run in no forward are left out."""
        tables = {layer: each.forwards().cpu().numpy() for layer, each in sums.items() if each.num_features}
        tables = {layer: table for layer, table in tables.items() if len(table)}
        return cls(stage, tables, {layer: sums[layer].num_features for layer in tables})

    @classmethod
    def together(cls, histories: Mapping[str, History]) -> History:
        """Join several histories of one training, such as histories of outputs and of gradients.

        Args:
            histories: name -> history. Layers are named ``"{name}/{layer}"``, in the order of the histories.

        Raises:
            TypeError: for anything else.

        >>> table = np.array([[0, -1, 2.0, 5, 0, 10, 40, 10]])
        >>> fc = History("train", {"fc": table}, {"fc": 2})
        >>> History.together({"outputs": fc, "gradients": fc}).layers
        ['outputs/fc', 'gradients/fc']
        """
        if not isinstance(histories, Mapping) or not all(isinstance(h, History) for h in histories.values()):
            raise TypeError(f"expected a dict of histories, got {histories!r}")
        stages = dict.fromkeys(each.stage for each in histories.values())
        named = [(f"{name}/{layer}", each, layer) for name, each in histories.items() for layer in each.layers]
        return cls(
            ", ".join(stages),
            {name: each._tables[layer] for name, each, layer in named},
            {name: each._widths[layer] for name, each, layer in named},
        )

    @property
    def layers(self) -> list[str]:
        """The layers, in order of execution."""
        return list(self._tables)

    @property
    def forwards(self) -> list[int]:
        """The numbers of the forwards, ascending."""
        return sorted({int(number) for table in self._tables.values() for number in table[:, FORWARD]})

    @property
    def rows(self) -> list[HistoryRow]:
        """All rows, forward by forward, with the layers of each forward in order of execution."""
        rows = [
            _row(layer, line, self._widths[layer]) for layer, table in self._tables.items() for line in table
        ]
        return sorted(rows, key=lambda row: row.forward)  # a stable sort

    def __iter__(self) -> Iterator[HistoryRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def __repr__(self) -> str:
        forwards = self.forwards
        span = f", {forwards[0]} to {forwards[-1]}" if forwards else ""
        return f"History({self.stage}: {len(forwards)} forwards{span}, of {len(self.layers)} layers)"

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, a column for each attribute of :class:`HistoryRow`.

        Raises:
            ModuleNotFoundError: without pandas, extra ``spectralmetrics[pandas]``.
        """
        frame: pandas.DataFrame = import_pandas().DataFrame(self.rows, columns=list(HistoryRow._fields))
        return frame.astype({"step": "Int64"})  # an integer that may be missing

    def plot(self, quantity: Quantity = "rms", layers: Sequence[str] | None = None) -> tuple[Any, Any]:
        """Draw a quantity of each layer over the forwards, a small picture for each layer.

        The horizontal axis shows steps of the optimiser if all are known, and forwards otherwise.

        Args:
            quantity: ``"rms"``, ``"mean"``, ``"max_abs"``, ``"zero_share"`` or ``"non_finite"``.
            layers: the layers to draw; None: all.

        Returns:
            The figure and an array of axes, as :func:`~spectralmetrics.plotting.plot_history`.

        Raises:
            ValueError: for another quantity or layer, or where there is nothing to draw.
            ModuleNotFoundError: without matplotlib.
        """
        if quantity not in get_args(Quantity):
            raise ValueError(f"expected a quantity among {get_args(Quantity)}, got {quantity!r}")
        chosen = self.layers if layers is None else list(layers)
        if unknown := [each for each in chosen if each not in self._tables]:
            raise ValueError(f"expected layers among {self.layers}, got {unknown}")
        has_steps = all((table[:, STEP] >= 0).all() for table in self._tables.values())
        rows = self.rows
        series = {
            layer: [
                (row.step if has_steps and row.step is not None else row.forward, getattr(row, quantity))
                for row in rows
                if row.layer == layer
            ]
            for layer in chosen
        }
        return plot_history(series, quantity, along="step" if has_steps else "forward", title=self.stage)

    def first_movers(self, at: int | None = None, threshold: float = 6.0) -> list[Mover]:
        """The layers that left their own range before a forward, in the order in which they did.

        The range comes from a layer's own changes: the changes of the logarithm of its root mean square from
        one forward to the next. The median and the 0.9 quantile of the magnitudes of the last 32 changes each
        give the standard deviation that a normal distribution would have; the robust deviation is the larger of
        the two, and at least 0.03. A layer has left its range if a change is more than ``threshold`` deviations
        or observations are not finite for the first time. The forwards of one step of the optimiser are pooled.
        At least 12 earlier changes are needed.

        Layers that left in the same forward are in order of execution, and ``tied``: a layer moves all layers
        behind it in the same forward, so the first of them is the one to examine. If all weights have changed
        and everything moves at once, the order says nothing.

        Args:
            at: number of the forward; None: the last.
            threshold: the largest change within the range, in robust deviations.

        Returns:
            A :class:`Mover` for each layer that left; empty if none did.

        Raises:
            ValueError: for a forward outside of the history, or a threshold that is not positive.

        >>> quiet = np.array([[forward, -1, 1.0, 5, 0, 0, 5 + forward % 2, 5] for forward in range(20)])
        >>> loud = quiet.copy()
        >>> loud[19, 6] *= 16
        >>> history = History("train", {"a": quiet, "b": loud}, {"a": 1, "b": 1})
        >>> [(mover.layer, mover.forward) for mover in history.first_movers()]
        [('b', 19)]
        >>> history.first_movers(at=18)
        []
        """
        is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
        if not is_number or not 0 < threshold < math.inf:
            raise ValueError(f"expected threshold to be a positive number, got {threshold!r}")
        forwards = self.forwards
        if at is not None and not (is_integer(at, 0) and forwards and forwards[0] <= at <= forwards[-1]):
            span = f"from {forwards[0]} to {forwards[-1]}" if forwards else "of which there is none"
            raise ValueError(f"expected at to be the number of a forward in the history, {span}, got {at!r}")
        movers = []
        for place, (layer, table) in enumerate(self._tables.items()):
            table = table if at is None else table[table[:, FORWARD] <= at]
            pooled = _pooled(table)
            for time, distance in enumerate(_distances(pooled)):
                if distance > threshold:
                    movers.append((int(pooled[time, FORWARD]), place, layer, float(distance)))
                    break
        movers.sort()
        times = [forward for forward, *_ in movers]
        return [Mover(layer, t, distance, times.count(t) > 1) for t, _, layer, distance in movers]


def _row(layer: str, line: npt.NDArray[np.float64], width: int) -> HistoryRow:
    count = line[COUNT]
    values = count * width if count else math.nan
    return HistoryRow(
        int(line[FORWARD]),
        int(line[STEP]) if line[STEP] >= 0 else None,
        layer,
        int(count),
        math.sqrt(max(line[SQUARES] / values, 0.0)) if count else math.nan,
        float(line[TOTAL] / values),
        float(line[LARGEST]) if count else math.nan,
        float(1 - line[NONZERO] / values),
        int(line[LEFT_OUT]),
    )


def _pooled(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A row for each step of the optimiser, or for each forward whose step is unknown.

    The row has the number of its first forward.
    """
    if not len(table):
        return table
    steps = table[:, STEP]
    begins = np.ones(len(table), dtype=bool)
    begins[1:] = (steps[1:] < 0) | (steps[1:] != steps[:-1])
    first = np.flatnonzero(begins)
    added = np.add.reduceat(table, first, axis=0)
    most = np.maximum.reduceat(table, first, axis=0)
    added[:, :COUNT] = most[:, :COUNT]
    added[:, FORWARD] = table[first, FORWARD]
    return added


def _log_scales(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The logarithm of the root mean square of each row, up to a constant; NaN without observations."""
    count = table[:, COUNT]
    with np.errstate(divide="ignore", invalid="ignore"):
        scales: npt.NDArray[np.float64] = 0.5 * np.log(table[:, SQUARES] / np.where(count > 0, count, np.nan))
    return scales


def scales_of(sums: ForwardHistory | None) -> Scales:
    """The scale of a layer in each step of the optimiser, or in each forward whose step is unknown.

    Args:
        sums: the sums of the layer; None if no history is kept.

    >>> scales_of(None)
    []
    """
    if sums is None or not sums.num_features:
        return []
    table = _pooled(sums.forwards().cpu().numpy())
    scales = _log_scales(table) - 0.5 * math.log(sums.num_features)
    return [
        (int(row[FORWARD]), int(row[STEP]) if row[STEP] >= 0 else None, float(scale))
        for row, scale in zip(table, scales, strict=True)
    ]


def left_out_of(sums: ForwardHistory | None) -> int:
    """The number of rows left out for a NaN or an infinity, of all rows: others may be drawn; 0 if unknown."""
    return 0 if sums is None or not sums.num_features else int(sums.forwards()[:, LEFT_OUT].sum())


def _distances(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distances of rows from the rows before them, in robust deviations; 0 if unknown."""
    left_out = table[:, LEFT_OUT]
    with np.errstate(invalid="ignore"):
        changes = np.diff(_log_scales(table))
    # Without observations, or from zero to zero, the change is undefined and counts as none.
    changes[np.isnan(changes)] = 0.0
    distances = np.zeros(len(table))
    for time in range(_FEWEST_CHANGES + 1, len(table)):
        if left_out[time] and not left_out[:time].any():
            distances[time] = math.inf
            continue
        before = changes[: time - 1]
        before = before[np.isfinite(before)]
        if len(before) < _FEWEST_CHANGES:
            continue
        # Magnitudes, not deviations from the median: if real and generated batches alternate, changes go to and
        # fro and the median may be either value.
        sizes = np.quantile(np.abs(before[-_MOST_CHANGES:]), list(_QUANTILES))
        deviation = max(_LEAST_DEVIATION, *(sizes / list(_QUANTILES.values())))
        distances[time] = abs(changes[time - 1]) / deviation
    return distances
