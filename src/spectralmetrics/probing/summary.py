"""The summary table: the dimension of each layer's features, how certain it is, and what stands out."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from spectralmetrics.findings import (
    Finding,
    LayerNumbers,
    has_eigenvalues,
    in_words,
    read_numbers,
    true_ceiling,
)
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import Progress, Wanted, decompose_together
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.probing.facts import UNKNOWN_LAYER, LayerFacts
from spectralmetrics.table import import_pandas, number, percent, text_table, wrapped

if TYPE_CHECKING:
    import pandas


class SummaryRow(NamedTuple):
    """One layer.

    Attributes:
        layer: qualified name of the layer.
        kind: type of the layer; empty if it is unknown.
        width: the number of features D.
        ceiling: the most directions that its weights allow; D if that is unknown.
        observations: the number of observations n.
        value: the value of the statistic.
        low: the lower end of its interval; NaN without folds.
        high: the upper end of its interval; NaN without folds or while a fold is empty.
        saturation: the intrinsic dimension as a share of D; where the value is either, that of the value.
        sufficient_width: number of directions that hold the threshold's share of the variance: the upper end
            of the intrinsic dimension, or the dimension itself without folds.
        stands_out: the layer's findings in words; empty without any.
    """

    layer: str
    kind: str
    width: int
    ceiling: int
    observations: int
    value: float
    low: float
    high: float
    saturation: float
    sufficient_width: int
    stands_out: tuple[str, ...]


class Summary:
    """A table of layers; its text fits the terminal, else 100 columns, and a notebook shows an HTML table.

    Args:
        rows: the rows in forward order.
        title: title of the table, such as the stage.
        statistic: name of the value.
        findings: the findings of the layers, problems first.

    Attributes:
        rows: a :class:`SummaryRow` for each layer.
        findings: the list of :class:`~spectralmetrics.Finding`, problems first.

    >>> row = SummaryRow("fc", "Linear", 64, 32, 900, 12, 11, 14, 0.1875, 14, ("in the tail",))
    >>> print(Summary([row], "eval", "intrinsic_dimension"))
    eval
    layer  type    width  ceiling    n   dimension  saturation  what stands out
    fc     Linear     64       32  900  12 (11-14)       0.188  in the tail
    """

    def __init__(
        self, rows: Sequence[SummaryRow], title: str, statistic: str, findings: Sequence[Finding] = ()
    ) -> None:
        self.rows = list(rows)
        self.title = title
        self.statistic = statistic
        self.findings = list(findings)

    def __str__(self) -> str:
        cells = [self._cells(row) for row in self.rows]
        lines = text_table(self._heads(), cells, left=("type",), spare=("type", "ceiling", "width", "n"))
        problems = (line for each in self._problems() for line in wrapped(each))
        return "\n".join([*wrapped(self.title), *problems, *lines])

    def _problems(self) -> list[str]:
        """A line for each problem, above the table."""
        problems = [each for each in self.findings if each.severity == "problem"]
        return [f"problem: {each.layer}: {each.message}" for each in problems]

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(self._cells(row), "td") for row in self.rows)
        caption = "<br>".join(map(html.escape, [self.title, *self._problems()]))
        caption = f"<caption>{caption}</caption>"
        return f"<table>{caption}<thead>{line(self._heads(), 'th')}</thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, a column for each attribute of :class:`SummaryRow`.

        Raises:
            ModuleNotFoundError: without pandas, extra ``spectralmetrics[pandas]``.
        """
        frame: pandas.DataFrame = import_pandas().DataFrame(self.rows, columns=list(SummaryRow._fields))
        frame["stands_out"] = [", ".join(words) for words in frame["stands_out"]]
        return frame

    def _heads(self) -> list[str]:
        named = "dimension" if self.statistic == "intrinsic_dimension" else self.statistic.replace("_", " ")
        return ["layer", "type", "width", "ceiling", "n", named, "saturation", "what stands out"]

    def _cells(self, row: SummaryRow) -> list[str]:
        value = number(row.value)
        if not math.isnan(row.low):
            ends: tuple[float, ...] = (row.low, row.high)
            counts = isinstance(row.value, int) or (math.isnan(row.value) and all(map(float.is_integer, ends)))
            if counts:  # the ends are counts, too, except for an unknown end
                ends = tuple(end if math.isnan(end) else int(end) for end in ends)
            value += f" ({'-'.join(map(number, ends))})"
        numbers = [str(each) for each in (row.width, row.ceiling, row.observations)]
        return [row.layer, row.kind, *numbers, value, number(row.saturation), ", ".join(row.stands_out)]


def summary_rows(
    layers: Mapping[str, Spectrum],
    facts: Mapping[str, LayerFacts],
    metric: SpectralMetric,
    *,
    threshold: float,
    progress: Progress | None = None,
) -> list[tuple[SummaryRow, LayerNumbers]]:
    """The row of each layer without findings, and the numbers that findings are made from.

    Args:
        layers: name -> spectrum about the mean, on the CPU, in forward order.
        facts: name -> the layer's facts, known without its data.
        metric: the metric of the value to show.
        threshold: share of the variance for dimension and saturation.
        progress: called as spectra are decomposed.

    Raises:
        ValueError: for a statistic that is no single number.
    """
    return [
        (_row(numbers, layers[numbers.layer], facts.get(numbers.layer, UNKNOWN_LAYER), metric), numbers)
        for numbers in numbers_of(layers, facts, threshold, progress)
    ]


def numbers_of(
    spectra: Mapping[str, Spectrum],
    facts: Mapping[str, LayerFacts],
    threshold: float,
    progress: Progress | None = None,
) -> list[LayerNumbers]:
    """The numbers that findings need, from layers' spectra about the mean; see :func:`summary_rows`."""
    wanted = [
        Wanted(each, "eigenvalues" if has_eigenvalues(each) else "variances")
        for each in spectra.values()
        if int(each.num_observations)
    ]
    decompose_together(wanted, progress)
    of_layers = {name: facts.get(name, UNKNOWN_LAYER) for name in spectra}
    return [
        read_numbers(name, each, of_layers[name].ceiling, threshold, of_layers[name].of_gradients)
        for name, each in spectra.items()
    ]


def summary_of(
    rows: Sequence[tuple[SummaryRow, LayerNumbers]],
    findings: Sequence[Finding],
    metric: SpectralMetric,
    *,
    threshold: float,
    where: str,
) -> Summary:
    """The summary of rows in forward order, with the findings of their layers.

    Args:
        rows: see :func:`summary_rows`.
        findings: the findings of all layers.
        metric: the metric of the value to show.
        threshold: share of the variance for dimension and saturation.
        where: the beginning of the title, such as the stage.

    Raises:
        ValueError: for a statistic that cannot be read of any layer. If it cannot be read of some layers, it is
            NaN there, and one warning names them.
    """
    unread = [row for row, _ in rows if row.stands_out]
    if unread:
        named = ", ".join(repr(row.layer) for row in unread)
        words = f"{metric.short_name!r} of {named}: {unread[0].stands_out[0]}"
        if len(unread) == len(rows):
            raise ValueError(words)
        warnings.warn(f"left out {words}", UserWarning, stacklevel=3)
    complete = [
        row._replace(
            stands_out=(*in_words(each for each in findings if each.layer == row.layer), *row.stands_out)
        )
        for row, _ in rows
    ]
    is_about_zero = metric.short_name in ("intrinsic_dimension", "saturation") and not metric.center
    kind, whole = ("dimension about zero", "second moment") if is_about_zero else ("dimension", "variance")
    title = f"{where}, {kind} at {percent(threshold)} of the {whole}"
    return Summary(complete, title, metric.short_name, findings)


def threshold_of(metrics: Iterable[object]) -> float:
    """The threshold of the first metric that has one, a share of the variance; 0.99 if none has.

    >>> from spectralmetrics import IntrinsicDimensionMetric
    >>> threshold_of([IntrinsicDimensionMetric(threshold=0.9)])
    0.9
    """
    return next((float(metric.threshold) for metric in metrics if hasattr(metric, "threshold")), 0.99)


def _row(numbers: LayerNumbers, about_mean: Spectrum, facts: LayerFacts, metric: SpectralMetric) -> SummaryRow:
    spectrum = about_mean.about(center=metric.center)
    low = high = math.nan
    unread: tuple[str, ...] = ()
    value = torch.tensor(math.nan)
    if numbers.observations:
        try:
            value = metric.value_of(spectrum)
            if metric.has_interval and numbers.has_interval:
                low, high = (float(end) for end in metric.interval_of(spectrum))
        except (RuntimeError, ValueError, TypeError) as error:
            unread = (f"not read, {error}",)
    if value.ndim:
        raise ValueError(
            f"expected a statistic that is one number, got {metric.short_name!r} of shape {tuple(value.shape)}"
        )
    dimension, _, end = numbers.dimension
    # A shown dimension may be about zero, or by another rule: the saturation beside it is its own.
    own = {"intrinsic_dimension": value.item() / numbers.width, "saturation": value.item()}
    enough = end if numbers.has_interval and not math.isnan(end) else numbers.known_dimension
    return SummaryRow(
        numbers.layer,
        facts.kind,
        numbers.width,
        true_ceiling(numbers),
        numbers.observations,
        value.item(),
        low,
        high,
        own.get(metric.short_name, dimension / numbers.width),
        int(enough),
        unread,
    )
