"""Folds change no value, deal whole batches in turn, and give an interval."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torchmetrics import MetricCollection

import spectralmetrics as sm
from spectralmetrics.functional import held_out_eigenvalues
from spectralmetrics.sums.folds import Folds
from tests.metrics.properties import SAMPLED, assert_same, feed
from tests.metrics.test_properties import BUILT_IN, VARIANTS
from tests.oracles import random_rows

STREAMED = [name for name, new in VARIANTS.items() if new().short_name not in SAMPLED]
REFUSING = ("covariance", "embedding")


class LargestShareMetric(sm.SpectralMetric):
    """Share of the first eigenvalue; a statistic of a user's own."""

    short_name = "largest_share_of_a_test"

    def statistic(self, spectrum):
        return spectrum.eigenvalues[0] / spectrum.total_variance


class CountMetric(sm.SpectralMetric):
    """A statistic of a user's own that is a plain number."""

    short_name = "count_of_a_test"

    def statistic(self, spectrum):
        return int((spectrum.eigenvalues > 0.5).sum())


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch):
    """What is defined here is no statistic of other tests."""
    for name in (LargestShareMetric.short_name, CountMetric.short_name):
        monkeypatch.setitem(sm.metrics.base._STATISTICS, name, sm.statistics()[name])


def counts(metric):
    metric.flush()
    return metric.fold_count.tolist()


def pair(name, **options):
    """A metric that keeps its observations in four folds, and one that keeps them in one."""
    return VARIANTS[name](folds=4, **options), VARIANTS[name](**options)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(("count", "batch"), [(200, 7), (200, 30), (1500, 300)])
class TestFoldsEqualNoFolds:
    """In every value, to rounding."""

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
        # The dealing goes on where it was.
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
        """Otherwise an epoch of few batches would always fill the first folds."""
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
        """Not even where their first batches leave states that look alike."""
        collection = MetricCollection(
            {f"{name}_{folds}": new(folds=folds) for folds in (1, 2, 8) for name, new in BUILT_IN.items()}
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
        # The determinant is read from the covariance, which needs the eigenvectors of all data.
        without = (*REFUSING, "covariance_determinant")
        able = [new() for name, new in BUILT_IN.items() if name not in without]
        with sm.LayerProbe(model, able, folds=5) as probe:
            for _ in range(10):
                model(torch.randn(20, 4))
        assert len(probe.intervals()) == len(able)
        assert len(calls) == 5


class TestInterval:
    @pytest.mark.parametrize("name", sorted(set(STREAMED) - {"covariance", "unbiased"}))
    def test_it_is_the_plain_value_and_that_of_the_held_out_spectrum(self, name):
        metric = feed(VARIANTS[name](folds=4), random_rows(1, 90, 7, mean=0.3, decay=0.8), 9)
        low, high = interval = metric.interval()
        assert isinstance(interval, sm.metrics.base.Interval)
        plain = metric.compute()
        assert low.shape == high.shape == plain.shape
        assert low.dtype == high.dtype == plain.dtype
        assert (low <= high).all()
        held_out = held_out_eigenvalues(metric.sums[0].folds, metric.center)
        values = held_out.sum() if name == "covariance_trace" else None
        if name == "spectrum" or name == "uncentred_spectrum":
            values = held_out
        elif name == "intrinsic_dimension":
            values = sm.functional.intrinsic_dimension(held_out, 0.99)
        elif name == "participation_ratio":
            values = sm.functional.participation_ratio(held_out)
        if values is not None:
            assert_same(low, torch.minimum(plain, values), 1e-12)
            assert_same(high, torch.maximum(plain, values), 1e-12)
        else:
            assert ((low == plain) | (high == plain)).all()

    @pytest.mark.parametrize("name", REFUSING)
    def test_what_is_no_number_of_a_spectrum_has_none(self, name):
        metric = feed(BUILT_IN[name](folds=2), torch.randn(20, 3), 5)
        with pytest.raises(RuntimeError, match=f"{type(metric).__name__} has no interval"):
            metric.interval()

    @pytest.mark.parametrize("name", sorted(set(BUILT_IN) - set(REFUSING)))
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
        metric = feed(LargestShareMetric(folds=3), random_rows(0, 60, 6), 6)
        low, high = metric.interval()
        held_out = held_out_eigenvalues(metric.sums[0].folds)
        assert_same(low, held_out[0] / held_out.sum(), 1e-12)
        assert_same(high, metric.compute(), 0)

    def test_a_users_own_plain_number_has_one(self):
        rows = torch.randn(40, 12)
        metric = feed(CountMetric(folds=4), rows, 5)
        low, high = metric.interval()
        assert low.dtype == torch.int64
        assert low <= metric.compute() <= high

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
        """Of 96 equal directions, few observations show few; the interval reaches to within one of all."""
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
