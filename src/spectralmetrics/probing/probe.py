"""LayerProbe: metrics on every layer of a model, which does not notice."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes
from torchmetrics import Metric, MetricCollection

from spectralmetrics.functional.moments import Observations
from spectralmetrics.metrics import EigenspaceEmbeddingMetric, SaturationMetric, SpectralMetric
from spectralmetrics.metrics.merging import run_together
from spectralmetrics.probing.observations import (
    FeatureMaps,
    Interpolation,
    ObservationRule,
    Sequences,
    draw,
    first_tensor,
    sample_size,
)
from spectralmetrics.probing.selection import Selectors, select_layers, unwrap

Metrics: TypeAlias = Metric | Sequence[Metric] | Mapping[str, Metric] | MetricCollection
STAGES = ("train", "eval")


@dataclass
class _Progress:
    """What a probe remembers of one layer and stage besides its metrics."""

    forwards: int = 0
    samples: int = 0
    epoch: int = 0


class LayerProbe(nn.Module):
    """Metrics of the outputs of a model's layers, train and eval apart, while the model runs as ever.

    The probe hooks the model and owns the metrics. It never becomes part of the model: the model's
    ``state_dict``, parameters and pickles are as they were, copies of the model are not probed, and training
    is bit-identical with and without it. Activations recomputed in backward are not counted again.

    Args:
        model: any module; wrappers for compilation and data parallelism are looked through.
        metrics: a metric, a sequence or dict of them, or a ``MetricCollection``; cloned for every layer and
            stage; ``SaturationMetric()`` by default. The stage is the layer's own ``training`` flag:
            ``"train"`` or ``"eval"``.
        layers: which layers, by glob pattern on their qualified names, module type, callable
            ``(name, module) -> bool``, or a sequence of these; by default linear, convolutional and recurrent
            layers and multi-head attention. See :func:`~spectralmetrics.probing.select_layers`.
        exclude: taken away from these, likewise.
        feature_maps: what is an observation of feature maps ``(N, C, *spatial)``: ``"positions"``, every kernel
            position, (N·positions, C); ``"mean"``, ``"max"`` or ``"median"`` of each map, (N, C) (of an even
            number of values the lower median, as in ``torch.median``); ``"flatten"``, (N, C·positions).
        sequences: what is an observation of sequences (N, T, D): ``"timesteps"``, (N·T, D); ``"last"``, the
            last valid step, or ``"mean"`` of the valid steps, (N, D); ``"flatten"``, (N, T·D), padding set to
            zero.
        max_map_size: maps that are larger in any spatial extent are interpolated down to it; None: never.
        interpolation: mode of ``torch.nn.functional.interpolate``; 1-D and 3-D maps use the linear mode of
            their rank.
        every_n_steps: observe the first and then every n-th forward of a layer.
        max_samples: stop observing a layer and stage after that many samples until :meth:`reset`.
        rows_per_feature: r draws at most ⌈r·D⌉ observations uniformly from each forward.
        max_features: a wider layer is left out with a warning.
        select: pattern -> function that takes a layer's output and returns the tensor to observe, (N, D),
            (N, T, D) or ``(N, C, *spatial)``: of an LSTM's last hidden state, (N, D),
            ``lambda out: out[1][0][-1]``.
        seed: of the draws, which leave the global random state alone.

    Raises:
        TypeError: for a model or metrics of another type.
        ValueError: for an argument out of range or a selector that matches nothing.
        RuntimeError: if the model is compiled and has already run: hooks would silently be ignored.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with LayerProbe(model, SaturationMetric(threshold=0.9)) as probe:
    ...     _ = model(torch.eye(4))
    ...     sorted(probe.compute())
    ['saturation/train/0', 'saturation/train/2']
    """

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
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        for name, value in (("every_n_steps", every_n_steps), ("max_features", max_features)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {value!r}")
        for name, limit in (("max_samples", max_samples), ("rows_per_feature", rows_per_feature)):
            if limit is not None and limit <= 0:
                raise ValueError(f"expected {name} to be positive or None, got {limit!r}")
        self.rule = ObservationRule(feature_maps, sequences, max_map_size, interpolation)
        self.every_n_steps = every_n_steps
        self.max_samples = max_samples
        self.rows_per_feature = rows_per_feature
        self.max_features = max_features
        self.seed = seed

        chosen = select_layers(model, layers, exclude)
        _check_not_yet_compiled(model)
        self._selected = {
            name: function
            for pattern, function in (select or {}).items()
            for name in select_layers(model, pattern)
        }
        templates = _named_metrics(SaturationMetric() if metrics is None else metrics)
        self._names = list(templates)
        self._layers = list(chosen)
        self._forward_order: list[str] = []
        self.metrics = nn.ModuleDict(
            {_module_key(stage, name): _collection(templates) for stage in STAGES for name in chosen}
        )
        self._progress = {(stage, name): _Progress() for stage in STAGES for name in chosen}
        self._given_up: set[tuple[str, str]] = set()  # until the next reset
        self._too_wide: set[tuple[str, str]] = set()
        self._paused = 0
        self._mask: Tensor | None = None
        self._mask_fits = False
        self._mask_misses: dict[str, tuple[int, ...]] = {}  # layer -> shape of a sequence it does not fit
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._handles = [module.register_forward_hook(_Observer(self, name)) for name, module in chosen.items()]
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)
        self._finalizer.atexit = False  # at the end of the program there is nothing left to clean

    # -- what the user sees ------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The probed layers: those that have run, in the order of their first run, then the rest."""
        return self._forward_order + [name for name in self._layers if name not in self._forward_order]

    @property
    def statistics(self) -> dict[str, Metric]:
        """The metrics by the names that their values have, in their order, as they are kept for one layer."""
        members = dict(self._all_collections()[0].items(keep_base=True, copy_state=False))
        return {name: members[name] for name in self._names}

    def __getitem__(self, key: tuple[str, str]) -> MetricCollection:
        """The metrics of one stage and layer: ``probe["train", "layer1.0.conv1"]``."""
        stage, name = key
        _check_stage(stage)
        if name not in self._layers:
            raise KeyError(f"{name!r} is not probed; probed layers are {', '.join(map(repr, self._layers))}")
        collection = self.metrics[_module_key(stage, name)]
        assert isinstance(collection, MetricCollection)
        return collection

    def compute(self, stage: str | None = None) -> dict[str, Tensor]:
        """The values of all layers, merged across processes in two collectives.

        Args:
            stage: ``"train"``, ``"eval"``, or None for both.

        Returns:
            ``"{metric}/{stage}/{layer}"`` -> value, in forward order. Layers that have seen nothing are left
            out, with one warning that names them if others in that stage have seen something.

        Raises:
            RuntimeError: if observations were not finite and a metric has ``nan_strategy="error"``.
        """
        stages = STAGES if stage is None else (_check_stage(stage),)
        values: dict[str, Tensor] = {}
        with self._lock, self._merged([(s, name) for s in stages for name in self._layers]):
            for each in stages:
                values.update(self._compute_stage(each))
        return values

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the metrics hold what all processes have observed together.

        :meth:`compute` and ``probe[stage, layer]`` then read it without further communication. All processes
        enter together. Layers must not run inside.
        """
        with self._lock, self._merged([(stage, name) for stage in STAGES for name in self._layers]):
            self._is_merged = True
            try:
                yield
            finally:
                self._is_merged = False

    def reset(self, stage: str | None = None) -> None:
        """Forget the observations of one stage, or of both; sampling goes on with fresh draws."""
        with self._lock:
            for each in STAGES if stage is None else (_check_stage(stage),):
                for name in self._layers:
                    self._given_up.discard((each, name))
                    self[each, name].reset()
                    progress = self._progress[each, name]
                    progress.forwards = progress.samples = 0
                    progress.epoch += 1

    def pause(self) -> None:
        """Observe nothing until :meth:`resume`."""
        self._paused += 1

    def resume(self) -> None:
        """Observe again after :meth:`pause`."""
        self._paused = max(self._paused - 1, 0)

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
            mask: (N, T) boolean, True for valid tokens; applied to outputs that are sequences of that shape.

        Raises:
            TypeError: if the mask is no boolean tensor.
            ValueError: if it is not 2-D.

        Warns once if sequences were observed inside and it fitted none of them.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"expected a boolean mask, True for valid tokens, got {kind}")
        if mask.ndim != 2:
            raise ValueError(f"expected a mask of shape (N, T), got {tuple(mask.shape)}")
        before, self._mask = self._mask, mask
        self._mask_fits, self._mask_misses = False, {}
        try:
            yield
        finally:
            self._mask = before
        if self._mask_misses and not self._mask_fits and not self._warned_of_mask:
            self._warned_of_mask = True
            name, shape = next(iter(self._mask_misses.items()))
            _warn(
                f"the mask of shape {tuple(mask.shape)} fits no sequence that was observed; all steps were"
                f" counted of {', '.join(map(repr, self._mask_misses))}: (N, T, D) of {name!r} is {shape}"
            )

    def remove(self) -> None:
        """Take all hooks off the model; what has been observed can still be computed."""
        _remove_all(self._handles)

    def __enter__(self) -> LayerProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def persistent(self, mode: bool = True) -> None:
        """Whether ``state_dict`` holds observations and sampling progress, so that an epoch can resume."""
        for collection in self._all_collections():
            for metric in _members(collection):
                metric.persistent(False)
            for leader in _leaders(collection):  # the others share its state
                leader.persistent(mode)
        self._is_persistent = mode

    _is_persistent = False
    _warned_of_mask = False
    _is_merged = False

    def to(self, *args: Any, **kwargs: Any) -> LayerProbe:
        """Move the metrics; from then on observations are brought to that device."""
        for collection in self._all_collections():
            for metric in _members(collection):
                metric.to(*args, **kwargs)
        return self

    def cpu(self) -> LayerProbe:
        """As ``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> LayerProbe:
        """As ``to("cuda")``."""
        return self.to("cuda" if device is None else torch.device("cuda", device))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The layers and metrics, in a line each."""
        return f"layers={self.layers}, metrics={self._names}"

    def _all_collections(self) -> list[MetricCollection]:
        return [self[stage, name] for stage in STAGES for name in self._layers]

    # -- observing ---------------------------------------------------------------------------------------

    def _observe(self, name: str, module: nn.Module, output: Any) -> None:
        # In backward this is a checkpoint's recomputation, and the forward has been counted. Under a tracer
        # nothing is computed, and inside `select` or another library's metric the model is not the user's run.
        if self._paused or torch._C._current_graph_task_id() != -1 or _is_traced(output):
            return
        if getattr(self._thread, "observing", False):
            return
        stage = "train" if module.training else "eval"
        with self._lock:
            progress = self._progress[stage, name]
            forward = progress.forwards
            progress.forwards += 1
            if name not in self._forward_order:
                self._forward_order.append(name)
            if forward % self.every_n_steps or (stage, name) in self._given_up | self._too_wide:
                return
            if self.max_samples is not None and progress.samples >= self.max_samples:
                return
            self._thread.observing = True
            try:
                with _undisturbed(output):
                    self._observe_output(stage, name, module, output, progress, forward)
            except Exception as error:
                # A monitor must not end a training run.
                self._give_up(stage, name, f"{type(error).__name__}: {error}")
            finally:
                self._thread.observing = False

    def _observe_output(
        self, stage: str, name: str, module: nn.Module, output: Any, progress: _Progress, forward: int
    ) -> None:
        selected = name in self._selected
        if selected:
            output = self._selected[name](output)
        batch = self.rule.batch(None if selected else module, output, self._mask)
        if self._mask is not None and batch.kind == "sequence":
            if batch.valid is None:
                self._mask_misses[name] = tuple(batch.values.shape)
            else:
                self._mask_fits = True
        if self.max_samples is not None:
            batch = batch.first(self.max_samples - progress.samples)
        if batch.values.numel() == 0:
            return
        progress.samples += batch.num_samples
        observations = batch.observations(self.rule)
        width = observations.num_features
        if width > self.max_features:
            self._too_wide.add((stage, name))
            self._give_up(
                stage,
                name,
                f"{width} features exceed max_features={self.max_features}; their covariance would take"
                f" {8 * width**2 / 2**30:.1f} GiB",
            )
            return
        if self.rows_per_feature is not None:
            seed = zlib.crc32(f"{self.seed} {stage} {name} {progress.epoch} {forward}".encode())
            observations = draw(observations, sample_size(self.rows_per_feature, width), seed)
        _update(self[stage, name], observations)

    def _give_up(self, stage: str, name: str, reason: str) -> None:
        self._given_up.add((stage, name))
        warnings.warn(
            f"layer {name!r} is not observed any more in {stage}: {reason}", UserWarning, stacklevel=2
        )

    # -- computing ---------------------------------------------------------------------------------------

    def _compute_stage(self, stage: str) -> dict[str, Tensor]:
        order = self.layers
        unseen, left_out, values = [], [], {}
        for name in order:
            collection = self[stage, name]
            leaders = [m for m in _leaders(collection) if isinstance(m, SpectralMetric)]
            if not _has_seen(collection, leaders, self._progress[stage, name]):
                unseen.append(name)
            if leaders and (dropped := int(leaders[0].non_finite)):
                left_out.append(f"{dropped} of {name!r}")
                strategies = {m.nan_strategy for m in _members(collection) if isinstance(m, SpectralMetric)}
                if "error" in strategies:
                    raise RuntimeError(
                        f"{dropped} observations of layer {name!r} in {stage} hold NaN or infinite values;"
                        " nan_strategy='warn' leaves them out"
                    )
                if "warn" not in strategies:
                    left_out.pop()
        failed = []
        for name in order:
            if name in unseen:
                continue
            members = dict(self[stage, name].items(keep_base=True, copy_state=False))
            found: dict[str, Tensor] = {}
            # Eigenvectors first: they come with the eigenvalues that the others read.
            for key in sorted(members, key=lambda k: not getattr(members[k], "needs_eigenvectors", False)):
                metric = members[key]
                try:
                    if isinstance(metric, SpectralMetric):
                        metric.check_range()
                    found[key] = metric.read() if isinstance(metric, SpectralMetric) else metric.compute()
                except Exception as error:
                    # One value less: a user's statistic on a width it was not made for, say.
                    failed.append(f"{key!r} of {name!r} ({type(error).__name__}: {error})")
            values.update({f"{key}/{stage}/{name}": found[key] for key in self._names if key in found})
        if left_out:
            _warn(f"observations with NaN or infinite values were left out in {stage}: {', '.join(left_out)}")
        if failed:
            _warn(f"values that could not be computed in {stage} are left out: {', '.join(failed)}")
        if unseen and len(unseen) < len(order):
            _warn(f"layers that saw nothing in {stage} are left out: {', '.join(map(repr, unseen))}")
        return values

    @contextlib.contextmanager
    def _merged(self, where: list[tuple[str, str]]) -> Iterator[None]:
        """Inside, the states of these layers are those of all processes together."""
        if self._is_merged:
            yield
            return
        collections = [self[stage, name] for stage, name in where]
        leaders = [m for c in collections for m in _leaders(c) if isinstance(m, SpectralMetric)]
        groups: dict[Any, list[SpectralMetric]] = {}
        for leader in leaders:
            if leader.sync_on_compute and leader.distributed_available_fn():
                groups.setdefault(leader.process_group, []).append(leader)
        local = [(leader, leader.metric_state) for members in groups.values() for leader in members]
        try:
            for group, members in groups.items():
                if torch.distributed.get_rank(group) >= 0:
                    exchanges = [member.exchanges(group) for member in members]
                    results = iter(run_together([e for each in exchanges for e in each], group))
                    for member, each in zip(members, exchanges, strict=True):
                        member.absorb([next(results) for _ in each], group)
            for collection in collections:
                _share_state(collection)
            yield
        finally:
            for leader, state in local:
                for key, value in state.items():
                    setattr(leader, key, value)
            for collection in collections:
                _share_state(collection)

    # -- saving ------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_persistent:
            rows = [
                [p.forwards, p.samples, p.epoch, (stage, name) in self._given_up | self._too_wide]
                for (stage, name), p in self._progress.items()
            ]
            destination[prefix + "progress"] = torch.tensor(rows, dtype=torch.int64)
            order = [self._layers.index(name) for name in self._forward_order]
            destination[prefix + "forward_order"] = torch.tensor(order, dtype=torch.int64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        progress = state_dict.pop(prefix + "progress", None)
        order = state_dict.pop(prefix + "forward_order", None)
        if progress is None and self._is_persistent:
            missing_keys.append(prefix + "progress")  # saved from a probe that was not persistent
        if progress is not None:
            if progress.shape[0] != len(self._progress):
                raise ValueError(
                    f"expected the state of {len(self._layers)} probed layers, got that of"
                    f" {progress.shape[0] // len(STAGES)}"
                )
            self._given_up = set()
            for key, (forwards, samples, epoch, given_up) in zip(
                self._progress, progress.tolist(), strict=True
            ):
                self._progress[key] = _Progress(forwards, samples, epoch)
                if given_up:
                    self._given_up.add(key)
        if order is not None:
            self._forward_order = [self._layers[index] for index in order.tolist()]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a probe holds its observations; the hooks belong to the original.
        state = self.__dict__.copy()
        state.update(_lock=None, _thread=None, _handles=[], _finalizer=None, _selected={}, _mask=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()
        self._thread = threading.local()


class _Observer:
    """The forward hook of one layer."""

    def __init__(self, probe: LayerProbe, name: str) -> None:
        self._probe = weakref.ref(probe)
        self._name = name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        probe = self._probe()
        if probe is not None:
            probe._observe(self._name, module, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # Hooks are copied and pickled with a module. What arrives is a function of the standard library that
        # takes any three arguments and does nothing, so that the copy is not probed and needs no package.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _remove_all(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _check_stage(stage: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"expected a stage among {STAGES}, got {stage!r}")
    return stage


def _check_not_yet_compiled(model: nn.Module) -> None:
    """Hooks made after the first compiled call never fire: PyTorch does not look for them again."""
    inner = unwrap(model)
    compiled = {
        name: module
        for name, module in [("model", model), *model.named_modules(), ("model", inner), *inner.named_modules()]
        if getattr(module, "_orig_mod", None) is not None or module._compiled_call_impl is not None
    }
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for name, module in compiled.items():
        original = getattr(module, "_orig_mod", module)
        code = getattr(getattr(original.forward, "__func__", original.forward), "__code__", None)
        call = nn.Module._call_impl.__code__
        if any(entry is not None and _debug_get_cache_entry_list(entry) for entry in (code, call)):
            raise RuntimeError(
                f"{name or 'the model'} ({type(original).__name__}) is compiled and has already run, so PyTorch"
                " would ignore the probe's hooks; make the probe before the first call, or call"
                " torch.compiler.reset() first"
            )


def _named_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by the names that their values will have."""
    if isinstance(metrics, Metric):
        metrics = [metrics]
    if isinstance(metrics, MetricCollection):
        named = [(str(key), metric) for key, metric in metrics.items(copy_state=False)]
    elif isinstance(metrics, Mapping):
        named = list(metrics.items())
    elif isinstance(metrics, Sequence) and not isinstance(metrics, str):
        named = [(getattr(metric, "short_name", type(metric).__name__), metric) for metric in metrics]
    else:
        hint = f"the class {metrics.__name__}; call it" if isinstance(metrics, type) else type(metrics).__name__
        raise TypeError(f"expected a metric, a sequence or dict of metrics, got {hint}")
    if not named:
        raise ValueError("expected at least one metric, got none")
    for name, metric in named:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"expected metric {name!r} to be a torchmetrics.Metric, got {type(metric).__name__}"
            )
        if {".", "/"} & set(name) or not name or hasattr(MetricCollection, name):
            raise ValueError(
                f"expected a metric name without dots and slashes that torch.nn.Module has not, got {name!r}"
            )
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected each metric name once, got {twice} more than once; name them with a dict")
    return dict(named)


def _collection(templates: dict[str, Metric]) -> MetricCollection:
    """Clones in a collection whose groups are known from their settings instead of from the first data."""
    clones: dict[str, Metric | MetricCollection] = {}
    for name, metric in templates.items():
        clones[name] = clone = metric.clone()
        clone.reset()
    return MetricCollection(clones, compute_groups=_compute_groups(templates))


def _compute_groups(templates: dict[str, Metric]) -> list[list[str]]:
    """Names of metrics that can share a state; the first of each group accumulates for all of them."""
    groups: dict[Any, list[str]] = {}
    # A metric with a sample of its own accumulates all that a plain one needs, and can lead one group.
    samplers = [name for name, metric in templates.items() if isinstance(metric, EigenspaceEmbeddingMetric)]
    for name, metric in templates.items():
        key: Any = name
        if isinstance(metric, SpectralMetric) and metric.takes_observations and name not in samplers[1:]:
            key = (metric.gram_dtype, metric.process_group, metric.sync_on_compute)
        groups.setdefault(key, []).append(name)
    return [sorted(names, key=lambda name: name not in samplers) for names in groups.values()]


def _members(collection: MetricCollection) -> list[Metric]:
    # `values` would read the states to share them.
    return [getattr(collection, str(name)) for name in collection.keys(keep_base=True)]


def _leaders(collection: MetricCollection) -> list[Metric]:
    return [getattr(collection, names[0]) for names in collection.compute_groups.values()]


def _has_seen(collection: MetricCollection, leaders: list[SpectralMetric], progress: _Progress) -> bool:
    if leaders:
        return all(int(metric.count) > 0 for metric in leaders)
    # Metrics of other libraries merge by themselves, on all processes or on none.
    return progress.samples > 0 or any(metric.distributed_available_fn() for metric in _members(collection))


def _share_state(collection: MetricCollection) -> None:
    collection._state_is_copy = False
    collection._compute_groups_create_state_ref()


def _update(collection: MetricCollection, observations: Observations) -> None:
    members = _members(collection)
    if all(isinstance(m, SpectralMetric) and m.takes_observations for m in members):
        # The collection's own update would read the states to share them, and rows could not wait.
        for leader in _leaders(collection):
            leader.update(observations)
        return
    rows = observations.rows()
    collection.update(rows if observations.valid is None else rows[observations.valid])


def _module_key(stage: str, name: str) -> str:
    """A key for ``nn.ModuleDict``, which takes neither dots nor the names of its own methods."""
    name = name.replace("%", "%25").replace("/", "%2F")
    return f"{stage}/{name.replace('.', '/')}"


def _is_traced(output: Any) -> bool:
    """Whether the model is being traced, planned or transformed, and not run."""
    if torch._C._is_tracing() or isinstance(output, torch.fx.Proxy):
        return True
    values = first_tensor(output)
    if isinstance(values, PackedSequence):
        values = values.data
    return values is not None and (
        isinstance(values, FakeTensor)
        or values.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(values)
    )


@contextlib.contextmanager
def _undisturbed(output: Any) -> Iterator[None]:
    """No autograd, no inference mode, no autocast, and nobody listening to what is computed inside."""
    device = output.device.type if isinstance(output, Tensor) else "cpu"
    with contextlib.ExitStack() as stack:
        # Selective checkpointing records every operation of the forward, to replay it in backward.
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
