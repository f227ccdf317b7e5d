"""Private parts of torchmetrics, which no other file overrides or uses.

Each override names the behaviour of torchmetrics that forces it, and has a test in ``TestWhatIsOverridden``
that fails if that behaviour changes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from spectralmetrics.torch_private import untraced


def count_update(metric: Metric) -> None:
    """Count an update of a metric's states that did not go through ``update``."""
    own = metric.__dict__  # `torch.nn.Module` looks for an attribute in many places
    own["_computed"] = None
    own["_update_count"] += 1


def count_of_updates(metric: Metric, new: int | None = None) -> int:
    """The number of updates of a metric, after setting it if a number is given."""
    if new is not None:
        metric.__dict__.update(_update_count=new, _computed=None)
    return int(metric.__dict__["_update_count"])


def add_earlier(metric: Metric, earlier: dict[str, Any], updates: int) -> None:
    """Add states of earlier updates to another library's metric, as if it had made these updates itself."""
    # torchmetrics puts incoming states first, and weighs an incoming mean by one update less than it counts.
    own = metric._update_count
    metric.__dict__["_update_count"] = updates / own + 1
    metric.merge_state(earlier)
    metric.__dict__["_update_count"] = updates + own


def defaults(metric: Metric) -> dict[str, Any]:
    """The states by name, with the values that they have before the first update."""
    states: dict[str, Any] = metric._defaults
    return states


def has_persistent_states(metric: Metric) -> bool:
    """True if any state is in the ``state_dict``."""
    return any(metric._persistent.values())


def drop_states(metric: Metric, names: Sequence[str]) -> None:
    """Remove the states of these names; torchmetrics can only add states."""
    for name in names:
        for by_name in (metric._defaults, metric._reductions, metric._persistent, metric.__dict__):
            by_name.pop(name, None)


def merged_as_in_compute(metric: Metric) -> contextlib.AbstractContextManager[None]:
    """Inside, the states are as ``compute`` reads them: merged over all processes if it merges."""
    merged: contextlib.AbstractContextManager[None] = metric.sync_context(
        dist_sync_fn=metric.dist_sync_fn, should_sync=metric._to_sync, should_unsync=metric._should_unsync
    )
    return merged


def copy_metric(metric: Metric) -> Metric:
    """A deep copy of any metric, which merges in the same process group."""
    return copy.deepcopy(metric, {id(metric.process_group): metric.process_group})


STATES: set[str] = set()
"""The names of all states of all metrics of this package; each is a property."""
_PLAIN = frozenset({"configuration", "_update_count", "_computed"})  # set often, and never a module
_NOT_MERGED = contextlib.nullcontext()


class MergingMetric(Metric):
    """A ``torchmetrics.Metric`` that has its own states again after a merge, even after a failed one."""

    _computing: bool = False
    _value_shape: torch.Size | None = None

    @property
    def update_called(self) -> bool:
        """True if rows have been offered since construction or reset."""
        # torchmetrics warns in `compute` when this is False, also on a process without data while others have
        # some. After the merge, no observations are an error.
        return self._computing or self._update_count > 0

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        stock = super()._wrap_update(update)

        @functools.wraps(update)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            before = self._update_count, self._computed
            try:
                stock(*args, **kwargs)
            except (TypeError, ValueError):
                # torchmetrics counts a refused update, and forgets the value that was computed before it.
                self._update_count, self._computed = before
                raise

        return wrapped

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def remembering_shape(*args: Any, **kwargs: Any) -> Any:
            value = compute(*args, **kwargs)
            self.__dict__["_value_shape"] = value.shape if isinstance(value, Tensor) else None
            return value

        stock = super()._wrap_compute(functools.wraps(compute)(remembering_shape))

        @functools.wraps(compute)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._to_sync and self.distributed_available_fn():
                # A cached value would skip the merge on the processes without new rows, and the other processes
                # would wait for them for ever.
                self._computed = None
            self.refresh()
            own = self.__dict__  # `torch.nn.Module` looks in many places before it sets an attribute
            own["_computing"] = True
            try:
                value = stock(*args, **kwargs)
            finally:
                own["_computing"] = False
            # torchmetrics squeezes any tensor of one element, also the (1,) and (1, 1) of a one-feature layer.
            return value if self._value_shape is None else value.reshape(self._value_shape)

        return wrapped

    def refresh(self) -> None:
        """Forget the computed value if the states have changed since."""

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merge the states across processes, as torchmetrics does; an error leaves them as they were."""
        # After an error, torchmetrics leaves half-merged states, and keeps its copy of the earlier states.
        before = self._cache
        try:
            super().sync(*args, **kwargs)
        except BaseException:
            if not self._is_synced and self._cache is not before and self._cache is not None:
                for name, value in self._cache.items():
                    setattr(self, name, value)
                self._cache = None
            raise

    def sync_context(  # type: ignore[override]  # any context serves
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the states are merged; afterwards they are this process' own, even after an error."""
        available = distributed_available or self.distributed_available_fn
        if not self._is_synced and not (callable(available) and available()):
            return _NOT_MERGED
        return self._merging(should_unsync, dist_sync_fn, process_group, should_sync, distributed_available)

    @contextlib.contextmanager
    def _merging(self, should_unsync: bool, *how: Any) -> Iterator[None]:
        # torchmetrics has no `finally` here: an error in `compute` leaves the metric synced.
        self.sync(*how)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def __deepcopy__(self, memo: dict[int, Any]) -> Metric:
        # torchmetrics would copy the process group, too, which cannot be copied.
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the observations of another metric of this class, or of its state as a dict."""
        super().merge_state(incoming_state)
        # torchmetrics keeps the value computed before the merge.
        self._computed = None
        self._update_count = max(self._update_count, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Metric:
        # torchmetrics lets `model.to(torch.bfloat16)` cast the state of a metric inside the model.
        def device_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(device_only, exclude_state)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # torchmetrics keeps the checkpoint's own tensors, which updates would modify in place, and the value
        # computed before.
        names = [name for name in self._defaults if prefix + name in state_dict]
        super()._load_from_state_dict(state_dict, prefix, *others)
        with torch.inference_mode(False):
            for name in names:
                setattr(self, name, getattr(self, name).detach().clone())
        if names:
            self._computed = None


class OverriddenMetric(MergingMetric):
    """A ``torchmetrics.Metric`` whose states are sums, each about its own origin, and may have rows waiting."""

    @abstractmethod
    def flush(self) -> None:
        """Add the rows that wait to the states."""

    @abstractmethod
    def take_in(self, incoming: dict[str, Any]) -> None:
        """Add the states of another metric of this kind."""

    @abstractmethod
    def merge_processes(self, group: Any) -> None:
        """Replace the states by the merged states of all processes of a group."""

    @abstractmethod
    def read_saved(self, saved: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Prepare a saved state for loading: translate names, add an error for a state that does not fit."""

    def __setattr__(self, name: str, value: Any) -> None:
        # A collection sets all states of all its metrics whenever it is read. torchmetrics would pass each to
        # `torch.nn.Module`, which looks for parameters, buffers and modules of that name first.
        if name in STATES or name in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        # torch.compile would trace torchmetrics' bookkeeping and specialise on its counter.
        return untraced(super()._wrap_update(update))

    def _copy_state_dict(self) -> dict[str, Tensor | list[Any]]:
        # torchmetrics clones the state before `sync` and `forward`, in case these modify it in place. Here they
        # only replace it, and it may be large.
        return {name: getattr(self, name) for name in self._defaults}

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # torchmetrics would add the sums although their origins differ.
        self.take_in(incoming_state)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # torchmetrics gathers whole matrices from all processes and adds them although their origins differ.
        group = process_group or self.process_group
        if dist_sync_fn is gather_all_tensors:
            self.merge_processes(group)
            return
        # A user's gather function returns one tensor per process.
        gathered = {name: dist_sync_fn(getattr(self, name), group=group) for name in self._defaults}
        states = [dict(zip(gathered, parts, strict=True)) for parts in zip(*gathered.values(), strict=True)]
        for name, default in self._defaults.items():
            setattr(self, name, default.clone() if isinstance(default, Tensor) else default)
        for state in states:
            self.take_in(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # torchmetrics accepts any shape.
        refused: list[str] = []
        self.read_saved(state_dict, prefix, refused)
        names = [name for name in self._defaults if prefix + name in state_dict]
        if refused:
            others[-1].extend(refused)  # the messages of errors
            for name in names:
                state_dict.pop(prefix + name)
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        if names:
            self._update_count = max(self._update_count, int(self.has_observed()))

    @abstractmethod
    def has_observed(self) -> bool:
        """True if there are sums of a known width."""

    def __getstate__(self) -> dict[str, Any]:
        # torchmetrics copies and pickles the instance's dictionary, without borrowed states and waiting rows.
        self.flush()
        state: dict[str, Any] = super().__getstate__() | {name: getattr(self, name) for name in self._defaults}
        return {key: value for key, value in state.items() if key not in ("_live", "_leader")}
