"""From a layer's output to the metrics of that layer, as observations: what the hooks of a probe call."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.findings import is_untrained
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.compilation import Unobservable
from spectralmetrics.probing.facts import LayerFacts, facts_of
from spectralmetrics.probing.hooks import Select, how_it_runs, tell, undisturbed
from spectralmetrics.probing.labelling import Labels
from spectralmetrics.probing.layout import FeatureDim, Layout, dim_of
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.masking import Masks
from spectralmetrics.probing.meshes import At, Meshes
from spectralmetrics.probing.observations import Batch, ObservationRule
from spectralmetrics.probing.parts import LeftOut, Part, first_rank, reason_of
from spectralmetrics.probing.placement import bring, place
from spectralmetrics.probing.sampling import draw, sample_size
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums import Observations
from spectralmetrics.torch_private import in_backward, is_fake

_NOT_MEASURING = contextlib.nullcontext()


class Router:
    """Turns what layers put out into observations, and hands them to the metrics of the layer and stage.

    Args:
        places: (stage, layer) -> its metrics.
        modules: the layers by name.
        rule: what is an observation.
        limits: how many of them; looked at in each forward.
        steps: which forwards of the model.
        layout: of sequences.
        selected: layers of whose output a function of the user's returns a part.
        meshes: which layers share their forwards with other processes.

    Attributes:
        order: the layers that have run, in the order of their first run.
        facts: layer -> what its weights say.
        masks: laid beside the model.
        labels: likewise.
        paused: how many times; 0 observes.
        is_merged: whether the states are those of all processes, so that nothing can be added.
        lock: held while anything is added or read.
    """

    def __init__(
        self,
        places: Mapping[tuple[str, str], LayerMetrics],
        modules: Mapping[str, nn.Module],
        rule: ObservationRule,
        limits: Limits,
        steps: Steps,
        layout: Layout,
        selected: Container[str],
        meshes: Meshes,
    ) -> None:
        self.order: list[str] = []
        self.masks = Masks()
        self.labels = Labels()
        self.paused = 0
        self.is_merged = False
        self.lock = threading.RLock()
        self._thread = threading.local()
        self._places = places
        self._rule = rule
        self._limits = limits
        self._steps = steps
        self._layout = layout
        self._told_layout: set[str] = set()
        self._selected = selected
        self.meshes = meshes
        self.facts = {name: self._facts_of(name, module) for name, module in modules.items()}
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def observe(self, name: str, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """What the hooks call; nothing that happens here may end a forward."""
        # In backward this is a checkpoint's recomputation, and the forward has been counted. Inside `select` or
        # another library's metric the model is not the user's run.
        if in_backward() or getattr(self._thread, "observing", False):
            return
        is_idle = bool(self.paused)
        if is_idle and not self.meshes.concerns(output):
            return
        stage = self._steps.stage_of(training)
        if stage is None:
            return
        of_layer = self._places[stage, name]
        if self.is_merged and not is_idle:
            tell(f"layer {name!r} ran inside `merged()`, where states are those of all processes: not observed")
            if not self.meshes.concerns(output):
                return
            is_idle = True
        if of_layer.forwards and self._steps.passes():  # most forwards, where there is a budget
            self._pass(of_layer)
            return
        has_grad = torch.is_grad_enabled()
        with self.lock:
            self._thread.observing = True
            try:
                with self._measuring(of_layer.stage, output), undisturbed(output):
                    self._observe_output(of_layer, module, output, select, has_grad, is_idle)
            except Exception as error:
                is_news = not (of_layer.given_up or is_idle)
                if not is_idle:
                    of_layer.given_up = reason_of(error)
                if is_news:
                    tell(f"layer {name!r} is not observed any more in {of_layer.stage}: {of_layer.given_up}")
            finally:
                self._thread.observing = False

    def _pass(self, of_layer: LayerMetrics) -> None:
        """Count a forward that is not observed, by as few steps as can be: nothing of it is in any cache."""
        with self.lock:
            of_layer.forwards += 1
            of_layer.ran += 1
        if self._steps.budget is not None:
            self._steps.budget.passes(of_layer.stage)

    def _measuring(self, stage: str, output: Any) -> contextlib.AbstractContextManager[None]:
        budget = self._steps.budget
        if budget is None:
            return _NOT_MEASURING
        if self._steps.passes():
            budget.passes(stage)
            return _NOT_MEASURING
        return budget.measuring(stage, output)

    def _observe_output(
        self,
        of_layer: LayerMetrics,
        module: nn.Module,
        output: Any,
        select: Select | None,
        has_grad: bool,
        is_idle: bool,
    ) -> None:
        name, limits, meshes = of_layer.layer, self._limits, self.meshes
        how = how_it_runs(output)
        if how != "run":
            of_layer.transformed = of_layer.transformed or how == "transformed"
            return
        forward = of_layer.forwards
        of_layer.forwards += 1
        of_layer.ran += 1
        if not forward:
            if name not in self.order:
                self.order.append(name)
            self.facts[name] = self._facts_of(name, module)  # a lazy layer has its weights now
            meshes.look(module)
        if of_layer.given_up or of_layer.too_wide:
            is_idle = True
        if limits.max_samples is not None and of_layer.samples >= limits.max_samples:
            is_idle = True
        # Where others may share the forward, what follows depends on nothing but the seed, the stage and the
        # number of the forward, until rows have travelled.
        if is_idle and not meshes.concerns(output):
            return
        if isinstance(output, Unobservable):
            raise LeftOut(output.why)
        if self._steps.leaves_out and not self._steps.observes(of_layer.stage, name, forward):
            return
        chosen, error = output, None
        if select is not None:
            chosen, error = meshes.select(name, output, select)
        if meshes.active or type(chosen) is not Tensor:
            part = meshes.part_of(name, module, chosen, self._layout.dims.get(name))
            if part is not None:
                self._observe_part(of_layer, module, part, forward, has_grad, is_idle or error is not None)
                if error is not None:
                    raise error
                return
        if is_idle:
            return
        batch = self._batch_of(name, module, chosen)
        if of_layer.takes_labels:
            batch = self.labels.join(name, batch, name in self._layout.time_first)
        if limits.max_samples is not None:
            batch = batch.first(limits.max_samples - of_layer.samples)
        if batch.values.numel() == 0:
            return
        of_layer.samples += batch.num_samples
        labelled = batch.labelled()
        observations = batch.observations(self._rule)
        limits.check_width(of_layer, observations.num_features)
        everything = None
        if of_layer.takes_all_rows:
            everything = observations = self._numbered(of_layer, observations, has_grad)
        size, seed = self._draws(of_layer, observations.num_features, batch, forward)
        if size is not None:
            observations = draw(observations, size, seed)
            labelled = None if labelled is None else draw(labelled, size, seed)
        of_layer.update(observations, labelled, self._steps.groups(), batch.values, everything)

    def _observe_part(
        self, of_layer: LayerMetrics, module: nn.Module, part: Part, forward: int, has_grad: bool, is_idle: bool
    ) -> None:
        """Observe what this process gets of an output that is spread over processes.

        Args:
            of_layer: whose output.
            module: the layer.
            part: what this process has of the output.
            forward: number of the forward, which says what is drawn.
            has_grad: whether gradients are recorded.
            is_idle: whether this process only takes part, since others share the forward, and keeps nothing.
        """
        name, limits = of_layer.layer, self._limits
        if is_fake(part.local):
            return
        dims = None
        if name not in self._selected:
            dims = self._layout.dims.get(name) or dim_of(module, of_inputs=self._rule.of_inputs)
            dims = At(dims.find(part.meta()), dims.takes_sequences)

        def make(values: Tensor, with_flags: bool) -> Batch:
            if not with_flags:
                return self._batch(name, module, values, None, dims)
            batch = self._batch_of(name, module, values, dims)
            is_time_first = name in self._layout.time_first
            return self.labels.join(name, batch, is_time_first) if of_layer.takes_labels else batch

        placed = place(part, make, self._rule)
        if placed.whole.labels is not None and placed.batch.labels is None:
            self.labels.note(name, part.shape, fits=False)
        remaining = None if limits.max_samples is None else max(limits.max_samples - of_layer.samples, 0)
        labelled = placed.batch.labelled()
        observations = placed.observations(self._rule, remaining)
        width = placed.whole_width(observations)
        limits.check_width(of_layer, width)
        size, seed = self._draws(of_layer, width, placed.whole, forward)
        if of_layer.folds > 1:
            of_layer.share_with((first_rank(part), dist.get_world_size()))
        everything = None
        if of_layer.takes_all_rows:
            everything = bring(observations, placed, None, seed)
            everything = self._numbered(of_layer, everything, has_grad)
            observations = everything
            if size is not None:
                observations = draw(everything, placed.share(size), seed)
        else:
            observations = bring(observations, placed, size, seed)
        labelled = None if labelled is None else bring(labelled, placed, size, seed)
        groups = self._steps.groups()
        if is_idle:
            of_layer.pass_over(groups)
            return
        of_layer.samples += min(placed.whole.num_samples, sys.maxsize if remaining is None else remaining)
        of_layer.update(observations, labelled, groups, placed.batch.values, everything)

    def _numbered(self, of_layer: LayerMetrics, observations: Observations, has_grad: bool) -> Observations:
        """Observations with the number of their forward and of the optimiser's step, for histories."""
        number = self._steps.forward()
        if number is None:  # the layer is run by itself
            number = of_layer.ran if has_grad or of_layer.stage != "train" else -1
        return replace(observations, forward=number, step=self._steps.step)

    def _draws(self, of_layer: LayerMetrics, width: int, batch: Batch, forward: int) -> tuple[int | None, int]:
        """How many observations to draw of a batch, None for all, and the seed of the draws."""
        rows_per_feature = self._rows_per_feature(of_layer.stage)
        size = batch.limit(self._rule)
        if rows_per_feature is not None:
            size = min(sample_size(rows_per_feature, width), size or sys.maxsize)
        where = f"{self._limits.seed} {of_layer.stage} {of_layer.layer} {of_layer.epoch} {forward}"
        return size, 0 if size is None else zlib.crc32(where.encode())

    def untrained(self, layers: Iterable[str]) -> dict[str, bool | None]:
        """Layer -> whether its weights are as they were initialised; None where it cannot be told."""
        if self._rule.of_inputs:
            return {}
        modules = {name: self._modules[name]() for name in layers if name in self._modules}
        return {name: is_untrained(module) for name, module in modules.items() if module is not None}

    def _rows_per_feature(self, stage: str) -> float | None:
        wanted, budget = self._limits.rows_per_feature, self._steps.budget
        allowed = None if budget is None else budget.rows_per_feature(stage)
        if allowed is None or wanted is None:
            return wanted if allowed is None else allowed
        return min(wanted, allowed)

    def _facts_of(self, name: str, module: nn.Module) -> LayerFacts:
        if self._rule.of_inputs:  # of which the layer's own weights say nothing
            return facts_of(module, is_linear=False)
        is_linear = name not in self._selected and self._rule.feature_maps in ("positions", "mean")
        return facts_of(module, is_linear=is_linear and self._rule.sequences != "flatten")

    def _batch(
        self, name: str, module: nn.Module, output: Any, mask: Tensor | None, dims: FeatureDim | None = None
    ) -> Batch:
        is_selected, time_first = name in self._selected, name in self._layout.time_first
        dims = self._layout.dims.get(name) if dims is None else dims
        return self._rule.batch(None if is_selected else module, output, mask, time_first, dims)

    def _batch_of(self, name: str, module: nn.Module, output: Any, dims: FeatureDim | None = None) -> Batch:
        """The output with samples first, as its layer's type, its surroundings and the mask tell."""
        batch = self._batch(name, module, output, self.masks.value, dims)
        self.masks.met(name, batch)
        if name not in self._told_layout and (doubt := self._doubt(name, batch)):
            self._told_layout.add(name)
            tell(doubt)
        return batch

    def _doubt(self, name: str, batch: Batch) -> str:
        """What is to be said of a layout that nothing tells for sure."""
        values = batch.values
        if batch.guessed_dim is not None:
            width = values.shape[2 if batch.kind == "sequence" else 1]
            return (
                f"nothing tells where the features of {name!r} are: dimension {batch.guessed_dim} of"
                f" {values.ndim}, of size {width}, is taken. Call register_layer for its type, or give a"
                " `select` for this layer, or batch_first=True if it is a sequence (N, T, D)"
            )
        if name not in self._layout.unsure:
            return ""
        if batch.was_flat:
            taken = f"(N, T) = {tuple(values.shape[:2])}, flattened,"
        elif batch.kind == "sequence" and batch.valid is None and self._rule.sequences != "timesteps":
            taken = f"(N, T, D) = {tuple(values.shape)},"
        else:
            return ""
        return (
            f"the output of {name!r} is taken as {taken} but parts of this model have time first: give the"
            " probe batch_first=True or False, or a `select` for this layer"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nothing runs; a lock cannot be copied, and what lies beside a model belongs to the original.
        state = self.__dict__.copy()
        state.update(lock=None, _thread=None, masks=Masks(), labels=Labels(), _modules={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self._thread = threading.local()
