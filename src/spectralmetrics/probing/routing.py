"""Adds sampling, budgets, masks, labels, layouts, and outputs of other kinds to :class:`.Core`."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.parameters import is_untrained
from spectralmetrics.probing.beside import Labels, Masks
from spectralmetrics.probing.collections import LayerMetrics, Places
from spectralmetrics.probing.experts import Expert, Pairs
from spectralmetrics.probing.facts import GradientFacts, LayerFacts, facts_of
from spectralmetrics.probing.hooks import Select, runs, undisturbed, warn_user
from spectralmetrics.probing.layout import At, FeatureDim, Layout, dim_of
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.mixtures import Mixtures
from spectralmetrics.probing.outputs import Unobservable
from spectralmetrics.probing.parts import LeftOut, Part, first_rank
from spectralmetrics.probing.placement import bring, has_some_positions, place, whole_sample_setting
from spectralmetrics.probing.processes import is_one_of_several
from spectralmetrics.probing.rules import Batch, ObservationRule
from spectralmetrics.probing.sampling import Limits, draw
from spectralmetrics.probing.steps import Moment, Steps
from spectralmetrics.sums.observations import of_forward, plain_observations
from spectralmetrics.torch_private import in_backward, is_context_parallel, is_fake


class Router(Mixtures):
    """Routes every output of a model's layers to its metrics, see :class:`.Core`.

    Args:
        places: (stage, layer) -> its metrics.
        modules: the layers by name.
        rule: the rule that makes observations from outputs.
        limits: the limits of rows and features; read in each forward.
        steps: decides which forwards of the model are observed.
        layout: the layout of sequences.
        selected: layers for which the user gave a ``select`` function.
        meshes: finds the layers that share their forwards with other processes.

    Attributes:
        order: the layers that have run, in the order of their first run.
        facts: layer -> its facts, read from its weights.
        masks, labels: the masks and the labels in use.
    """

    def __init__(
        self,
        places: Places,
        modules: Mapping[str, nn.Module],
        rule: ObservationRule,
        limits: Limits,
        steps: Steps,
        layout: Layout,
        selected: Container[str],
        meshes: Meshes,
    ) -> None:
        super().__init__(places, rule, limits, steps, meshes)
        self.masks, self.labels = Masks(), Labels()
        self.layout, self.selected = layout, selected
        self._warned_layout: set[str] = set()  # layers with a warning about their layout
        self.order: list[str] = []
        self.facts = {name: self._facts_of(name, module) for name, module in modules.items()}
        self.modules = {name: weakref.ref(module) for name, module in modules.items()}

    def observe(self, name: str, module: nn.Module, output: Any, training: bool, select: Select | None) -> Any:
        """See :meth:`.Core.observe`; counts an output of a forward that is not observed in few steps."""
        if self.paused and not self.meshes.concerns(output):
            return None
        current = self.thread.here.current
        if current is None or current.is_observed or self.paused or self.is_merged or in_backward():
            return super().observe(name, module, output, training, select)
        of_layer = self.places.get((current.stages[training], name))
        if of_layer is None or not of_layer.forwards:
            return super().observe(name, module, output, training, select)
        # Without the lock: a count that two threads lose changes nothing but the rows that are drawn next.
        of_layer.forwards += 1
        of_layer.ran += 1
        if current.is_news and self.steps.budget is not None:
            current.is_news = False
            self.steps.budget.passes(current.stage)
        return None

    def _around(self, stage: str, output: Any) -> contextlib.AbstractContextManager[None]:
        budget = self.steps.budget
        if budget is None:
            return undisturbed(output)
        if self.steps.passes():
            budget.passes(stage)
            return undisturbed(output)
        return budget.measuring(stage, output, undisturbed(output))

    def _begin(self, of_layer: LayerMetrics, module: nn.Module) -> None:
        name = of_layer.layer
        if name not in self.order:
            self.order.append(name)
        self.facts[name] = self._facts_of(name, module)  # a lazy layer has its weights now
        if is_one_of_several():
            self.meshes.search(module.whole if isinstance(module, Expert) else module)
            self.meshes.agree(name)

    def _moment(
        self, of_layer: LayerMetrics, output: Any, forward: int, has_grad: bool, is_idle: bool
    ) -> Moment | None:
        if isinstance(output, Unobservable):
            raise LeftOut(output.why)
        steps = self.steps
        call = steps.call(of_layer.layer) if self.meshes.active else 0
        if steps.leaves_out and not steps.observes(of_layer.stage, of_layer.layer, forward):
            return None
        number = None
        if of_layer.takes_all_rows:
            number = steps.forward()
            if number is None:  # the layer is run by itself
                number = -1
                if has_grad or of_layer.stage != "train":
                    of_layer.ran = steps.alone_after(of_layer.ran, of_layer.stage)
                    number = steps.first_in_step(of_layer.ran, of_layer.stage, of_layer.layer)
            elif number >= 0:
                of_layer.ran = number
        mask = self.masks.value if self.masks.given else None
        labels = self.labels.value if self.labels.given else None
        return Moment(forward, steps.groups(), number, steps.step, mask, labels, is_idle, call)

    def _route(
        self, of_layer: LayerMetrics, module: nn.Module, output: Any, select: Select | None, moment: Moment
    ) -> None:
        meshes, name = self.meshes, of_layer.layer
        if isinstance(output, Pairs):
            if output.calls.splits or not moment.is_idle:
                self.take_pairs(of_layer, output, moment)
            return
        chosen, error = output, None
        if select is not None:
            chosen, error = meshes.selecting.select(name, output, select)
        if meshes.active or type(chosen) is not Tensor:
            part = meshes.part_of(name, module, chosen, self.layout.dims.get(name), moment.call)
            if part is not None:
                self.take_part(of_layer, module, part, moment, moment.is_idle or error is not None)
                if error is not None:
                    raise error
                return
        if not moment.is_idle:
            self.take_rows(of_layer, module, chosen, moment)

    def take_again(self, of_layer: LayerMetrics, output: Any) -> bool:
        """Take an output as :meth:`.Core.take_rows` would; see :meth:`.Core.take_again`."""
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
        allowed = self.steps.rows_per_feature
        size, seed = limits.draws(of_layer, plain.width, plain.limit, forward, allowed)
        of_layer.update(observations if size is None else draw(observations, size, seed))
        return True

    def _batch(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> Batch:
        batch = self.batch_of(of_layer, module, output, moment)
        if not is_context_parallel() or not has_some_positions(batch):
            return batch
        if how := whole_sample_setting(batch, self.rule):
            raise LeftOut(
                f"{how} needs whole samples, of which each process has some positions inside context_parallel."
                " Take every position (sequences='timesteps', feature_maps='positions')"
            )
        if batch.labels is not None and batch.labels.ndim == 1:  # of whole samples
            self.labels.note(of_layer.layer, tuple(batch.values.shape), fits=False)
            return replace(batch, labels=None)
        return batch

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
        if moment.mask is not None and moment.mask is self.masks.value:  # otherwise the forward has noted it
            self.masks.note_fit(name, batch)
        if name not in self._warned_layout and (doubt := _doubt_of(name, batch, self.layout, self.rule)):
            self._warned_layout.add(name)
            warn_user(doubt)
        if of_layer.takes_labels and moment.labels is not None:
            batch = self.labels.join(name, batch, moment.labels, name in self.layout.time_first)
        return batch

    def _plain_batch(
        self, name: str, module: nn.Module, output: Any, mask: Tensor | None, dims: FeatureDim | None = None
    ) -> Batch:
        is_selected, time_first = name in self.selected, name in self.layout.time_first
        dims = self.layout.dims.get(name) if dims is None else dims
        return self.rule.batch(None if is_selected else module, output, mask, time_first, dims)

    def take_part(
        self, of_layer: LayerMetrics, module: nn.Module, part: Part, moment: Moment, is_idle: bool
    ) -> None:
        """Pass this process' rows of an output that is spread over processes to the metrics.

        A process that ``is_idle`` keeps nothing and only takes part, since others share the forward.
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
        most, allowed = placed.whole.limit(self.rule), self.steps.rows_per_feature
        size, seed = limits.draws(of_layer, width, most, moment.forward, allowed)
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

    def untrained(self, layers: Iterable[str]) -> dict[str, bool | None]:
        """Layer -> True if its weights are as they were initialised; None if that is unknown."""
        if self.rule.observe != "outputs":
            return {}
        modules = {name: self.modules[name]() for name in layers if name in self.modules}
        return {name: is_untrained(module) for name, module in modules.items() if module is not None}

    def _facts_of(self, name: str, module: nn.Module) -> LayerFacts:
        if self.rule.observe != "outputs":  # the layer's own weights do not bound inputs or gradients
            facts = facts_of(module, is_linear=False)
            return GradientFacts(*facts) if self.rule.observe == "gradients" else facts
        is_linear = name not in self.selected and self.rule.feature_maps in ("positions", "mean")
        return facts_of(module, is_linear=is_linear and self.rule.sequences != "flatten")

    def __getstate__(self) -> dict[str, Any]:
        # The layers of a copy do not run, and a lock cannot be copied.
        return {**self.__dict__, "lock": None, "thread": None, "modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self.thread = self.steps.thread


def _doubt_of(name: str, batch: Batch, layout: Layout, rule: ObservationRule) -> str:
    """A warning that the layout of an output is uncertain; empty if it is certain."""
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
