"""Adds sampling, budgets, experts, and outputs of other kinds to :class:`.Core`."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from spectralmetrics.findings import is_untrained
from spectralmetrics.probing.collections import LayerMetrics, Places
from spectralmetrics.probing.compilation import Unobservable
from spectralmetrics.probing.experts import Calls, Expert, Pairs, Watched
from spectralmetrics.probing.facts import GradientFacts, LayerFacts, facts_of
from spectralmetrics.probing.hooks import Select, how_it_runs, undisturbed
from spectralmetrics.probing.layout import Layout
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.parts import LeftOut, reason_of
from spectralmetrics.probing.routed import Routed
from spectralmetrics.probing.rules import ObservationRule
from spectralmetrics.probing.steps import Moment, Steps
from spectralmetrics.probing.taking import Rows
from spectralmetrics.torch_private import in_backward


class Router(Rows):
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
        super().__init__(places, rule, limits, steps, meshes, layout, selected)
        self.order: list[str] = []
        self.facts = {name: self._facts_of(name, module) for name, module in modules.items()}
        self.modules = {name: weakref.ref(module) for name, module in modules.items()}

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
                size, seed = self.most(stage, calls.states.shape[-1], f"{watched.name} {watched.forwards}")
                number = len(next(module.parameters(recurse=False))) // spread.travels.size
                if size is not None and any(place.takes_all_rows for place in self.places.values()):
                    calls.whole = copy.copy(calls)
                    calls.whole.travel(spread.travels, number, None, seed)
                calls.travel(spread.travels, number, size, seed)
        return calls

    def _passes(self, stage: str, name: str) -> bool:
        of_layer = self.places[stage, name]
        if not of_layer.forwards or self.is_merged:
            return False
        with self.lock:
            of_layer.forwards += 1
            of_layer.ran += 1
        if self.steps.budget is not None:
            self.steps.budget.passes(stage)
        return True

    def _around(self, stage: str, output: Any) -> contextlib.AbstractContextManager[None]:
        budget = self.steps.budget
        if budget is None:
            return undisturbed(output)
        if self.steps.passes():
            budget.passes(stage)
            return undisturbed(output)
        return budget.measuring(stage, output, undisturbed(output))

    def _route(
        self, of_layer: LayerMetrics, module: nn.Module, output: Any, select: Select | None, moment: Moment
    ) -> None:
        meshes, name = self.meshes, of_layer.layer
        if isinstance(output, Pairs):
            if output.splits or not moment.is_idle:
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

    def _begin(self, of_layer: LayerMetrics, module: nn.Module) -> None:
        name = of_layer.layer
        if name not in self.order:
            self.order.append(name)
        self.facts[name] = self._facts_of(name, module)  # a lazy layer has its weights now
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
                    number = steps.alone_after(of_layer.ran, of_layer.stage)
            of_layer.ran = number if number >= 0 else of_layer.ran
        beside = self.masks.value, self.labels.value
        return Moment(forward, steps.groups(), number, steps.step, *beside, is_idle, call)

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
        return {**super().__getstate__(), "lock": None, "thread": None, "modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self.thread = self.steps.thread
