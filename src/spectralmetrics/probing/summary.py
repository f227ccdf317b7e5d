"""The answer in a table: how wide each layer's features are, how sure that is, and what stands out."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from spectralmetrics.findings import LayerNumbers, read_numbers
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import Progress, Wanted, decompose_together
from spectralmetrics.metrics import IntrinsicDimensionMetric, SpectralMetric
from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.sums import SpectralSum, Sum
from spectralmetrics.tail import low_saturation_tail

if TYPE_CHECKING:
    import pandas

WIDTH = 100
"""Columns of the screen that the table fits."""
_ENOUGH = 10  # observations per direction found (and at all), below which a value is not to be trusted
_WIDE = 0.1  # share of the width, beyond which an interval says little
_AT_CEILING = 0.95  # share of the ceiling from which on a layer uses all that its weights allow


class SummaryRow(NamedTuple):
    """One layer.

    Attributes:
        layer: its qualified name.
        kind: its type; empty if it is unknown.
        width: the number of features D.
        ceiling: the most directions that its weights allow; D if that is unknown.
        observations: their number n.
        value: of the statistic.
        low: the lower end of its interval; NaN without folds.
        high: the upper end of its interval; NaN without folds or while a fold is empty.
        saturation: the intrinsic dimension as a share of D.
        sufficient_width: the upper end of the intrinsic dimension, or itself without folds: so many directions
            hold the threshold's share of the variance.
        stands_out: what does, in words; empty for a layer of which there is nothing to say.
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
    """A table of layers; printing it fits 100 columns, and a notebook shows it as one.

    Args:
        rows: in forward order.
        title: what it is a summary of.
        statistic: name of the value.

    Attributes:
        rows: a :class:`SummaryRow` for each layer.

    >>> row = SummaryRow("fc", "Linear", 64, 32, 900, 12, 11, 14, 0.1875, 14, ("in the tail",))
    >>> print(Summary([row], "eval", "intrinsic_dimension"))
    eval
    layer  type    width  ceiling    n   dimension  saturation  what stands out
    fc     Linear     64       32  900  12 (11-14)       0.188  in the tail
    """

    def __init__(self, rows: Sequence[SummaryRow], title: str, statistic: str) -> None:
        self.rows = list(rows)
        self.title = title
        self.statistic = statistic

    def __str__(self) -> str:
        heads, cells = self._heads(), [self._cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads) - 1)]
        room = WIDTH - sum(widths[1:]) - 2 * len(widths)
        widths[0] = min(widths[0], max(room - 18, 12))
        left = max(room - widths[0], 12)
        lines = [self.title] if self.title else []
        for line in [heads, *cells]:
            name = textwrap.wrap(line[0], widths[0]) or [""]
            words = textwrap.wrap(line[-1], left) or [""]
            for number in range(max(len(name), len(words))):
                middle = line[1:-1] if number == 0 else [""] * (len(heads) - 2)
                aligned = [
                    text.ljust(width) if head == "type" else text.rjust(width)
                    for text, width, head in zip(middle, widths[1:], heads[1:-1], strict=True)
                ]
                first = (name[number] if number < len(name) else "").ljust(widths[0])
                last = words[number] if number < len(words) else ""
                lines.append("  ".join([first, *aligned, last]).rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(self._cells(row), "td") for row in self.rows)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead>{line(self._heads(), 'th')}</thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, a column for each attribute of :class:`SummaryRow`.

        Raises:
            ModuleNotFoundError: without pandas, extra ``spectralmetrics[pandas]``.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'a data frame needs pandas: pip install "spectralmetrics[pandas]"'
            ) from error
        frame = pandas.DataFrame(self.rows, columns=list(SummaryRow._fields))
        frame["stands_out"] = [", ".join(words) for words in frame["stands_out"]]
        return frame

    def _heads(self) -> list[str]:
        named = "dimension" if self.statistic == "intrinsic_dimension" else self.statistic.replace("_", " ")
        return ["layer", "type", "width", "ceiling", "n", named, "saturation", "what stands out"]

    def _cells(self, row: SummaryRow) -> list[str]:
        value = _number(row.value)
        if not math.isnan(row.low):
            value += f" ({_number(row.low)}-{'?' if math.isnan(row.high) else _number(row.high)})"
        numbers = [str(each) for each in (row.width, row.ceiling, row.observations)]
        return [row.layer, row.kind, *numbers, value, f"{row.saturation:.3f}", ", ".join(row.stands_out)]


def summarise(
    layers: Mapping[str, Sequence[Sum]],
    facts: Mapping[str, LayerFacts],
    metric: SpectralMetric,
    *,
    threshold: float = 0.99,
    where: str,
) -> Summary:
    """The summary of layers of which the sums are known.

    Args:
        layers: name -> sums, the spectral one first, in forward order.
        facts: name -> what is known of the layer besides.
        metric: of the value to show; one that gives a single number.
        threshold: share of the variance for dimension and saturation.
        where: the stage, and whatever else the title is to begin with.

    Raises:
        ValueError: for a statistic that is no single number.
    """
    rows = summary_rows(layers, facts, metric, threshold=threshold)
    return summary_of(rows, metric, threshold=threshold, where=where)


def summary_rows(
    layers: Mapping[str, Sequence[Sum]],
    facts: Mapping[str, LayerFacts],
    metric: SpectralMetric,
    *,
    threshold: float,
    progress: Progress | None = None,
) -> list[SummaryRow]:
    """The rows of layers, each by itself; see :func:`summarise`."""
    dimension = IntrinsicDimensionMetric(threshold=threshold)
    spectra = {name: _spectrum(sums) for name, sums in layers.items()}
    decompose_together((Wanted(spectrum, "eigenvalues") for spectrum in spectra.values()), progress)
    return [
        _row(name, spectrum, facts.get(name, LayerFacts("", None)), metric, dimension)
        for name, spectrum in spectra.items()
    ]


def numbers_of(
    layers: Mapping[str, Sequence[Sum]],
    ceilings: Mapping[str, int | None],
    threshold: float,
    progress: Progress | None = None,
) -> list[LayerNumbers]:
    """What findings are made from, of layers of which the sums are known, the spectral one first.

    Args:
        layers: name -> sums, the spectral one first.
        ceilings: name -> the most directions that its weights allow; None where that is unknown.
        threshold: share of the variance for the dimension.
        progress: told how many spectra are decomposed, and of how many.
    """
    spectra = {name: _spectrum(sums) for name, sums in layers.items()}
    wanted = [
        Wanted(each, "eigenvalues" if _has_spectrum(each) else "variances")
        for each in spectra.values()
        if int(each.num_observations)
    ]
    decompose_together(wanted, progress)
    return [read_numbers(name, each, ceilings.get(name), threshold) for name, each in spectra.items()]


def _has_spectrum(spectrum: Spectrum) -> bool:
    return spectrum.sums.keeps_products or spectrum.sketch is not None


def summary_of(rows: Sequence[SummaryRow], metric: SpectralMetric, *, threshold: float, where: str) -> Summary:
    """The summary of rows in forward order, and what one layer has beside the others; see :func:`summarise`."""
    known = {row.layer: row.saturation for row in rows if not math.isnan(row.saturation)}
    tail = low_saturation_tail(known) if len(known) == len(rows) else []
    rows = [
        row._replace(stands_out=("in the tail", *row.stands_out)) if row.layer in tail else row for row in rows
    ]
    title = f"{where}, dimension at {100 * threshold:.4g} % of the variance"
    return Summary(rows, title, metric.short_name)


def threshold_of(metrics: Iterable[object]) -> float:
    """The share of variance that the first metric which has one explains; 0.99 if none has.

    >>> threshold_of([IntrinsicDimensionMetric(threshold=0.9)])
    0.9
    """
    return next((float(metric.threshold) for metric in metrics if hasattr(metric, "threshold")), 0.99)


def _spectrum(sums: Sequence[Sum]) -> Spectrum:
    spectral = sums[0]
    assert isinstance(spectral, SpectralSum)
    return Spectrum(spectral, others=sums[1:], device=torch.device("cpu"))


def _row(
    name: str,
    about_mean: Spectrum,
    facts: LayerFacts,
    metric: SpectralMetric,
    dimension: IntrinsicDimensionMetric,
) -> SummaryRow:
    spectrum = about_mean.about(center=metric.center)
    value = metric.value_of(spectrum)
    if value.ndim:
        raise ValueError(
            f"expected a statistic that is one number, got {metric.short_name!r} of shape {tuple(value.shape)}"
        )
    low = high = math.nan
    spread = math.nan
    is_sketched = about_mean.sketch is not None
    if is_sketched or about_mean.num_folds > 1:
        if metric.has_interval:
            low, high = (float(end) for end in metric.interval_of(spectrum))
        end = dimension.interval_of(about_mean)
        spread = float(end.high) - float(end.low)
    share = float(dimension.value_of(about_mean))
    is_known = not math.isnan(share)
    found = int(share) if is_known else int(end.low)  # at least
    enough = found if math.isnan(spread) else int(end.high)
    width, count = about_mean.num_features, int(about_mean.num_observations)
    ceiling = width if facts.ceiling is None else min(facts.ceiling, width)
    if found > ceiling:  # refuted: weights that changed meanwhile, or a forward of the layer's own
        ceiling = width
    words = []
    if not is_known:
        words.append(f"more than {found - 1} directions: larger sketch")
    elif is_sketched:
        words.append("sketched")
    if count < _ENOUGH * max(found, 1) or (spread > _WIDE * width and not is_sketched):
        words.append("few observations")
    if found and found >= _AT_CEILING * ceiling:
        words.append("at its ceiling")
    if count > 1 and (dead := int((about_mean.variances == 0).sum())):
        words.append(f"{dead} dead feature{'s' if dead > 1 else ''}")
    if left_out := int(about_mean.num_left_out):
        words.append(f"{left_out} row{'s' if left_out > 1 else ''} with NaN or infinities left out")
    return SummaryRow(
        name,
        facts.kind,
        width,
        ceiling,
        count,
        value.item(),
        low,
        high,
        found / width if is_known else math.nan,
        enough,
        tuple(words),
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return "?"
    return str(int(value)) if float(value).is_integer() else f"{value:.3g}"
