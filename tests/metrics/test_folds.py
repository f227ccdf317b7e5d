"""Folds change no value, deal whole batches in turn, and give an interval."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MetricCollection

import spectralmetrics as sm
from spectralmetrics.sums import first_fold
from spectralmetrics.sums.folds import Folds
from tests.functional.test_held_out import plain_definition
from tests.metrics.properties import SAMPLED, assert_same, feed
from tests.metrics.test_properties import BUILT_IN, VARIANTS
from tests.oracles import STATISTICS, random_rows

# Statistics of each feature by itself have no folds.
MARGINAL = [name for name, new in BUILT_IN.items() if issubclass(new, sm.MarginalMetric)]
FOLDED = {name: new for name, new in VARIANTS.items() if name not in MARGINAL}
STREAMED = [name for name, new in FOLDED.items() if new().short_name not in SAMPLED]
REFUSING = ("covariance", "embedding")
COUNTING = ("delve", "intrinsic_dimension", "saturation")
# The statistic of each variant with an interval, in numpy.
ORACLES = {name: STATISTICS[name] for name in STREAMED if name in STATISTICS and name not in REFUSING} | {
    "delve": lambda values, covariance: (np.cumsum(values) < 0.99 * values.sum()).mean(),
    "determinant_log": lambda values, covariance: np.linalg.slogdet(covariance)[1],
    "rankme": STATISTICS["effective_rank"],
    "uncentred_spectrum": STATISTICS["spectrum"],
}


def plain_interval(statistic, parts, center=True, counts_directions=False):
    """The definition: values of all rows and of held-out rows, and the jackknife over all parts but one."""

    def of_rows(rows):
        covariance = np.cov(rows.T, bias=True) if center else rows.T @ rows / len(rows)
        return np.asarray(statistic(np.linalg.eigvalsh(covariance)[::-1], covariance))

    held_out = plain_definition(parts, center)
    ends = [of_rows(np.concatenate(parts)), np.asarray(statistic(held_out, np.diag(held_out)))]
    low, high = np.minimum(*ends), np.maximum(*ends)
    if counts_directions:
        return low, high
    number = len(parts)
    values = [of_rows(np.concatenate(parts[:k] + parts[k + 1 :])) for k in range(number)]
    error = np.sqrt((number - 1) / number * sum((value - np.mean(values, 0)) ** 2 for value in values))
    margin = stats.t.ppf(0.975, number - 1) * error
    return low - margin, high + margin


class LargestShareMetric(sm.SpectralMetric):
    """Share of the first eigenvalue; a user's own statistic."""

    short_name = "largest_share_of_a_test"

    def statistic(self, spectrum):
        return spectrum.eigenvalues[0] / spectrum.total_variance


class CountMetric(sm.SpectralMetric):
    """A plain number; a user's own statistic."""

    short_name = "count_of_a_test"

    def statistic(self, spectrum):
        return int((spectrum.eigenvalues > 0.5).sum())


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch):
    """Restore the registry's entries of these statistics after each test."""
    for name in (LargestShareMetric.short_name, CountMetric.short_name):
        monkeypatch.setitem(sm.metrics.base._STATISTICS, name, sm.statistics()[name])


def counts(metric):
    metric.flush()
    return metric.fold_count.tolist()


def pair(name, **options):
    """A metric with its observations in four folds, and one with all in one fold."""
    return VARIANTS[name](folds=4, **options), VARIANTS[name](**options)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(
    ("count", "batch"), [(200, 7), pytest.param(200, 30, marks=pytest.mark.long), (1500, 300)]
)
class TestFoldsEqualNoFolds:
    """All values agree up to rounding."""

    def rows(self, count):
        return random_rows(count, count, 9, mean=3.0, decay=0.6)

    def test_compute(self, name, count, batch):
        folded, plain = (feed(metric, self.rows(count), batch) for metric in pair(name))
        assert_same(folded.compute(), plain.compute(), 1e-10)
        assert int(folded.count) == int(plain.count) == count

    def test_merge(self, name, count, batch):
        rows = self.rows(count)
        for order in ((0, 1), (1, 0)):
            metrics = []
            for which in range(2):
                parts = [
                    feed(pair(name)[which], part, batch)
                    for part in rows.split([count // 3, count - count // 3])
                ]
                parts[order[0]].merge_state(parts[order[1]])
                metrics.append(parts[order[0]])
            assert_same(metrics[0].compute(), metrics[1].compute(), 1e-10)
            assert sum(counts(metrics[0])) == count

    def test_forward(self, name, count, batch):
        folded, plain = pair(name)
        for part in self.rows(count).split(batch):
            assert_same(folded(part), plain(part), 1e-10)
        assert_same(folded.compute(), plain.compute(), 1e-10)
        assert all(counts(folded))  # these batches are dealt in turn, too

    def test_copies(self, name, count, batch):
        folded, plain = (feed(metric, self.rows(count), batch) for metric in pair(name))
        for twin in (folded.clone(), copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert_same(twin.compute(), plain.compute(), 1e-10)
            assert counts(twin) == counts(folded)
            twin.update(self.rows(8))
            assert sum(counts(twin)) == count + 8
            assert sum(counts(folded)) == count

    def test_state_dict(self, name, count, batch):
        rows = self.rows(count)
        folded, plain = (feed(metric, rows, batch) for metric in pair(name))
        folded.persistent(True)
        fresh = pair(name)[0]
        fresh.load_state_dict(folded.state_dict())
        assert_same(fresh.compute(), plain.compute(), 1e-10)
        # The dealing continues where it was.
        for metric in (folded, fresh, plain):
            feed(metric, rows, batch)
        assert counts(fresh) == counts(folded)
        assert_same(fresh.compute(), plain.compute(), 1e-10)

    def test_reset(self, name, count, batch):
        folded, plain = pair(name)
        for metric in (folded, plain):
            feed(metric, self.rows(count) * 5 + 1e3, batch)
            metric.reset()
            feed(metric, self.rows(count)[:, :6], batch)
        assert_same(folded.compute(), plain.compute(), 1e-10)
        assert sum(counts(folded)) == count


@pytest.mark.parametrize("name", STREAMED)
def test_float32_products(name):
    rows = random_rows(3, 900, 8, mean=2.0, decay=0.4, dtype=torch.float32)
    folded, plain = (feed(metric, rows, 300) for metric in pair(name, gram_dtype=torch.float32))
    fragile = name in ("covariance_determinant", "determinant_log")
    assert_same(folded.compute(), plain.compute(), 1e-4 if fragile else 1e-5)


def test_the_sample_of_an_embedding_is_that_without_folds():
    rows = random_rows(0, 200, 5, mean=1.0)
    folded, plain = (feed(sm.EigenspaceEmbeddingMetric(max_samples=20, folds=f), rows, 16) for f in (3, 1))
    assert_same(folded.compute(), plain.compute(), 1e-9)
    assert sum(counts(folded)) == 200


class TestDealing:
    def test_batches_are_dealt_in_turn_and_never_divided(self):
        metric = sm.SaturationMetric(folds=3)
        sizes = [5, 1, 70, 2, 400, 3, 9, 11]
        for size in sizes:
            metric.update(torch.randn(size, 4))
        assert counts(metric) == [sum(sizes[turn::3]) for turn in range(3)]

    @pytest.mark.parametrize("batch", [3, 500])  # rows that wait for others, and rows that do not
    def test_each_fold_has_the_moments_of_its_own_batches(self, batch):
        rows = random_rows(0, 8 * batch, 6, mean=-4.0)
        metric = feed(sm.SpectrumMetric(folds=3), rows, batch)
        batches = rows.split(batch)
        for turn, fold in enumerate(metric.sums[0].folds):
            alone = feed(sm.CovarianceMetric(), torch.cat(batches[turn::3]))
            assert int(fold.count) == int(alone.count)
            assert_same(fold.mean(), alone.moments.mean(), 1e-12)
            assert_same(fold.covariance(), alone.compute(), 1e-11)

    def test_batches_without_rows_take_no_turn(self):
        metric = sm.SaturationMetric(folds=2)
        for size in (4, 0, 7, 0, 0, 9):
            metric.update(torch.randn(size, 3))
        assert counts(metric) == [13, 7]

    def test_a_reset_goes_on_in_turn(self):
        """Dealing continues after a reset; otherwise short epochs would always fill the first folds."""
        metric = feed(sm.SaturationMetric(folds=4), torch.randn(5, 3), 1)
        metric.reset()
        feed(metric, torch.randn(2, 3), 1)
        assert counts(metric) == [0, 1, 1, 0]

    def test_rows_that_are_not_finite_are_counted_in_their_fold(self):
        metric = sm.SaturationMetric(folds=2, nan_strategy="ignore")
        for bad in (1, 2, 3):
            rows = torch.randn(8, 3)
            rows[:bad, 0] = torch.nan
            metric.update(rows)
        assert counts(metric) == [12, 6]
        assert metric.fold_non_finite.tolist() == [4, 2]
        assert int(metric.non_finite) == 6

    def test_observations_in_their_layout(self):
        maps = torch.randn(12, 5, 4, 4)
        metric = sm.SpectrumMetric(folds=3)
        for part in maps.split(2):
            metric.update(sm.Observations(part, feature_dim=1))
        assert counts(metric) == [64, 64, 64]
        plain = feed(sm.SpectrumMetric(), maps.movedim(1, -1).reshape(-1, 5))
        assert_same(metric.compute(), plain.compute(), 1e-12)


class TestCollections:
    def test_metrics_with_different_folds_never_share(self):
        """Not even if their states look alike after the first batches."""
        collection = MetricCollection(
            {
                f"{name}_{folds}": new(folds=folds)
                for folds in (1, 2, 8)
                for name, new in BUILT_IN.items()
                if folds == 1 or name in FOLDED
            }
        )
        for _ in range(20):
            collection.update(torch.zeros(4, 3))
        for group in collection.compute_groups.values():
            assert len({name.rsplit("_", 1)[1] for name in group}) == 1
        for folds, expected in ((2, [40, 40]), (8, [12, 12, 12, 12, 8, 8, 8, 8])):
            assert counts(collection[f"saturation_{folds}"]) == expected

    def test_those_with_the_same_folds_do(self):
        collection = MetricCollection([sm.SaturationMetric(folds=4), sm.EffectiveRankMetric(folds=4)])
        rows = random_rows(0, 400, 6)
        for part in rows.split(20):
            collection.update(part)
        assert len(collection.compute_groups) == 1
        alone = feed(sm.EffectiveRankMetric(folds=4), rows, 20)
        for mine, its in zip(collection["EffectiveRankMetric"].interval(), alone.interval(), strict=True):
            assert_same(mine, its, 1e-12)

    def test_one_decomposition_serves_all_intervals(self, monkeypatch):
        calls = []
        original = torch.linalg.eigh

        def counted(*args, **kwargs):
            calls.append(args[0].shape)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, "eigh", counted)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6))
        # The determinant needs the covariance, and so the eigenvectors of all data.
        without = (*REFUSING, *MARGINAL, "covariance_determinant")
        able = [new() for name, new in BUILT_IN.items() if name not in without]
        with sm.LayerProbe(model, able, folds=5) as probe:
            for _ in range(10):
                model(torch.randn(20, 4))
        assert len(probe.intervals()) == len(able)
        assert len(calls) == 5


class TestInterval:
    @pytest.mark.parametrize("folds", [2, 3, 8])
    @pytest.mark.parametrize("name", ORACLES)
    def test_against_the_plain_definition(self, name, folds):
        """The plain and the held-out value, moved outwards by the margin unless directions are counted."""
        rows = random_rows(folds, 30 * folds, 7, mean=0.3, decay=0.8)
        metric = feed(VARIANTS[name](folds=folds), rows, 10)
        low, high = interval = metric.interval()
        assert isinstance(interval, sm.metrics.base.Interval)
        plain = metric.compute()
        assert low.shape == high.shape == plain.shape
        assert low.dtype == high.dtype == plain.dtype
        batches = rows.split(10)
        parts = [torch.cat(batches[turn::folds]).numpy() for turn in range(folds)]
        of = plain_interval(ORACLES[name], parts, metric.center, name in COUNTING)
        if metric.plot_lower_bound is not None:
            of = (np.maximum(of[0], metric.plot_lower_bound), of[1])
        for end, expected in zip(interval, of, strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(end, expected, rtol=1e-9, atol=1e-10 * scale)

    @pytest.mark.parametrize("name", COUNTING)
    def test_of_counted_directions_the_ends_are_values_themselves(self, name):
        metric = feed(VARIANTS[name](folds=4), random_rows(1, 90, 30, decay=0.8), 9)
        low, high = metric.interval()
        held_out = metric.statistic(metric.spectrum.held_out())
        assert low == metric.compute() < high == held_out

    @pytest.mark.parametrize("name", sorted(set(ORACLES) - set(COUNTING)))
    def test_of_others_they_lie_further_out(self, name):
        metric = feed(VARIANTS[name](folds=4), random_rows(1, 90, 7, mean=0.3, decay=0.8), 9)
        low, high = metric.interval()
        for value in (metric.compute(), metric.statistic(metric.spectrum.held_out())):
            assert (low < value).all()
            assert (value < high).all()

    def test_without_enough_observations_a_logarithm_of_zero_leaves_the_margin_out(self):
        metric = feed(sm.CovarianceDeterminantMetric(log=True, folds=4), torch.randn(20, 18), 5)
        assert metric.compute().isfinite()  # without folds it is not
        low, high = metric.interval()
        assert low <= metric.compute() <= high

    def test_it_holds_what_a_few_large_eigenvalues_decide(self):
        """Sampling of the observations moves this ratio more than fitting the directions does."""
        generator = torch.Generator().manual_seed(0)
        variances = torch.arange(1, 49, dtype=torch.float64) ** -2
        truth = float(variances.sum() ** 2 / (variances**2).sum())
        held, held_without = 0, 0
        for _ in range(40):
            rows = torch.randn(192, 48, dtype=torch.float64, generator=generator) * variances.sqrt()
            metric = feed(sm.ParticipationRatioMetric(folds=8), rows, 6)
            low, high = metric.interval()
            held += bool(low <= truth <= high)
            ends = sorted([float(metric.compute()), float(metric.statistic(metric.spectrum.held_out()))])
            held_without += ends[0] <= truth <= ends[1]
        assert held >= 36
        assert held_without < 30  # so the margin is needed

    @pytest.mark.parametrize("name", REFUSING)
    def test_what_is_no_number_of_a_spectrum_has_none(self, name):
        metric = feed(BUILT_IN[name](folds=2), torch.randn(20, 3), 5)
        with pytest.raises(RuntimeError, match=f"{type(metric).__name__} has no interval"):
            metric.interval()

    @pytest.mark.parametrize("name", [*REFUSING, *MARGINAL])
    def test_nor_is_it_said_that_folds_would_give_one(self, name):
        metric = feed(BUILT_IN[name](), torch.randn(20, 3), 5)
        with pytest.raises(RuntimeError, match=f"{type(metric).__name__} has no interval$"):
            metric.interval()

    @pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {*REFUSING, *MARGINAL}))
    def test_without_folds_the_error_says_how_to_get_one(self, name):
        metric = feed(BUILT_IN[name](), torch.randn(20, 3), 5)
        with pytest.raises(RuntimeError, match="no interval; make it with folds=8"):
            metric.interval()

    def test_without_observations(self):
        with pytest.raises(RuntimeError, match="no observation"):
            sm.SaturationMetric(folds=2).interval()

    @pytest.mark.parametrize("batches", [1, 2, 3])
    def test_an_empty_fold_leaves_one_end_unknown(self, batches):
        rows = random_rows(0, 10 * batches, 5)
        metric = feed(sm.IntrinsicDimensionMetric(folds=4), rows, 10)
        low, high = metric.interval()
        assert high.isnan()
        assert low == metric.compute()
        assert low.dtype == high.dtype == torch.float64
        for _ in range(4 - batches):
            metric.update(rows)
        assert not any(end.isnan() for end in metric.interval())

    def test_a_users_own_statistic_has_one(self):
        rows = random_rows(0, 60, 6)
        metric = feed(LargestShareMetric(folds=3), rows, 6)
        parts = [torch.cat(rows.split(6)[turn::3]).numpy() for turn in range(3)]
        expected = plain_interval(lambda values, covariance: values.max() / values.sum(), parts)
        np.testing.assert_allclose(metric.interval(), expected, rtol=1e-10)

    def test_a_users_own_plain_number_has_one(self):
        rows = torch.randn(40, 12)
        metric = feed(CountMetric(folds=4), rows, 5)
        low, high = metric.interval()
        assert low.dtype == high.dtype == torch.float64
        parts = [torch.cat(rows.split(5)[turn::4]).numpy() for turn in range(4)]
        expected = plain_interval(lambda values, covariance: (values > 0.5).sum(), parts)
        np.testing.assert_allclose((low, high), expected, rtol=1e-12)

    def test_more_data_moves_it(self):
        metric = feed(sm.EffectiveRankMetric(folds=2), random_rows(0, 40, 6, decay=0.0), 10)
        first = metric.interval()
        feed(metric, random_rows(1, 4000, 6, decay=0.0), 10)
        second = metric.interval()
        assert second.high - second.low < (first.high - first.low) / 10

    def test_it_is_the_callers_own(self):
        metric = feed(sm.SpectrumMetric(folds=2), random_rows(0, 40, 6), 10)
        expected = [end.clone() for end in metric.interval()]
        for end in metric.interval():
            end.zero_()
        for end, its in zip(metric.interval(), expected, strict=True):
            assert torch.equal(end, its)

    @pytest.mark.parametrize("folds", [2, 8])
    def test_a_known_flat_spectrum(self, folds):
        """With 96 equal directions, few observations show few; the interval reaches almost all."""
        rows = torch.randn(192, 96, dtype=torch.float64)
        low, high = feed(sm.IntrinsicDimensionMetric(folds=folds), rows, 6).interval()
        assert low <= 90
        assert high >= 94


def test_nothing_keeps_the_sums_alive():
    metric = feed(sm.SaturationMetric(folds=3), torch.randn(40, 5), 8)
    metric.interval()
    kept = weakref.ref(metric.fold_second_moment)
    del metric
    gc.collect()
    assert kept() is None


def test_counting_merges_no_matrices(monkeypatch):
    metric = feed(sm.SaturationMetric(folds=3), torch.randn(40, 5), 8)
    monkeypatch.setattr(Folds, "total", property(lambda self: pytest.fail("merged")))
    assert int(metric.count) == 40
    assert int(metric.non_finite) == 0


class TestArguments:
    @pytest.mark.parametrize("folds", [0, -1, 2.0, True, "8", None])
    def test_folds_that_are_no_number(self, folds):
        with pytest.raises(ValueError, match=f"folds to be a positive integer, got {folds!r}"):
            sm.SaturationMetric(folds=folds)

    def test_states_of_another_number_of_folds_are_refused(self):
        four = feed(sm.SaturationMetric(folds=4), torch.randn(20, 3), 5)
        two = feed(sm.SaturationMetric(folds=2), torch.randn(20, 3), 5)
        with pytest.raises(ValueError, match=r"folds=2.*folds=4"):
            two.merge_state(four)
        four.persistent(True)
        with pytest.raises(RuntimeError, match=r"'folds', 2.*'folds', 4"):
            two.load_state_dict(four.state_dict())
        assert sum(counts(two)) == 20


def test_the_states_of_all_folds_together_have_the_names_that_they_have_without():
    rows = torch.randn(90, 4, dtype=torch.float64) + 2
    rows[3, 0] = torch.nan
    folded, plain = (sm.SaturationMetric(folds=folds, nan_strategy="ignore") for folds in (3, 1))
    for part in rows.split(10):
        folded.update(part)
        plain.update(part)
    assert (int(folded.count), int(folded.non_finite)) == (89, 1)
    about = plain.origin + plain.first_moment / plain.count
    torch.testing.assert_close(folded.origin + folded.first_moment / folded.count, about)
    assert folded.second_moment.shape == (4, 4)
    total = folded.moments
    for name, tensor in (
        ("origin", total.origin),
        ("first_moment", total.first),
        ("second_moment", total.second),
    ):
        assert torch.equal(getattr(folded, name), tensor)


class TestMergedFoldsAreEqual:
    """For any number of batches on each side."""

    def seen(self, batches, seed=0, folds=8, rows=10):
        return feed(sm.EffectiveRankMetric(folds=folds), random_rows(seed, rows * batches, 4), rows)

    @pytest.mark.parametrize(("left", "right"), [(4, 4), (3, 5), (12, 4), (1, 7), (13, 11), (0, 8), (8, 0)])
    def test_two(self, left, right):
        metric = self.seen(left)
        metric.merge_state(self.seen(right, seed=1))
        assert max(counts(metric)) - min(counts(metric)) <= 10
        low, high = metric.interval()
        assert low < high

    def test_many_that_each_saw_one_batch(self):
        metrics = [self.seen(1, seed=seed) for seed in range(8)]
        for other in metrics[1:]:
            metrics[0].merge_state(other.metric_state)
        assert counts(metrics[0]) == 8 * [10]
        assert_same(metrics[0].compute(), self.whole(), 1e-12)

    def whole(self):
        rows = torch.cat([random_rows(seed, 10, 4) for seed in range(8)])
        return feed(sm.EffectiveRankMetric(), rows, 10).compute()

    def test_a_fold_stays_whole(self):
        left, right = self.seen(3), self.seen(2, seed=1)
        parts = [fold.covariance() for metric in (left, right) for fold in metric.sums[0].folds if fold.count]
        left.merge_state(right)
        found = [fold.covariance() for fold in left.sums[0].folds if fold.count]
        assert len(found) == 5
        assert all(any(torch.allclose(part, its) for its in found) for part in parts)

    def test_groups_that_the_user_gave_stay_together(self):
        rows = random_rows(0, 20, 4)
        left, right = sm.EffectiveRankMetric(folds=4), sm.EffectiveRankMetric(folds=4)
        for metric, half in zip((left, right), rows.split(10), strict=True):
            metric.update(sm.Observations(half, group=1))
        left.merge_state(right)
        assert counts(left) == [0, 20, 0, 0]

    def test_labelled(self):
        metrics = []
        for seed in range(2):
            metrics.append(sm.LinearProbeMetric(2, folds=8))
            for part in random_rows(seed, 40, 4).split(10):
                metrics[-1].update(part, torch.arange(10) % 2)
        metrics[0].merge_state(metrics[1])
        assert metrics[0].sums[0].counts.tolist() == 8 * [10]
        assert metrics[0].sums[0].class_counts.tolist() == 8 * [[5, 5]]


@pytest.mark.parametrize("folds", [2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 13])
def test_replicas_fill_all_folds_alike(world, folds):
    starts = [first_fold(folds, rank, world) for rank in range(world)]
    for batches in range(1, 3 * folds):
        filled = np.bincount(
            [(start + batch) % folds for start in starts for batch in range(batches)], minlength=folds
        )
        assert filled.max() - filled.min() <= 1
