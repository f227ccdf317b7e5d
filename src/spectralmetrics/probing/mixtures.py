"""Rows of single experts of a mixture, see :mod:`~spectralmetrics.probing.experts`."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spectralmetrics.probing.beside import Labels, Masks
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.core import Core
from spectralmetrics.probing.experts import Calls, Expert, Pairs, Watched
from spectralmetrics.probing.hooks import Select, how_it_runs, undisturbed
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.outputs import Routed, Unobservable
from spectralmetrics.probing.parts import Split, first_rank, reason_of
from spectralmetrics.probing.placement import bring, placed_as
from spectralmetrics.probing.sampling import sample_size
from spectralmetrics.probing.steps import Moment
from spectralmetrics.sums import Observations
from spectralmetrics.sums.observations import of_forward
from spectralmetrics.torch_private import in_backward


class Mixtures(Core):
    """Passes the rows of each expert of a mixture to its metrics."""

    meshes: Meshes
    masks: Masks
    labels: Labels

    def observe_experts(
        self, watched: Watched, module: nn.Module, output: Any, training: bool, select: Select | None
    ) -> None:
        """Observe a module of experts with each expert as a layer; see :meth:`observe`."""
        if in_backward() or self.thread.here.is_observing:
            return
        stage = self.steps.stage_of(training)
        if stage is None:
            return
        outputs: Iterable[tuple[str, Expert, Any]]
        routed = output
        try:
            routed = output if select is None else select(output)
            outputs = watched.pairs(self._calls(watched, module, routed, stage))
        except Exception as error:
            why = routed if isinstance(routed, Unobservable) else Unobservable(reason_of(error))
            outputs = [(name, expert, why) for name, expert in watched.experts.items()]
        for name, expert, pairs in outputs:
            self.observe(name, expert, pairs, training, None)

    def _calls(self, watched: Watched, module: nn.Module, routed: Routed, stage: str) -> Calls:
        """The tokens of experts in a forward. They may come from other processes, which then all call this."""
        calls = Calls(watched.name, watched.number, module, routed, self.masks, self.labels)
        self.meshes.search(module)  # before other searches, since the weights that FSDP2 shards are whole now
        if how_it_runs(calls.states) != "run" or not self.meshes.shares():
            return calls
        with self.lock, undisturbed(calls.states):
            spread = self.meshes.spread_of_experts(module, calls.states)
            calls.splits = spread.splits
            watched.forwards += 1
            if spread.travels is not None and not self.steps.passes():
                limits = self.meshes.alike.limits
                rows = self.steps.rows_per_feature(stage, limits.rows_per_feature)
                size = None if rows is None else sample_size(rows, calls.states.shape[-1])
                seed = zlib.crc32(f"{limits.seed} {stage} {watched.name} {watched.forwards}".encode())
                number = len(next(module.parameters(recurse=False))) // spread.travels.size
                if size is not None and any(place.takes_all_rows for place in self.places.values()):
                    calls.whole = copy.copy(calls)
                    calls.whole.travel(spread.travels, number, None, seed)
                calls.travel(spread.travels, number, size, seed)
        return calls

    def take_pairs(self, of_layer: LayerMetrics, pairs: Pairs, moment: Moment) -> None:
        """Pass the rows that an expert returns for its tokens, or for some that are drawn, to its metrics."""
        calls, splits = pairs.calls, pairs.calls.splits
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
        labels = calls.labels[tokens] if of_layer.takes_labels and calls.labels is not None else None
        seen = Observations(tokens[:, None], valid=valid, labels=labels)
        size, seed = limits.draws(of_layer, width, None, moment.forward, self.steps.rows_per_feature)
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
        takes_inputs = self.rule.observe == "inputs"
        rows = pairs.states[tokens] if takes_inputs else pairs.calls.outputs(tokens, pairs.index)
        outputs = replace(chosen, values=rows)
        return bring(outputs, placed_as(outputs, behind), None, seed) if behind else outputs
