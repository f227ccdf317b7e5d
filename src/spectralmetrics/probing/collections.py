"""The metrics of one layer in one stage: which keep sums, how they are updated and read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import read_together
from spectralmetrics.metrics import SpectralMetric
from spectralmetrics.metrics.groups import Templates
from spectralmetrics.metrics.sharing import Stream, spectrum_of
from spectralmetrics.sums import ForwardHistory, Observations, SpectralSum, Sum

_GOLDEN_RATIO = (5**0.5 - 1) / 2


class Counts(NamedTuple):
    """Counts to check before the sums of a metric are read.

    Attributes:
        observations: the number of observations counted.
        left_out: the number of observations left out for a NaN or an infinity.
        in_range: 0 if some sum has overflowed.
    """

    observations: int
    left_out: int
    in_range: int


Places: TypeAlias = Mapping[tuple[str, str], "LayerMetrics"]
"""(stage, layer) -> its metrics."""

Counted: TypeAlias = Mapping[int, Counts]
"""The ``id`` of a leader -> its counts."""


def count_together(places: Iterable[LayerMetrics]) -> Counted:
    """The counts of all layers, with one transfer for each device."""
    leaders = [leader for place in places for leader in place.spectral_leaders]
    read = read_together([leader.counts() for leader in leaders])
    return {id(leader): Counts(*numbers) for leader, numbers in zip(leaders, read, strict=True)}


class LayerMetrics:
    """The metrics of one layer in one stage, and the probe's counters and flags beside them.

    Attributes:
        stage: ``"train"`` or ``"eval"``.
        layer: the name of the layer.
        number: the number of the layer.
        kept: name -> metric that keeps sums, a leader; one for each group that shares sums.
        leaders: the leaders in the order of the groups.
        spectral_leaders: the leaders that are metrics of this package.
        leader_of: name of any metric -> its leader.
        forwards: forwards of the layer since the last reset, observed or not; shared ones while paused, too.
        ran: all forwards of the layer; with a history, the number of the last one.
        samples: number of samples observed since the last reset.
        ran_elsewhere: True if another process is known to have observed samples since then.
        epoch: number of resets so far.
        given_up: the reason why the layer is not observed until the next reset; empty if it is observed.
        too_wide: True if the layer is left out for good since it is too wide.
        is_sketched: True if the layer is so wide that sketches are kept.
        transformed: True if the layer ran under a ``torch.func`` transform, where nothing can be observed.
        before_update: called before observations are added.
        needs_more_than_rows: True if metrics need labels, groups or numbers of forwards, or are not ours.
    """

    def __init__(self, stage: str, layer: str, templates: Templates, number: int) -> None:
        self.stage, self.layer, self.number = stage, layer, number
        self.forwards = self.ran = self.samples = self.epoch = 0
        self.given_up, self.too_wide, self.transformed = "", False, False
        self.ran_elsewhere = False
        self.before_update: Callable[[], None] | None = None
        self._has_lost = False  # True if sums were reset or replaced since they were read
        self.spectral_leaders: list[SpectralMetric] = []
        self.keep(templates)

    def keep(self, templates: Templates) -> None:
        """Keep copies of these metrics from now on, and drop the earlier metrics with their observations."""
        pinned = [leader._pinned_device for leader in self.spectral_leaders]
        self.is_sketched = False
        self.templates, groups = templates, templates.groups
        self._collection: MetricCollection | None = None
        self._followers: dict[str, Any] = {}  # metrics that keep no sums, made when first read
        self.leaders: list[Metric] = [templates.leader(names) for names in groups]
        pairs = zip(groups, self.leaders, strict=True)
        self.leader_of = {name: leader for names, leader in pairs for name in names}
        self.kept = nn.ModuleDict({names[0]: self.leader_of[names[0]] for names in sorted(groups)})
        self.spectral_leaders = [metric for metric in self.leaders if isinstance(metric, SpectralMetric)]
        for leader in self.spectral_leaders:
            # Otherwise similar layers would all have their costly update at the same step. The fractions of
            # multiples of the golden ratio lie as far apart as possible.
            leader.phase = self.number * _GOLDEN_RATIO % 1
            leader._pinned_device = next(iter(pinned), leader._pinned_device)
        self.takes_labels = any(metric.needs_labels for metric in self.spectral_leaders)
        sums = [m.prototypes if isinstance(m, SpectralMetric) else () for m in self.leaders]
        self._whole = [any(each.takes_all_rows for each in some) for some in sums]
        self.takes_all_rows = any(self._whole)
        self._is_direct = all(isinstance(m, SpectralMetric) and m.takes_observations for m in self.leaders)
        self.needs_more_than_rows = (
            not self._is_direct or self.takes_labels or self.takes_all_rows or self.folds > 1
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own collection.
        return {**self.__dict__, "_collection": None, "_followers": {}}

    @property
    def collection(self) -> MetricCollection:
        """All metrics; those without own sums are made at the first call, and read the sums of their leader."""
        if self._collection is None:
            for name, leader in self.leader_of.items():
                if name not in self.kept:
                    self._followers[name] = metric = self.templates.fresh(name)
                    if self.is_sketched and not metric.needs_labels:
                        metric.sketch_instead(self.sketch_size)
                    metric.follow(leader)
            groups = [list(names) for names in self.templates.groups]
            self._collection = MetricCollection({**self.leader_of, **self._followers}, compute_groups=groups)
        return self._collection

    @property
    def members(self) -> list[Metric]:
        """The metrics made so far; the leaders come last."""
        return [*self._followers.values(), *self.leaders]

    @property
    def folds(self) -> int:
        """The most folds that a metric keeps."""
        return max((metric.folds for metric in self.spectral_leaders), default=1)

    @property
    def sketch_size(self) -> int | None:
        """The columns of the sketches, if the layer is so wide that sketches are kept; otherwise None."""
        # Marginals, such as those of a history, stay as they are.
        sizes = (metric.sketch_size for metric in self.spectral_leaders if not metric.needs_labels)
        return next(filter(None, sizes), None) if self.is_sketched else None

    def widths(self) -> tuple[int | None, tuple[int, ...]]:
        """The columns of sketches, or None, and the width of the sums of each leader; 0 without data."""
        return self.sketch_size, tuple(leader.sums[0].num_features for leader in self.spectral_leaders)

    def note_reading(self, reader: Any) -> bool:
        """Note that a reader reads the sums; return True if they have changed since it last did."""
        changed, self._has_lost = self._has_lost, False
        for leader in self.spectral_leaders:
            stream = Stream.of(leader.sums[0].anchor)
            changed = changed or stream.noted is None or stream.noted() is not reader
            stream.noted = weakref.ref(reader)
        return changed

    def note_other_states(self) -> None:
        """Note that other sums were put in, so that :meth:`note_reading` reports a change."""
        self._has_lost = True

    @property
    def keeps_matrices(self) -> bool:
        """True if memory grows with the square of the width."""
        kept = [metric.prototypes[0] for metric in self.spectral_leaders]
        return any(isinstance(each, SpectralSum) and each.keeps_products for each in kept)

    @property
    def history(self) -> ForwardHistory | None:
        """The history of the last forwards; None if no metric keeps one."""
        kept = [each for metric in self.spectral_leaders for each in metric.sums]
        return next((each for each in kept if isinstance(each, ForwardHistory)), None)

    @property
    def needs_labels(self) -> bool:
        """True if all metrics need labels."""
        return all(isinstance(metric, SpectralMetric) and metric.needs_labels for metric in self.leaders)

    def sketch(self, sketch_size: int) -> None:
        """Keep sketches instead of covariances from now on; metrics that need labels then get no data."""
        for metric in self.members:
            if isinstance(metric, SpectralMetric) and not metric.needs_labels:
                metric.sketch_instead(sketch_size)
        self.is_sketched = True

    def update(
        self,
        observations: Observations,
        labelled: Observations | None = None,
        groups: dict[int, int] | None = None,
        inputs: Tensor | None = None,
        everything: Observations | None = None,
    ) -> None:
        """Add observations to all metrics; gradients and inference mode are off.

        Args:
            observations: observations for metrics that take no labels.
            labelled: observations for metrics that take labels; None if there are no labels.
            groups: ``id`` of a leader -> group of these observations. It is filled here for later calls of the
                layer in the same forward: all observations of one forward must be in one fold.
            inputs: the layer's output for each sample, shape (N, ...), before rows were drawn.
            everything: observations for sums that take all rows; None if ``observations`` has all rows.
        """
        if self.before_update is not None:
            self.before_update()
        if not self.needs_more_than_rows:
            for each in self.spectral_leaders:
                each.observe(observations)
            return
        if not self._is_direct:
            rows = observations.rows()
            rows = rows if observations.valid is None else rows[observations.valid]
        for leader, is_whole in zip(self.leaders, self._whole, strict=True):
            if not isinstance(leader, SpectralMetric) or not leader.takes_observations:
                leader.update(rows)
            elif not leader.needs_labels:
                also = () if everything is None or not is_whole else (everything,)
                leader.observe(_grouped(observations, leader, groups), *also)
            elif labelled is not None and not self.is_sketched:
                leader.observe(_grouped(labelled, leader, groups))
        first = next((leader for leader in self.spectral_leaders if leader.folds > 1), None)
        if first is not None and inputs is not None and groups is not None and id(first) in groups:
            first.note(inputs, groups[id(first)])

    def pass_over(self, groups: dict[int, int]) -> None:
        """Add nothing of a forward that other processes share, but draw its fold, to stay in step with them."""
        for leader in self.spectral_leaders:
            if leader.folds > 1 and id(leader) not in groups:
                groups[id(leader)] = leader.deal()

    def share_with(self, replica: tuple[int, int]) -> None:
        """Make all processes that share the layer's forwards begin with the same fold."""
        for leader in self.spectral_leaders:
            leader.replica = leader.replica or replica

    def has_data(self) -> bool:
        """True if anything has been observed or counted."""
        return bool(self.samples or self.forwards) or any(each.has_observed() for each in self.spectral_leaders)

    def too_few(self, counted: Counted) -> int:
        """The number of observations, if it is below twice the dimension read from them; otherwise 0."""
        for name, metric in self.readable().items():
            if not isinstance(metric, SpectralMetric) or metric.needs_labels:
                continue
            count = counted[id(self.leader_of[name])].observations
            if count and (dimension := metric.dimension_read()):
                return count if count < 2 * dimension else 0
        return 0

    def repeats(self) -> bool:
        """True if the same inputs are in several folds."""
        return any(leader.repeats() for leader in self.spectral_leaders)

    def sums(self, *, with_left_out: bool = False) -> list[Sum]:
        """The sums of the metrics, each kind once, preferring exact products; empty without data.

        Args:
            with_left_out: True if sums whose observations were all left out count as data.
        """
        spectral: dict[type[Sum], SpectralSum] = {}
        others: dict[type[Sum], Sum] = {}
        # Exact products first, and more folds before fewer: sums with more folds hold all of the others.
        leaders = [metric for metric in self.spectral_leaders if metric.takes_observations]
        for metric in sorted(leaders, key=lambda m: (m.gram_dtype == torch.float32, -m.folds)):
            for each in metric.sums:
                if not each.num_features:
                    continue
                if not isinstance(each, SpectralSum):
                    others.setdefault(type(each), each)
                elif each.in_range() and int(each.num_observations + with_left_out * each.num_left_out):
                    spectral.setdefault(type(each), each)
        first = [each for each in spectral.values() if each.describes_layer][:1]
        first += [each for each in spectral.values() if not each.describes_layer]
        return [*first, *others.values()] if first else []

    def recorded_sums(self) -> list[Sum]:
        """The sums for a record: also those of a layer whose observations were all left out."""
        return self.sums() or self.sums(with_left_out=True)

    def spectrum(self, *, with_left_out: bool = False) -> Spectrum | None:
        """The spectrum of :meth:`sums`, with the eigenvalues read so far; None without data."""
        return spectrum_of(self.sums(with_left_out=with_left_out))

    def reset(self) -> None:
        """Forget the observations."""
        with torch.inference_mode(False):  # states made in inference mode cannot be updated outside
            for leader in self.leaders:
                leader.reset()
        self.forwards = self.samples = 0
        self.epoch += 1
        self.given_up, self.transformed, self.ran_elsewhere = "", False, False
        self._has_lost = True

    def has_seen(self, counted: Counted) -> bool:
        """True if there is anything to compute; with several processes, once the states are merged."""
        plain = [metric for metric in self.spectral_leaders if not metric.needs_labels]
        if decisive := plain or self.spectral_leaders:
            return any(counted[id(metric)].observations > 0 for metric in decisive)
        # Metrics of other libraries merge by themselves, on all processes or on none.
        return self.samples > 0 or self.ran_elsewhere

    def readable(self) -> dict[str, Metric]:
        """The metrics by name; metrics that need eigenvectors first, since these bring the eigenvalues, too."""
        collection = self.collection
        if not all(metric.is_borrowed() for metric in self._followers.values()):  # the user updated it alone
            collection.items(copy_state=False)
        named = sorted({**self.leader_of, **self._followers}.items())
        return dict(sorted(named, key=lambda item: not getattr(item[1], "needs_eigenvectors", False)))


def _grouped(observations: Observations, leader: SpectralMetric, groups: dict[int, int] | None) -> Observations:
    """The observations with the number of their group; a leader draws a group once in a forward."""
    if leader.folds == 1 or groups is None:
        return observations
    if id(leader) not in groups:
        groups[id(leader)] = leader.deal()
    return replace(observations, group=groups[id(leader)])
