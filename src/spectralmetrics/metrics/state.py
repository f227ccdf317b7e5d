"""Sums as the states of a ``torchmetrics.Metric``: added to, merged, moved, saved and loaded.

:mod:`spectralmetrics.sums` defines the sums, and :mod:`spectralmetrics.metrics.base` reads values from them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from spectralmetrics.metrics.overrides import count_update, defaults, drop_states, has_persistent_states
from spectralmetrics.metrics.sharing import Live, SharingMetric, group_object
from spectralmetrics.sums import Exchange, Observations, Sum, first_fold, has_float64, run_together
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.sums.repeats import Repeats


class SumsMetric(SharingMetric):
    """A metric whose states are the tensors of sums; groups of batches are dealt to the folds in turn.

    Args:
        num_features: the width D; None reads it from the first rows.
        gram_dtype: dtype of the products; None chooses by the device of the rows, see ``SpectralMetric``.
        kwargs: see ``torchmetrics.Metric``.
    """

    takes_observations: ClassVar[bool] = True
    """True if ``update`` also takes ``Observations``; False for a subclass that overrides it."""

    phase: float = 0.0
    """See :class:`~spectralmetrics.sums.Intake`; a probe sets it, so that its layers take turns."""
    folds: int = 1
    """The number of folds; groups of batches are dealt to them in turn."""
    replica: tuple[int, int] | None = None
    """The number of this process among the processes that observe different data, and the number of these.

    None: the rank in the process group and its size. Give one number to processes that share their forwards,
    as under tensor parallelism.
    """
    configuration: Tensor

    _dealt = 0  # groups dealt so far, never reset
    _first_fold: int | None = None
    _has_own_groups = False  # True if the user gave `Observations.group`
    _rearranges = False
    _repeats: Repeats | None = None

    def __init__(self, num_features: int | None, gram_dtype: torch.dtype | None, **kwargs: Any) -> None:
        check_positive_integer("num_features", num_features, or_none=True)
        if gram_dtype not in (None, torch.float64, torch.float32):
            raise ValueError(f"expected gram_dtype torch.float64, torch.float32 or None, got {gram_dtype!r}")
        super().__init__(**kwargs)
        self._given_features = num_features
        self.gram_dtype = gram_dtype
        self._pinned_device: torch.device | None = None
        self._batches = 0  # taken so far, never reset: the next random draw depends on it
        # torchmetrics forms compute groups by comparing states with a tolerance, in some releases only the
        # first. This state differs between metrics that accumulate differently, whatever the data: small
        # integers differ by more than the tolerance.
        self.add_state("configuration", torch.zeros(4, dtype=torch.int64, device="cpu"), dist_reduce_fx="max")

    # -- which sums there are ----------------------------------------------------------------------------

    def accumulate_also(self, sums: Sequence[Sum]) -> None:
        """Keep further sums, empty and of width zero, so that metrics that need them can share these states."""
        self._prototypes = (*self._prototypes, *sums)
        for each in sums:
            added = {each.states[attribute] for attribute in each.additive}
            self.declare(each.states.values())
            for name, tensor in each.tensors().items():
                self.add_state(name, tensor, dist_reduce_fx="sum" if name in added else None)
        digest = zlib.crc32(" ".join(map(str, self.accumulation())).encode()).to_bytes(4, "big")
        self.configuration = torch.tensor(list(digest), dtype=torch.int64, device="cpu")
        defaults(self)["configuration"] = self.configuration.clone()

    def accumulate_instead(self, sums: Sequence[Sum]) -> None:
        """Keep these sums, empty and of width zero, in place of all others."""
        was_persistent = has_persistent_states(self)
        self.reset()
        drop_states(self, self.state_names())
        self._prototypes = ()
        self.accumulate_also(sums)
        self.persistent(was_persistent)

    def accumulation(self) -> list[object]:
        """The settings of the accumulation: dtype of the products, a subclass' own ``update``, the sums."""
        update = type(self).update
        own = [] if self.takes_observations else [f"{update.__module__}.{update.__qualname__}"]
        return [self.gram_dtype, *own, *(setting for each in self._prototypes for setting in each.settings())]

    @property
    def num_features(self) -> int | None:
        """The width D; None until it is known."""
        return self._current()[0].num_features or self._given_features

    # -- observations ------------------------------------------------------------------------------------

    def observe(self, observations: Observations, everything: Observations | None = None) -> None:
        """Like ``update``, without torchmetrics' wrapper; call it without gradients, outside inference mode.

        Sums that take all rows get ``everything``, from which the observations were drawn; None for the same.
        """
        count_update(self)
        live = self._live
        width = self.num_features if live is None else live.num_features
        if width is not None and observations.values.shape[observations.feature_dim] != width:
            self._check(observations, observations)
        self._take(observations, everything)

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

    def _take_given(self, observations: Observations) -> None:
        """Add observations that fit, from the user."""
        with torch.inference_mode(False), torch.no_grad(), self.changed_by_user():
            self._take(self.grouped(observations))

    def _take(self, observations: Observations, everything: Observations | None = None) -> None:
        """Add observations that fit."""
        if (observations if everything is None else everything).values.numel() == 0:
            return
        own, home, device = self.__dict__, None, observations.values.device
        live = self._live or self._revive()
        if (
            live is None
            or live.device != device
            or live.is_inference
            or (self._is_synced or self._leader is not None)  # other metrics may share the sums
        ):
            live = self._prepare(observations)
            if live.device != device:
                home = live.device
                if home.type != "cpu" or self._pinned_device is not None or has_float64(device):
                    observations = observations.to(home)
                    everything, home = None if everything is None else everything.to(home), None
        batch, gram_dtype = own["_batches"], own["gram_dtype"]
        live.stream.add(live.sums, observations, everything, batch, gram_dtype, self.phase, home)
        own["_batches"] = batch + 1
        own["_changes"] = self._changes + 1

    def _prepare(self, observations: Observations) -> Live:
        """The state, allocated and writable."""
        device = observations.values.device
        before = self._revive()
        if before is None:
            home = self._pinned_device or (device if has_float64(device) else torch.device("cpu"))
            earlier = self._current()
            fresh = [each.empty(observations.num_features, home) for each in earlier]
            self.replace_sums(
                [new.merged(old.map(lambda t: t.to(home))) for new, old in zip(fresh, earlier, strict=True)]
            )
        elif before.device.type == "cpu" and device.type != "cpu" and has_float64(device):
            if self._pinned_device is None:
                self.replace_sums([each.map(lambda tensor: tensor.to(device)) for each in self.sums])
        elif before.is_inference or self.is_borrowed():
            # A copy made in inference mode (by torchmetrics, or by deepcopy) could not be updated in place.
            self.replace_sums([each.map(torch.clone) for each in self.sums])
        live = self._revive()
        assert live is not None
        if before is None:
            live.stream.begin(live.sums, self.gram_dtype, self.phase)
        return live

    # -- folds -------------------------------------------------------------------------------------------

    def deal(self) -> int:
        """The number of the next group of batches; its fold is this number modulo g."""
        if self._first_fold is None:
            self._first_fold = first_fold(self.folds, *(self.replica or self._rank()))
        self._dealt += 1
        return self._first_fold + self._dealt - 1

    def grouped(self, observations: Observations) -> Observations:
        """The user's observations with the number of their group; their inputs are noted."""
        self._has_own_groups = self._has_own_groups or observations.group is not None
        if self.folds == 1 or not observations.values.numel():
            return observations
        group = self.deal() if observations.group is None else observations.group
        if observations.feature_dim % observations.values.ndim:  # samples come first
            self.note(observations.values, group)
        return replace(observations, group=group)

    def note(self, inputs: Tensor, group: int) -> None:
        """Remember the inputs of a group, shape (N, ...); see :meth:`repeats`."""
        self._repeats = self._repeats or Repeats(self.folds)
        self._repeats.add(inputs, group % self.folds)

    def repeats(self) -> bool:
        """True if the same inputs have come in several folds, as far as this process has seen."""
        return self._repeats is not None and self._repeats.found()

    def reset(self) -> None:
        """Forget all observations."""
        super().reset()
        self._repeats = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The value of one batch, which is added; see ``torchmetrics.Metric``."""
        before = self._repeats
        with self.changed_by_user():
            value = super().forward(*args, **kwargs)  # this resets in between
        if before is not None and before is not self._repeats:
            if self._repeats is not None:
                before.merge(self._repeats)
            self._repeats = before
        return value

    def _rank(self) -> tuple[int, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        rank = dist.get_rank(self.process_group)
        return (0, 1) if rank < 0 else (rank, dist.get_world_size(self.process_group))

    # -- merging -----------------------------------------------------------------------------------------

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the observations of another metric of this class, or of its state as a dict.

        Its folds are paired with the folds of this metric so that all are filled as equally as possible, unless
        the user gave ``Observations.group``.
        """
        with self.changed_by_user():
            self.merge_for_all(incoming_state)

    def merge_for_all(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Like :meth:`merge_state`; metrics that follow this one read the merged sums in any case."""
        has_groups = getattr(incoming_state, "_has_own_groups", False)
        self._rearranges = not (self._has_own_groups or has_groups)
        self._has_own_groups = self._has_own_groups or has_groups
        try:
            super().merge_state(incoming_state)
        finally:
            self._rearranges = False
        theirs: Repeats | None = getattr(incoming_state, "_repeats", None)
        if theirs is not None:
            self._repeats = self._repeats or Repeats(self.folds)
            self._repeats.merge(theirs)

    def take_in(self, incoming: dict[str, Any]) -> None:
        """Add the states of another metric of this class."""
        if missing := [name for name in defaults(self) if name not in incoming]:
            raise ValueError(
                f"expected the states {list(defaults(self))} in the incoming state, got {list(incoming)},"
                f" missing {missing}"
            )
        mine = self.sums
        theirs = [prototype.with_tensors(incoming) for prototype in self._prototypes]
        width, their_width = self.num_features, theirs[0].num_features
        if their_width and width not in (None, their_width):
            raise ValueError(f"expected an incoming state with {width} features, got {their_width}")
        with torch.inference_mode(False), torch.no_grad():
            home = mine[0].anchor.device
            if not mine[0].num_features and their_width:
                home = self._pinned_device or theirs[0].anchor.device
                mine = tuple(each.map(lambda tensor: tensor.to(home)) for each in mine)
            pairs = list(zip(mine, theirs, strict=True))
            if self._rearranges:
                pairs = [(own, own.beside(other)) for own, other in pairs]
            self.replace_sums([own.merged(other) for own, other in pairs])

    def exchanges(self, group: Any = None) -> list[Exchange]:
        """The exchanges with other processes, for :func:`~spectralmetrics.sums.run_together`."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        mine, live = self.sums, self._revive()
        unknown: Sequence[Sum | None] = [None] * len(mine)
        earlier = unknown if live is None else live.stream.merged.get(group_object(group), unknown)
        return [own.exchange(merged, rank, world_size) for own, merged in zip(mine, earlier, strict=True)]

    def absorb(self, results: Sequence[Sum | None], group: Any = None) -> None:
        """Replace the states by the results of :meth:`exchanges`; the old tensors are left as they were."""
        if any(each is None for each in results):
            return
        merged = [each for each in results if each is not None]
        live = self._revive()
        if live is not None:
            live.stream.merged[group_object(group)] = merged
        self.replace_sums(merged)

    def merge_processes(self, group: Any) -> None:
        """Replace the states by the merged states of all processes of a group."""
        if dist.get_rank(group) >= 0:  # a process outside the group keeps its own state
            self.absorb(run_together(self.exchanges(group), group), group)

    # -- saving and moving -------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]  # torchmetrics' signature
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The persistent states and, if later draws depend on it, the number of batches so far."""
        destination = super().state_dict(destination, prefix, keep_vars)
        if any(each.counts_batches for each in self._prototypes) and has_persistent_states(self):
            destination[prefix + "draws"] = torch.tensor(self._batches)
            if self.folds > 1:
                destination[prefix + "deals"] = torch.tensor(self._dealt)
        return destination

    def read_saved(self, saved: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """See :class:`~spectralmetrics.metrics.overrides.OverriddenMetric`."""
        batches = saved.pop(prefix + "draws", None)
        self._batches = self._batches if batches is None else int(batches)
        # 0.2.0 saved only the number of batches.
        self._dealt = int(saved.pop(prefix + "deals", self._dealt if batches is None else batches))
        if prefix + "configuration" in saved:  # a saved state must not change how this metric accumulates
            saved[prefix + "configuration"] = defaults(self)["configuration"]
        states = {name: saved[prefix + name] for name in defaults(self) if prefix + name in saved}
        if not states.keys() >= self._prototypes[0].tensors().keys():
            return
        loaded = self.sums_of(states)
        saved.update({prefix + name: each for sums in loaded for name, each in sums.tensors().items()})
        width = loaded[0].num_features
        if width and self._given_features not in (None, width):
            errors.append(
                f"expected a state of num_features={self._given_features} for {prefix}{type(self).__name__},"
                f" got one of {width}"
            )
        for own, other in zip(self._prototypes, loaded, strict=True):
            if own.settings() != other.settings():
                errors.append(f"expected a state with {own.settings()}, got one with {other.settings()}")

    def set_dtype(self, dst_type: str | torch.dtype) -> SumsMetric:
        """Leave everything as it is: the state is float64 and integers, whatever the model's dtype."""
        return self
