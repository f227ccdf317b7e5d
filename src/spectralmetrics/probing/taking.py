"""Makes rows of a layer's output, draws and limits them, and passes them to the metrics of the layer."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.probing.beside import Labels, Masks
from spectralmetrics.probing.collections import LayerMetrics, Places
from spectralmetrics.probing.core import Core
from spectralmetrics.probing.experts import Pairs
from spectralmetrics.probing.hooks import runs, warn_user
from spectralmetrics.probing.layout import At, FeatureDim, Layout, dim_of
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.parts import LeftOut, Part, Split, first_rank
from spectralmetrics.probing.placement import bring, has_some_positions, place, placed_as, whole_sample_setting
from spectralmetrics.probing.rules import Batch, ObservationRule
from spectralmetrics.probing.sampling import draw, sample_size
from spectralmetrics.probing.steps import Moment, Steps
from spectralmetrics.sums import Observations
from spectralmetrics.sums.observations import of_forward, plain_observations
from spectralmetrics.torch_private import is_fake


class Rows(Core):
    """Makes rows of all kinds of outputs: whole outputs, parts of them, and experts' outputs for tokens.

    Attributes:
        masks: the masks in use.
        labels: the labels in use.
        layout: the layout of sequences.
        selected: layers for which the user gave a ``select`` function.
    """

    meshes: Meshes

    def __init__(
        self,
        places: Places,
        rule: ObservationRule,
        limits: Limits,
        steps: Steps,
        meshes: Meshes,
        layout: Layout,
        selected: Container[str],
    ) -> None:
        super().__init__(places, rule, limits, steps, meshes)
        self.masks = Masks()
        self.labels = Labels()
        self.layout = layout
        self.selected = selected
        self._warned_layout: set[str] = set()  # layers with a warning about their layout

    def _batch(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> Batch:
        batch = self.batch_of(of_layer, module, output, moment)
        return self._of_some_positions(of_layer.layer, batch) if has_some_positions(batch) else batch

    def _of_some_positions(self, name: str, batch: Batch) -> Batch:
        """A batch of which each process has some positions of each sample; drops labels of whole samples."""
        if how := whole_sample_setting(batch, self.rule):
            raise LeftOut(
                f"{how} needs whole samples, of which each process has some positions inside context_parallel."
                " Take every position (sequences='timesteps', feature_maps='positions')"
            )
        if batch.labels is not None and batch.labels.ndim == 1:
            self.labels.note(name, tuple(batch.values.shape), fits=False)
            return replace(batch, labels=None)
        return batch

    def take_again(self, of_layer: LayerMetrics, output: Any) -> bool:
        """Take an output in few steps if it is like the last one of its layer and all rows are observations.

        The result is the same as with :meth:`.Core.enter` and :meth:`.Core.take_rows`.

        Returns:
            True if the output was taken; otherwise nothing was done.
        """
        plain, limits = self.plain.get(of_layer.layer), self.limits
        if (
            plain is None
            or type(output) is not Tensor
            or not of_layer.forwards  # the first forward since the last reset needs more checks
            or of_layer.needs_more_than_rows
            or of_layer.given_up
            or of_layer.too_wide
            or self.steps.leaves_out
            or self.masks.given
            or limits.max_samples is not None
            or limits.max_features < plain.width
            or not plain.is_like(output)
            or not runs(output)
        ):
            return False
        forward = of_layer.forwards
        of_layer.forwards += 1
        of_layer.ran += 1
        of_layer.samples += plain.shape[0]
        observations = plain_observations(output, plain.dim)
        size, seed = limits.draws(of_layer, plain.width, plain.limit, forward, self.steps)
        of_layer.update(observations if size is None else draw(observations, size, seed))
        return True

    def take_part(
        self, of_layer: LayerMetrics, module: nn.Module, part: Part, moment: Moment, is_idle: bool
    ) -> None:
        """Pass this process' rows of an output that is spread over processes to the metrics.

        Args:
            of_layer: the metrics of the layer.
            module: the layer.
            part: this process' part of the output.
            moment: the moment of the forward; its number decides which rows are drawn.
            is_idle: True if this process keeps nothing and only takes part, since others share the forward.
        """
        name, limits = of_layer.layer, self.meshes.alike.limits
        if is_fake(part.local):
            return
        dims = None
        if name not in self.selected:
            dims = self.layout.dims.get(name) or dim_of(module, of_inputs=self.rule.observe == "inputs")
            dims = At(dims.find(part.meta()), dims.takes_sequences)

        def make(values: Tensor, with_flags: bool) -> Batch:
            if not with_flags:
                return self._plain_batch(name, module, values, None, dims)
            return self.batch_of(of_layer, module, values, moment, dims)

        placed = place(part, make, self.rule)
        if placed.whole.labels is not None and placed.batch.labels is None:
            self.labels.note(name, part.shape, fits=False)
        remaining = limits.room(of_layer)
        labelled = placed.batch.labelled()
        observations = placed.observations(self.rule, remaining)
        width = placed.whole_width(observations)
        limits.check_width(of_layer, width)
        size, seed = limits.draws(of_layer, width, placed.whole.limit(self.rule), moment.forward, self.steps)
        if of_layer.folds > 1:
            of_layer.share_with((first_rank(part), dist.get_world_size()))
        everything = None
        if moment.number is not None:
            observations = of_forward(observations, moment.number, moment.step)
            everything = None if size is None else bring(observations, placed, None, seed)
        observations = bring(observations, placed, size, seed)
        labelled = None if labelled is None else bring(labelled, placed, size, seed)
        if is_idle:
            of_layer.pass_over(moment.groups)
            return
        of_layer.samples += min(placed.whole.num_samples, sys.maxsize if remaining is None else remaining)
        of_layer.update(observations, labelled, moment.groups, placed.batch.values, everything)

    def take_pairs(self, of_layer: LayerMetrics, pairs: Pairs, moment: Moment) -> None:
        """Pass the rows that an expert returns for its tokens to the metrics.

        Args:
            of_layer: the metrics of the expert.
            pairs: the tokens of the expert; some are drawn before the expert runs on them.
            moment: the moment of the forward.
        """
        splits = pairs.splits
        if moment.is_idle and not any(split.op for split in splits):
            of_layer.pass_over(moment.groups)
            return
        limits = self.meshes.alike.limits if splits else self.limits
        width, tokens = pairs.states.shape[-1], pairs.tokens
        limits.check_width(of_layer, width)
        valid, remaining = None, limits.room(of_layer)
        if remaining is not None:
            valid = torch.arange(len(tokens), device=tokens.device) < remaining if splits else None
            tokens = tokens if splits else tokens[:remaining]
        labels = pairs.labels[tokens] if of_layer.takes_labels and pairs.labels is not None else None
        seen = Observations(tokens[:, None], valid=valid, labels=labels)
        size, seed = limits.draws(of_layer, width, None, moment.forward, self.steps)
        everything = None
        if moment.number is not None:
            seen = of_forward(seen, moment.number, moment.step)
            if (whole := pairs.whole) is not None:
                among = replace(seen, values=whole.tokens[:remaining, None])
                everything = self._put_out(whole, among, splits, None, seed)
            elif size is not None:
                everything = self._put_out(pairs, seen, splits, None, seed)
        observations = self._put_out(pairs, seen, splits, size, seed)
        if splits and of_layer.folds > 1:
            of_layer.share_with((first_rank(placed_as(seen, splits).part), dist.get_world_size()))
        if moment.is_idle:
            of_layer.pass_over(moment.groups)
            return
        of_layer.samples += len(tokens) if remaining is None else min(len(tokens), remaining)
        if (observations if everything is None else everything).num_observations:
            labelled = observations if labels is not None else None
            of_layer.update(observations, labelled, moment.groups, pairs.states, everything)

    def _put_out(
        self, pairs: Pairs, seen: Observations, splits: Sequence[Split], size: int | None, seed: int
    ) -> Observations:
        """An expert's whole outputs for some of its tokens; the tokens themselves if inputs are observed."""
        before = [split for split in splits if split.is_replicated]
        behind = [split for split in splits if not split.is_replicated]
        chosen = bring(seen, placed_as(seen, before), size, seed)
        tokens = chosen.values[:, 0]
        rows = pairs.states[tokens] if self.rule.observe == "inputs" else pairs.outputs(tokens)
        outputs = replace(chosen, values=rows)
        return bring(outputs, placed_as(outputs, behind), None, seed) if behind else outputs

    def most(self, stage: str, width: int, where: str) -> tuple[int | None, int]:
        """The number of rows to draw in a forward that processes share, None for all, and a seed."""
        limits = self.meshes.alike.limits
        rows_per_feature = self.steps.rows_per_feature(stage, limits.rows_per_feature)
        size = None if rows_per_feature is None else sample_size(rows_per_feature, width)
        return size, zlib.crc32(f"{limits.seed} {stage} {where}".encode())

    def _plain_batch(
        self, name: str, module: nn.Module, output: Any, mask: Tensor | None, dims: FeatureDim | None = None
    ) -> Batch:
        is_selected, time_first = name in self.selected, name in self.layout.time_first
        dims = self.layout.dims.get(name) if dims is None else dims
        return self.rule.batch(None if is_selected else module, output, mask, time_first, dims)

    def batch_of(
        self,
        of_layer: LayerMetrics,
        module: nn.Module,
        output: Any,
        moment: Moment,
        dims: FeatureDim | None = None,
    ) -> Batch:
        """The output with samples first, by its layer, the model and the mask, and with its labels."""
        name = of_layer.layer
        batch = self._plain_batch(name, module, output, moment.mask, dims)
        if moment.mask is self.masks.value:  # otherwise the forward has noted it
            self.masks.note_fit(name, batch)
        if name not in self._warned_layout and (doubt := _doubt_of(name, batch, self.layout, self.rule)):
            self._warned_layout.add(name)
            warn_user(doubt)
        if of_layer.takes_labels and moment.labels is not None:
            batch = self.labels.join(name, batch, moment.labels, name in self.layout.time_first)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        # Masks and labels belong to the original.
        return {**self.__dict__, "masks": Masks(), "labels": Labels()}


def _doubt_of(name: str, batch: Batch, layout: Layout, rule: ObservationRule) -> str:
    """A warning that the layout of an output is uncertain; empty if it is certain.

    Args:
        name: the name of the layer.
        batch: its output, as it was taken.
        layout: the layout of sequences, as read from the model.
        rule: the rule that makes observations from outputs.
    """
    values = batch.values
    if batch.guessed_dim is not None:
        width = values.shape[2 if batch.kind == "sequence" else 1]
        return (
            f"the feature dimension of {name!r} is unknown: dimension {batch.guessed_dim} of {values.ndim}, of"
            f" size {width}, is used. Call register_layer for its type, or give a `select` for this layer, or"
            " batch_first=True if it is a sequence (N, T, D)"
        )
    if name not in layout.unsure:
        return ""
    if batch.was_flat:
        taken = f"(N, T) = {tuple(values.shape[:2])}, flattened,"
    elif batch.kind == "sequence" and batch.valid is None and rule.sequences != "timesteps":
        taken = f"(N, T, D) = {tuple(values.shape)},"
    else:
        return ""
    return (
        f"the output of {name!r} is taken as {taken} but parts of this model have time first: give the"
        " probe batch_first=True or False, or a `select` for this layer"
    )
