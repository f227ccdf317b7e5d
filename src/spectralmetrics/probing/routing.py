"""From a layer's output to the metrics of that layer, as observations: what the hooks of a probe call."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectralmetrics.findings import is_untrained
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.compilation import Unobservable
from spectralmetrics.probing.experts import Calls, Expert, Pairs, Watched
from spectralmetrics.probing.facts import GradientFacts, LayerFacts, facts_of
from spectralmetrics.probing.hooks import Select, how_it_runs, tell, undisturbed
from spectralmetrics.probing.layout import Layout
from spectralmetrics.probing.limits import Limits
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.observations import ObservationRule
from spectralmetrics.probing.parts import LeftOut, reason_of
from spectralmetrics.probing.routed import Routed
from spectralmetrics.probing.steps import Steps
from spectralmetrics.probing.taking import Moment, Rows
from spectralmetrics.torch_private import in_backward

T = TypeVar("T")
_NOT_MEASURING = contextlib.nullcontext()


class _Thread(threading.local):
    """What each thread knows for itself: whether it observes."""

    observing = False


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
        rows: of what is observed.
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
        self.paused = 0
        self.is_merged = False
        self.lock = threading.RLock()
        self._thread = _Thread()
        self._places = places
        self._rule = rule
        self._limits = limits
        self._steps = steps
        self._layout = layout
        self._selected = selected
        self.meshes = meshes
        self.rows = Rows(rule, limits, steps, layout, selected, meshes.alike)
        self.facts = {name: self._facts_of(name, module) for name, module in modules.items()}
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def observe(self, name: str, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """What the hooks call; nothing that happens here may end a forward."""
        # In backward this is a checkpoint's recomputation, and the forward has been counted.
        if in_backward() or self._thread.observing:
            return
        is_idle = self.paused > 0
        if is_idle and not self.meshes.concerns(output):
            return
        stage = self._steps.stage_of(training)
        if stage is None or self._passes(stage, name):
            return
        is_idle = is_idle or self._is_closed(name)
        if is_idle and not self.meshes.concerns(output):
            return
        has_grad = torch.is_grad_enabled()
        self._guard(
            stage,
            name,
            output,
            self._observe_output,
            module,
            output,
            select,
            has_grad,
            is_idle,
            is_idle=is_idle,
        )

    def observe_experts(
        self, watched: Watched, module: nn.Module, output: Any, training: bool, select: Select | None
    ) -> None:
        """What the hook of a module of experts calls; see :meth:`observe`, with each expert as a layer."""
        if in_backward() or self._is_observing():
            return
        stage = self._steps.stage_of(training)
        if stage is None:
            return
        shown: Iterable[tuple[str, Expert, Any]]
        routed = output
        try:
            routed = output if select is None else select(output)
            shown = watched.shown(self._calls(watched, module, routed, stage))
        except Exception as error:
            why = routed if isinstance(routed, Unobservable) else Unobservable(reason_of(error))
            shown = [(name, expert, why) for name, expert in watched.experts.items()]
        for name, expert, pairs in shown:
            self.observe(name, expert, pairs, training, None)

    def _calls(self, watched: Watched, module: nn.Module, routed: Routed, stage: str) -> Calls:
        """What experts get in a forward, whose tokens may come from other processes; all of these call it."""
        calls = Calls(watched.name, watched.number, module, routed, self.rows.masks, self.rows.labels)
        self.meshes.look(module)  # before anything else asks, since what FSDP2 shards is whole now
        if how_it_runs(calls.states) != "run" or not self.meshes.shares():
            return calls
        with self.lock, undisturbed(calls.states):
            spread = self.meshes.spread_of_experts(module, calls.states)
            calls.splits = spread.splits
            watched.forwards += 1
            if spread.travels is not None and not self._steps.passes():
                takes_all = any(place.takes_all_rows for place in self._places.values())
                size, seed = self.rows.most(stage, calls.states.shape[-1], f"{watched.name} {watched.forwards}")
                number = len(next(module.parameters(recurse=False))) // spread.travels.size
                calls.travel(spread.travels, number, None if takes_all else size, seed)
        return calls

    def _is_closed(self, name: str) -> bool:
        """Whether nothing can be added to the sums of a layer, which is said."""
        if self.is_merged:
            tell(f"layer {name!r} ran inside `merged()`, where states are those of all processes: not observed")
        return self.is_merged

    def _is_observing(self) -> bool:
        """Whether `select` or a metric of another library runs, where the model is not the user's run."""
        return self._thread.observing

    def _guard(
        self,
        stage: str,
        name: str,
        values: Any,
        function: Callable[..., T],
        *arguments: Any,
        is_idle: bool = False,
    ) -> T | None:
        """What a function of a layer's metrics and other arguments returns; what it raises ends that layer.

        Args:
            stage: whose metrics.
            name: of the layer.
            values: that are looked at.
            function: called with the metrics first.
            arguments: the others.
            is_idle: whether this process only takes part in what others observe.
        """
        of_layer = self._places[stage, name]
        if not is_idle and self._is_closed(name):
            return None
        with self.lock:
            self._thread.observing = True
            try:
                with self._measuring(of_layer.stage, values), undisturbed(values):
                    return function(of_layer, *arguments)
            except Exception as error:
                is_news = not (of_layer.given_up or is_idle)
                if not is_idle:
                    of_layer.given_up = reason_of(error)
                if is_news:
                    tell(f"layer {name!r} is not observed any more in {of_layer.stage}: {of_layer.given_up}")
            finally:
                self._thread.observing = False
        return None

    def _passes(self, stage: str, name: str) -> bool:
        """Whether a forward is not observed. Counts it in few steps: nothing of it is in any cache."""
        current = self._steps.running.current
        if current is None or current.is_observed or self.is_merged:
            return False
        of_layer = self._places[stage, name]
        if not of_layer.forwards:
            return False
        with self.lock:
            of_layer.forwards += 1
            of_layer.ran += 1
        if self._steps.budget is not None:
            self._steps.budget.passes(of_layer.stage)
        return True

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
        if select is None and not (is_idle or self.meshes.active) and self.rows.take_again(of_layer, output):
            return
        moment = self._enter(of_layer, module, output, has_grad, is_idle)
        if moment is None:
            return
        meshes, name = self.meshes, of_layer.layer
        if isinstance(output, Pairs):
            if output.splits or not moment.is_idle:
                self.rows.take_pairs(of_layer, output, moment)
            return
        chosen, error = output, None
        if select is not None:
            chosen, error = meshes.selecting.select(name, output, select)
        if meshes.active or type(chosen) is not Tensor:
            part = meshes.part_of(name, module, chosen, self._layout.dims.get(name))
            if part is not None:
                self.rows.take_part(of_layer, module, part, moment, moment.is_idle or error is not None)
                if error is not None:
                    raise error
                return
        if not moment.is_idle:
            self.rows.take(of_layer, module, chosen, moment)

    def _enter(
        self, of_layer: LayerMetrics, module: nn.Module, output: Any, has_grad: bool, is_idle: bool = False
    ) -> Moment | None:
        """Count a forward; None if it is not observed."""
        name, limits = of_layer.layer, self._limits
        how = how_it_runs(output)
        if how != "run":
            of_layer.transformed = of_layer.transformed or how == "transformed"
            return None
        forward = of_layer.forwards
        of_layer.forwards += 1
        of_layer.ran += 1
        if not forward:
            if name not in self.order:
                self.order.append(name)
            self.facts[name] = self._facts_of(name, module)  # a lazy layer has its weights now
            self.meshes.look(module.whole if isinstance(module, Expert) else module)
            self.meshes.agree(name)
        if of_layer.given_up or of_layer.too_wide:
            is_idle = True
        if limits.max_samples is not None and of_layer.samples >= limits.max_samples:
            is_idle = True
        # Where others may share the forward, what follows depends on nothing but the seed, the stage and the
        # number of the forward, until rows have travelled.
        if is_idle and not self.meshes.concerns(output):
            return None
        if isinstance(output, Unobservable):
            raise LeftOut(output.why)
        if self._steps.leaves_out and not self._steps.observes(of_layer.stage, name, forward):
            return None
        number = None
        if of_layer.takes_all_rows:
            number = self._steps.forward()
            if number is None:  # the layer is run by itself
                number = of_layer.ran if has_grad or of_layer.stage != "train" else -1
        steps = self._steps
        beside = self.rows.masks.value, self.rows.labels.value
        return Moment(forward, number, steps.step, steps.groups(), *beside, is_idle)

    def untrained(self, layers: Iterable[str]) -> dict[str, bool | None]:
        """Layer -> whether its weights are as they were initialised; None where it cannot be told."""
        if self._rule.observe != "outputs":
            return {}
        modules = {name: self._modules[name]() for name in layers if name in self._modules}
        return {name: is_untrained(module) for name, module in modules.items() if module is not None}

    def _facts_of(self, name: str, module: nn.Module) -> LayerFacts:
        if self._rule.observe != "outputs":  # of which the layer's own weights say nothing
            facts = facts_of(module, is_linear=False)
            return GradientFacts(*facts) if self._rule.observe == "gradients" else facts
        is_linear = name not in self._selected and self._rule.feature_maps in ("positions", "mean")
        return facts_of(module, is_linear=is_linear and self._rule.sequences != "flatten")

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nothing runs, and a lock cannot be copied.
        state = self.__dict__.copy()
        state.update(lock=None, _thread=None, _modules={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self._thread = _Thread()
