"""Numbers as a table on the screen."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

from spectralmetrics.recording.record import Record, Row
from spectralmetrics.recording.writer import Writer
from spectralmetrics.tail import MEAN_LAYER

if TYPE_CHECKING:
    from rich.table import Table


class ConsoleWriter(Writer):
    """A table of the layers after each epoch, with rich; extra ``spectralmetrics[console]``.

    Progress bars of tqdm and rich stay whole, and in a notebook the table renders as one.

    Args:
        max_layers: a network with more layers is shown by its means alone; None: always show all.

    Raises:
        ModuleNotFoundError: without rich.
    """

    name = "console"

    def __init__(self, max_layers: int | None = None) -> None:
        try:
            import rich  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'the console writer needs rich: pip install "spectralmetrics[console]"'
            ) from error
        self.max_layers = max_layers

    def write(self, record: Record) -> None:
        """See :class:`Writer`."""
        from rich.console import Console

        console = Console()
        table = table_of(record, self.max_layers)
        bars = sys.modules.get("tqdm.std") or sys.modules.get("tqdm")
        active: Any = getattr(getattr(bars, "tqdm", None), "_instances", ())
        if len(active) and not console.is_jupyter:
            text = io.StringIO()
            Console(file=text, width=console.width, force_terminal=console.is_terminal).print(table)
            bars.tqdm.write(text.getvalue().rstrip("\n"))  # type: ignore[union-attr]
        else:
            console.print(table)


def table_of(record: Record, max_layers: int | None = None) -> Table:
    """The numbers of a record as a table: a line for each layer, a column for each statistic and stage."""
    from rich.table import Table

    of_layers = [row for row in record.rows if row.layer]
    columns = list(dict.fromkeys((row.statistic, row.stage) for row in of_layers))
    layers = list(dict.fromkeys(row.layer for row in of_layers if row.layer != MEAN_LAYER))
    if max_layers is not None and len(layers) > max_layers:
        layers = []
    scalars = [f"{_name(row)} {row.value:.4g}" for row in record.rows if not row.layer]
    table = Table(title=", ".join([f"Epoch {record.epoch}", *scalars]), title_justify="left")
    table.add_column("layer", overflow="fold")
    for statistic, stage in columns:
        table.add_column("\n".join([*statistic.split("_"), stage]), justify="right")
    cells = {(row.layer, row.statistic, row.stage): _format(row.value) for row in of_layers}
    for layer in [*layers, MEAN_LAYER] if of_layers else []:
        if layer == MEAN_LAYER and layers:
            table.add_section()
        table.add_row(layer, *(cells.get((layer, *column), "") for column in columns))
    return table


def _name(row: Row) -> str:
    return f"{row.stage} {row.statistic}".strip()


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
