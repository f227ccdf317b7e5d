"""The streaming sums that every metric of this package accumulates, as a ``torchmetrics.Metric``.

:class:`SpectralMetric` holds the state (sums of :mod:`spectralmetrics.sums`) and reads it. A statistic is a
short subclass that says how to read a number from a :class:`~spectralmetrics.functional.Spectrum`:

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
"""

from __future__ import annotations

import copy
import numbers
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.overrides import OverriddenMetric
from spectralmetrics.metrics.stream import Stream
from spectralmetrics.sums import (
    Exchange,
    Moments,
    Observations,
    SpectralSum,
    Sum,
    empty_folds,
    empty_moments,
    run_together,
)

NanStrategy = Literal["warn", "error", "ignore"]

_STATISTICS: dict[str, type[SpectralMetric]] = {}


class Interval(NamedTuple):
    """Two values of a statistic between which that for unlimited data is expected.

    Attributes:
        low: the smaller, of the statistic's shape; NaN if it is unknown.
        high: the larger, of the statistic's shape; NaN if it is unknown.
    """

    low: Tensor
    high: Tensor


class _Live(NamedTuple):
    """The sums of a metric as objects, and their stream, until a state is replaced."""

    sums: tuple[Sum, ...]
    anchor: Tensor
    stream: Stream


def statistics() -> dict[str, type[SpectralMetric]]:
    """All statistics defined so far, by short name, those of the user included.

    >>> from spectralmetrics import statistics
    >>> statistics()["saturation"].__name__
    'SaturationMetric'
    """
    return dict(_STATISTICS)


def _state(name: str) -> Any:
    """A state whose reader, whoever it is, finds the waiting rows added."""

    def read(metric: SpectralMetric) -> Tensor:
        metric.flush()
        value: Tensor | None = metric.__dict__.get(name)
        if value is None:  # no state of this metric, but maybe of the sums that it keeps in folds
            spectral = metric._current()[0] if "_prototypes" in metric.__dict__ else None
            value = _of_all_folds(spectral, name) if isinstance(spectral, SpectralSum) else None
            if value is None:
                raise AttributeError(f"{type(metric).__name__!r} object has no attribute {name!r}")
        return value

    def write(metric: SpectralMetric, value: Tensor) -> None:
        metric.__dict__[name] = value
        metric.__dict__["_live"] = None

    return property(read, write)


class SpectralMetric(OverriddenMetric):
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
        folds: with g > 1, batches are dealt in turn to g sums, so that :meth:`interval` can judge by some what
            was fitted to the others. All values are those of all data; the state is g times as large.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from ``update``, for rows that are no floating tensor.
        ValueError: for an argument out of range; from ``update``, for rows that are not 2-D or whose width
            is not D.
        RuntimeError: from ``compute``, if no observation has been counted, or if the observations overflow.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    short_name: ClassVar[str]
    """The statistic's key in a probe's values and its name in tables; defining it registers the class."""
    needs_eigenvectors: ClassVar[bool] = False
    """Whether :meth:`statistic` reads eigenvectors, so that a probe decomposes once for all."""
    has_interval: ClassVar[bool] = True
    """Whether :meth:`statistic` can be read from held-out eigenvalues, too."""
    takes_observations: ClassVar[bool] = True
    """Whether ``update`` also takes ``Observations``; False for a subclass that overrides it."""

    configuration: Tensor
    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first_moment: Tensor
    second_moment: Tensor

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
        folds: int = 1,
        **kwargs: Any,
    ) -> None:
        if num_features is not None and not _is_positive_integer(num_features):
            raise ValueError(f"expected num_features to be a positive integer or None, got {num_features!r}")
        if gram_dtype not in (torch.float64, torch.float32):
            raise ValueError(f"expected gram_dtype torch.float64 or torch.float32, got {gram_dtype!r}")
        if nan_strategy not in get_args(NanStrategy):
            raise ValueError(f"expected nan_strategy among {get_args(NanStrategy)}, got {nan_strategy!r}")
        if not _is_positive_integer(folds):
            raise ValueError(f"expected folds to be a positive integer, got {folds!r}")
        super().__init__(**kwargs)
        self._given_features = num_features
        self.center = center
        self.gram_dtype = gram_dtype
        self.nan_strategy = nan_strategy
        self.folds = folds
        self._pinned_device: torch.device | None = None
        self._batches = 0  # taken so far, never reset: what is drawn or dealt next
        self._live: _Live | None = None
        self._prototypes: tuple[Sum, ...] = ()
        # Compute groups are formed by comparing states with a tolerance, in some releases of torchmetrics only
        # the first state: this one tells apart metrics that accumulate differently, whatever the data. Small
        # integers differ by more than the tolerance.
        self.add_state("configuration", torch.zeros(4, dtype=torch.int64, device="cpu"), dist_reduce_fx="max")
        self.accumulate_also((_spectral_sum(folds), *self.other_sums()))

    def other_sums(self) -> Sequence[Sum]:
        """Sums that :meth:`statistic` reads besides the moments, empty and of width zero; a subclass' own."""
        return ()

    def accumulate_also(self, sums: Sequence[Sum]) -> None:
        """Keep further sums, empty and of width zero, so that metrics that need them can share these states."""
        self._prototypes = (*self._prototypes, *sums)
        for each in sums:
            added = {each.states[attribute] for attribute in each.additive}
            for name, tensor in each.tensors().items():
                if not isinstance(getattr(type(self), name, None), property):
                    setattr(SpectralMetric, name, _state(name))
                self.add_state(name, tensor, dist_reduce_fx="sum" if name in added else None)
        digest = zlib.crc32(" ".join(map(str, self.accumulation())).encode()).to_bytes(4, "big")
        self.configuration = torch.tensor(list(digest), dtype=torch.int64, device="cpu")
        self._defaults["configuration"] = self.configuration.clone()

    def with_folds(self, folds: int) -> SpectralMetric:
        """A metric with the same settings and without observations, which it will keep in so many folds."""
        if not _is_positive_integer(folds):
            raise ValueError(f"expected folds to be a positive integer, got {folds!r}")
        twin = copy.deepcopy(self)
        twin.reset()
        twin.drop_states([name for name in twin._defaults if name != "configuration"])
        twin.folds = folds
        twin._prototypes = ()
        twin.accumulate_also((_spectral_sum(folds), *twin.other_sums()))
        return twin

    def accumulation(self) -> list[object]:
        """What changes what is accumulated: the products' dtype, an ``update`` of a subclass' own, the sums."""
        update = type(self).update
        own = [] if self.takes_observations else [f"{update.__module__}.{update.__qualname__}"]
        return [self.gram_dtype, *own, *(setting for each in self._prototypes for setting in each.settings())]

    # -- what a statistic reads --------------------------------------------------------------------------

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """The value of this metric for the given spectrum; what a subclass defines."""
        raise NotImplementedError(f"{type(self).__name__} must define `statistic(self, spectrum)`")

    @property
    def num_features(self) -> int | None:
        """The width D; None until it is known."""
        return self._current()[0].num_features or self._given_features

    @property
    def sums(self) -> tuple[Sum, ...]:
        """The sums, the spectral one first; their tensors are the states themselves."""
        self.flush()
        return self._current()

    @property
    def moments(self) -> Moments | None:
        """The moments, all folds together, or None before the first rows; without folds the state itself."""
        first = self.sums[0]
        assert isinstance(first, SpectralSum)
        total = first.total
        return total if isinstance(total, Moments) and total.num_features else None

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

    def read_interval(self) -> Interval:
        """The value of :meth:`interval` for this process' observations, without its checks."""
        spectrum = self._shared_spectrum()
        held_out = spectrum.held_out()
        plain = self._value(spectrum)
        if held_out is None:
            low = plain.to(torch.float64)
            return Interval(low, torch.full_like(low, torch.nan))
        other = self._value(held_out)
        return Interval(torch.minimum(plain, other), torch.maximum(plain, other))

    def check_range(self) -> None:
        """Raise a RuntimeError if the observations have overflowed."""
        first = self.sums[0]
        assert isinstance(first, SpectralSum)
        if first.num_features and not first.in_range():
            limit = "1e154" if self.gram_dtype == torch.float64 else "3e38, or 1e154 for float64 rows"
            raise RuntimeError(
                f"{type(self).__name__}: the observations overflow: their distances from the mean, or the"
                " squares of the observations exceed the range of the sums (distances of about"
                f" {limit} with {self.gram_dtype} products); scale them down before `update`"
            )

    def _value(self, spectrum: Spectrum) -> Tensor:
        value: Any = self.statistic(spectrum)
        if isinstance(value, Tensor):
            return value
        # A number, from a statistic of the user's.
        dtype = torch.float64 if isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device=self.configuration.device)

    def _shared_spectrum(self) -> Spectrum:
        first, *others = self.sums
        assert isinstance(first, SpectralSum)
        assert first.num_features
        live = self._revive()
        assert live is not None
        return Spectrum(first, center=self.center, cache=live.stream.cache, others=others)

    # -- what torchmetrics offers ------------------------------------------------------------------------

    def update(self, rows: Tensor | Observations, *others: Any) -> None:
        """Add observations.

        Args:
            rows: shape (N, D), floating. Rows with NaN or infinities are left out and counted; zero rows are
                a no-op. :class:`~spectralmetrics.functional.Observations` are taken in their own layout.
            others: none. In a ``MetricCollection`` with metrics that take other arguments, name them:
                ``collection.update(rows=features, preds=…, target=…)`` gives each metric its own.
        """
        if others:
            raise TypeError(
                f"expected rows alone, got {1 + len(others)} positional arguments; in a MetricCollection with"
                " metrics that take other arguments name them all, as in"
                " collection.update(rows=features, preds=predictions, target=labels)"
            )
        observations = rows if isinstance(rows, Observations) else Observations(rows)
        self._check(observations, rows)
        with torch.inference_mode(False), torch.no_grad():
            self._take(observations)

    def observe(self, observations: Observations) -> None:
        """As ``update`` without gradients and outside inference mode, and without torchmetrics' way there."""
        own = self.__dict__
        own["_computed"] = None
        own["_update_count"] += 1
        width = self.num_features
        if width is not None and observations.values.shape[observations.feature_dim] != width:
            self._check(observations, observations)
        self._take(observations)

    def compute(self) -> Tensor:
        """The statistic of all observations so far, merged across processes as torchmetrics is told to."""
        return self._value(self.spectrum)

    def interval(self) -> Interval:
        """Two values between which that for unlimited data is expected; merged like ``compute``.

        One is the statistic of the spectrum; the other that of the spectrum on held-out data, see
        :func:`~spectralmetrics.functional.held_out_eigenvalues`. Directions that are fitted to few observations
        look too unequal on these and too equal on others: for dimension, saturation, effective rank,
        participation ratio and stable rank the truth lies between.

        Returns:
            low and high, of the shape of ``compute``. The end that is unknown while a fold is empty is NaN.

        Raises:
            RuntimeError: with ``folds=1``, for what ``compute`` raises, and for a statistic that has no
                interval.
        """
        self._check_interval()
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            self._check_observed()
            return Interval(*(end.clone() for end in self.read_interval()))

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

    def state_dict(  # type: ignore[override]  # torchmetrics' signature
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The persistent states and, where it matters to what comes next, how many batches came."""
        destination = super().state_dict(destination, prefix, keep_vars)
        if any(each.counts_batches for each in self._prototypes) and any(self._persistent.values()):
            destination[prefix + "draws"] = torch.tensor(self._batches)
        return destination

    # -- what the overrides of torchmetrics, probes and recorders ask for --------------------------------

    def flush(self) -> None:
        """Add the rows that wait. Called by whoever reads a state."""
        live: _Live | None = self.__dict__.get("_live")
        if live is None and "_prototypes" in self.__dict__:
            live = self._revive()
        if live is not None:
            live.stream.flush(live.sums)

    def take_in(self, incoming: dict[str, Any]) -> None:
        """Add the states of another metric of this class."""
        missing = [name for name in self._defaults if name not in incoming]
        if missing:
            raise ValueError(
                f"expected the states {list(self._defaults)} in the incoming state, missing {missing}"
            )
        mine = self.sums
        theirs = [prototype.with_tensors(incoming) for prototype in self._prototypes]
        width, their_width = self.num_features, theirs[0].num_features
        if their_width and width not in (None, their_width):
            raise ValueError(f"expected an incoming state with {width} features, got {their_width}")
        with torch.inference_mode(False), torch.no_grad():
            home = mine[0].tensors()[self._anchor_name()].device
            if not mine[0].num_features and their_width:
                home = self._pinned_device or incoming[self._anchor_name()].device
                mine = tuple(each.map(lambda tensor: tensor.to(home)) for each in mine)
            self.replace_sums([own.merged(other) for own, other in zip(mine, theirs, strict=True)])

    def exchanges(self, group: Any = None) -> list[Exchange]:
        """What this metric exchanges with other processes, for :func:`~spectralmetrics.sums.run_together`."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        mine = self.sums
        live = self._revive()
        known: Sequence[Sum | None] = (
            [None] * len(mine) if live is None else live.stream.merged.get(group, [None] * len(mine))
        )
        return [each.exchange(its, rank, world_size) for each, its in zip(mine, known, strict=True)]

    def absorb(self, results: Sequence[Sum | None], group: Any = None) -> None:
        """Replace the states by what the :meth:`exchanges` returned; the old tensors are left as they were."""
        if any(each is None for each in results):
            return
        merged = [each for each in results if each is not None]
        live = self._revive()
        if live is not None:
            live.stream.merged[group] = merged
        self.replace_sums(merged)

    def merge_processes(self, group: Any) -> None:
        """Replace the states by those of all processes of a group together."""
        if dist.get_rank(group) >= 0:  # a process outside the group keeps its own state
            self.absorb(run_together(self.exchanges(group), group), group)

    def replace_sums(self, sums: Sequence[Sum]) -> None:
        """Put other sums in the place of the states."""
        for each in sums:
            for name, tensor in each.tensors().items():
                setattr(self, name, tensor)

    def has_observed(self) -> bool:
        """Whether there are sums of a known width."""
        return self._current()[0].num_features > 0

    def read_saved(self, saved: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Look at a saved state before it is loaded."""
        self._batches = int(saved.pop(prefix + "draws", self._batches))
        names = [name for each in self._prototypes for name in each.tensors()]
        if not all(prefix + name in saved for name in names):
            return
        loaded = [each.with_tensors({n: saved[prefix + n] for n in names}) for each in self._prototypes]
        width = loaded[0].num_features
        if width and self._given_features not in (None, width):
            errors.append(
                f"expected a state of num_features={self._given_features} for {prefix}{type(self).__name__},"
                f" got one of {width}"
            )
        for own, other in zip(self._prototypes, loaded, strict=True):
            if own.settings() != other.settings():
                errors.append(f"expected a state with {own.settings()}, got one with {other.settings()}")

    # -- the state ---------------------------------------------------------------------------------------

    def _current(self) -> tuple[Sum, ...]:
        """The sums without the rows that wait."""
        own = self.__dict__
        live: _Live | None = own.get("_live")
        if live is not None:
            return live.sums
        prototypes: tuple[Sum, ...] = own["_prototypes"]
        return tuple(each.with_tensors(own) for each in prototypes)

    def _anchor_name(self) -> str:
        return next(iter(self._prototypes[0].states.values()))

    def _revive(self) -> _Live | None:
        """The sums as objects and their stream; None before the first rows."""
        own = self.__dict__
        live: _Live | None = own.get("_live")
        if live is None:
            sums = self._current()
            if sums[0].num_features == 0:
                return None
            anchor = own[self._anchor_name()]
            live = own["_live"] = _Live(sums, anchor, Stream.of(anchor))
        return live

    def _check(self, observations: Observations, rows: Any) -> None:
        values = observations.values
        observations.check()
        if rows is values and values.ndim != 2:
            raise ValueError(
                f"expected rows of shape (N, D), got shape {tuple(values.shape)}; give each observation a row,"
                " or pass spectralmetrics.Observations(maps, feature_dim=1)"
            )
        width = observations.num_features
        if self.num_features is not None and width != self.num_features:
            raise ValueError(
                f"expected rows with {self.num_features} features, got {width} (shape {tuple(values.shape)})"
            )

    def _take(self, observations: Observations) -> None:
        """Add observations that fit."""
        if observations.values.numel() == 0:
            return
        live = self._revive()
        if (
            live is None
            or live.anchor.device != observations.values.device
            or live.anchor.is_inference()
            or self._is_synced
        ):
            live, observations = self._meet(observations)
        own = self.__dict__
        live.stream.add(live.sums, observations, own["_batches"], self.gram_dtype)
        own["_batches"] += 1

    def _meet(self, observations: Observations) -> tuple[_Live, Observations]:
        """The state, allocated and writable, and the observations, on one device."""
        device = observations.values.device
        live = self._revive()
        if live is None:
            home = self._pinned_device or (torch.device("cpu") if device.type == "mps" else device)
            before = self._current()
            fresh = [each.empty(observations.num_features, home) for each in before]
            self.replace_sums(
                [each.merged(its.map(lambda t: t.to(home))) for each, its in zip(fresh, before, strict=True)]
            )
        else:
            current = live.anchor.device
            if current.type == "cpu" and device.type not in ("cpu", "mps"):
                if self._pinned_device is None:
                    self.replace_sums([each.map(lambda tensor: tensor.to(device)) for each in self.sums])
            elif live.anchor.is_inference() or self._is_synced:
                # A copy made in inference mode (by torchmetrics, or by deepcopy) could not be updated in place;
                # merged sums are shared with the other metrics of a group.
                self.replace_sums([each.map(torch.clone) for each in self.sums])
        is_new = live is None
        live = self._revive()
        assert live is not None
        if is_new:
            live.stream.begin(live.sums, self.gram_dtype)
        home = live.anchor.device
        return live, observations if observations.values.device == home else observations.to(home)

    def _check_interval(self) -> None:
        if self.folds < 2:
            raise RuntimeError(
                f"{type(self).__name__} has kept its observations in one fold, of which there is no"
                " interval; make it with folds=8, say"
            )
        if not self.has_interval:
            raise RuntimeError(f"{type(self).__name__} has no interval")

    def _check_observed(self) -> None:
        spectral = self.sums[0]
        assert isinstance(spectral, SpectralSum)
        count, non_finite = int(spectral.num_observations), int(spectral.num_left_out)
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


def _of_all_folds(sums: SpectralSum, name: str) -> Tensor | None:
    if name == "count":  # what is asked for most needs no merge of matrices
        return sums.num_observations
    return sums.num_left_out if name == "non_finite" else sums.total.tensors().get(name)


def _spectral_sum(folds: int) -> SpectralSum:
    return empty_folds(folds, 0) if folds > 1 else empty_moments(0)


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


for _name in ("count", "non_finite", "origin", "first_moment", "second_moment"):
    setattr(SpectralMetric, _name, _state(_name))
