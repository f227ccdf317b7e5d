"""Outputs that are spread over processes: the rows that each process observes, and how it gets them.

Each process observes rows of full width that no other process observes. So plain sums are right for any way to
spread a model. Each process takes its share of a replicated output. If features are sharded, or sums are still
to be reduced, rows are drawn first and then travel: each process gets some of them whole. Shards of samples or
positions stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmetrics.probing.parts import LeftOut, Part, Span, Split, exchange, own_of
from spectralmetrics.probing.processes import is_one_of_several
from spectralmetrics.probing.rules import Batch, ObservationRule
from spectralmetrics.probing.sampling import draw
from spectralmetrics.sums import Observations


class Placed(NamedTuple):
    """This process' part of an output, as observations that are still to travel.

    Attributes:
        batch: this process' part, with its part of the mask and the labels.
        whole: the batch of all processes; only the shape of its values has a meaning.
        part: the part as the layer returned it.
        feature_dim: the dimension of its features.
        start: number of the first sample in ``batch``, or of the first token if tokens were flattened.
        is_flat: True if flattened tokens are sharded.
        cuts: ranges of samples that this process kept when samples travelled.
    """

    batch: Batch
    whole: Batch
    part: Part
    feature_dim: int
    start: int = 0
    is_flat: bool = False
    cuts: tuple[Span, ...] = ()

    def observations(self, rule: ObservationRule, remaining: int | None) -> Observations:
        """The observations of this process' part; only of the whole's first ``remaining`` samples, if given."""
        observed = self.batch.observations(rule)
        if remaining is None or remaining >= self.whole.num_samples:
            return observed
        shape = observed.values.movedim(observed.feature_dim, -1).shape[:-1]
        number, samples = math.prod(shape), self.whole.num_samples
        if self.is_flat:
            each = self.whole.values.shape[1]
            sample = torch.arange(self.start, self.start + number, device=observed.values.device)
            sample = sample % samples if self.whole.order[0] else sample // each
        else:
            each = max(number // max(self.batch.num_samples, 1), 1)
            sample = torch.arange(number, device=observed.values.device) // each + self.start
        keep = sample < remaining
        return replace(observed, valid=keep if observed.valid is None else keep & observed.valid)

    def whole_width(self, observations: Observations) -> int:
        """The width of observations with the features of all processes."""
        if any(split.dim == self.feature_dim for split in self.part.splits):
            return self.part.shape[self.feature_dim]
        return observations.num_features


def place(part: Part, make: Callable[[Tensor, bool], Batch], rule: ObservationRule) -> Placed:
    """Prepare the observations of one process' part.

    Args:
        part: the part of the output.
        make: makes the batch of a tensor; True adds the mask and the labels. It is called once for the whole
            and once for the part.
        rule: defines an observation.

    Raises:
        LeftOut: for observations of whole samples, if other dimensions than samples and features are divided.
    """
    whole = make(part.standing_in(), True)
    order = whole.order
    feature_dim = order[1 if whole.kind == "maps" else -1]
    sample_dim = order[0]
    dims = set(part.row_dims(feature_dim))
    how = whole_sample_setting(whole, rule)
    if how and dims - ({sample_dim} if not whole.was_flat else set()):
        raise LeftOut(
            f"{how} needs whole samples, and its output {part.shape} is placed as {part.words()} with features"
            f" in dimension {feature_dim}: samples are divided among processes. Take every position"
            " (sequences='timesteps', feature_maps='positions'), or have `select` return whole samples"
        )
    batch, valid, labels, start = make(part.local, False), whole.valid, whole.labels, 0
    if whole.was_flat and dims:
        assert valid is not None
        span = part.spans(0)
        start, valid = span.start, _flat(valid, order)[span.start : span.stop]
        labels = None if labels is None or labels.ndim == 1 else _flat(labels, order)[span.start : span.stop]
    elif whole.was_flat:
        batch = _unflattened(batch, whole)
    elif batch.order != order:  # the mask showed that time comes first
        batch = replace(batch, values=batch.values.transpose(0, 1), order=order)
    if not whole.was_flat:
        start = part.spans(sample_dim).start if sample_dim in dims else 0
        for dim in sorted(dims):
            at, span = order.index(dim), part.spans(dim)
            if valid is not None:
                valid = valid.narrow(at - (whole.kind == "maps" and at > 0), span.start, span.stop - span.start)
            if labels is not None:
                needs_whole = at > 0 and labels.ndim == 1  # the mean of each sample
                labels = None if needs_whole else labels.narrow(at, span.start, span.stop - span.start)
    batch = replace(batch, valid=valid, labels=labels)
    placed = Placed(batch, whole, part, feature_dim, start, whole.was_flat and bool(dims))
    if part.travels(feature_dim) and _needs_features(how, part, feature_dim):
        placed = _gathered(placed)
    return placed


def placed_as(observations: Observations, splits: Sequence[Split]) -> Placed:
    """Rows (n, D) of one process; the others have the same rows, or other summands of them."""
    values = observations.values
    batch = Batch("rows", values)
    return Placed(batch, batch, Part(values, tuple(values.shape), tuple(values.stride()), tuple(splits)), 1)


def bring(observations: Observations, placed: Placed, size: int | None, seed: int) -> Observations:
    """This process' share of all processes' rows, with all features.

    Args:
        observations: the observations of this process' part.
        placed: the part that they come from.
        size: number of rows to draw over all processes, before they travel; None: all.
        seed: seed of the random draws, the same on all processes that share rows.
    """
    part, features = placed.part, placed.feature_dim
    values = observations.values.movedim(observations.feature_dim, -1)
    is_empty = not values.shape[-1]
    rows = values.new_empty((math.prod(values.shape[:-1]), 0)) if is_empty else values.flatten(0, -2)
    flags = (observations.valid, observations.labels)
    # Each process draws its share from its shard of rows, or from its own range of replicated rows.
    spans = [*placed.cuts, *(part.spans(dim) for dim in part.row_dims(features))]
    for split in part.splits:
        if split.is_replicated:
            spans.append(Span(split.rank, split.rank + 1, split.size))
            rows, flags = _cut(rows, flags, own_of(len(rows), split))
    if size is not None:
        for span in spans:
            size, seed = span.of(size), seed + 1_000_003 * span.start
        rows, flags = _drawn(rows, flags, size, seed)
    rows, (valid, labels), _ = _made_whole(rows, flags, part, features)
    return replace(observations, values=rows, feature_dim=-1, valid=valid, labels=labels)


def has_some_positions(batch: Batch) -> bool:
    """True if this process has only some positions of each sample of a batch, inside ``context_parallel``."""
    return batch.kind != "rows" and not batch.is_feature_map and is_one_of_several()


def whole_sample_setting(whole: Batch, rule: ObservationRule) -> str:
    """The argument of the probe that needs whole samples; empty if none does."""
    if whole.kind == "sequence" and rule.sequences != "timesteps":
        return f"sequences={rule.sequences!r}"
    if whole.kind == "maps":
        if rule.feature_maps != "positions":
            return f"feature_maps={rule.feature_maps!r}"
        size = rule.max_map_size
        if whole.is_feature_map and size is not None and max(whole.values.shape[2:]) > size:
            return f"max_map_size={size}"
    return ""


def _needs_features(how: str, part: Part, feature_dim: int) -> bool:
    """True if observations can only be made from whole features."""
    if "'flatten'" in how:
        return any(split.dim == feature_dim for split in part.splits)
    is_linear = not how or "'mean'" in how or "'last'" in how or how.startswith("max_map_size")
    return any(split.op and not (is_linear and split.op in ("sum", "avg")) for split in part.splits) and bool(
        how
    )


def _gathered(placed: Placed) -> Placed:
    """The placement after whole samples have travelled, each to one process, before observations are made."""
    batch, part = placed.batch, placed.part
    is_map = batch.kind == "maps"
    values = batch.values.movedim(1, -1) if is_map else batch.values
    features = placed.feature_dim
    values, (valid, labels), cuts = _made_whole(values, (batch.valid, batch.labels), part, features)
    values = values.movedim(-1, 1) if is_map else values
    batch = replace(batch, values=values, valid=valid, labels=labels)
    kept = tuple(split for split in part.splits if not (split.op or split.dim == features))
    start = placed.start + sum(cut.start for cut in cuts)
    return placed._replace(batch=batch, part=replace(part, splits=kept), start=start, cuts=tuple(cuts))


def _unflattened(batch: Batch, whole: Batch) -> Batch:
    """A batch of all tokens in the shape of the whole, which the mask has set."""
    samples, steps = whole.values.shape[:2]
    is_time_first = whole.order[0] == 1
    values = batch.values.unflatten(0, (steps, samples) if is_time_first else (samples, steps))
    values = values.transpose(0, 1) if is_time_first else values
    return replace(batch, kind="sequence", values=values, was_flat=True, order=whole.order)


def _flat(flags: Tensor, order: tuple[int, ...]) -> Tensor:
    """Flags of samples and steps in the order of flattened tokens."""
    return (flags.mT if order[0] else flags).reshape(-1)


_Flags = tuple[Tensor | None, Tensor | None]


def _cut(rows: Tensor, flags: _Flags, span: Span) -> tuple[Tensor, _Flags]:
    valid, labels = (None if each is None else each[span.start : span.stop] for each in flags)
    return rows[span.start : span.stop], (valid, labels)


def _drawn(rows: Tensor, flags: _Flags, number: int, seed: int) -> tuple[Tensor, _Flags]:
    if number >= len(rows):
        return rows, flags
    if not number:
        return _cut(rows, flags, Span(0, 0, len(rows)))
    index = draw(Observations(torch.arange(len(rows), device=rows.device)[:, None]), number, seed).values[:, 0]
    valid, labels = (None if each is None else each[index] for each in flags)
    return rows.index_select(0, index), (valid, labels)


def _made_whole(rows: Tensor, flags: _Flags, part: Part, features: int) -> tuple[Tensor, _Flags, list[Span]]:
    """This process' rows and flags after features or summands have travelled, and the ranges that it kept."""
    cuts = []
    for number in reversed(range(len(part.splits))):
        split = part.splits[number]
        if split.op or split.dim == features:
            cuts.append(own_of(len(rows), split))
            _, flags = _cut(rows, flags, cuts[-1])
            rows = exchange(rows, split, part.sizes(number) if split.dim is not None else None)
    return rows, flags, cuts
