"""The streaming covariance that every metric of this package accumulates, as a ``torchmetrics.Metric``.

:class:`SpectralMetric` holds the state (sums about an origin, see
:mod:`spectralmetrics.functional.moments`) and everything that torchmetrics needs to know about it. A
statistic is a short subclass that says how to read a number from a
:class:`~spectralmetrics.functional.Spectrum`:

>>> import torch
>>> from spectralmetrics.metrics.base import SpectralMetric
>>> class ConditionNumberMetric(SpectralMetric):
...     '''The largest eigenvalue over the smallest.'''
...
...     short_name = "condition_number_example"
...
...     def statistic(self, spectrum):
...         return spectrum.eigenvalues[0] / spectrum.eigenvalues[-1]
>>> metric = ConditionNumberMetric()
>>> metric.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
>>> metric.compute()
tensor(4., dtype=torch.float64)

This file is the only one that overrides private methods of torchmetrics. Each override names the behaviour
that forces it, and has a test that fails if that behaviour changes.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from spectralmetrics.functional.moments import Moments, Observations, accumulate, empty_moments, merge
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.merging import Exchange, exchange_moments, run_together

NanStrategy = Literal["warn", "error", "ignore"]

# Results that belong to a state tensor and not to a metric: metrics of one compute group share the tensor,
# and so the decomposition. Both are emptied when the tensor is updated in place.
_DECOMPOSITIONS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # second moment -> {center: cached parts}
_MERGED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # second moment -> {process group: merged Moments}

_STREAMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # second moment -> _Stream

# Batches too small for a product worth its pass over the D x D sum wait in a buffer of this many rows.
_GATHERED_ROWS = 2048

_STATISTICS: dict[str, type[SpectralMetric]] = {}


@dataclass
class _Stream:
    """What belongs to the sums of a stream besides their numbers, whichever metrics share them.

    Attributes:
        origin_is_near: whether the origin is known to lie near the data.
        origin_is_float32: whether the origin is known to be exact in float32.
        accumulations: how often rows were added.
        buffer: rows that wait, shape (_GATHERED_ROWS, D).
        waiting: their number.
    """

    origin_is_near: bool = False
    origin_is_float32: bool = False
    accumulations: int = 0
    buffer: Tensor | None = None
    waiting: int = 0


def _state(name: str) -> Any:
    """A state whose reader, whoever it is, finds the waiting rows added."""

    def read(metric: SpectralMetric) -> Tensor:
        metric._flush()
        try:
            value: Tensor = metric.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None
        return value

    def write(metric: SpectralMetric, value: Tensor) -> None:
        metric.__dict__[name] = value

    return property(read, write)


def statistics() -> dict[str, type[SpectralMetric]]:
    """All statistics defined so far, by short name, those of the user included.

    >>> from spectralmetrics import statistics
    >>> statistics()["saturation"].__name__
    'SaturationMetric'
    """
    return dict(_STATISTICS)


class SpectralMetric(Metric):
    r"""Base class of all statistics of a feature covariance; subclasses define :meth:`statistic`.

    ``update`` takes rows of shape (N, D) in any floating dtype. The state is float64, constant in size, and
    lives on the device of the first rows (or where :meth:`to` has put the metric): sums of
    :math:`x - o` and :math:`(x - o)(x - o)^\top` about an origin :math:`o` near the data, and a count.

    Args:
        num_features: the width D; None reads it from the first rows.
        center: False reads the second moment about zero instead of the covariance. Where the mean is more
            than 1e6 times the spread, only its first eigenvalue stands out of the round-off.
        gram_dtype: dtype of the products: ``torch.float64``, or ``torch.float32`` for speed. The sums are
            float64 either way.
        nan_strategy: rows that hold NaN or infinities are left out and counted. ``"warn"`` says so at
            ``compute``, ``"error"`` raises there, ``"ignore"`` is silent.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from ``update``, for rows that are no floating tensor.
        ValueError: for an argument out of range; from ``update``, for rows that are not 2-D or whose width
            is not D.
        RuntimeError: from ``compute``, if no observation has been counted.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    short_name: ClassVar[str]
    """The statistic's key in a probe's values and its name in tables; defining it registers the class."""
    needs_eigenvectors: ClassVar[bool] = False
    """Whether :meth:`statistic` reads eigenvectors, so that a probe decomposes once for all."""
    takes_observations: ClassVar[bool] = True
    """Whether ``update`` also takes ``Observations``; False for a subclass that overrides it."""

    configuration: Tensor
    count = _state("count")
    non_finite = _state("non_finite")
    origin = _state("origin")
    first_moment = _state("first_moment")
    second_moment = _state("second_moment")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__ and "takes_observations" not in cls.__dict__:
            cls.takes_observations = False
        if "short_name" in cls.__dict__:
            present = _STATISTICS.get(cls.short_name)
            if present is not None and present.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"expected a short name of its own for {cls.__name__}, got {cls.short_name!r},"
                    f" which names {present.__name__}"
                )
            _STATISTICS[cls.short_name] = cls

    def __init__(
        self,
        num_features: int | None = None,
        *,
        center: bool = True,
        gram_dtype: torch.dtype = torch.float64,
        nan_strategy: NanStrategy = "warn",
        **kwargs: Any,
    ) -> None:
        if num_features is not None and (
            not isinstance(num_features, int) or isinstance(num_features, bool) or num_features < 1
        ):
            raise ValueError(f"expected num_features to be a positive integer or None, got {num_features!r}")
        if gram_dtype not in (torch.float64, torch.float32):
            raise ValueError(f"expected gram_dtype torch.float64 or torch.float32, got {gram_dtype!r}")
        if nan_strategy not in get_args(NanStrategy):
            raise ValueError(f"expected nan_strategy among {get_args(NanStrategy)}, got {nan_strategy!r}")
        super().__init__(**kwargs)
        self._given_features = num_features
        self.center = center
        self.gram_dtype = gram_dtype
        self.nan_strategy = nan_strategy
        self._pinned_device: torch.device | None = None
        self._computing = False
        self._value_shape: torch.Size | None = None
        self._register_states()

    def _register_states(self) -> None:
        # Compute groups are formed by comparing states with a tolerance, in some releases of torchmetrics only
        # the first state: this one tells apart metrics that accumulate differently, whatever the data. Small
        # integers differ by more than the tolerance.
        digest = zlib.crc32(" ".join(self._accumulation()).encode()).to_bytes(4, "big")
        configuration = torch.tensor(list(digest), dtype=torch.int64, device="cpu")
        self.add_state("configuration", configuration, dist_reduce_fx="max")
        # The widths are unknown, or large: the sums are allocated by the first update.
        empty = functools.partial(torch.zeros, dtype=torch.float64, device="cpu")
        self.add_state("count", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("non_finite", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("origin", empty(0), dist_reduce_fx=None)
        self.add_state("first_moment", empty(0), dist_reduce_fx="sum")
        self.add_state("second_moment", empty(0, 0), dist_reduce_fx="sum")

    def _accumulation(self) -> list[str]:
        """What changes the accumulation: the products' dtype, and an ``update`` of a subclass' own."""
        update = type(self).update
        own = [] if self.takes_observations else [f"{update.__module__}.{update.__qualname__}"]
        return [str(self.gram_dtype), *own]

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """The value of this metric for the given spectrum; what a subclass defines."""
        raise NotImplementedError(f"{type(self).__name__} must define `statistic(self, spectrum)`")

    @property
    def num_features(self) -> int | None:
        """The width D; None until it is known."""
        width: int = self.__dict__["second_moment"].shape[0]
        return width if width else self._given_features

    @property
    def moments(self) -> Moments | None:
        """The sums, or None before the first rows; the tensors are the state itself."""
        self._flush()
        return self._unflushed()

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum of what has been accumulated, shared by the metrics that share this state.

        Raises:
            RuntimeError: if no observation has been counted.
        """
        self._check_observed()
        return self._shared_spectrum()

    def read(self) -> Tensor:
        """The value of ``compute`` for this process' observations, without its checks."""
        if type(self).compute is not SpectralMetric.compute:  # a subclass' own, checks and all
            return type(self).compute(self)
        return self._value(self._shared_spectrum()).clone()  # the spectrum itself is shared

    def check_range(self) -> None:
        """Raise a RuntimeError if the squares of the observations have overflowed."""
        if not self.second_moment.diagonal().isfinite().all():
            raise RuntimeError(
                f"{type(self).__name__}: the squares of the observations exceed the range of the sums (about"
                " 1e308 in float64); scale them down before `update`"
            )

    def _value(self, spectrum: Spectrum) -> Tensor:
        value: Any = self.statistic(spectrum)
        if isinstance(value, Tensor):
            return value
        # A number, from a statistic of the user's.
        dtype = torch.float64 if isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device=self.second_moment.device)

    def _shared_spectrum(self) -> Spectrum:
        assert self.moments is not None
        cache = _DECOMPOSITIONS.setdefault(self.second_moment, {}).setdefault(self.center, {})
        return Spectrum(self.moments, center=self.center, cache=cache)

    def update(self, rows: Tensor | Observations) -> None:
        """Add observations.

        Args:
            rows: shape (N, D), floating. Rows with NaN or infinities are left out and counted; zero rows are
                a no-op. :class:`~spectralmetrics.functional.Observations` are taken in their own layout.
        """
        observations = self._check_rows(rows)
        if observations.values.numel() == 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            first_rows = self._unflushed() is None
            moments, observations = self._meet(observations)
            if moments.second not in _STREAMS:
                _STREAMS[moments.second] = _Stream()
                if not first_rows:
                    self.look_at_origin()
            stream: _Stream = _STREAMS[moments.second]
            if first_rows or not self._gather(stream, observations):
                self._accumulate(moments, stream, observations)
            if first_rows:
                self.look_at_origin()

    def compute(self) -> Tensor:
        """The statistic of all observations so far, merged across processes as torchmetrics is told to."""
        return self._value(self.spectrum)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, as torchmetrics' metrics do.

        Args:
            val: what ``compute`` or ``forward`` returned, or a sequence of such; None computes.
            ax: a matplotlib axis to draw into.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the observations of another metric of this class, or of its state as a dict."""
        super().merge_state(incoming_state)
        # torchmetrics keeps the value computed before the merge.
        self._computed = None
        self._update_count = max(self._update_count, 1)

    def reset(self) -> None:
        """Forget all observations; a width that was read from rows is forgotten too."""
        super().reset()

    def look_at_origin(self) -> None:
        """Read from the device whether the origin lies near the data, which saves moving it at each update.

        Called after the first rows, and before the first that are added to a state made elsewhere; never later
        in ``update``.
        """
        moments = self.moments
        if moments is None:
            return
        stream: _Stream = _STREAMS.setdefault(moments.second, _Stream())
        stream.origin_is_near = int(moments.count) > 0
        exact = moments.origin.to(torch.float32).to(torch.float64) == moments.origin
        stream.origin_is_float32 = stream.origin_is_near and bool(exact.all())

    def to(self, *args: Any, **kwargs: Any) -> SpectralMetric:
        """Move the metric; from then on rows are brought to that device. Dtypes are left alone."""
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, Tensor):
            device = device.device
        if isinstance(device, (str, int, torch.device)):
            self._pinned_device = torch.device(device)
        super().to(*args, **kwargs)
        return self

    def cpu(self) -> SpectralMetric:
        """Move the metric to the CPU; from then on rows are brought there."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> SpectralMetric:
        """Move the metric to a CUDA device; from then on rows are brought there."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def set_dtype(self, dst_type: str | torch.dtype) -> SpectralMetric:
        """Leave everything as it is: the state is float64 and integers, whatever the model's dtype."""
        return self

    def exchanges(self, group: Any = None) -> list[Exchange]:
        """What this metric exchanges with other processes, for :func:`~.merging.run_together`."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        known = _MERGED.get(self.second_moment, {}).get(group)
        return [exchange_moments(self.moments, known, rank, world_size)]

    def absorb(self, results: list[Any], group: Any = None) -> None:
        """Replace the state by what the :meth:`exchanges` returned; the old tensors are left as they were."""
        merged: Moments | None = results[0]
        if merged is not None:
            _MERGED.setdefault(self.second_moment, {})[group] = merged
            self._set_moments(merged)

    # -- the state --------------------------------------------------------------------------------------

    def _check_rows(self, rows: Tensor | Observations) -> Observations:
        observations = rows if isinstance(rows, Observations) else Observations(rows)
        values = observations.values
        if not isinstance(values, Tensor):
            raise TypeError(f"expected rows as a floating tensor of shape (N, D), got {type(values).__name__}")
        if not values.is_floating_point():
            raise TypeError(f"expected rows of a floating dtype, got {values.dtype}; cast them to float first")
        if rows is values and values.ndim != 2:
            raise ValueError(
                f"expected rows of shape (N, D), got shape {tuple(values.shape)}; give each observation a row,"
                " or pass spectralmetrics.Observations(maps, feature_dim=1)"
            )
        width = observations.num_features
        if width == 0:
            raise ValueError(f"expected at least one feature, got rows of shape {tuple(values.shape)}")
        if self.num_features is not None and width != self.num_features:
            raise ValueError(
                f"expected rows with {self.num_features} features, got {width} (shape {tuple(values.shape)})"
            )
        return observations

    def _meet(self, observations: Observations) -> tuple[Moments, Observations]:
        """The state, allocated and writable, and the observations, on one device."""
        device = observations.values.device
        moments = self._unflushed()
        if moments is None:
            home = self._pinned_device or (torch.device("cpu") if device.type == "mps" else device)
            moments = empty_moments(observations.num_features, home)
            moments.non_finite.add_(self.non_finite)
            self._set_moments(moments)
        elif moments.second.device.type == "cpu" and device.type not in ("cpu", "mps"):
            if self._pinned_device is None:
                self._flush()
                moments = moments.map(lambda tensor: tensor.to(device))
                self._set_moments(moments)
        elif moments.second.is_inference() or self._is_synced:
            # A copy made in inference mode (by torchmetrics, or by deepcopy) could not be updated in place;
            # merged sums are shared with the other metrics of a group.
            self._flush()
            moments = moments.map(torch.clone)
            self._set_moments(moments)
        if moments.second.device != device:
            observations = observations.to(moments.second.device)
        return moments, observations

    def _set_moments(self, moments: Moments) -> None:
        self.count, self.non_finite = moments.count, moments.non_finite
        self.origin, self.first_moment, self.second_moment = moments.origin, moments.first, moments.second

    def _unflushed(self) -> Moments | None:
        """The sums without the rows that wait."""
        state = self.__dict__
        if state["second_moment"].shape[0] == 0:
            return None
        return _moments_of(state)

    def _gather(self, stream: _Stream, observations: Observations) -> bool:
        """Let a small batch wait for others; False if it is none."""
        count, width = observations.num_observations, observations.num_features
        dtype = observations.values.dtype
        if observations.valid is not None or count > min(max(width, 256), _GATHERED_ROWS // 2):
            return False
        if stream.buffer is None:
            shape = (_GATHERED_ROWS, width)
            dtype = dtype if dtype == torch.float64 else torch.float32  # in which half precision is exact
            stream.buffer = torch.empty(shape, dtype=dtype, device=observations.values.device)
        elif (dtype == torch.float64) != (stream.buffer.dtype == torch.float64):
            return False
        if stream.waiting + count > _GATHERED_ROWS:
            self._flush()
        moved = observations.values.detach().movedim(observations.feature_dim, -1)
        stream.buffer[stream.waiting : stream.waiting + count].view(moved.shape).copy_(moved)
        stream.waiting += count
        return True

    def _flush(self) -> None:
        """Add the rows that wait. Called by whoever reads a state."""
        second = self.__dict__.get("second_moment")
        stream: _Stream | None = None if second is None else _STREAMS.get(second)
        if stream is not None and stream.waiting:
            assert stream.buffer is not None
            rows, stream.waiting = stream.buffer[: stream.waiting], 0
            with torch.inference_mode(False), torch.no_grad():
                self._accumulate(_moments_of(self.__dict__), stream, Observations(rows))

    def _accumulate(self, moments: Moments | None, stream: _Stream, observations: Observations) -> None:
        assert moments is not None
        is_float64 = observations.values.dtype == torch.float64
        stream.accumulations += 1
        # The first rows may be unlike the rest, and features drift in training: the origin follows the data,
        # ever more seldom.
        milestone = stream.accumulations <= 4 or stream.accumulations.bit_count() == 1
        rounded = self.gram_dtype == torch.float32 and not is_float64
        recentre = milestone or not stream.origin_is_near or (rounded and not stream.origin_is_float32)
        accumulate(moments, observations, self.gram_dtype, recentre=recentre)
        if recentre and is_float64:
            stream.origin_is_float32 = False
        _DECOMPOSITIONS.pop(moments.second, None)
        _MERGED.pop(moments.second, None)

    def _check_observed(self) -> None:
        count, non_finite = int(self.count), int(self.non_finite)
        if non_finite and self.nan_strategy == "error":
            raise RuntimeError(
                f"{type(self).__name__}: {non_finite} of {count + non_finite} observations hold NaN or"
                " infinite values; nan_strategy='warn' leaves them out"
            )
        if count == 0:
            detail = f" ({non_finite} with NaN or infinite values were left out)" if non_finite else ""
            raise RuntimeError(
                f"{type(self).__name__} has counted no observation{detail}; call `update` before `compute`"
            )
        self.check_range()
        if non_finite and self.nan_strategy == "warn":
            warnings.warn(
                f"{type(self).__name__} left out {non_finite} of {count + non_finite} observations that hold"
                " NaN or infinite values",
                UserWarning,
                stacklevel=2,
            )

    # -- overrides of torchmetrics -----------------------------------------------------------------------

    @property
    def update_called(self) -> bool:
        """Whether rows have been offered since construction or reset."""
        # torchmetrics warns in `compute` when this is False, also on a process that had no data while others
        # had. Whether there are observations is checked after the merge, with an error.
        return self._computing or self._update_count > 0

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        # torch.compile would trace torchmetrics' bookkeeping and specialise on its counter.
        wrapped: Callable[..., None] = torch.compiler.disable(super()._wrap_update(update))
        return wrapped

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def remembering_shape(*args: Any, **kwargs: Any) -> Any:
            value = compute(*args, **kwargs)
            self._value_shape = value.shape if isinstance(value, Tensor) else None
            return value

        stock = super()._wrap_compute(functools.wraps(compute)(remembering_shape))

        @functools.wraps(compute)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._to_sync and self.distributed_available_fn():
                # A cached value would skip the merge on the processes that had no new rows, and the others
                # would wait for them for ever.
                self._computed = None
            self._computing = True
            try:
                value = stock(*args, **kwargs)
            finally:
                self._computing = False
            # torchmetrics squeezes any tensor of one element, also the (1,) and (1, 1) of a one-feature layer.
            return value if self._value_shape is None else value.reshape(self._value_shape)

        return wrapped

    def __getstate__(self) -> dict[str, Any]:
        # torchmetrics copies and pickles what is in the instance's dictionary.
        self._flush()
        return super().__getstate__()

    def _copy_state_dict(self) -> dict[str, Tensor | list[Any]]:
        # torchmetrics clones the state before `sync` and `forward`, in case it is modified in place. Here it
        # is only ever replaced there, and may be large.
        return {name: getattr(self, name) for name in self._defaults}

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # torchmetrics would add the sums although their origins differ.
        missing = [name for name in self._defaults if name not in incoming_state]
        if missing:
            raise ValueError(
                f"expected the states {list(self._defaults)} in the incoming state, missing {missing}"
            )
        incoming = _moments_of(incoming_state) if incoming_state["second_moment"].shape[0] else None
        local = self.moments
        if incoming is not None and self.num_features not in (None, incoming.num_features):
            raise ValueError(
                f"expected an incoming state with {self.num_features} features, got {incoming.num_features}"
            )
        with torch.inference_mode(False), torch.no_grad():
            if incoming is None:
                self.non_finite = self.non_finite + incoming_state["non_finite"].to(self.non_finite.device)
            elif local is None:
                home = self._pinned_device or incoming.second.device
                self._set_moments(incoming.map(lambda tensor: tensor.to(home, copy=True)))
            else:
                home = local.second.device
                self._set_moments(merge(local, incoming.map(lambda tensor: tensor.to(home))))

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # torchmetrics gathers whole matrices from all processes and adds them although their origins differ.
        group = process_group or self.process_group
        if dist_sync_fn is not gather_all_tensors:
            self._sync_with(dist_sync_fn, group)
        elif dist.get_rank(group) >= 0:  # a process outside the group keeps its own state
            self.absorb(run_together(self.exchanges(group), group), group)

    def _sync_with(self, gather: Callable[..., Any], group: Any) -> None:
        """Merge with a gather function of the user's: it returns one tensor per process."""
        gathered = {name: gather(getattr(self, name), group=group) for name in self._defaults}
        states = [dict(zip(gathered, parts, strict=True)) for parts in zip(*gathered.values(), strict=True)]
        for name, default in self._defaults.items():
            setattr(self, name, default.clone() if isinstance(default, Tensor) else default)
        for state in states:
            self._reduce_states(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Metric:
        # torchmetrics lets `model.to(torch.bfloat16)` cast the state of a metric inside the model.
        def device_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(device_only, exclude_state)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torchmetrics keeps the checkpoint's own tensors, which updates would modify in place.
        names = [name for name in self._defaults if prefix + name in state_dict]
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.inference_mode(False):
            for name in names:
                setattr(self, name, getattr(self, name).detach().clone())
        if names:
            self._computed = None
            self._update_count = max(self._update_count, int(self.moments is not None))


def _moments_of(state: Mapping[str, Any]) -> Moments:
    names = ("count", "non_finite", "origin", "first_moment", "second_moment")
    return Moments(*(state[name] for name in names))
