"""``measure``: the statistics of existing rows, in files or in memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from spectralmetrics.files.blocks import Block, Rows
from spectralmetrics.files.choosing import WIDEST, metrics_for
from spectralmetrics.files.fields import ReadError
from spectralmetrics.findings import Finding
from spectralmetrics.functional.together import Progress
from spectralmetrics.metrics import Interval, SpectralMetric
from spectralmetrics.metrics.groups import Metrics
from spectralmetrics.probing import LayerProbe, Summary
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.probe import layer_by_hand, read_probe
from spectralmetrics.probing.processes import agreed, gather_agreed, is_one_of_several
from spectralmetrics.recording import Recorder
from spectralmetrics.sums import Moments, Observations, Sketch, SpectralSum, empty_numbered, stack
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.table import number, text_table

LAYER = "embeddings"
"""The name of the layer in records, equal for all sources, so that ``compare`` pairs the layers of two runs."""
_STAGE = "eval"
_MOST_OF_CLASSES = 2**32
"""The most bytes for the sums of all classes."""
_SAMPLE = 1024
"""The most rows that a run keeps."""
_IN_SUMMARY = ("intrinsic_dimension", "saturation")


class Measurement(NamedTuple):
    """The result of :func:`measure`; printing it shows the summary, the findings and the values.

    Attributes:
        values: statistic -> its value, on the CPU.
        intervals: statistic -> its :class:`~spectralmetrics.Interval`; empty without folds.
        summary: a :class:`~spectralmetrics.Summary` of one row.
        findings: a :class:`~spectralmetrics.Finding` for everything that stands out, problems first.
        sums: the sums behind the values: :class:`~spectralmetrics.sums.Moments`,
            :class:`~spectralmetrics.sums.Folds` or another sum, which :func:`measure` takes again.
    """

    values: dict[str, Tensor]
    intervals: dict[str, Interval]
    summary: Summary
    findings: list[Finding]
    sums: SpectralSum

    def __str__(self) -> str:
        rows = [
            [name, number(value.item()), self._ends(name)]
            for name, value in self.values.items()
            if name not in _IN_SUMMARY and isinstance(value, Tensor) and value.numel() == 1
        ]
        table = text_table(["statistic", "value", "interval"], rows) if rows else []
        if int(self.sums.num_observations) == 1 and not any(value.any() for value in self.values.values()):
            table = ["One row has no variance, and all statistics are zero: measure more rows."]
        return "\n".join([str(self.summary), *([""] if table else []), *table])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()

    def _ends(self, name: str) -> str:
        if name not in self.intervals:
            return ""
        return "{} to {}".format(*(number(float(end)) for end in self.intervals[name]))


def measure(
    source: Any,
    metrics: Metrics | None = None,
    *,
    column: str | None = None,
    labels: Any = None,
    center: bool = True,
    folds: int = 8,
    block_rows: int = 65536,
    record: str | Path | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """The statistics of existing embeddings, in files or in memory, in one pass.

    Memory is bounded by the number of features, whatever the number of rows. Rows with NaN, infinities or, in
    Parquet, missing values are left out with their labels, and counted.

    In a process group (``torchrun``) all processes call it with the same source: each reads some of the files
    or, with fewer files than processes, some blocks, and all get the result of all rows.

    Args:
        source: rows of shape (N, D) in any floating dtype: a path of a ``.npy``, ``.npz``, ``.safetensors``,
            ``.parquet`` or ``.pt`` file, of a folder of these, or a glob; an array, tensor, data frame or dict
            of arrays; a sequence or any other iterable of all these. Files of a folder or a glob come in
            numeric order. Or the sums of rows that were counted elsewhere, see :func:`moments_of`; several
            :class:`~spectralmetrics.sums.Moments` are folds.
        metrics: a metric, or a sequence or dict of them; by default dimension, saturation, effective rank,
            participation ratio, stable rank, total variance and spread, and with labels linear probe and
            neural collapse.
        column: name or pattern of the column of features; in a Parquet file a pattern may match columns of
            numbers. None: the only column of floating vectors, or all columns of floating numbers, which keep
            their names in all files, in any order. Integers are never features.
        labels: an integer for each row: the name of a column, a path of a file (one of the above, or ``.txt``
            with one in each line), or the labels themselves; -1, NaN or a missing value for none. None: no
            labels.
        center: False reads the second moment about zero: the effective rank is then RankMe.
        folds: with g > 1 values have intervals. With g files or more, each file is in one fold; with fewer, and
            for arrays, blocks from all over the rows are dealt to folds. Items of an iterable are not divided.
        block_rows: the most rows in memory at a time; fewer if they are wide.
        record: directory of a run to write, which report, ``compare`` and ``recompute`` read; the rows are its
            layer ``"embeddings"`` in stage ``"eval"``.
        progress: called with the number of rows that this process has read and the number that it will read
            (for an iterable, the first number again). An exception stops the work.

    Returns:
        A :class:`Measurement`, the same on all processes.

    Raises:
        ReadError: a ``ValueError`` that names file and row, for rows that cannot be read: another width or
            dtype, a damaged file, several columns that could be meant. Its ``partial`` is the measurement of
            the rows before.
        FileNotFoundError: if there is no such file.
        FileExistsError: if ``record`` holds a run.
        ModuleNotFoundError: for Parquet or safetensors without the extra ``spectralmetrics[files]``.
        TypeError, ValueError: for an argument out of range, a source of another kind or without rows, or
            different numbers of labels and rows.
        RuntimeError: if the rows overflow the range of the sums.

    >>> rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> measured = measure(rows, folds=4)
    >>> measured.values["intrinsic_dimension"], measured.intervals["intrinsic_dimension"].high
    (tensor(16), tensor(16))
    """
    check_positive_integer("folds", folds)
    check_positive_integer("block_rows", block_rows)
    if column is not None and not isinstance(column, str):
        raise TypeError(f"expected column as a name, a pattern or None, got {column!r}")
    if record is not None and not isinstance(record, (str, Path)):
        raise TypeError(f"expected record as a directory or None, got {record!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"expected progress to be a function of two numbers or None, got {progress!r}")
    groups = [dist.group.WORLD] if is_one_of_several() else []
    if (sums := _sums_of(source)) is not None:
        if labels is not None:
            raise ValueError("expected no labels with sums, which hold none, got some")
        templates = metrics_for(metrics, sums.num_features, 0, center, max(len(sums.folds), 1))
        return _Measuring(templates, sums.num_features, type(sums).__name__.lower(), record).of_sums(sums)

    def prepare() -> tuple[Rows, dict[str, Metric]]:
        where = (dist.get_rank(), dist.get_world_size()) if groups else (0, 1)
        rows = Rows(source, column, labels, folds, block_rows, *where)
        classes = rows.num_classes() if metrics is None else 0
        size = 8 * folds * classes * rows.width
        if size > _MOST_OF_CLASSES:
            raise ValueError(
                f"expected labels that number few classes from 0 on, got {classes - 1} among them: the sums of"
                f" classes would take {size / 2**30:.1f} GiB; number the classes anew, or give metrics"
            )
        templates = metrics_for(metrics, rows.width, classes, center, folds)
        wants = [n for n, each in templates.items() if isinstance(each, SpectralMetric) and each.needs_labels]
        if wants and labels is None:
            raise ValueError(f"expected labels for {wants[0]!r}, got None: labels='label', say")
        own = [n for n, each in templates.items() if groups and each.process_group not in (None, groups[0])]
        if own:
            raise ValueError(
                f"expected metrics that all processes merge, which share the rows, got {own[0]!r} with a"
                " process_group of its own"
            )
        return rows, templates

    rows, templates = agreed(prepare, groups)
    return _Measuring(templates, rows.width, rows.dtype, record).of_rows(rows, progress)


class _Measuring:
    """A probe that measures rows without a model; their kind is shown in place of a layer's type."""

    def __init__(self, templates: dict[str, Metric], width: int, kind: str, record: str | Path | None) -> None:
        model = nn.ModuleDict({LAYER: nn.Identity()})
        self._probe = LayerProbe(model.eval(), templates, layers=LAYER)
        self._probe.remove()
        self._place = layer_by_hand(self._probe, _STAGE, LAYER, kind)
        self._recorder: Recorder | None = None
        if record is not None:
            leaders = self._place.spectral_leaders
            unlabelled = (each for each in leaders if each.takes_observations and not each.needs_labels)
            if (leader := next(unlabelled, None)) is not None:
                # Numbered rows, which `compare` pairs with the rows of another run.
                size = max(min(_SAMPLE, _SAMPLE * WIDEST // max(width, 1)), 64)
                leader.accumulate_also([empty_numbered(size, 0)])
            self._recorder = Recorder(record, self._probe, ["csv", "arrays"])

    def of_rows(self, rows: Rows, progress: Progress | None) -> Measurement:
        """Measures rows."""
        fault: ReadError | None = None
        error: BaseException | None = None
        with self._recorder or contextlib.nullcontext():
            try:
                for block in rows:
                    _add(self._place, block)
                    if progress is not None:
                        progress(*block.done)
            except ReadError as raised:
                fault = raised
            except BaseException as raised:
                error = raised
            faults = [each for each in gather_agreed(fault, error, None) if each is not None]
            fault = fault or (faults[0] if faults else None)
            kind = "items" if rows.unit == "items" else "parts"
            parts = f" in {rows.num_parts} {kind}" if rows.num_parts > 1 else ""
            deals = "" if self._place.folds == 1 else f", {self._place.folds} folds of {rows.unit}"
            measured = self._read(lambda n: f"{n:,} x {rows.width} {rows.dtype}{parts}{deals}")
            named = ", ".join(map(repr, rows.empty))
            if measured is not None and named:
                warnings.warn(f"skipped, for there are no rows in them: {named}", UserWarning, stacklevel=3)
            if fault is not None:
                fault.partial = measured
                raise fault
            if measured is None:
                raise ValueError(f"expected rows in `source`, got none{f' in {named}' if named else ''}")
            self._record()
        return measured

    def of_sums(self, sums: SpectralSum) -> Measurement:
        """Measures sums that were made elsewhere."""
        with self._recorder or contextlib.nullcontext():
            [leader] = self._place.spectral_leaders
            leader.replace_sums([sums.map(torch.clone)])
            measured = self._read(lambda n: f"{n:,} x {sums.num_features}")
            if measured is None:
                raise ValueError("expected `source` to be the sums of some rows, got sums of no rows")
            self._record()
        return measured

    def _read(self, describe: Any) -> Measurement | None:
        """The values of all processes' rows; None if there were none."""
        with self._probe.merged():
            sums = [each for each in self._place.sums(with_left_out=True) if isinstance(each, SpectralSum)]
            if not sums:
                for leader in self._place.spectral_leaders:
                    leader.check_range()
                return None
            values: dict[str, Tensor] = {}
            intervals: dict[str, Interval] = {}
            if int(sums[0].num_observations):
                with read_probe(self._probe) as reading:
                    values = {name: value for (name, *_), value in reading.values.items()}
                    intervals = {name: ends for (name, *_), ends in reading.intervals.items()}
            reads_spectrum = self._place.keeps_matrices or isinstance(sums[0], Sketch)
            statistic = _IN_SUMMARY[0] if reads_spectrum else next(iter(self._probe.statistics))
            summary = self._probe.summary(_STAGE, statistic)
            count = int(sums[0].num_observations + sums[0].num_left_out)
            summary.title = describe(count) + summary.title.removeprefix(_STAGE)
            kept = sums[0].map(torch.clone)
            return Measurement(values, intervals, summary, summary.findings, kept)

    def _record(self) -> None:
        if self._recorder is not None:
            self._recorder.record(reset=False)


def _add(place: LayerMetrics, block: Block) -> None:
    """Add the rows of a block to the metrics of a layer."""
    with torch.no_grad(), torch.inference_mode(False):
        observations = Observations(block.rows, group=block.group, start=block.start)
        labelled = None
        if block.labels is not None and place.takes_labels:
            labelled = Observations(block.rows, group=block.group, labels=block.labels.to(block.rows.device))
        place.samples += len(block.rows)
        place.forwards += 1
        place.update(observations, labelled)


def _sums_of(source: Any) -> SpectralSum | None:
    """Sums that are given in place of rows; several moments become folds."""
    if isinstance(source, SpectralSum):
        return source
    if isinstance(source, Sequence) and source and all(isinstance(each, Moments) for each in source):
        return source[0] if len(source) == 1 else stack(source)
    return None
