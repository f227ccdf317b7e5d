"""LayerProbe: metrics of a model's layers, without changing the model."""

from __future__ import annotations

import contextlib
import functools
import numbers
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from spectralmetrics.findings import Finding, LayerNumbers, find
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import Progress
from spectralmetrics.metrics import HistoryMetric, Interval, SaturationMetric, SpectralMetric, statistics
from spectralmetrics.metrics.groups import Metrics, collect, described, named_metrics
from spectralmetrics.probing import processes, saving, windows
from spectralmetrics.probing.agreeing import Catalogue, MergedSums, agree_on_layers
from spectralmetrics.probing.alike import Alike
from spectralmetrics.probing.budget import Budget
from spectralmetrics.probing.collections import LayerMetrics
from spectralmetrics.probing.exchange import Agreement, Kept
from spectralmetrics.probing.experts import Expert, by_whole, is_elsewhere, select_probed
from spectralmetrics.probing.facts import STAGES, Key, LayerFacts, Place, as_text, module_key
from spectralmetrics.probing.gradient_hooks import FirstGradientHook, GradientHook
from spectralmetrics.probing.gradients import GradientRouter, check_scale
from spectralmetrics.probing.hooks import Hooks, Select, level_of_user, warn_user, watch_outputs, weakly
from spectralmetrics.probing.layout import find_layout
from spectralmetrics.probing.meshes import Meshes, may_share_layers
from spectralmetrics.probing.movers import History, Scales, left_out_of, scales_of
from spectralmetrics.probing.outputs import Choose
from spectralmetrics.probing.parts import dtensors_of
from spectralmetrics.probing.reading import (
    HOST,
    Question,
    Reading,
    nothing_observed,
    read_covariance,
    read_layers,
    read_others,
    report_covariances,
    report_readings,
)
from spectralmetrics.probing.rendezvous import Identity
from spectralmetrics.probing.routing import Router
from spectralmetrics.probing.rules import FeatureMaps, Interpolation, ObservationRule, Observes, Sequences
from spectralmetrics.probing.sampling import Limits
from spectralmetrics.probing.saving import Sharded
from spectralmetrics.probing.selection import Selectors, select_layers, unseen_parameters, unwrap
from spectralmetrics.probing.steps import Steps
from spectralmetrics.probing.summary import (
    Summary,
    SummaryRow,
    numbers_of,
    summary_of,
    summary_rows,
    threshold_of,
)
from spectralmetrics.sums import Sum, compiled
from spectralmetrics.sums.checks import check_positive_integer, is_integer
from spectralmetrics.sums.repeats import REPEATED_INPUTS

T = TypeVar("T")

_UNSEEN = 0.05  # a warning names layers that are not probed if they have a larger share of the parameters


class _Limit:
    """An attribute of a probe that is kept in its limits, which the router reads."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, probe: LayerProbe | None, owner: type | None = None) -> Any:
        return self if probe is None else getattr(probe._limits, self._name)

    def __set__(self, probe: LayerProbe, value: Any) -> None:
        replace(probe._limits, **{self._name: value})  # refuses what the constructor refuses
        setattr(probe._limits, self._name, value)
        if self._name == "seed":
            probe._steps.seed = value


# Arguments of the constructor that are fixed. All others may be set later.
_FIXED = {"model", "layers", "exclude", "feature_maps", "sequences", "max_map_size", "interpolation", "select"}
_FIXED |= {"folds", "batch_first", "observe", "rule"}


class LayerProbe(nn.Module):
    """Observes the outputs of a model's layers and computes metrics, separately for training and evaluation.

    The probe hooks the model and owns the metrics. It never becomes part of the model: the model's
    ``state_dict``, parameters and pickles do not change, and copies of the model have no hook. Eager training
    is bit-identical with and without it; a compiled model gets one opaque operation for each probed
    layer. Activations recomputed in backward are not counted again.

    Args:
        model: any module; wrappers for compilation and data parallelism are unwrapped.
        metrics: a metric, a sequence or dict of them, or a ``MetricCollection``; cloned for every layer and
            stage; ``SaturationMetric()`` by default. The stage is the layer's own ``training`` flag:
            ``"train"`` or ``"eval"``.
        layers: layers to probe, by glob pattern on their qualified names, module type, callable
            ``(name, module) -> bool``, or a sequence of these; by default linear, convolutional and recurrent
            layers and multi-head attention. See :func:`~spectralmetrics.probing.select_layers`. The name of a
            module whose experts are stacked in one parameter, such as Mixtral's, selects each of them: as
            layers ``….experts.0``, ``….experts.1``, and so on.
        exclude: layers to take away from these, likewise.
        feature_maps: observations of feature maps ``(N, C, *spatial)``: ``"positions"``, every kernel position,
            (N·positions, C); ``"mean"``, ``"max"`` or ``"median"`` of each map, (N, C) (the lower median of an
            even number of values, as in ``torch.median``); ``"flatten"``, (N, C·positions).
        sequences: observations of sequences (N, T, D): ``"timesteps"``, (N·T, D); ``"last"``, the last valid
            step, or ``"mean"`` of the valid steps, (N, D); ``"flatten"``, (N, T·D), padding set to zero.
        max_map_size: feature maps of two or three spatial dimensions that are larger in any extent are
            interpolated down to it, unless they are pooled. From each sample of other outputs, such as
            (N, H, W, C) and the series of ``Conv1d``, at most ``max_map_size ** 2`` positions are drawn. None:
            never.
        interpolation: mode of ``torch.nn.functional.interpolate``; 3-D maps use ``"trilinear"`` in place of
            other linear modes.
        every_n_steps: observe one of every n forwards of the model, with all calls of its layers: the first,
            then one drawn from each n. A layer that is run by itself counts its own forwards.
        budget: with 0.03, the probe takes at most 3 % of the time between forwards in the long run: it measures
            its time, and observes fewer rows and forwards, evenly over layers and time. :meth:`summary` says
            what it took. The observed rows, and so the values, then depend on the machine.
        max_samples: stop observing a layer and stage after that many samples until :meth:`reset`.
        rows_per_feature: with r, at most ⌈r·D⌉ observations are drawn uniformly from each forward.
        max_features: a wider layer is left out with a warning, or sketched.
        sketch_size: with k, layers wider than ``max_features`` keep a sketch of k columns, see
            :class:`~spectralmetrics.SpectralMetric`. Statistics that need the whole spectrum or labels are left
            out there.
        select: pattern -> function that takes a layer's output and returns the tensor to observe, (N, D),
            (N, T, D) or ``(N, C, *spatial)``: of an LSTM's last hidden state, (N, D),
            ``lambda out: out[1][0][-1]``. With ``observe="inputs"`` it is called as the layer is. If a model is
            sharded in a way that PyTorch does not know, the function returns a DTensor:
            ``lambda out: DTensor.from_local(out, mesh, [Shard(-1)])``.
        seed: seed of the random draws, which leave the global random state alone.
        folds: with g > 1, every metric keeps its observations in g folds, see
            :class:`~spectralmetrics.SpectralMetric`, and :meth:`intervals` says how sure the values are. None
            leaves the metrics as they are.
        observe: ``"outputs"`` of the layers; ``"inputs"``: the first floating argument of each, before the
            layer may change it, see :meth:`covariances`; or ``"gradients"`` with respect to the outputs, with
            the same rows as the outputs, whenever one arrives in a backward. Large feature maps are then
            sampled, not interpolated. Under a mean loss rows scale as 1/batch, see :attr:`gradient_scale`.
        batch_first: the layout of sequences from layers whose type does not decide it: True for (N, T, D),
            False for (T, N, D). None goes by the transformer, recurrent layer or attention that the layer is
            part of, and takes (N, T, D) elsewhere. For layers of your own see
            :func:`~spectralmetrics.register_layer`.

    Raises:
        TypeError: for a model or metrics of another type.
        ValueError: for an argument out of range or a selector that matches nothing.
        RuntimeError: if a layer takes no hooks, such as a scripted one.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with LayerProbe(model, SaturationMetric(threshold=0.9)) as probe:
    ...     _ = model(torch.randn(32, 4))
    ...     sorted(probe.compute())
    ['saturation/train/0', 'saturation/train/2']
    """

    max_samples, rows_per_feature, max_features, sketch_size, seed = (_Limit() for _ in range(5))

    def __init__(
        self,
        model: nn.Module,
        metrics: Metrics | None = None,
        *,
        layers: Selectors | None = None,
        exclude: Selectors | None = None,
        feature_maps: FeatureMaps = "positions",
        sequences: Sequences = "timesteps",
        max_map_size: int | None = 32,
        interpolation: Interpolation = "bilinear",
        every_n_steps: int = 1,
        max_samples: int | None = None,
        rows_per_feature: float | None = None,
        max_features: int = 8192,
        select: Mapping[str, Callable[[Any], Any]] | None = None,
        seed: int = 0,
        folds: int | None = None,
        batch_first: bool | None = None,
        budget: float | None = None,
        observe: Observes = "outputs",
        sketch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(unwrap(model), torch.jit.ScriptModule):
            raise RuntimeError(
                f"expected a model that is neither scripted nor traced, got {type(unwrap(model)).__name__}: its"
                " layers call no hooks; probe the model that torch.jit was given"
            )
        check_positive_integer("every_n_steps", every_n_steps)
        self._limits = Limits(max_samples, rows_per_feature, max_features, sketch_size, seed)
        if batch_first not in (True, False, None):
            raise ValueError(f"expected batch_first to be True, False or None, got {batch_first!r}")
        if select is not None and not (isinstance(select, Mapping) and all(map(callable, select.values()))):
            raise TypeError(f"expected select to be a dict of patterns and functions, got {select!r}")
        self._steps = Steps(every_n_steps, seed, None if budget is None else Budget(budget, seed))
        self.observe = observe
        self.rule = ObservationRule(feature_maps, sequences, max_map_size, interpolation, observe)
        functions = {
            module: function
            for pattern, function in (select or {}).items()
            for module in select_layers(model, pattern).values()
        }
        if observe == "gradients":  # no gradient arrives at a single expert
            chosen = select_layers(model, layers, exclude)
        else:
            chosen = select_probed(model, layers, exclude, set(functions))
        wholes = by_whole(chosen)
        chosen = {name: module for name, module in chosen.items() if not is_elsewhere(module)}
        if not chosen:
            raise ValueError(f"expected `layers` to match a layer of this process, got {layers!r}")
        if layers is None:
            _warn_unseen(model, chosen)
        _warn_fault()
        # By module: a shared module may be chosen under one name and have a function under another.
        selected = {name: functions[module] for name, module in chosen.items() if module in functions}
        templates = named_metrics(SaturationMetric() if metrics is None else metrics)
        if folds is not None:
            templates = {name: _with_folds(metric, folds) for name, metric in templates.items()}
        for metric in templates.values():
            if isinstance(metric, SpectralMetric):
                metric.check_folds()
        self._templates = templates
        self._layers = list(chosen)
        kept = collect(templates)
        self._places = {
            (stage, name): LayerMetrics(stage, name, kept, number)
            for stage in STAGES
            for number, name in enumerate(chosen)
        }
        self.metrics = nn.ModuleDict(
            {module_key(*place): of_layer.kept for place, of_layer in self._places.items()}
        )
        self._resets: list[str | None] = []  # calls of reset() inside merged(), done at its end
        deals = any(isinstance(m, SpectralMetric) and m.folds > 1 for m in templates.values())
        is_of_inputs = observe == "inputs"
        layout = find_layout(model, chosen, batch_first, selected, of_inputs=is_of_inputs)
        # Folds and histories need the numbers of forwards.
        self._counts_forwards = deals or any(each.takes_all_rows for each in self._places.values())
        others = {**vars(self.rule), "metrics": tuple(described(*each) for each in templates.items())}
        alike = Alike(self._limits, self._steps, others)
        meshes = Meshes(unwrap(model), list(chosen), set(selected), is_of_inputs, alike)
        self._steps.shares = meshes.shares
        router = GradientRouter if observe == "gradients" else Router
        self._router = router(
            self._places, chosen, self.rule, self._limits, self._steps, layout, set(selected), meshes
        )
        self._guests: Agreement | None = None  # all processes' layers, while states are merged
        self._kept = Kept()
        self._warned: set[str] = set()  # stages and layers without observations that have been named
        self._windows = windows.Windows(self._places)
        self._remembered: dict[str, dict[str, Any]] = {}  # by reader of windows; saved with the states
        self._identity = Identity(chosen)
        self._hooks = Hooks(self, unwrap(model))
        try:
            for whole, watched in wholes.items():
                observe_them = weakly(self._router.observe_experts, watched)
                self._hooks.before(whole, observe_them, Choose(whole), needs_values=True)
            self._watch(chosen, selected)
        except BaseException:
            self.remove()
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_router" in self.__dict__:
            raise AttributeError(
                f"{name!r} is chosen when a LayerProbe is made and cannot change later: call remove() and make"
                " another one"
            )
        super().__setattr__(name, value)

    def _watch(self, chosen: Mapping[str, nn.Module], selected: Mapping[str, Select]) -> None:
        for name, module in chosen.items():
            if isinstance(module, Expert):
                continue
            observe = weakly(self._router.observe, name)
            if isinstance(self._router, GradientRouter):
                first = FirstGradientHook() if name not in selected and dtensors_of(module) else None
                last = GradientHook(self._router, name, module, selected.get(name), first=first)
                if first is not None:
                    self._hooks.put(module, first, prepend=True)
                self._hooks.put(module, last)
            elif self.observe == "inputs":
                function = selected.get(name)
                chooses = None if function is None else _of_arguments(function)
                self._hooks.before(module, observe, chooses, needs_values=True)
            elif name in selected:
                self._hooks.behind(module, observe, selected[name])
            else:
                watch_outputs(self._hooks, module, observe)
        self._watch_steps()

    def _watch_steps(self) -> None:
        """Put hooks on the model itself, if the begin and end of its forwards matter."""
        model = self._hooks.model
        matters = self._steps.leaves_out or self._counts_forwards or may_share_layers()
        if self._hooks and model is not None and matters:
            self._steps.watch(model, self._hooks)

    # -- what the user sees ------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The probed layers: those that have run, in the order of their first run, then the rest.

        Inside :meth:`merged` the layers of all processes, in one order for all.
        """
        if self._guests is not None:
            return self._guests.layers
        order = self._router.order
        return order + [name for name in self._layers if name not in order]

    @property
    def every_n_steps(self) -> int:
        """One of so many forwards of the model is observed; may be set at any time."""
        return self._steps.every

    @every_n_steps.setter
    def every_n_steps(self, every_n_steps: int) -> None:
        check_positive_integer("every_n_steps", every_n_steps)
        self._steps.every = every_n_steps
        self._watch_steps()

    @property
    def budget(self) -> float | None:
        """The share of the time that the probe may take, None for all it needs; may be set at any time."""
        return None if self._steps.budget is None else self._steps.budget.share

    @budget.setter
    def budget(self, budget: float | None) -> None:
        self._steps.budget = None if budget is None else Budget(budget, self.seed)
        self._watch_steps()

    @property
    def gradient_scale(self) -> Any:
        """The factor of the loss that is taken out of gradients, read whenever one arrives; 1.0 by default.

        A number, or the ``torch.amp.GradScaler`` that scales the loss (or any object with ``get_scale()``). The
        callbacks set it from their trainer's scaler. Under a mean loss over N samples, ``1 / N`` gives rows
        that do not depend on the size of the batch. Rows of steps that overflow are counted as left out,
        without a warning while this is a scaler.

        Raises:
            RuntimeError: where it is set on a probe that does not observe gradients.
            TypeError: for anything else.
            ValueError: for a number that is not positive.

        >>> model = nn.Linear(4, 3)
        >>> probe = LayerProbe(model, observe="gradients")
        >>> rows = torch.randn(32, 4)
        >>> probe.gradient_scale = 1 / len(rows)
        >>> model(rows).square().mean(0).sum().backward()
        """
        return self._router.scale if isinstance(self._router, GradientRouter) else 1.0

    @gradient_scale.setter
    def gradient_scale(self, gradient_scale: Any) -> None:
        check_scale(gradient_scale)
        if not isinstance(self._router, GradientRouter):
            raise RuntimeError(f"expected a probe with observe='gradients', got one of {self.observe!r}")
        self._router.scale = gradient_scale

    @property
    def _expects_overflow(self) -> bool:
        """True if a scaler skips steps that overflow, which then need no warning."""
        return not isinstance(self.gradient_scale, numbers.Real)

    @property
    def facts(self) -> dict[str, LayerFacts]:
        """Facts about each layer, known without its data; inside :meth:`merged` about all processes' layers."""
        return self._router.facts if self._guests is None else self._guests.facts

    @property
    def statistics(self) -> dict[str, Metric]:
        """The metrics of one layer by the names of their values, in the order of the values."""
        named = self._places[STAGES[0], self._layers[0]].readable()
        return {name: named[name] for name in self._templates}

    def __getitem__(self, key: tuple[str, str]) -> MetricCollection:
        """The metrics of one stage and layer: ``probe["train", "layer1.0.conv1"]``."""
        if not isinstance(key, tuple) or len(key) != 2:
            raise KeyError(
                f"expected a stage and a layer, such as probe[{STAGES[0]!r}, {self._layers[0]!r}], got {key!r}"
            )
        stage, name = key
        _check_stage(stage)
        if name not in self.layers:
            raise KeyError(f"{name!r} is not probed; probed layers are {', '.join(map(repr, self._layers))}")
        self._join_windows()
        return self._place(stage, name).collection

    def compute(self, stage: str | None = None, progress: Progress | None = None) -> dict[str, Tensor]:
        """The values of all layers, merged across processes; all processes call it.

        Layers are matched by their names. Each layer is read by one process, to which all others send its sums.

        Args:
            stage: ``"train"``, ``"eval"``, or None for both.
            progress: called as the work proceeds, with the amount done and the total. An exception in it stops
                the work; no observation is lost, and a second call continues where the first ended.

        Returns:
            ``"{metric}/{stage}/{layer}"`` -> value, in the memory of the CPU and in forward order. Layers
            without observations are left out; one warning names them if others in that stage have some. If no
            layer has any, a warning says why.

        Raises:
            RuntimeError: if observations were not finite and a metric has ``nan_strategy="error"``.
        """
        return as_text(self._read("compute", stage, _value_of, progress=progress))

    def intervals(self, stage: str | None = None, progress: Progress | None = None) -> dict[str, Interval]:
        """Intervals expected to contain the values for unlimited data.

        See :meth:`.SpectralMetric.interval`.

        Args:
            stage: ``"train"``, ``"eval"``, or None for both.
            progress: see :meth:`compute`.

        Returns:
            The keys of :meth:`compute` -> low and high, of all metrics that have an interval; merged across
            processes likewise.

        Raises:
            RuntimeError: without folds; for what :meth:`compute` raises.
        """
        if not self.has_intervals:
            raise RuntimeError("the probe keeps its observations in one fold; make it with folds=8, say")
        intervals = as_text(self._read("intervals", stage, _interval_of, _keeps_interval, progress))
        for each in STAGES if stage is None else (stage,):
            if named := self._repeating(each):
                warnings.warn(f"in {each} of {named}: {REPEATED_INPUTS}", UserWarning, stacklevel=2)
        return intervals

    def _repeating(self, stage: str) -> str:
        """The layers that got the same inputs in several folds."""
        own = (name for name in self.layers if (stage, name) in self._places)
        return ", ".join(repr(name) for name in own if self._places[stage, name].repeats())

    @property
    def has_intervals(self) -> bool:
        """True if there are :meth:`intervals`, of some layer at least."""
        readable = (metric for place in self._places.values() for metric in place.readable().values())
        return any(map(_keeps_interval, readable))

    def _read(
        self,
        call: str,
        stage: str | None,
        read: Callable[[Any], Any],
        applies: Callable[[Any], bool] = lambda metric: True,
        progress: Progress | None = None,
    ) -> dict[Key, Any]:
        stages = STAGES if stage is None else (_check_stage(stage),)
        with self._router.lock, self._agreed(call, stages, _wrong(progress)) as agreement:
            readings = self._readings(agreement, stages, Question(self._templates, read, applies), progress)
            return self._values(stages, readings)

    def _readings(
        self, agreement: Agreement | None, stages: Sequence[str], question: Question, progress: Progress | None
    ) -> dict[Place, Reading]:
        """The reading of each layer, in one order on all processes."""
        read = functools.partial(read_layers, question)
        readings: dict[Place, Reading] = {}
        for where, (place, found) in self._read_places(agreement, stages, read, progress).items():
            reading = readings[where] = found or Reading()
            if not place.spectral_leaders:
                reading.seen = place.stage not in self._aside and place.has_seen({})
            if reading.seen:
                read_others(place, question, reading)
            if self._expects_overflow:
                reading.left_out = 0
                reading.known = reading.known or None
        return readings

    def _values(self, stages: Sequence[str], readings: Mapping[Place, Reading]) -> dict[Key, Any]:
        """The values of some stages; gives the warnings of the readings."""
        values: dict[Key, Any] = {}
        has_data = False
        for stage in stages:
            of_stage = {layer: reading for (each, layer), reading in readings.items() if each == stage}
            new = report_readings(stage, of_stage, self._templates, self._warned)
            has_data = has_data or new is not None
            values.update(new or {})
        if not has_data:
            warnings.warn(self._nothing_in(stages), UserWarning, stacklevel=level_of_user())
        return values

    def _nothing_in(self, stages: Sequence[str]) -> str:
        is_off = bool(self._router.paused or not self._hooks)
        return nothing_observed(stages, self._places.values(), is_off, self.budget, self.observe)

    @contextlib.contextmanager
    def _agreed(
        self, call: str, stages: Sequence[str], error: BaseException | None = None, *, of_all: bool = False
    ) -> Iterator[Agreement | None]:
        """Inside, the sums of some stages can be read; through the agreement of processes, if there is one.

        Args:
            call: the method that reads, with the arguments that must be the same on all processes.
            stages: the stages whose layers are read.
            error: an error of this process to raise on all processes; None for none.
            of_all: True adds the layers of other processes even if metrics are not merged.
        """
        self._join_windows()
        if self._router.is_merged:
            if error is not None:
                raise error
            yield self._guests if self._is_sharing else None
            return
        group = processes.merging_group(self._places.values())
        keeps_own = of_all and processes.merges_nothing(self._places.values()) and processes.is_one_of_several()
        with processes.uninterrupted():
            if group is processes.NO_GROUP and not keeps_own:
                with self._merged_states(call, stages, error):
                    yield None
                return
            try:
                if keeps_own:
                    # Metrics that are not merged keep their own values; layers of other processes are added.
                    self._guests = self._agree(call, stages, None, takes_all=True, keeps_own=True, error=error)
                else:
                    self._guests = self._agree(call, stages, group, error=error)
                yield self._guests
            finally:
                self._guests = None

    def _read_places(
        self,
        agreement: Agreement | None,
        stages: Sequence[str],
        read: Callable[[list[LayerMetrics], Progress | None], Mapping[Place, T]],
        progress: Progress | None = None,
    ) -> dict[Place, tuple[LayerMetrics, T | None]]:
        """Read the merged states of each stage's layers, in one order on all processes; None without data."""
        if agreement is None:
            places = {(stage, name): self._place(stage, name) for stage in stages for name in self.layers}
            groups = [] if self._router.is_merged else processes.merging_groups(self._places.values())
            results = processes.agreed(lambda: read(list(places.values()), progress), groups)
        else:
            places = {place: each for place, each in agreement.places.items() if place[0] in stages}
            results = agreement.read(read, progress, stages, is_held=self._is_sharing)
        return {place: (each, results.get(place)) for place, each in places.items()}

    @contextlib.contextmanager
    def merged(self, *, sharing: bool = False) -> Iterator[None]:
        """Inside, the metrics hold the observations of all processes, for the layers of all processes.

        :meth:`compute` and ``probe[stage, layer]`` then read it without further communication. All processes
        enter together. Layers must not run inside. All merged sums are held at once; :meth:`iter_merged` holds
        the sums of one layer at a time.

        Args:
            sharing: True if all processes call :meth:`compute` inside, which then shares its work among them.
        """
        with self._router.lock:
            if self._router.is_merged:
                yield
                return
            self._join_windows()
            try:
                with self._merged_states("merged", STAGES):
                    self._router.is_merged = True
                    self._is_sharing = (
                        sharing and processes.merging_group(self._places.values()) is not processes.NO_GROUP
                    )
                    try:
                        yield
                    finally:
                        self._router.is_merged = self._is_sharing = False
            finally:
                while self._resets:  # done now that states are this process' own again
                    self.reset(self._resets.pop())

    @contextlib.contextmanager
    def _merged_states(
        self, call: str, stages: Sequence[str], error: BaseException | None = None
    ) -> Iterator[None]:
        """Inside, the states are merged, each in its own process group; an error is raised on all processes."""
        before = self._guests
        with contextlib.ExitStack() as stack:
            try:
                with processes.uninterrupted():
                    groups = processes.merging_groups(self._places.values())
                    for group in groups:
                        try:
                            agreement = self._agree(call, stages, group, error=error)
                            for batch in agreement.batches():
                                stack.enter_context(agreement.holding(agreement.exchange(batch)))
                            self._guests = self._guests or agreement
                            for place in agreement.places.values() if len(groups) > 1 else ():
                                place.ran_elsewhere = True  # no process knows this of all groups
                        except BaseException as raised:  # raised on the processes of the next groups, too
                            error = raised
                if error is not None:
                    raise error
                yield
            finally:
                self._guests = before

    def _agree(
        self,
        call: str,
        stages: Sequence[str],
        group: Any,
        *,
        takes_all: bool = False,
        keeps_own: bool = False,
        error: BaseException | None = None,
    ) -> Agreement:
        """The agreement of a group's processes on some stages; an error of one process is raised on all."""
        places = {place: each for place, each in self._places.items() if place[0] in stages}
        meshes = self._router.meshes

        def describe() -> Catalogue:
            if error is not None:
                raise error
            others = [place for place, each in places.items() if not each.spectral_leaders]
            return Catalogue(
                call,
                (
                    ("stages", *stages),
                    *([] if self.budget is None else [("with a budget",)]),
                    *(described(name, metric) for name, metric in self._templates.items()),
                ),
                {name: self._router.facts[name] for name in self._layers},
                tuple(self._router.order),
                {place: each.widths() for place, each in places.items()},
                tuple(sorted(place for place in others if places[place].samples)),
                meshes.alike.settings() if meshes.active else None,
            )

        agreement = agree_on_layers(
            group,
            describe,
            places,
            lambda stage, layer: LayerMetrics(stage, layer, collect(self._templates), 0),
            self._kept,
            self._identity,
            meshes.alike,
            takes_all=takes_all,
            keeps_own=keeps_own,
        )
        self._steps.agree_on_plans(group)
        return agreement

    def _place(self, stage: str, layer: str) -> LayerMetrics:
        return self._places[stage, layer] if self._guests is None else self._guests.places[stage, layer]

    def summary(self, stage: str = "eval", statistic: str = "intrinsic_dimension") -> Summary:
        """The answer in a table: how wide each layer's features are, how sure that is, and what stands out.

        Merged across processes; all processes call it. With ``folds`` values come with their
        intervals. Printing it gives a table that fits the terminal, else 100 columns.

        Args:
            stage: ``"train"`` or ``"eval"``.
            statistic: name of a metric of this probe, or short name of any statistic that is one number.

        Raises:
            ValueError: for another stage, or a statistic that is unknown, is not one number, or cannot be read
                from any layer.
            RuntimeError: if nothing was observed in that stage.
        """
        _check_stage(stage)
        metric = self.statistics.get(statistic) or _known_statistic(statistic, self.statistics)
        if not isinstance(metric, SpectralMetric):
            kind = type(metric).__name__
            raise ValueError(f"expected a statistic of this package, got {statistic!r}, a {kind}")
        threshold = threshold_of([metric, *self.statistics.values()])

        def read(
            places: list[LayerMetrics], report: Progress | None
        ) -> dict[Place, tuple[SummaryRow, LayerNumbers]]:
            rows = summary_rows(_spectra(places), self.facts, metric, threshold=threshold, progress=report)
            return {(stage, row.layer): (row, numbers) for row, numbers in rows}

        call = f"summary(statistic={statistic!r})"
        with self._router.lock, self._agreed(call, [stage]) as agreement:
            by_layer = self._read_places(agreement, [stage], read)
            rows = [row for _, row in by_layer.values() if row is not None]
            if not rows:
                raise RuntimeError(self._nothing_in([stage]))
            where = stage + (", gradients" if self.observe == "gradients" else "") + self._budget_words(stage)
            if self._repeating(stage):
                where += ", the same inputs in several folds: intervals too narrow"
            findings = find(stage, self._without_overflow(numbers for _, numbers in rows), self._untrained)
            return summary_of(rows, findings, metric, threshold=threshold, where=where)

    def findings(self, stage: str = "eval") -> list[Finding]:
        """Findings in the layers of one stage: problems first, then notes, each in forward order.

        The kinds of findings, their thresholds and the sums that they need are in
        :data:`~spectralmetrics.FINDING_RULES`. A finding whose sums the probe does not keep is absent.

        Merged across processes; all processes call it.

        Args:
            stage: ``"train"`` or ``"eval"``.

        Returns:
            A :class:`~spectralmetrics.Finding` for each; empty if nothing stands out.

        Raises:
            ValueError: for another stage.
            RuntimeError: if nothing was observed in that stage.

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> with LayerProbe(model) as probe:
        ...     _ = model(torch.randn(300, 8))
        >>> print(probe.findings("train")[0])
        problem: '1' in train: dead: 8 of 8 features
        """
        _check_stage(stage)
        with self._router.lock:
            by_layer = self._numbers("findings", stage, lambda place: None)
            numbers = self._without_overflow(each[1] for _, each in by_layer.values() if each is not None)
            others = (place for place, _ in by_layer.values() if not place.spectral_leaders)
            if not numbers and not any(place.has_seen({}) for place in others):
                raise RuntimeError(self._nothing_in([stage]))
            return find(stage, numbers, self._untrained)

    def _without_overflow(self, numbers: Iterable[LayerNumbers]) -> list[LayerNumbers]:
        """The numbers for findings: rows left out in steps that overflow do not count."""
        return [each._replace(left_out=0) if self._expects_overflow else each for each in numbers]

    def _numbers(
        self, call: str, stage: str, more: Callable[[LayerMetrics], T]
    ) -> dict[Place, tuple[LayerMetrics, tuple[T, LayerNumbers] | None]]:
        """The result of ``more`` and the numbers for findings of each layer; None without numbers."""
        threshold = threshold_of(self.statistics.values())

        def read(places: list[LayerMetrics], report: Progress | None) -> dict[Place, tuple[T, LayerNumbers]]:
            others = {place.layer: more(place) for place in places}
            return {
                (stage, each.layer): (others[each.layer], each)
                for each in numbers_of(_spectra(places), self.facts, threshold, report)
            }

        with self._agreed(call, [stage]) as agreement:
            return self._read_places(agreement, [stage], read)

    def _untrained(self, layers: Sequence[str], agreement: Agreement | None = None) -> dict[str, bool]:
        """Layer -> True if its weights are still the initial ones, from a process that has the layer."""
        own: dict[str, bool | None] = {}
        error: BaseException | None = None
        try:
            own = self._router.untrained(layers)
        except Exception as raised:  # the other processes wait for the answer
            error = raised
        group = processes.merging_group(self._places.values()) if agreement is None else agreement.group
        if group is not processes.NO_GROUP and not self._router.is_merged:
            of_processes = processes.gather_agreed(own, error, group)
        elif error is not None:
            raise error
        else:
            of_processes = [own]
        known = ((name, flag) for each in reversed(of_processes) for name, flag in each.items())
        return {name: flag for name, flag in known if flag is not None}

    def _budget_words(self, stage: str) -> str:
        """The used share of the budget, for the title of a summary."""
        budget = self._steps.budget
        if budget is None:
            return ""
        spent = budget.spent(stage)
        leaders = (leader for place in self._places.values() for leader in place.spectral_leaders)
        on_cpu = any(leader.counts().device == HOST for leader in leaders)
        sums = f", sums {compiled.describe()}" if on_cpu else ""
        return (
            f", observed {spent.observed} of {spent.forwards} forwards in {100 * spent.share:.2g} % of the time"
            f" (budget {100 * budget.share:.4g} %){sums}"
        )

    @property
    def step(self) -> int | None:
        """The step of the optimiser that the next forwards belong to; None until it is set.

        Set it once for each step, before its first forward: ``probe.step = step``. A history then contains it,
        and pools the forwards of one step.
        """
        return self._steps.step

    @step.setter
    def step(self, step: int | None) -> None:
        if step is not None and not is_integer(step, 0):
            raise ValueError(f"expected step as an integer that is not negative or None, got {step!r}")
        self._steps.step = None if step is None else int(step)

    def history(self, stage: str = "train") -> History:
        """Each layer in each recent forward, as a :class:`~spectralmetrics.HistoryMetric` keeps it.

        Merged across processes by the number of the forward; all processes call it. In training mode, forwards
        without gradients, such as rollouts, are not in it.

        Args:
            stage: ``"train"`` or ``"eval"``.

        Raises:
            ValueError: for another stage, or if no metric of the probe is a ``HistoryMetric``.

        >>> from spectralmetrics import HistoryMetric
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> probe = LayerProbe(model, HistoryMetric(steps=100))
        >>> for probe.step in range(3):
        ...     _ = model(torch.randn(32, 4))
        >>> history = probe.history()
        >>> [(row.forward, row.step, row.layer, row.observations) for row in history.rows[-2:]]
        [(2, 2, '0', 32), (2, 2, '2', 32)]
        """
        _check_stage(stage)
        if not any(place.takes_all_rows for place in self._places.values()):
            names = list(self._templates)
            raise ValueError(f"expected a HistoryMetric among the metrics of the probe, got {names}")
        by_layer = self._each_merged("history", stage, lambda place: place.history)
        return History.of_sums(stage, {layer: each for layer, each in by_layer if each is not None})

    def sums(self, stage: str, layer: str) -> list[Sum]:
        """The sums of a layer's observations: the spectral sum, then others; empty for nothing.

        The tensors are the states themselves. Inside :meth:`merged` they are the merged states.
        """
        self[stage, layer]  # raises an error if the layer is not probed
        return self._place(stage, layer).sums()

    def iter_merged(self, stage: str) -> Iterator[tuple[str, list[Sum]]]:
        """The merged sums of each layer of all processes, one layer at a time; all processes iterate.

        Args:
            stage: ``"train"`` or ``"eval"``.

        Returns:
            An iterator of layer and sums as :meth:`sums` gives them, for every process in the same order,
            without layers that saw nothing. If one process stops early, the others get a RuntimeError.

        Raises:
            ValueError: for another stage.
        """
        _check_stage(stage)
        each_merged = self._each_merged("iter_merged", stage, LayerMetrics.sums)
        return ((layer, sums) for layer, sums in each_merged if sums)

    def _each_merged(self, call: str, stage: str, read: Callable[[LayerMetrics], T]) -> Iterator[tuple[str, T]]:
        """Read each layer while its states are merged, on all processes."""
        group = processes.NO_GROUP if self._router.is_merged else processes.merging_group(self._places.values())
        self._join_windows()
        if group is not processes.NO_GROUP:
            with self._router.lock:
                agreement = self._agree(call, [stage], group)
            yield from agreement.iterate(read, self._router.lock)
            return
        with self._router.lock, contextlib.ExitStack() as stack:
            if not self._router.is_merged:
                stack.enter_context(self._merged_states(call, [stage]))
            results = [(name, read(self._place(stage, name))) for name in self.layers]
        yield from results

    def covariances(self, stage: str, *, unbiased: bool = False, center: bool = True) -> dict[str, Tensor]:
        r"""The covariance of each layer's observations, whatever the metrics.

        With ``observe="inputs"`` and ``center=False`` these are the second moments :math:`X^\top X / n` of a
        layer's inputs, which compression, quantisation and adaptation use (GPTQ, SVD-LLM, SliceGPT).

        Merged across processes; all processes call it.

        Args:
            stage: ``"train"`` or ``"eval"``.
            unbiased: divide by n - 1.
            center: False leaves the mean in.

        Returns:
            Layer -> shape (D, D), float64, where its sums are, in forward order; without layers that saw
            nothing. If all metrics need labels, only labelled observations count. A warning names layers
            without a covariance, such as sketched layers and, with ``nan_strategy="error"``, layers with
            observations that were not finite. Another warning says if nothing was observed.

        Raises:
            ValueError: for another stage.
        """
        _check_stage(stage)

        read = functools.partial(read_covariance, unbiased=unbiased, center=center)
        with self._router.lock:
            call = f"covariances(unbiased={unbiased}, center={center})"
            by_layer = dict(self._each_merged(call, stage, read))
            for each in by_layer.values() if self._expects_overflow else ():
                each.left_out = 0
            covariances = report_covariances(stage, by_layer)
            if covariances is None:
                warnings.warn(self._nothing_in([stage]), UserWarning, stacklevel=level_of_user())
        return covariances or {}

    def reset(self, stage: str | None = None) -> None:
        """Forget the observations of one stage, or of both; sampling goes on with fresh draws."""
        with self._router.lock:
            if self._router.is_merged:
                self._resets.append(None if stage is None else _check_stage(stage))
                return
            self._join_windows()
            self._kept.forget()
            for each in STAGES if stage is None else (_check_stage(stage),):
                self._steps.reset(each)
                for name in self._layers:
                    self._places[each, name].reset()

    def _join_windows(self) -> None:
        """Let the probe hold all sums, not only the sums since a reader's last window."""
        with self._router.lock:
            self._windows.join()

    @contextlib.contextmanager
    def _only(self, reader: str, stage: str) -> Iterator[None]:
        """Inside, the probe holds only a reader's unread sums of a stage. Layers must not run inside."""
        with self._router.lock, self._windows.only(reader, stage):
            yield

    @contextlib.contextmanager
    def _without(self, stages: Collection[str]) -> Iterator[None]:
        """Inside, the probe holds nothing of these stages. Layers must not run inside."""
        with self._router.lock:
            self._join_windows()
            before, self._aside = self._aside, self._aside.union(stages)
            places = [self._places[stage, name] for stage in stages for name in self._layers]
            taken = [windows.take_out(place) for place in places]
            try:
                yield
            finally:
                self._aside = before
                for place, each in zip(places, taken, strict=True):
                    windows.put_back(place, each)

    def pause(self) -> None:
        """Observe nothing until :meth:`resume`."""
        self._router.paused += 1

    def resume(self) -> None:
        """Observe again after :meth:`pause`."""
        self._router.paused = max(self._router.paused - 1, 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing inside ``with probe.paused():``."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    @contextlib.contextmanager
    def mask(self, mask: Tensor) -> Iterator[None]:
        """Count only the valid steps of sequences inside ``with probe.mask(mask):``.

        Args:
            mask: (N, T) boolean, True for valid tokens; applied to outputs that are sequences of that shape,
                to tokens flattened to (N·T, D), and to outputs with one dimension T beside N and the features.

        Raises:
            TypeError: if the mask is no boolean tensor.
            ValueError: if it is not 2-D.

        Warns once of each layer whose steps it did not fit: padding was counted there.
        """
        with self._router.masks.within(mask):
            yield

    @contextlib.contextmanager
    def labels(self, labels: Tensor) -> Iterator[None]:
        """Give the classes of the model's inputs inside ``with probe.labels(y):``.

        They are for metrics that need labels, such as :class:`~spectralmetrics.LinearProbeMetric`; others
        ignore them.

        Args:
            labels: (N,) integers, one for each sample: outputs that are feature maps or sequences are pooled to
                their means. Or (N, T), one for each step of sequences (N, T, D), which are the observations
                then. A negative label, such as -100, means none.

        Raises:
            TypeError: if the labels are no integer tensor.
            ValueError: if they are neither 1-D nor 2-D.

        An output with another number of samples than labels, such as the output for a chunk of the batch or of
        an expert, is left out, with one warning for each layer.

        >>> from spectralmetrics import LinearProbeMetric
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> probe = LayerProbe(model, LinearProbeMetric(num_classes=2))
        >>> with probe.labels(torch.arange(32) % 2):
        ...     _ = model(torch.randn(32, 4))
        >>> sorted(probe.compute())
        ['linear_probe/train/0', 'linear_probe/train/2']
        """
        with self._router.labels.within(labels):
            yield

    def remove(self) -> None:
        """Take all hooks off the model; what has been observed can still be computed."""
        self._hooks.take_off()

    def __enter__(self) -> LayerProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def persistent(self, mode: bool = True) -> None:
        """Have ``state_dict`` hold observations and sampling progress, so that an epoch can resume."""
        for of_layer in self._places.values():
            for leader in of_layer.leaders:
                leader.persistent(mode)
        self._is_persistent = mode

    _is_persistent = False
    _has_own_history = False  # True if a monitor has added it
    _is_sharing = False
    _aside: frozenset[str] = frozenset()  # stages whose observations are set aside

    def to(self, *args: Any, **kwargs: Any) -> LayerProbe:
        """Move the metrics; from then on observations are brought to that device."""
        self._join_windows()
        for of_layer in self._places.values():
            for metric in of_layer.members:
                metric.to(*args, **kwargs)
        return self

    def cpu(self) -> LayerProbe:
        """As ``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> LayerProbe:
        """As ``to("cuda")``."""
        return self.to("cuda" if device is None else torch.device("cuda", device))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        shown = ", ".join(self.layers[:6]) + (", …" if len(self.layers) > 6 else "")
        return f"LayerProbe({', '.join(self._templates)} of {len(self.layers)} layers: {shown})"

    def merge_state(self, other: LayerProbe) -> None:
        """Add what another probe has observed, layer by layer, by their names; the other is left as it was.

        Args:
            other: a probe with the same metrics, whose layers are all layers of this one.

        Raises:
            TypeError: for anything that is no probe.
            ValueError: for a layer or metric that this probe does not have, or for other settings or widths;
                this probe is then as it was.
        """
        if not isinstance(other, LayerProbe):
            raise TypeError(f"expected another LayerProbe to merge, got {type(other).__name__}")
        if unknown := [name for name in other._layers if name not in self._layers]:
            raise ValueError(
                f"expected `other` to probe layers of this probe, got {', '.join(map(repr, unknown))}; layers"
                f" are {', '.join(map(repr, self._layers))}"
            )
        expected, got = (
            [described(name, metric) for name, metric in probe._templates.items()] for probe in (self, other)
        )
        if expected != got:
            raise ValueError(f"expected a probe with the metrics {expected} to merge, got {got}")
        with self._router.lock, other._router.lock:
            if self._router.is_merged or other._router.is_merged:
                raise RuntimeError("expected probes with their own states to merge, got one inside merged()")
            self._join_windows()
            other._join_windows()
            pairs = [(self._places[place], each) for place, each in other._places.items() if each.has_data()]
            for own, added in pairs:
                windows.check_places(own, added)
            for own, added in pairs:
                windows.merge_places(own, added)
            self._steps.go_beyond(other._steps)
            self._router.order += [name for name in other._router.order if name not in self._router.order]

    # -- saving ------------------------------------------------------------------------------------------

    def sharded(self) -> Sharded:
        """The observations of all processes, for ``torch.distributed.checkpoint``.

        ``dcp.save({"probe": probe.sharded()}, checkpoint_id=folder)`` saves it, and
        ``dcp.load({"probe": probe.sharded()}, checkpoint_id=folder)`` loads it on any number of processes, also
        into a fresh probe: together the processes then hold the saved sums, each layer's on one process. They
        forget earlier observations. All processes call both.
        """

        def agree() -> Agreement | None:
            self._join_windows()
            is_alone = not processes.is_one_of_several()
            return None if is_alone else self._agree("sharded", STAGES, None, takes_all=True)

        return Sharded(self._places, agree, self._steps, self._router.order, self._remembered, self.reset)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._join_windows()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_persistent:
            order = [self._layers.index(name) for name in self._router.order]
            saving.save_progress(destination, prefix, list(self._places.values()), self._steps, order)
            for place, of_layer in self._places.items():
                windows.save_updates(destination, f"{prefix}metrics.{module_key(*place)}.", of_layer)
            windows.save_remembered(destination, prefix, self._remembered, self._steps)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        self._join_windows()
        self._windows.forget()
        windows.load_remembered(state_dict, prefix, self._remembered, self._steps)
        for place, of_layer in self._places.items():
            start = f"{prefix}metrics.{module_key(*place)}."
            saving.give_to_leaders(state_dict, start, of_layer)
            windows.load_updates(state_dict, start, of_layer)
            if self.sketch_size is not None and not of_layer.is_sketched:
                names = (key for key in state_dict if key.startswith(start))
                if any(key.endswith(".sketch_image") for key in names):  # in 0.2.0 only these say it
                    of_layer.sketch(self.sketch_size)
        places = list(self._places.values())
        order = saving.load_progress(state_dict, prefix, places, self._steps, self.sketch_size)
        if order is not None:
            self._router.order[:] = [self._layers[index] for index in order]
        elif self._is_persistent:
            missing_keys.append(prefix + "progress")  # saved from a probe that was not persistent
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


def _of_arguments(function: Select) -> Select:
    """A function of a layer's arguments, as a function of the pair of positional and named arguments."""

    def choose(arguments: Any) -> Any:
        args, kwargs = arguments
        return function(*args, **kwargs)

    return choose


def _warn_unseen(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Warn about the share of a model's parameters that is not probed, if it is large."""
    share, names = unseen_parameters(model, chosen.values())
    if share > _UNSEEN:
        shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warn_user(
            f"{100 * share:.0f} % of the model's parameters lie in layers that are not probed by default:"
            f" {shown}; `layers` chooses any module by name or type"
        )


@functools.cache
def _warn_fault() -> None:
    """Warn once in a process if the compiled sums of the install are missing."""
    if fault := compiled.fault():
        warn_user(f"sums in the memory of the CPU take about twice as long as they could: {fault}")


class ProbeReading(NamedTuple):
    """The values of a probe, read once.

    Attributes:
        values: as :meth:`.LayerProbe.compute` returns them.
        intervals: the intervals of the values that have one.
        sums: (stage, layer) -> sums of the layer. On several processes the first one may read them, one layer
            at a time, while all others are in :attr:`serve`.
        known: (stage, layer) -> eigenvalues that were read, see :meth:`.Spectrum.known`.
        facts: layer -> its facts, known without its data.
        untrained: layer -> True if its weights are as initialised, where findings may depend on it.
        serve: see :func:`~.processes.on_first_process`; None if this process has all sums.
    """

    values: dict[Key, Any]
    intervals: dict[Key, Interval]
    sums: Mapping[tuple[str, str], Sequence[Sum]]
    known: Mapping[tuple[str, str], Mapping[tuple[str, bool], Any]]
    facts: Mapping[str, LayerFacts]
    untrained: Mapping[str, bool]
    serve: Callable[[], None] | None = None


@contextlib.contextmanager
def read_probe(
    probe: LayerProbe,
    progress: Progress | None = None,
    error: BaseException | None = None,
    is_trained: Callable[[str], bool] = lambda layer: False,
) -> Iterator[ProbeReading]:
    """Read all that a recorder keeps of a probe; each covariance is decomposed once, by one process.

    All processes enter together. Inside, the first one can read the sums of each layer.

    Args:
        probe: the probe to read.
        progress: see :meth:`LayerProbe.compute`.
        error: raised on all processes; None if this one has none.
        is_trained: layer -> True if its weights are known to be trained; the same on all processes.

    Raises:
        RuntimeError: see :meth:`LayerProbe.compute`.
    """
    question = Question(probe._templates, _value_of, lambda metric: True, for_record=True)
    error = error or _wrong(progress)
    with probe._router.lock, probe._agreed("record", STAGES, error, of_all=True) as agreement:
        readings = probe._readings(agreement, STAGES, question, progress)
        values = probe._values(STAGES, readings)
        intervals = {
            (name, *place): interval
            for place, reading in readings.items()
            for name, interval in reading.intervals.items()
        }
        known = {place: reading.known for place, reading in readings.items() if reading.known is not None}
        untrained = _untrained_in(probe, agreement, readings, is_trained)
        if agreement is None or probe._is_sharing:
            sums = {place: probe._place(*place).recorded_sums() for place in known}
            yield ProbeReading(values, intervals, sums, known, probe.facts, untrained)
            return
        fetched = MergedSums(agreement, known)
        try:
            yield ProbeReading(values, intervals, fetched, known, probe.facts, untrained, fetched.serve)
        finally:
            fetched.close()


def _untrained_in(
    probe: LayerProbe,
    agreement: Agreement | None,
    readings: Mapping[Place, Reading],
    is_trained: Callable[[str], bool],
) -> dict[str, bool]:
    """Layer -> True if its weights are as initialised: for the layers of which :func:`.find` would ask."""
    asked: dict[str, None] = {}
    for stage in STAGES:
        layers = {
            name: each for (own, name), each in readings.items() if own == stage and each.known is not None
        }
        last = max((place for place, each in enumerate(layers.values(), 1) if each.needs_weights), default=0)
        asked |= dict.fromkeys(list(layers)[:last])
    trained = dict.fromkeys(filter(is_trained, asked), False)
    # Processes that merge nothing have readings of their own, and may ask for other layers or for none.
    if not asked and not (agreement is not None and processes.merges_nothing(probe._places.values())):
        return {}
    return trained | probe._untrained([layer for layer in asked if layer not in trained], agreement)


def group_of(probe: LayerProbe | None) -> Any:
    """The process group whose processes read a probe together; its first process warns and writes.

    See :func:`~.processes.reading_group`; the default group without a probe.
    """
    return None if probe is None else processes.reading_group(probe._places.values())


def keep_history(probe: LayerProbe, stage: str, steps: int) -> None:
    """Add a :class:`~spectralmetrics.HistoryMetric` to a probe to which the user gave none.

    Args:
        probe: a probe that has observed nothing.
        stage: the stage whose forwards of one step of the optimiser count as one in this history.
        steps: number of forwards to remember.

    Raises:
        RuntimeError: if the probe has observed something.
    """
    if probe._has_own_history:
        probe._steps.pools.add(stage)
    if any(place.takes_all_rows for place in probe._places.values()):
        return
    if any(place.has_data() for place in probe._places.values()):
        raise RuntimeError(
            "expected a probe that has observed nothing, to which a HistoryMetric can be added, got one with"
            f" observations, {probe!r}: make the Monitor before the model runs, or call reset(), or give the"
            " probe a HistoryMetric"
        )
    first = next(iter(probe._templates.values()))
    metric = HistoryMetric(
        steps=steps, process_group=first.process_group, sync_on_compute=first.sync_on_compute
    )
    with probe._router.lock:
        name = next(each for each in ("history", "monitor_history") if each not in probe._templates)
        probe._templates = {**probe._templates, name: metric}
        probe._has_own_history = True
        probe._steps.pools.add(stage)
        kept = collect(probe._templates)
        for key, place in probe._places.items():
            place.keep(kept)
            probe.metrics[module_key(*key)] = place.kept
        if probe._is_persistent:
            probe.persistent()
        probe._counts_forwards = True
        probe._watch_steps()


def read_window(probe: LayerProbe, stage: str, reader: str) -> list[tuple[LayerNumbers, Scales]]:
    """The sums of each layer since a reader's last window, in forward order; all processes call it.

    Args:
        probe: the probe to read; see :class:`~.windows.Windows`.
        stage: ``"train"`` or ``"eval"``.
        reader: name of a reader with an open window of that stage.

    Returns:
        For each layer with observations, the numbers for findings and the scale in each forward.
    """
    with probe._only(reader, stage):
        by_layer = probe._numbers(
            f"window of {reader}", stage, lambda place: (scales_of(place.history), left_out_of(place.history))
        )
    read = [each for _, each in by_layer.values() if each is not None]
    numbers = [each._replace(left_out=max(each.left_out, left_out)) for (_, left_out), each in read]
    return list(zip(probe._without_overflow(numbers), (scales for (scales, _), _ in read), strict=True))


def layer_by_hand(probe: LayerProbe, stage: str, layer: str, kind: str) -> LayerMetrics:
    """The metrics of a layer whose rows come from no model; the caller passes rows to ``update``.

    Args:
        probe: the probe of the layer.
        stage: ``"train"`` or ``"eval"``.
        layer: name of the layer.
        kind: name in place of the layer's type.
    """
    probe._router.facts[layer] = LayerFacts(kind, None)
    probe._router.order.append(layer)
    return probe._places[stage, layer]


def _value_of(metric: Any) -> Any:
    return metric.read(HOST) if isinstance(metric, SpectralMetric) else metric.compute()


def _spectra(places: Sequence[LayerMetrics]) -> dict[str, Spectrum]:
    """Layer -> spectrum, including layers whose observations were all left out."""
    spectra = {place.layer: place.spectrum(with_left_out=True) for place in places}
    return {layer: spectrum for layer, spectrum in spectra.items() if spectrum is not None}


def _interval_of(metric: SpectralMetric) -> Interval:
    return metric.read_interval(HOST)


def _keeps_interval(metric: Any) -> bool:
    return isinstance(metric, SpectralMetric) and metric.keeps_interval


def _wrong(progress: Any) -> TypeError | None:
    """The error for a progress that cannot be called."""
    if progress is None or callable(progress):
        return None
    return TypeError(f"expected progress to be a function of two numbers or None, got {progress!r}")


def _check_stage(stage: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"expected a stage among {STAGES}, got {stage!r}")
    return stage


def _known_statistic(name: str, recorded: Mapping[str, Metric]) -> SpectralMetric:
    if name not in statistics():
        raise ValueError(f"expected a statistic among {sorted({*recorded, *statistics()})}, got {name!r}")
    if statistics()[name].needs_labels:
        raise ValueError(f"expected a statistic of this probe, got {name!r}, which needs labels: probe it")
    metric = statistics()[name]()
    if hasattr(metric, "threshold"):
        metric.threshold = threshold_of(recorded.values())
    return metric


def _with_folds(metric: Metric, folds: int) -> Metric:
    return (
        metric.with_folds(folds) if isinstance(metric, SpectralMetric) and metric.takes_observations else metric
    )
