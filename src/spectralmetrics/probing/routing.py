"""From a layer's output to the metrics of that layer, as observations: what the hooks of a probe call."""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from spectralmetrics.findings import is_untrained
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.compilation import Unobservable
from spectralmetrics.probing.facts import GradientFacts, LayerFacts, facts_of
from spectralmetrics.probing.hooks import Select, how_it_runs, tell, undisturbed
from spectralmetrics.probing.labelling import Labels
from spectralmetrics.probing.layout import Layout
from spectralmetrics.probing.masking import Masks
from spectralmetrics.probing.observations import Batch, ObservationRule
from spectralmetrics.probing.sampling import draw, sample_size
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.checks import check_positive_integer, check_seed
from spectralmetrics.torch_private import in_backward

T = TypeVar("T")
_NOT_MEASURING = contextlib.nullcontext()


@dataclass
class Limits:
    """How much of what a layer puts out is observed; see :class:`~spectralmetrics.LayerProbe`."""

    max_samples: int | None = None
    rows_per_feature: float | None = None
    max_features: int = 8192
    sketch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integer("max_features", self.max_features)
        check_positive_integer("sketch_size", self.sketch_size, or_none=True)
        check_positive_integer("max_samples", self.max_samples, or_none=True)
        check_seed(self.seed)
        rows = self.rows_per_feature
        if rows is not None and not (isinstance(rows, numbers.Real) and 0 < rows < math.inf):
            raise ValueError(f"expected rows_per_feature to be a positive number or None, got {rows!r}")


class Moment(NamedTuple):
    """What belongs to one forward of a layer besides its output.

    Attributes:
        forward: number of the forward, of the layer and since the last reset; decides which rows are drawn.
        number: number of the model's forward for histories; None where no metric keeps one.
        step: step of the optimiser.
        groups: see :meth:`.Steps.groups`.
        mask: laid beside the model.
        labels: likewise.
    """

    forward: int
    number: int | None
    step: int | None
    groups: dict[int, int]
    mask: Tensor | None
    labels: Tensor | None


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
        self.facts = {name: self._facts_of(name, module) for name, module in modules.items()}
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def observe(self, name: str, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """What the hooks call; nothing that happens here may end a forward."""
        # In backward this is a checkpoint's recomputation, and the forward has been counted.
        if self.paused or in_backward() or self._is_observing():
            return
        stage = self._steps.stage_of(training)
        if stage is not None and not self._passes(stage, name):
            has_grad = torch.is_grad_enabled()
            self._guard(stage, name, output, self._observe_output, module, output, select, has_grad)

    def _is_observing(self) -> bool:
        """Whether `select` or a metric of another library runs, where the model is not the user's run."""
        return getattr(self._thread, "observing", False)

    def _guard(
        self, stage: str, name: str, values: Any, function: Callable[..., T], *arguments: Any
    ) -> T | None:
        """What a function of a layer's metrics and other arguments returns; what it raises ends that layer.

        Args:
            stage: whose metrics.
            name: of the layer.
            values: that are looked at.
            function: called with the metrics first.
            arguments: the others.
        """
        of_layer = self._places[stage, name]
        if self.is_merged:
            tell(f"layer {name!r} ran inside `merged()`, where states are those of all processes: not observed")
            return None
        with self.lock:
            self._thread.observing = True
            try:
                with self._measuring(of_layer.stage, values), undisturbed(values):
                    return function(of_layer, *arguments)
            except Exception as error:
                is_news = not of_layer.given_up
                kind = "" if isinstance(error, LeftOut) else f"{type(error).__name__}: "
                of_layer.given_up = f"{kind}{error}"
                if is_news:
                    tell(f"layer {name!r} is not observed any more in {of_layer.stage}: {of_layer.given_up}")
            finally:
                self._thread.observing = False
        return None

    def _passes(self, stage: str, name: str) -> bool:
        """Whether a forward is not observed. Counts it in few steps: nothing of it is in any cache."""
        of_layer = self._places[stage, name]
        if self.is_merged or not of_layer.forwards or not self._steps.passes():
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
        self, of_layer: LayerMetrics, module: nn.Module, output: Any, select: Select | None, has_grad: bool
    ) -> None:
        moment = self._enter(of_layer, module, output, has_grad)
        if moment is not None:
            self._take(of_layer, module, output if select is None else select(output), moment)

    def _enter(self, of_layer: LayerMetrics, module: nn.Module, output: Any, has_grad: bool) -> Moment | None:
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
        if of_layer.given_up or of_layer.too_wide:
            return None
        if isinstance(output, Unobservable):
            raise LeftOut(output.why)
        if self._steps.leaves_out and not self._steps.observes(of_layer.stage, name, forward):
            return None
        if limits.max_samples is not None and of_layer.samples >= limits.max_samples:
            return None
        number = None
        if of_layer.takes_all_rows:
            number = self._steps.forward()
            if number is None:  # the layer is run by itself
                number = of_layer.ran if has_grad or of_layer.stage != "train" else -1
        steps = self._steps
        return Moment(forward, number, steps.step, steps.groups(), self.masks.value, self.labels.value)

    def _take(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> None:
        """Hand the rows of an output to the metrics."""
        name, limits = of_layer.layer, self._limits
        batch = self._batch_of(of_layer, module, output, moment)
        if limits.max_samples is not None:
            batch = batch.first(limits.max_samples - of_layer.samples)
        if batch.values.numel() == 0:
            return
        of_layer.samples += batch.num_samples
        labelled = batch.labelled()
        observations = batch.observations(self._rule)
        width = observations.num_features
        if width > limits.max_features and of_layer.keeps_matrices and not of_layer.is_sketched:
            if limits.sketch_size is None:
                of_layer.too_wide = True
                raise LeftOut(
                    f"{width} features exceed max_features={limits.max_features}; their covariance would take"
                    f" {8 * width**2 / 2**30:.1f} GiB, a sketch (sketch_size=512)"
                    f" {8 * width * 512 / 2**30:.2g} GiB"
                )
            of_layer.sketch(limits.sketch_size)
        everything = None
        if moment.number is not None:
            everything = observations = replace(observations, forward=moment.number, step=moment.step)
        rows_per_feature = self._rows_per_feature(of_layer.stage)
        size = batch.limit(self._rule)
        if rows_per_feature is not None:
            size = min(sample_size(rows_per_feature, width), size or sys.maxsize)
        if size is not None:
            seed = zlib.crc32(
                f"{limits.seed} {of_layer.stage} {name} {of_layer.epoch} {moment.forward}".encode()
            )
            observations = draw(observations, size, seed)
            labelled = None if labelled is None else draw(labelled, size, seed)
        of_layer.update(observations, labelled, moment.groups, batch.values, everything)

    def untrained(self, layers: Iterable[str]) -> dict[str, bool | None]:
        """Layer -> whether its weights are as they were initialised; None where it cannot be told."""
        if self._rule.observe != "outputs":
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
        if self._rule.observe != "outputs":  # of which the layer's own weights say nothing
            facts = facts_of(module, is_linear=False)
            return GradientFacts(*facts) if self._rule.observe == "gradients" else facts
        is_linear = name not in self._selected and self._rule.feature_maps in ("positions", "mean")
        return facts_of(module, is_linear=is_linear and self._rule.sequences != "flatten")

    def _batch_of(self, of_layer: LayerMetrics, module: nn.Module, output: Any, moment: Moment) -> Batch:
        """The output with samples first, as its layer, its surroundings and the mask tell, and its labels."""
        name = of_layer.layer
        is_selected = name in self._selected
        time_first, dims = name in self._layout.time_first, self._layout.dims.get(name)
        batch = self._rule.batch(None if is_selected else module, output, moment.mask, time_first, dims)
        if moment.mask is self.masks.value:  # or it has been noted in the forward
            self.masks.met(name, batch)
        if name not in self._told_layout and (doubt := self._doubt(name, batch)):
            self._told_layout.add(name)
            tell(doubt)
        if of_layer.takes_labels and moment.labels is not None:
            batch = self.labels.join(name, batch, moment.labels, time_first)
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


class LeftOut(Exception):  # noqa: N818  # no error
    """A layer is not to be observed."""
