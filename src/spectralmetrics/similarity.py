"""LayerSimilarity: which layers of one network, or of two, represent the same samples alike."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmetrics.functional.relations import MINIMUM_SAMPLES, cka, gram, u_centred, usable_samples
from spectralmetrics.probing.alike import Alike
from spectralmetrics.probing.hooks import (
    HOOKS_IGNORED,
    Hooks,
    Select,
    how_it_runs,
    undisturbed,
    warn_user,
    watch_outputs,
    weakly,
)
from spectralmetrics.probing.layout import Layout, find_layout
from spectralmetrics.probing.meshes import Meshes
from spectralmetrics.probing.outputs import Unobservable
from spectralmetrics.probing.parts import LeftOut, ranks_of, reason_of, whole_of
from spectralmetrics.probing.placement import has_some_positions
from spectralmetrics.probing.processes import has_others
from spectralmetrics.probing.rules import FeatureMaps, ObservationRule, Sequences
from spectralmetrics.probing.sampling import Limits
from spectralmetrics.probing.selection import Selectors, select_layers, unwrap
from spectralmetrics.probing.steps import Steps
from spectralmetrics.sums.merging import communication_device
from spectralmetrics.torch_private import ignores_hooks, in_backward, is_context_parallel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Similarity:
    """The alignment of every layer of one network with every layer of another or the same network.

    Attributes:
        matrix: debiased linear CKA, shape (L1, L2), float64, in [−1, 1].
        layers: names of the rows, in forward order.
        other_layers: names of the columns, likewise.
        count: the number of samples.
    """

    matrix: Tensor
    layers: list[str]
    other_layers: list[str]
    count: int

    def __repr__(self) -> str:
        return f"Similarity({len(self.layers)} x {len(self.other_layers)} layers, {self.count} samples)"

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """The alignment of two layers by their names, shape ()."""
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise KeyError(f"expected the names of two layers, got {pair!r}")
        row, column = pair
        for name, names in ((row, self.layers), (column, self.other_layers)):
            if name not in names:
                raise KeyError(f"{name!r} was not compared; layers are {', '.join(map(repr, names))}")
        return self.matrix[self.layers.index(row), self.other_layers.index(column)]

    def plot(self, *, title: str | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw a heat map, see :func:`~spectralmetrics.plotting.plot_similarity`."""
        from spectralmetrics.plotting import plot_similarity

        return plot_similarity(self.matrix, self.layers, self.other_layers, title=title, ax=ax)


# Layer -> inner products between the samples of one forward, and a mask of the finite samples.
_Outputs: TypeAlias = dict[str, tuple[Tensor, Tensor]]


@dataclass
class _Forward:
    """One forward of a model.

    Attributes:
        outputs: the outputs of its layers.
        calls: layer -> number of its runs.
        ranks: the processes that share the forward and have the same outputs; empty for this process alone.
    """

    outputs: _Outputs = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    ranks: set[int] = field(default_factory=set)


@dataclass
class _Side:
    """One of the two models."""

    layers: list[str]
    layout: Layout
    meshes: Meshes
    forward_order: list[str] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)  # layer -> number of counted batches with it
    current: _Forward | None = None  # while a forward runs


class LayerSimilarity:
    """Debiased linear CKA between all layers of a model, or of two models, over batches.

    It hooks the models like a probe and never becomes part of them: eager training is bit-identical with and
    without it, and copies of the models have no hook. A compiled model gets one opaque operation for each layer
    and two for itself, so that every forward is seen.

    Run one forward of each model on the same batch, in either order, then the next batch. At the end of each
    pair of forwards the inner products between the samples of the batch are compared and forgotten: three
    numbers per pair of layers are kept, whatever their widths. During a forward each layer needs 8·N² bytes for
    a batch of N samples, and as much again at its end.

    A sample is one row of features per layer. Feature maps and sequences are flattened, as is usual for CKA:
    two layers are then alike if they separate the same samples by features and positions. Means ignore
    positions, and are cheaper. A layer that runs several times in a forward has the features of all runs. A
    sample with NaN or infinities in any layer is left out of the whole batch and counted, and so is the rest of
    a batch that has fewer than four others. A batch needs at least four samples.

    Where processes share a forward, as under tensor and sequence parallelism, each layer's output is gathered
    whole on all of them, and counted once.

    Args:
        model: any module; wrappers for compilation and ``DistributedDataParallel`` are unwrapped.
        other: the second model; None compares the layers of ``model`` with each other.
        layers: the layers of both models, selected as for :class:`~spectralmetrics.LayerProbe`.
        exclude: layers to leave out of these, selected likewise.
        feature_maps: ``"flatten"``, or ``"mean"``, ``"max"`` or ``"median"`` of each map.
        sequences: ``"flatten"`` (padding is zero), ``"mean"`` of the valid steps, or the ``"last"`` one.
        process_group: the processes whose samples :meth:`compute` adds up; the default group if None.

    Raises:
        TypeError: for a model of another type, or ``nn.DataParallel``, whose replicas see parts of a batch.
        ValueError: for a selector that matches nothing or an unknown way to observe.
        RuntimeError: if a layer takes no hooks, such as a scripted one.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with LayerSimilarity(model) as similarity:
    ...     for _ in range(4):
    ...         _ = model(torch.randn(64, 4))
    >>> result = similarity.compute()
    >>> result.layers
    ['0', '1', '3']
    >>> result.matrix.diagonal()
    tensor([1., 1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        other: nn.Module | None = None,
        *,
        layers: Selectors | None = None,
        exclude: Selectors | None = None,
        feature_maps: FeatureMaps = "flatten",
        sequences: Sequences = "flatten",
        process_group: Any = None,
    ) -> None:
        if feature_maps == "positions" or sequences == "timesteps":
            raise ValueError(
                "expected feature_maps and sequences that make one row of each sample ('flatten', 'mean', …),"
                f" got feature_maps={feature_maps!r}, sequences={sequences!r}"
            )
        self.rule = ObservationRule(feature_maps, sequences, max_map_size=None)
        self.process_group = process_group
        models = [model] if other is None else [model, other]
        for name, each in zip(("model", "other"), models, strict=False):
            if not isinstance(each, nn.Module):
                raise TypeError(f"expected {name} to be a torch.nn.Module, got {type(each).__name__}")
            if isinstance(each, nn.DataParallel):
                raise TypeError(
                    f"expected {name} to see whole batches, got nn.DataParallel, whose replicas see parts of"
                    " them; run and pass the model inside it"
                )
        chosen = [select_layers(each, layers, exclude) for each in models]
        alike = Alike(Limits(), Steps(1, 0), vars(self.rule))
        self._sides = [
            _Side(
                list(names), find_layout(each, names, None, ()), Meshes(unwrap(each), names, (), False, alike)
            )
            for each, names in zip(models, chosen, strict=True)
        ]
        self._waiting: tuple[int, _Forward] | None = None  # index and forward of the model that ran first
        self._paused = 0
        self._warned: set[str] = set()
        self._hooks = Hooks(self)
        self.reset()
        try:
            for index, (each, modules) in enumerate(zip(models, chosen, strict=True)):
                self._watch(index, unwrap(each), modules)
        except BaseException:
            self.remove()
            raise

    def _watch(self, index: int, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Put hooks on one of the models: before its forward, behind each layer, and behind its forward."""
        self._hooks.before(model, weakly(self._begin, index))
        for name, module in layers.items():
            watch_outputs(self._hooks, module, weakly(self._observe, (index, name)))
        self._hooks.behind(model, weakly(self._end, index), needs_values=False)

    @property
    def layers(self) -> list[str]:
        """The layers of the model: those that have run, in the order of their first run, then the rest."""
        return _ordered(self._sides[0])

    @property
    def other_layers(self) -> list[str]:
        """The layers of the other model, or of the only one."""
        return _ordered(self._sides[-1])

    def compute(self) -> Similarity:
        """The alignment of all layers that have run, over all samples of all processes, in one all-reduce.

        Raises:
            RuntimeError: if no pair of forwards has been counted.

        Warns of layers that have not run and of samples that were left out.
        """
        sums, counts, seen, positions = self._merged()
        count, left_out = (int(number) for number in counts)
        if count == 0:
            raise RuntimeError(self._why_nothing(left_out))
        if left_out:
            _warn(f"samples left out for NaN or infinite values in some layer: {left_out}")
        kept: list[list[int]] = []
        for side, times, order in zip(self._sides, seen, positions, strict=True):
            # The mean position over the processes that ran the layer: the position itself where they agree.
            position = (order / times.clamp(min=1)).tolist()
            kept.append(sorted((i for i, t in enumerate(times.tolist()) if t), key=lambda i: position[i]))
            if unseen := [name for name, t in zip(side.layers, times.tolist(), strict=True) if not t]:
                _warn(f"layers that saw nothing are left out: {', '.join(map(repr, unseen))}")
        rows, columns = kept[0], kept[-1]
        matrix = cka(*sums)[rows][:, columns]
        names = [[side.layers[i] for i in order] for side, order in zip(self._sides, kept, strict=True)]
        return Similarity(matrix, names[0], list(names[-1]), count)

    def reset(self) -> None:
        """Forget all samples, and a forward that waits for the other model's forward."""
        self._waiting = None
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None
        for side in self._sides:
            side.times.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing inside ``with similarity.paused():``, such as training steps."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove(self) -> None:
        """Take all hooks off the models; what has been observed can still be computed."""
        self._hooks.take_off()

    def __enter__(self) -> LayerSimilarity:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        sizes = " x ".join(str(len(side.layers)) for side in (self._sides[0], self._sides[-1]))
        return f"LayerSimilarity({sizes} layers)"

    def _begin(self, index: int, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """A forward of a model begins, unless it is traced or a checkpoint's recomputation in backward."""
        is_off = self._paused or in_backward()
        try:
            is_off = is_off or how_it_runs(output) != "run"
        except Exception:
            is_off = True  # a tensor that refuses every operation must not end a forward
        self._sides[index].current = None if is_off else _Forward()

    def _observe(
        self, where: tuple[int, str], module: nn.Module, output: Any, training: bool, select: Select | None
    ) -> None:
        """A layer of a side has run, maybe by itself. No error here may end a forward."""
        index, name = where
        side = self._sides[index]
        if in_backward():
            return
        forward = None if self._paused else side.current
        # Processes that share a layer gather its output together, even if only some of them observe it.
        if forward is None and not side.meshes.concerns(output):
            return
        try:
            if how_it_runs(output) != "run":
                return
            if isinstance(output, Unobservable):
                raise TypeError(output.why)
            with undisturbed(output):
                side.meshes.search(module)
                dims = side.layout.dims[name]
                calls = Counter[str]() if side.current is None else side.current.calls
                part = side.meshes.part_of(name, module, output, dims, calls[name])
                calls[name] += 1
                if part is not None:
                    output = whole_of(part)
                if forward is None:
                    return
                batch = self.rule.batch(module, output, time_first=name in side.layout.time_first, dims=dims)
                if is_context_parallel() and has_some_positions(batch):
                    raise LeftOut("each process has some positions of each sample inside context_parallel")
                observations = batch.observations(self.rule)
                products = gram(observations.rows())
                finite = usable_samples(products)
                if observations.valid is not None:
                    finite = finite & observations.valid
                if name in forward.outputs:
                    # Features put side by side: their inner products add up.
                    earlier = forward.outputs[name]
                    products, finite = products + earlier[0], finite & earlier[1]
                forward.outputs[name] = (products, finite)
                if part is not None:
                    forward.ranks.update(ranks_of(part))
        except Exception as error:
            # It must not end a training run.
            self._warn_once(f"layer {name!r} cannot be compared: {reason_of(error)}")
            if forward is not None:
                forward.outputs.pop(name, None)
            return
        if name not in side.forward_order:
            side.forward_order.append(name)

    def _end(self, index: int, module: nn.Module, output: Any, training: bool, select: Select | None) -> None:
        """A forward of a model ends."""
        current, self._sides[index].current = self._sides[index].current, None
        if current is None or not current.outputs:
            return
        if len(self._sides) == 1:
            pair = [current]
        elif self._waiting is None or self._waiting[0] == index:
            if self._waiting is not None:
                name = ("`model`", "`other`")[index]
                self._warn_once(
                    f"{name} ran twice before the other model ran: the earlier forward was dropped. Run both on"
                    " each batch, and other forwards inside `with similarity.paused():`"
                )
            self._waiting = (index, current)
            return
        else:
            pair = [current, self._waiting[1]] if index == 0 else [self._waiting[1], current]
            self._waiting = None
        try:
            ranks = set().union(*(each.ranks for each in pair))
            if not ranks or self._is_first(ranks):
                with undisturbed(next(iter(current.outputs.values()))[0]):
                    self._add([each.outputs for each in pair])
        except Exception as error:
            self._warn_once(f"a batch could not be compared and was left out: {type(error).__name__}: {error}")

    def _is_first(self, ranks: set[int]) -> bool:
        """True if this process counts the outputs that all these ranks share."""
        try:
            merged = set(dist.get_process_group_ranks(self.process_group))
        except (KeyError, ValueError):  # this process is not in the group
            merged = set()
        return dist.get_rank() == min(ranks & merged or ranks)

    def _add(self, pair: list[_Outputs]) -> None:
        sizes = [Counter(len(valid) for _, valid in side.values()).most_common(1)[0][0] for side in pair]
        if len(set(sizes)) > 1:
            self._warn_once(f"forwards of {sizes[0]} and {sizes[1]} samples are no pair and were left out")
            return
        samples = sizes[0]
        if samples < MINIMUM_SAMPLES:
            self._warn_once(
                f"a forward of {samples} samples was left out: the unbiased estimator needs {MINIMUM_SAMPLES}"
            )
            return
        for outputs in pair:
            for name, rows in [(name, len(valid)) for name, (_, valid) in outputs.items()]:
                if rows != samples:
                    del outputs[name]
                    self._warn_once(
                        f"layer {name!r} was left out of a forward: it has {rows} rows for {samples} samples"
                    )
        device = next(iter(pair[0].values()))[0].device
        valid = torch.stack([each.to(device) for side in pair for _, each in side.values()]).all(0)
        stacks = [_stack(side, outputs, valid) for side, outputs in zip(self._sides, pair, strict=True)]
        (left, left_present), (right, right_present) = stacks[0], stacks[-1]
        # The sums of a pair of layers run over the batches of both.
        sums = torch.stack(
            [
                left @ right.mT,
                left.square().sum(1)[:, None] * right_present,
                left_present[:, None] * right.square().sum(1),
            ]
        )
        # A batch weighed by its samples has n · HSIC = ⟨K̂, L̂⟩ / (n − 3).
        number = valid.sum()
        enough = number >= MINIMUM_SAMPLES
        sums = torch.where(enough, sums / (number - 3), 0.0)
        counted = torch.where(enough, number, 0)
        counts = torch.stack([counted, samples - counted])
        self._sums = sums if self._sums is None else self._sums.to(device) + sums
        self._counts = counts if self._counts is None else self._counts.to(device) + counts

    def _merged(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Sums and counts; per side, the number of processes that ran each layer, and its summed positions."""
        shape = (3, len(self._sides[0].layers), len(self._sides[-1].layers))
        sums = torch.zeros(shape, dtype=torch.float64) if self._sums is None else self._sums
        counts = torch.zeros(2) if self._counts is None else self._counts
        by_layer = []
        for side in self._sides:
            seen = [float(side.times[name] > 0) for name in side.layers]
            order = _ordered(side)
            by_layer += [seen, [s * order.index(name) for s, name in zip(seen, side.layers, strict=True)]]
        parts = [sums.flatten(), counts.to(torch.float64)]
        parts += [torch.tensor(each, dtype=torch.float64, device=sums.device) for each in by_layer]
        packed = torch.cat(parts)
        group = self.process_group
        if has_others(group):
            packed = packed.to(communication_device(group), copy=True)
            dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        sums, counts, *rest = torch.split(packed.to(sums.device), [len(part) for part in parts])
        return sums.reshape(shape), counts, rest[0::2], rest[1::2]

    def _why_nothing(self, left_out: int) -> str:
        if left_out:
            return (
                f"no sample could be compared: all {left_out} samples hold NaN or infinite values in some"
                f" layer, or their batch has fewer than {MINIMUM_SAMPLES} others"
            )
        ran = [bool(side.forward_order) for side in self._sides]
        if all(ran):
            advice = "run both models on the same batch" if len(ran) == 2 else "run the model"
            return f"no batch has been counted; {advice}, with at least {MINIMUM_SAMPLES} samples"
        models = (
            "the model"
            if len(ran) == 1
            else " and ".join(name for name, has in zip(("`model`", "`other`"), ran, strict=True) if not has)
        )
        because = "a model that is exported, scripted or run inside transforms of torch.func is not observed"
        because = HOOKS_IGNORED if ignores_hooks() else because
        return f"no forward of {models} has been seen since the LayerSimilarity was made; {because}"

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_user(message)


def _stack(side: _Side, outputs: _Outputs, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Debiased inner products of all layers, shape (L, N²), and a mask of the layers present, (L,), 0 or 1."""
    device = valid.device
    stacked = torch.zeros(len(side.layers), len(valid) ** 2, dtype=torch.float64, device=device)
    present = [name in outputs for name in side.layers]
    for row, name in enumerate(side.layers):
        if name in outputs:
            products, _ = outputs.pop(name)  # so that its memory is freed at once
            stacked[row] = u_centred(products.to(device), valid).flatten()
            side.times[name] += 1
    if all(present):  # without a copy to the device, which would wait for it
        return stacked, torch.ones(len(present), dtype=torch.float64, device=device)
    return stacked, torch.tensor(present, dtype=torch.float64, device=device)


def _ordered(side: _Side) -> list[str]:
    return side.forward_order + [name for name in side.layers if name not in side.forward_order]


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
