"""Numbers as a table on the screen."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectralmetrics.extras import from_extra
from spectralmetrics.findings import LayerNumbers, find
from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.metrics import IntrinsicDimensionMetric
from spectralmetrics.metrics.sharing import spectrum_of
from spectralmetrics.probing.summary import SummaryRow, summary_of, summary_rows
from spectralmetrics.recording.record import Record, recorded_threshold
from spectralmetrics.recording.writer import Writer
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.table import encodable, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_AROUND = 3  # a line and two spaces beside the cells of a column


class ConsoleWriter(Writer):
    """Tables of the layers after each epoch: their numbers, and a summary of the last stage.

    Needs rich, extra ``spectralmetrics[console]``.

    Progress bars of tqdm and rich stay whole, and in a notebook the table renders as one.

    Args:
        max_layers: a network with more layers is shown by its means alone; None: always show all.

    Raises:
        ValueError: for ``max_layers`` that is not a positive integer.
        ModuleNotFoundError: without rich.
    """

    name = "console"
    at_steps = True

    def __init__(self, max_layers: int | None = None) -> None:
        with from_extra("console", "the console writer needs rich"):
            import rich  # noqa: F401
        check_positive_integer("max_layers", max_layers, or_none=True)
        self.max_layers = max_layers

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        from rich.console import Console

        if sys.stdout is None:  # a program without a terminal, such as pythonw or a service
            return
        console = Console()
        tables, summary = tables_of(record, self.max_layers, console.width), self._summary(record)
        if console.is_jupyter:
            for table in tables:
                console.print(table)
            if summary is not None:
                console.print(summary, markup=False, highlight=False)
            return
        text = _render(tables, console)
        if summary is not None:
            text += f"\n\n{encodable(summary)}"
        bars = sys.modules.get("tqdm.std")
        active: Any = getattr(getattr(bars, "tqdm", None), "_instances", ())
        if len(active):
            bars.tqdm.write(text)  # type: ignore[union-attr]
        else:
            # As text: rich prints text above its progress bars, but not the output of another console.
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _summary(self, record: Record) -> str | None:
        """A summary of the last stage, or its findings if it has no spectrum; None if only means are shown."""
        if self.max_layers is not None and len({layer for _, layer in record.sums}) > self.max_layers:
            return None
        stages = {stage for stage, _ in record.sums}
        if not stages:
            return None
        stage = "eval" if "eval" in stages else "train"
        layers = [layer for each, layer in record.sums if each == stage]
        metric = IntrinsicDimensionMetric(threshold=recorded_threshold(record.statistics))
        rows = [row for layer in layers for row in _rows_of(record, stage, layer, metric)]
        findings = find(stage, [numbers for _, numbers in rows], lambda layers: record.untrained)
        if all(row.stands_out for row, _ in rows):  # no dimension can be read of any layer
            return "\n".join(map(str, findings)) or None
        return str(summary_of(rows, findings, metric, threshold=metric.threshold, where=stage))


def _rows_of(
    record: Record, stage: str, layer: str, metric: IntrinsicDimensionMetric
) -> list[tuple[SummaryRow, LayerNumbers]]:
    """The row of a layer, if it has one; the layer is released before the next layer's sums are fetched."""
    spectrum = record.spectrum(stage, layer) or spectrum_of(record.sums[stage, layer])
    spectra = {} if spectrum is None else {layer: spectrum}
    return summary_rows(spectra, record.layers, metric, threshold=metric.threshold)


def tables_of(record: Record, max_layers: int | None = None, width: int = 80) -> list[Table]:
    """The numbers of a record as tables: a line for each layer, a column for each statistic and stage.

    With more layers than ``max_layers`` only their means are shown. Columns for which the screen has no room go
    into further tables, at least one into each; names longer than half the width are folded.
    """
    from rich.table import Table
    from rich.text import Text

    of_layers = [row for row in record.rows if row.layer]
    columns = list(dict.fromkeys((row.statistic, row.stage) for row in of_layers))
    layers = list(dict.fromkeys(row.layer for row in of_layers if row.layer != MEAN_LAYER))
    if max_layers is not None and len(layers) > max_layers:
        layers = []
    names = [*layers, MEAN_LAYER] if of_layers else []
    scalars = [f"{row.stage} {row.statistic} {row.value:.4g}".strip() for row in record.rows if not row.layer]
    cells = {(row.layer, row.statistic, row.stage): number(row.value) for row in of_layers}
    headings = {(statistic, stage): [*statistic.split("_"), stage] for statistic, stage in columns}
    room = max(width // 2, 8)
    name_width = min(_longest(["layer", *names]), room)
    widths = {
        column: _longest([*headings[column], *(cells.get((layer, *column), "") for layer in names)])
        for column in columns
    }
    tables: list[Table] = []
    for shown in _groups_that_fit(widths, width - name_width - _AROUND - 1) or [[]]:
        title = f"E{str(record.key)[1:]}"
        title = title if tables else ", ".join([title, *scalars])
        table = Table(title=Text(title), title_justify="left")
        table.add_column("layer", overflow="fold", max_width=room)
        for column in shown:
            table.add_column(Text("\n".join(headings[column])), justify="right")
        for layer in names:
            if layer == MEAN_LAYER and layers:
                table.add_section()
            table.add_row(Text(layer), *(cells.get((layer, *column), "") for column in shown))
        tables.append(table)
    return tables


def _groups_that_fit(widths: Mapping[tuple[str, str], int], room: int) -> list[list[tuple[str, str]]]:
    """Columns in groups no wider than the room, unless a group has one column."""
    groups: list[list[tuple[str, str]]] = []
    left = 0
    for column, width in widths.items():
        if not groups or width + _AROUND > left:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= width + _AROUND
    return groups


def _longest(texts: Sequence[str]) -> int:
    """The width of the longest text, in characters of the screen."""
    from rich.cells import cell_len

    return max(map(cell_len, texts))


def _render(tables: list[Table], console: Console) -> str:
    """The tables as text that standard output can encode."""
    from rich.console import Console

    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = io.StringIO()
    renderer = Console(file=text, width=console.width, force_terminal=console.is_terminal)
    for table in tables:
        if not encoding.lower().startswith("utf"):
            from rich.box import ASCII

            table.box = ASCII
        renderer.print(table)
    return encodable(text.getvalue().rstrip("\n"))
