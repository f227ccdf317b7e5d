"""The core on one page: a hook, an observation, a metric.

A forward hook passes its layer's output to :meth:`Core.observe`. The rows of the output are observations, and
the metrics of the layer add them to their sums. For a plain eager model this is all:

>>> from spectralmetrics import SaturationMetric
>>> from spectralmetrics.metrics.groups import collect
>>> layer = nn.Linear(4, 3)
>>> metrics = LayerMetrics("train", "fc", collect({"saturation": SaturationMetric()}), 0)
>>> core = Core({("train", "fc"): metrics}, ObservationRule(), Limits(), Steps(1, 0), Alone())
>>> def hook(module, args, output):
...     core.observe("fc", module, output, module.training, None)
>>> handle = layer.register_forward_hook(hook)
>>> output = layer(torch.randn(100, 4))
>>> torch.equal(metrics.collection["saturation"].compute(), SaturationMetric()(output))
True

Everything else is in other files and joins at one of these seams, which :class:`~.routing.Router` fills:

- ``steps``: stages, sampling and budgets; ``limits``: how many rows and features;
- ``meshes``: processes that share the forwards of a layer;
- ``observe``: forwards that are not observed, in few steps; ``_around``: the time that observing takes;
- ``take_again``: outputs like the last one, in few steps;
- ``_begin``: checks in the first forward of a layer;
- ``_moment``: sampling, histories, folds, masks and labels;
- ``_route``: outputs that are selected, spread over processes, or of experts;
- ``_batch``: layouts, masks, labels, context parallelism;
- ``take``: gradients, which arrive later.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spectralmetrics.probing.collections import LayerMetrics, Places
from spectralmetrics.probing.hooks import Select, how_it_runs, undisturbed, warn_user
from spectralmetrics.probing.meshes import Alone, Meshes
from spectralmetrics.probing.parts import reason_of
from spectralmetrics.probing.rules import Batch, ObservationRule, Plain
from spectralmetrics.probing.sampling import Limits, draw
from spectralmetrics.probing.steps import Moment, Steps
from spectralmetrics.sums.observations import of_forward
from spectralmetrics.torch_private import in_backward


class Core:
    """Turns layers' outputs into observations, and passes them to the metrics of the layer and stage.

    Attributes:
        places: (stage, layer) -> its metrics.
        rule: the rule that makes observations from outputs.
        paused: the number of pauses in force; 0 observes.
        is_merged: True while the states are merged over processes, so that nothing can be added.
        lock: held while observations are added or read.
    """

    def __init__(
        self, places: Places, rule: ObservationRule, limits: Limits, steps: Steps, meshes: Meshes | Alone
    ) -> None:
        self.places, self.rule, self.limits, self.steps, self.meshes = places, rule, limits, steps, meshes
        self.paused, self.is_merged = 0, False
        self.lock, self.thread = threading.RLock(), steps.thread
        self.plain: dict[str, Plain | None] = {}  # layer -> the form of its last output

    def observe(self, name: str, module: nn.Module, output: Any, training: bool, select: Select | None) -> Any:
        """Observe an output; hooks call this, so that an error here must not end a forward."""
        is_idle = self.paused > 0
        if is_idle and not self.meshes.concerns(output):
            return None
        # In backward this is a checkpoint's recomputation, and the forward has been counted.
        if self.thread.here.is_observing or in_backward():
            return None
        stage = self.steps.stage_of(training)
        if stage is None:
            return None
        if self.is_merged and not is_idle:
            is_idle = self._is_closed(name)
            if not self.meshes.concerns(output):
                return None
        has_grad = torch.is_grad_enabled()
        return self.guard(stage, name, output, is_idle, self.take, module, output, select, has_grad)

    def guard(
        self, stage: str, name: str, values: Any, is_idle: bool, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Call a function with a layer's metrics, ``is_idle`` and other arguments; an error gives up the layer.

        ``is_idle`` is True if this process only takes part in a forward that other processes observe.
        """
        of_layer, here = self.places[stage, name], self.thread.here
        with self.lock:
            here.is_observing = True
            try:
                with self._around(stage, values):
                    return function(of_layer, is_idle, *arguments)
            except Exception as error:
                is_news = not (of_layer.given_up or is_idle)
                if not is_idle:
                    of_layer.given_up = reason_of(error)
                if is_news:
                    warn_user(f"layer {name!r} is not observed any more in {stage}: {of_layer.given_up}")
            finally:
                here.is_observing = False
        return None

    def take(
        self, of_layer: LayerMetrics, is_idle: bool, module: nn.Module, output: Any, select: Any, has_grad: bool
    ) -> Any:
        """Pass the output of a layer to its metrics."""
        if select is None and not (is_idle or self.meshes.active) and self.take_again(of_layer, output):
            return None
        moment = self.enter(of_layer, is_idle, module, output, has_grad)
        if moment is not None:
            self._route(of_layer, module, output, select, moment)
        return None

    def enter(
        self, of_layer: LayerMetrics, is_idle: bool, module: nn.Module, output: Any, has_grad: bool
    ) -> Moment | None:
        """Count a forward; None if it is not observed."""
        how = how_it_runs(output)
        if how != "run":
            of_layer.transformed = of_layer.transformed or how == "transformed"
            return None
        forward = of_layer.forwards
        of_layer.forwards += 1
        of_layer.ran += 1
        if not forward:
            self._begin(of_layer, module)
        is_idle = is_idle or self.limits.keeps_nothing(of_layer)
        # If other processes may share the forward, the next steps must depend only on the seed, the stage and
        # the number of the forward, until rows are exchanged.
        if is_idle and not self.meshes.concerns(output):
            return None
        return self._moment(of_layer, output, forward, has_grad, is_idle)

    def take_rows(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> None:
        """Pass the rows of an output to the metrics."""
        limits = self.limits
        batch, room = self._batch(of_layer, module, output, moment), limits.room(of_layer)
        if room is not None:
            batch = batch.first(room)
        if batch.values.numel() == 0:
            return
        of_layer.samples += batch.num_samples
        labelled, observations, limit = batch.labelled(), batch.observations(self.rule), batch.limit(self.rule)
        self.plain[of_layer.layer] = Plain.of(output, batch, observations, limit)
        limits.check_width(of_layer, observations.num_features)
        if moment.number is not None:
            observations = of_forward(observations, moment.number, moment.step)
        width, allowed = observations.num_features, self.steps.rows_per_feature
        size, seed = limits.draws(of_layer, width, limit, moment.forward, allowed)
        everything = None
        if size is not None:
            everything, observations = observations, draw(observations, size, seed)
            labelled = None if labelled is None else draw(labelled, size, seed)
        of_layer.update(observations, labelled, moment.groups, batch.values, everything)

    def _is_closed(self, name: str) -> bool:
        """True if nothing can be added to the sums of a layer; warns of it."""
        if self.is_merged:
            warn_user(f"layer {name!r} ran inside `merged()`, where its states are merged: it is not observed")
        return self.is_merged

    def take_again(self, of_layer: LayerMetrics, output: Any) -> bool:
        """Take an output in few steps if it is like the last one of its layer; return True if it was taken."""
        return False

    # -- seams, as a plain eager model needs them --------------------------------------------------------

    def _around(self, stage: str, output: Any) -> contextlib.AbstractContextManager[None]:
        return undisturbed(output)

    def _begin(self, of_layer: LayerMetrics, module: nn.Module) -> None:
        pass

    def _moment(
        self, of_layer: LayerMetrics, output: Any, forward: int, has_grad: bool, is_idle: bool
    ) -> Moment | None:
        return Moment(forward, {})

    def _route(
        self, of_layer: LayerMetrics, module: nn.Module, output: Any, select: Select | None, moment: Moment
    ) -> None:
        self.take_rows(of_layer, module, output if select is None else select(output), moment)

    def _batch(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> Batch:
        return self.rule.batch(module, output)
