"""One process: the contract of torchmetrics metrics, and the methods of torchmetrics that are overridden."""

import contextlib
import copy
import functools
import gc
import inspect
import io
import warnings
from typing import ClassVar

import matplotlib
import numpy as np
import pytest
import torch
import torchmetrics
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

import spectralmetrics as sm
from spectralmetrics.metrics import overrides, sharing
from spectralmetrics.sums import Observations, about_origin, compiled, decomposition, intake, per_feature
from tests.metrics.properties import assert_same, feed
from tests.metrics.test_properties import VARIANTS
from tests.oracles import random_rows, relative_error, two_pass_covariance

matplotlib.use("Agg")
SCALARS = sorted(set(VARIANTS) - {"covariance", "unbiased", "spectrum", "uncentred_spectrum", "embedding"})
STATES = ("configuration", "count", "non_finite", "origin", "first_moment", "second_moment")


class TestWrongInput:
    REFUSED = (
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.ones(3, 4, dtype=torch.complex64), TypeError, "torch.complex64"),
        (torch.ones(3, 4, dtype=torch.bool), TypeError, "torch.bool"),
        ([[1.0, 2.0]], TypeError, "list"),
        (np.ones((3, 4)), TypeError, "ndarray"),
        (torch.ones(4), ValueError, r"\(4,\)"),
        (torch.ones(2, 3, 4), ValueError, r"\(2, 3, 4\)"),
        (torch.ones(3, 5), ValueError, "4 features, got 5"),
        (torch.ones(0, 5), ValueError, "4 features, got 5"),
        (torch.ones(3, 0), ValueError, "at least one feature"),
    )

    @pytest.mark.parametrize("name", VARIANTS)
    def test_is_refused_and_leaves_the_state_as_it_was(self, name):
        metric = feed(VARIANTS[name](), random_rows(0, 20, 4))
        before = {key: value.clone() for key, value in metric.metric_state.items()}
        value = metric.compute()
        for rows, error, quoted in self.REFUSED:
            with pytest.raises(error, match=quoted):
                metric.update(rows)
            assert all(torch.equal(metric.metric_state[key], before[key]) for key in before)
        assert_same(metric.compute(), value)

    def test_a_given_width_is_checked_from_the_first_rows_on(self):
        metric = sm.SaturationMetric(4)
        with pytest.raises(ValueError, match="4 features, got 5"):
            metric.update(torch.ones(3, 5))

    @pytest.mark.parametrize("name", VARIANTS)
    def test_no_rows_are_no_operation(self, name):
        metric = VARIANTS[name]()
        metric.update(torch.ones(0, 7))
        assert metric.num_features is None
        metric.update(random_rows(0, 20, 4))
        value = metric.compute()
        metric.update(torch.ones(0, 4))
        assert_same(metric.compute(), value)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_compute_without_observations_says_so(self, name):
        with pytest.raises(RuntimeError, match="counted no observation"):
            VARIANTS[name]().compute()
        metric = VARIANTS[name](nan_strategy="ignore")
        metric.update(torch.full((3, 4), torch.nan))
        with pytest.raises(RuntimeError, match="3 with NaN or infinite values were left out"):
            metric.compute()

    @pytest.mark.parametrize(
        ("arguments", "quoted"),
        [
            ({"num_features": 0}, "0"),
            ({"num_features": 2.5}, "2.5"),
            ({"gram_dtype": torch.float16}, "torch.float16"),
            ({"nan_strategy": "drop"}, "'drop'"),
            ({"threshold": 1.5}, "1.5"),
            ({"rule": "mine"}, "'mine'"),
        ],
    )
    def test_constructor_arguments(self, arguments, quoted):
        with pytest.raises(ValueError, match=quoted):
            sm.SaturationMetric(**arguments)

    def test_unbiased_needs_two(self):
        metric = sm.CovarianceMetric(unbiased=True)
        metric.update(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match=r"at least 2 observations.*got 1"):
            metric.compute()


class TestValidFlags:
    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("length", [5, 0, 9])
    def test_of_another_length_are_refused_and_fix_no_width(self, name, length):
        metric = VARIANTS[name]()
        valid = torch.ones(length, dtype=torch.bool)
        with pytest.raises(ValueError, match=rf"valid of shape \(8,\), got \({length},\)"):
            metric.update(Observations(torch.randn(8, 3), valid=valid))
        assert metric.num_features is None
        feed(metric, random_rows(0, 20, 5))
        assert int(metric.count) == 20

    def test_maps_have_a_flag_for_each_position(self):
        metric = sm.SaturationMetric()
        maps = torch.randn(4, 3, 2, 5)
        with pytest.raises(ValueError, match=r"valid of shape \(40,\)"):
            metric.update(Observations(maps, feature_dim=1, valid=torch.ones(4, dtype=torch.bool)))
        metric.update(Observations(maps, feature_dim=1, valid=torch.arange(40) < 7))
        assert int(metric.count) == 7


class TestBadData:
    @pytest.mark.parametrize("where", ["alone", "first", "every", "whole first"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"embedding"}))
    def test_bad_rows_are_left_out(self, name, bad, where):
        rows = random_rows(0, 60, 4, mean=10.0)
        spoiled = rows.clone()
        index = {"alone": [33], "first": [0, 5], "every": [3, 23, 43], "whole first": list(range(20))}[where]
        spoiled[index, 1] = bad
        good = torch.ones(60, dtype=torch.bool)
        good[index] = False
        expected = feed(VARIANTS[name](), rows[good]).compute()
        silent = feed(VARIANTS[name](nan_strategy="ignore"), spoiled, 20)
        assert_same(silent.compute(), expected)
        warned = feed(VARIANTS[name](), spoiled, 20)
        with pytest.warns(UserWarning, match=f"left out {len(index)} of 60 observations"):
            assert_same(warned.compute(), expected)
        strict = feed(VARIANTS[name](nan_strategy="error"), spoiled, 20)
        with pytest.raises(RuntimeError, match=f"{len(index)} of 60 observations"):
            strict.compute()

    @pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("magnitude", [1e-150, 1e150])
    @pytest.mark.parametrize("name", [*SCALARS, "spectrum"])
    def test_magnitudes(self, name, magnitude, gram_dtype):
        if name in ("covariance_determinant", "rankme", "power_law_exponent") and gram_dtype == torch.float32:
            pytest.skip("covered with float64 products")
        rows = random_rows(0, 100, 3, decay=0.3)
        plain = feed(VARIANTS[name](), rows).compute().to(torch.float64)
        value = feed(VARIANTS[name](gram_dtype=gram_dtype), rows * magnitude, 30).compute().to(torch.float64)
        if name in ("covariance_trace", "diagonal_trace", "spectrum"):
            plain = plain * magnitude**2
        elif name in ("rms", "max_abs"):
            plain = plain * magnitude
        elif name == "covariance_determinant":
            plain = torch.tensor(0.0 if magnitude < 1 else torch.inf, dtype=torch.float64)
        elif name == "determinant_log":
            plain = plain + 6 * np.log(magnitude)
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (torch.ones(4, 3).to_sparse(), r"got one of layout torch\.sparse_coo; give its `to_dense\(\)`"),
            (torch.nested.as_nested_tensor([torch.ones(4, 3)], layout=torch.jagged), "got a nested one; give"),
        ],
        ids=["sparse", "jagged"],
    )
    def test_what_is_no_dense_tensor_is_named(self, rows, message):
        metric = feed(sm.SaturationMetric(), random_rows(0, 10, 3))
        with pytest.raises(TypeError, match="expected observations as a dense tensor, " + message):
            metric.update(rows)
        assert_same(metric.compute(), feed(sm.SaturationMetric(), random_rows(0, 10, 3)).compute())

    def test_overflow_is_an_error(self):
        metric = feed(sm.SaturationMetric(), random_rows(0, 10, 3) * 1e200)
        with pytest.raises(
            RuntimeError, match=r"exceed the range of the sums.*1e154 with torch\.float64 products"
        ):
            metric.compute()

    @pytest.mark.parametrize(
        ("largest", "dtype", "gram_dtype"),
        [(3e38, torch.float32, torch.float32), (1e308, torch.float64, torch.float64)],
    )
    @pytest.mark.parametrize("nan_strategy", ["warn", "error", "ignore"])
    def test_overflow_is_named_as_overflow(self, largest, dtype, gram_dtype, nan_strategy):
        metric = sm.CovarianceTraceMetric(gram_dtype=gram_dtype, nan_strategy=nan_strategy)
        # Differences from the mean overflow, wherever the origin is.
        metric.update(torch.tensor([[largest], [-largest], [-largest]], dtype=dtype))
        assert (int(metric.count), int(metric.non_finite)) == (3, 0)
        with pytest.raises(RuntimeError, match=r"the observations overflow.*scale them down before"):
            metric.compute()
        metric.reset()
        metric.update(torch.ones(2, 1, dtype=dtype))
        assert metric.compute() == 0


class TestCollections:
    def collection(self, **kwargs):
        kinds = (
            sm.SaturationMetric,
            sm.IntrinsicDimensionMetric,
            sm.CovarianceTraceMetric,
            sm.DiagonalTraceMetric,
            sm.EffectiveRankMetric,
            sm.ParticipationRatioMetric,
            sm.StableRankMetric,
        )
        return MetricCollection([kind(**kwargs) for kind in kinds])

    def test_one_accumulation_and_one_decomposition(self, monkeypatch):
        calls = {"accumulate": 0, "eigenvalues": 0}

        def counted(name, function):
            def wrapper(*args, **kwargs):
                calls[name] += 1
                return function(*args, **kwargs)

            return wrapper

        monkeypatch.setattr(intake, "accumulate", counted("accumulate", intake.accumulate))
        monkeypatch.setattr(
            decomposition.torch.linalg, "eigvalsh", counted("eigenvalues", torch.linalg.eigvalsh)
        )
        collection = self.collection()
        rows = random_rows(0, 90, 6)
        collection.update(rows[:30])
        calls["accumulate"] = 0
        collection.update(rows[30:60])
        # Some releases of torchmetrics read the states in `update`; in others the rows wait for a reader.
        assert all(int(metric.count) == 60 for metric in collection.values(copy_state=False))
        assert calls == {"accumulate": 1, "eigenvalues": 0}
        collection.compute()
        assert calls == {"accumulate": 1, "eigenvalues": 1}
        collection.update(rows[60:])
        values = collection.compute()
        assert calls == {"accumulate": 2, "eigenvalues": 2}
        for name, value in values.items():
            assert_same(value, feed(getattr(sm, name)(), rows).compute())

    @pytest.mark.parametrize(
        "first_rows",
        [torch.zeros(5, 4), torch.full((5, 4), torch.nan), torch.zeros(0, 4), torch.full((5, 4), 1e-30)],
        ids=["constant", "nan", "empty", "tiny"],
    )
    def test_different_accumulations_stay_apart(self, first_rows):
        class Doubled(sm.CovarianceTraceMetric):
            def update(self, rows):
                super().update(2 * rows)

        collection = MetricCollection(
            {
                "exact": sm.CovarianceTraceMetric(nan_strategy="ignore"),
                "fast": sm.CovarianceTraceMetric(gram_dtype=torch.float32, nan_strategy="ignore"),
                "doubled": Doubled(nan_strategy="ignore"),
                "sampled": sm.EigenspaceEmbeddingMetric(nan_strategy="ignore"),
                "resampled": sm.EigenspaceEmbeddingMetric(seed=1, nan_strategy="ignore"),
            }
        )
        collection.update(first_rows)
        if len(first_rows):
            assert len(collection.compute_groups) == 5
        rows = random_rows(0, 50, 4)
        collection.update(rows)
        if not first_rows.isnan().any() and len(first_rows):
            rows = torch.cat([first_rows.double(), rows])
        expected = feed(sm.CovarianceTraceMetric(), rows).compute()
        values = collection.compute()
        torch.testing.assert_close(values["exact"], expected)
        torch.testing.assert_close(values["doubled"], 4 * expected)
        assert values["fast"] != expected
        assert collection["fast"].gram_dtype == torch.float32

    def test_settings_that_change_only_the_reading_share_a_state(self):
        collection = MetricCollection(
            {
                "a": sm.SaturationMetric(threshold=0.5),
                "b": sm.SaturationMetric(threshold=0.99, center=False),
                "c": sm.SaturationMetric(rule="delve"),
                "d": sm.CovarianceMetric(unbiased=True),
            }
        )
        rows = random_rows(0, 50, 6, mean=1.0)
        collection.update(rows)
        collection.update(rows)
        assert len(collection.compute_groups) == 1
        for name, value in collection.compute().items():
            alone = {
                "a": sm.SaturationMetric(threshold=0.5),
                "b": sm.SaturationMetric(threshold=0.99, center=False),
                "c": sm.SaturationMetric(rule="delve"),
                "d": sm.CovarianceMetric(unbiased=True),
            }[name]
            assert_same(value, feed(feed(alone, rows), rows).compute())

    def test_clones_prefixes_nesting_and_other_libraries(self):
        rows = random_rows(0, 40, 4)
        inner = MetricCollection([sm.SaturationMetric(), sm.StableRankMetric()], prefix="inner_")
        collection = MetricCollection(
            {"ours": inner, "mean": torchmetrics.MeanMetric(), "trace": sm.CovarianceTraceMetric()}
        )
        validation = collection.clone(prefix="val_")
        for each in (collection, validation):
            for part in rows.split(10):
                each.update(part)
        values, copies = collection.compute(), validation.compute()
        assert {f"val_{key}" for key in values} == set(copies)
        torch.testing.assert_close(values["mean"].double(), rows.mean(), atol=1e-6, rtol=0)
        assert_same(values["trace"], feed(sm.CovarianceTraceMetric(), rows).compute())
        validation.update(rows)
        assert_same(collection.compute()["trace"], values["trace"])

    def test_beside_metrics_that_take_other_arguments(self):
        """`update(x, y)` gives both to each metric; named arguments go to the metrics that accept them."""
        accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        collection = MetricCollection([accuracy, sm.SaturationMetric(), sm.StableRankMetric()])
        scores, labels = torch.randn(20, 3), torch.randint(3, (20,), generator=torch.Generator())
        with pytest.raises(TypeError, match=r"got 2 positional.*collection\.update\(rows=features, preds="):
            collection.update(scores, labels)
        assert int(collection["SaturationMetric"].count) == 0
        collection.reset()
        features = random_rows(0, 20, 5)
        collection.update(rows=features[:8], preds=scores[:8], target=labels[:8])
        collection.update(rows=features[8:], preds=scores[8:], target=labels[8:])
        values = collection.compute()
        assert float(values["MulticlassAccuracy"]) == pytest.approx(
            float((scores.argmax(1) == labels).float().mean())
        )
        assert_same(values["SaturationMetric"], feed(sm.SaturationMetric(), features).compute())
        assert_same(values["StableRankMetric"], feed(sm.StableRankMetric(), features).compute())

    def test_forward_of_a_collection(self):
        rows = random_rows(0, 60, 5, mean=100.0)
        collection = self.collection()
        for index, part in enumerate(rows.split(20)):
            values = collection(part)
            for name, value in values.items():
                assert_same(value, feed(getattr(sm, name)(), part).compute())
            if index == 1:
                collection.update(rows[:5])
        total = torch.cat([rows, rows[:5]])
        for name, value in collection.compute().items():
            assert_same(value, feed(getattr(sm, name)(), total).compute())

    def test_reset_and_reuse(self):
        collection = self.collection()
        collection.update(random_rows(0, 20, 5))
        collection.compute()
        collection.reset()
        rows = random_rows(1, 30, 7)
        collection.update(rows)
        for name, value in collection.compute().items():
            assert_same(value, feed(getattr(sm, name)(), rows).compute())


class TestLifeCycle:
    @pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"embedding"}))
    def test_forward_gives_the_batch_and_keeps_the_rest(self, name):
        rows = random_rows(0, 60, 4, mean=1e6)
        metric = VARIANTS[name]()
        for part in rows.split(20):
            assert_same(metric(part), feed(VARIANTS[name](), part).compute(), 1e-6)
        assert_same(metric.compute(), feed(VARIANTS[name](), rows).compute(), 1e-6)
        metric.update(rows)
        assert int(metric.count) == 120

    @pytest.mark.parametrize("name", VARIANTS)
    def test_merge_state_after_compute(self, name):
        """torchmetrics alone would return the value from before the merge."""
        rows = random_rows(0, 60, 4)
        metric, other = feed(VARIANTS[name](), rows[:30]), feed(VARIANTS[name](), rows[30:])
        metric.compute()
        metric.merge_state(other)
        assert int(metric.count) == 60
        if name != "embedding":
            assert_same(metric.compute(), feed(VARIANTS[name](), rows).compute())
        metric.update(rows)
        assert int(other.count) == 30

    @pytest.mark.parametrize("name", VARIANTS)
    def test_merge_into_one_that_saw_nothing(self, name):
        rows = random_rows(0, 60, 4, mean=1e8)
        full, empty = feed(VARIANTS[name](), rows), VARIANTS[name]()
        value = full.compute()
        empty.merge_state(full.metric_state)
        assert_same(empty.compute(), value)
        empty.update(rows)  # in place, without changing the other's tensors
        assert int(full.count) == 60
        full.merge_state(VARIANTS[name]())
        assert_same(full.compute(), value)

    def test_merge_errors(self):
        metric = feed(sm.SaturationMetric(), torch.randn(9, 4))
        with pytest.raises(ValueError, match="4 features, got 5"):
            metric.merge_state(feed(sm.SaturationMetric(), torch.randn(9, 5)))
        with pytest.raises(ValueError, match=r"missing.*second_moment"):
            metric.merge_state({"count": torch.tensor(3)})
        assert int(metric.count) == 9

    def test_samples_of_different_size_do_not_merge(self):
        metric = feed(sm.EigenspaceEmbeddingMetric(max_samples=5), torch.randn(9, 4))
        with pytest.raises(ValueError, match="max_samples=5, got 6"):
            metric.merge_state(feed(sm.EigenspaceEmbeddingMetric(max_samples=6), torch.randn(9, 4)))
        assert int(metric.count) == 9

    def test_an_overridden_compute(self):
        class Leading(sm.SpectrumMetric):
            def compute(self):
                return super().compute()[:2]

        class Percent(sm.SaturationMetric):
            def compute(self):
                return {"percent": 100 * super().compute()}

        rows = random_rows(0, 30, 5)
        assert_same(feed(Leading(), rows).compute(), feed(sm.SpectrumMetric(), rows).compute()[:2])
        assert feed(Percent(), rows).compute()["percent"] == 100 * feed(sm.SaturationMetric(), rows).compute()

    def test_merge_counts_what_was_left_out(self):
        bad = feed(sm.SaturationMetric(nan_strategy="ignore"), torch.full((3, 4), torch.nan))
        good = feed(sm.SaturationMetric(nan_strategy="ignore"), torch.randn(5, 4))
        good.merge_state(bad)
        assert int(good.non_finite) == 3
        bad.merge_state(good)
        assert int(bad.non_finite) == 6
        assert int(bad.count) == 5

    def test_saving_through_a_module_and_a_file(self):
        model = torch.nn.Module()
        model.metric = feed(sm.SpectrumMetric(), random_rows(0, 30, 4))
        assert list(model.state_dict()) == []
        model.metric.persistent(True)
        assert set(model.state_dict()) == {f"metric.{name}" for name in STATES}
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = torch.nn.Module()
        fresh.metric = sm.SpectrumMetric()
        fresh.load_state_dict(torch.load(buffer))
        assert_same(fresh.metric.compute(), model.metric.compute())

    def test_whole_metric_through_a_file(self):
        metric = feed(sm.EigenspaceEmbeddingMetric(), random_rows(0, 30, 4))
        buffer = io.BytesIO()
        torch.save(metric, buffer)
        buffer.seek(0)
        assert_same(torch.load(buffer, weights_only=False).compute(), metric.compute())

    @pytest.mark.parametrize(
        "cast",
        [
            lambda m: m.set_dtype(torch.float32),
            lambda m: m.half(),
            lambda m: m.float(),
            lambda m: m.type(torch.bfloat16),
            lambda m: m.to(torch.bfloat16),
            lambda m: torch.nn.ModuleList([m]).to(torch.bfloat16)[0],
            lambda m: torch.nn.ModuleList([m]).half()[0],
            lambda m: MetricCollection([m]).set_dtype(torch.float16) and m,
        ],
        ids=["set_dtype", "half", "float", "type", "to", "parent.to", "parent.half", "collection"],
    )
    def test_the_state_stays_float64(self, cast):
        metric = feed(sm.SpectrumMetric(), random_rows(0, 30, 4))
        value = metric.compute()
        metric = cast(metric)
        assert metric.second_moment.dtype == torch.float64
        assert metric.count.dtype == torch.int64
        assert_same(metric.spectrum.eigenvalues, value)
        metric.update(torch.randn(5, 4))
        metric.reset()
        metric.update(torch.randn(5, 4))
        assert metric.second_moment.dtype == torch.float64

    @pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"embedding"}))  # generators cannot be on "meta"
    def test_after_a_reset_no_state_stays_where_the_rows_were(self, name, monkeypatch):
        for kind in (intake.DenseIntake, per_feature.MarginalsIntake):
            monkeypatch.setattr(kind, "meet", lambda *_: None)  # tensors on "meta" have no values to read
        metric = VARIANTS[name](nan_strategy="ignore")
        spoiled = random_rows(0, 20, 4)
        spoiled[3] = torch.nan
        metric.update(spoiled)
        metric.reset()
        metric.update(torch.randn(9, 4, device="meta"))
        devices = {
            key: state.device.type for key, state in metric.metric_state.items() if key != "configuration"
        }
        assert set(devices.values()) == {"meta"}, devices

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("name", VARIANTS)
    def test_rows_of_another_device_after_a_reset(self, name):
        """No state stays on the previous device."""
        metric = VARIANTS[name]()
        metric.update(torch.randn(9, 4, device="cuda"))
        assert {state.device.type for key, state in metric.metric_state.items() if key != "configuration"} == {
            "cuda"
        }
        metric.reset()
        rows = random_rows(0, 20, 4)
        assert_same(feed(metric, rows, 7).compute(), feed(VARIANTS[name](), rows, 7).compute())
        for key, state in metric.metric_state.items():
            assert key == "configuration" or state.device.type == "cpu"

    def test_moving_pins_the_device(self):
        metric = sm.SaturationMetric().to("meta")
        with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):  # tensors without values
            metric.update(torch.randn(5, 4))
        assert metric.second_moment.device.type == "meta"
        assert sm.SaturationMetric().cpu()._pinned_device == torch.device("cpu")

    def test_arithmetic(self):
        rows = random_rows(0, 30, 4)
        ratio = sm.CovarianceTraceMetric() / sm.DiagonalTraceMetric() + 1
        ratio.update(rows)
        torch.testing.assert_close(ratio.compute().item(), 2.0)

    @pytest.mark.filterwarnings("ignore:The default value for `maximize`:FutureWarning")  # torchmetrics 1.6
    def test_tracker(self):
        tracker = MetricTracker(sm.SaturationMetric(), maximize=False)
        for rank in (4, 1, 3):
            tracker.increment()
            tracker.update(random_rows(rank, 50, 5, rank=rank, decay=0.0))
        assert tracker.compute_all().tolist() == pytest.approx([0.8, 0.2, 0.6])
        best, step = tracker.best_metric(return_step=True)
        assert (best, step) == (pytest.approx(0.2), 1)

    def test_running(self):
        running = Running(sm.CovarianceTraceMetric(), window=2)
        parts = [random_rows(k, 20, 3, mean=1000.0 * k) for k in range(4)]
        for part in parts:
            running.update(part)
        assert_same(running.compute(), feed(sm.CovarianceTraceMetric(), torch.cat(parts[2:])).compute())

    def test_min_max(self):
        metric = MinMaxMetric(sm.CovarianceTraceMetric())
        values = []
        for k in range(3):
            metric.update(random_rows(k, 20, 3) * (2 - k))
            values.append(metric.compute())
        assert values[-1]["max"] >= values[-1]["raw"] >= values[-1]["min"]

    def test_boot_strapper(self):
        rows = random_rows(0, 400, 3)
        metric = BootStrapper(sm.CovarianceTraceMetric(), num_bootstraps=20)
        metric.update(rows)
        value = metric.compute()
        expected = feed(sm.CovarianceTraceMetric(), rows).compute()
        assert abs(value["mean"] - expected) < 4 * value["std"]

    @pytest.mark.parametrize("features", [1, 4])
    @pytest.mark.parametrize("name", VARIANTS)
    def test_plot(self, name, features):
        if name == "power_law_exponent" and features == 1:
            pytest.skip("no slope of one eigenvalue")
        metric = feed(VARIANTS[name](), random_rows(0, 30, features))
        figure, axis = metric.plot()
        assert axis.figure is figure
        assert axis.has_data()
        metric.plot([metric.compute(), metric.compute()], ax=axis)
        matplotlib.pyplot.close("all")


class TestModes:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_inference_mode_first(self, name):
        rows = random_rows(0, 60, 4)
        metric = VARIANTS[name]()
        with torch.inference_mode():
            metric.update(rows[:20] * 1.0)
            metric.compute()
        metric.update(rows[20:40])
        with torch.inference_mode():
            metric.update(rows[40:] * 1.0)
            value = metric.compute()
        if name != "embedding":
            assert_same(value, feed(VARIANTS[name](), rows).compute())
        assert not any(state.is_inference() for state in metric.metric_state.values())

    @pytest.mark.parametrize("name", VARIANTS)
    def test_life_cycle_inside_inference_mode(self, name):
        rows = random_rows(0, 60, 4)
        metric = VARIANTS[name]()
        with torch.inference_mode():
            metric(rows[:20] * 1.0)
            twin = metric.clone()
            metric.reset()
            metric(rows[:20] * 1.0)
        for each in (metric, twin):
            each.update(rows[20:])
            assert int(each.count) == 60

    @pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
    def test_autocast(self, gram_dtype):
        rows = random_rows(0, 60, 4, dtype=torch.float32)
        expected = feed(sm.SpectrumMetric(gram_dtype=gram_dtype), rows).compute()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(feed(sm.SpectrumMetric(gram_dtype=gram_dtype), rows).compute(), expected)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_default_dtype_and_device(self, name):
        rows = random_rows(0, 60, 4)
        expected = feed(VARIANTS[name](), rows, 20).compute()
        torch.set_default_dtype(torch.float16)
        try:
            # As torch.set_default_device("meta"); after it, torch 2.8 would have no default device at all.
            with torch.device("meta"):
                metric = VARIANTS[name]()
                for part in rows.split(20):
                    metric.update(part)
                assert_same(metric.compute(), expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_gradients_do_not_flow(self):
        rows = torch.randn(10, 3, requires_grad=True)
        metric = sm.CovarianceMetric()
        metric.update(rows * 2)
        assert not metric.second_moment.requires_grad
        assert not metric(rows * 2).requires_grad

    @pytest.mark.parametrize("name", ["saturation", "embedding", "covariance"])
    def test_compiled_step(self, name):
        rows = random_rows(0, 60, 4)
        metric = VARIANTS[name]()

        @torch.compile(backend="eager")
        def step(part):
            metric.update(part * 1.0)
            return part + 1

        for part in rows.split(20):
            step(part)
        assert int(metric.count) == 60
        if name != "embedding":
            assert_same(metric.compute(), feed(VARIANTS[name](), rows).compute())


class TestOrigin:
    """Moving the origin costs a pass over the sums, so it must be rare, also after the state was replaced."""

    @pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("how", ["updates", "forward", "merge", "load"])
    def test_it_settles(self, how, gram_dtype, monkeypatch):
        moves = []
        accumulate = intake.accumulate
        monkeypatch.setattr(
            intake, "accumulate", lambda *a, **k: moves.append(k["recentre"]) or accumulate(*a, **k)
        )
        metric, other = (sm.SaturationMetric(gram_dtype=gram_dtype) for _ in range(2))
        other.update(torch.randn(30, 4))
        if how == "forward":
            metric(torch.randn(30, 4))
            metric(torch.randn(30, 4))
        elif how == "merge":
            metric.update(torch.randn(30, 4))
            metric.merge_state(other)
        elif how == "load":
            other.persistent(True)
            metric.load_state_dict(other.state_dict())
        moves.clear()
        for _ in range(40):
            metric.update(torch.randn(30, 4))
        assert sum(moves) <= 8

    def test_it_settles_for_each_dtype(self):
        metric = sm.CovarianceMetric(gram_dtype=torch.float32)
        rows = random_rows(0, 1200, 3, mean=1e6 / 3)
        for index, part in enumerate(rows.split(30)):
            metric.update(part.float() if index % 2 else part)
        parts = [p.float().double() if i % 2 else p for i, p in enumerate(rows.split(30))]
        assert relative_error(metric.compute(), two_pass_covariance(torch.cat(parts))) < 1e-6


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
@pytest.mark.parametrize("name", VARIANTS)
def test_float8_rows(name):
    rows = random_rows(0, 60, 4).to(torch.float8_e4m3fn)
    value = feed(VARIANTS[name](), rows).compute()
    assert_same(value, feed(VARIANTS[name](), rows.to(torch.float32)).compute())


@pytest.mark.skipif(not hasattr(torch, "float8_e5m2"), reason="this torch has no float8")
@pytest.mark.parametrize(
    "new",
    [functools.partial(sm.SpectrumMetric, sketch_size=3), functools.partial(sm.LinearProbeMetric, 3)],
    ids=["sketch", "labels"],
)
def test_float8_rows_of_other_sums(new):
    rows = random_rows(0, 60, 4)
    rows[7, 2] = torch.nan
    rows = rows.to(torch.float8_e5m2)
    metrics = [new(nan_strategy="ignore") for _ in range(2)]
    for metric, cast in zip(metrics, (rows, rows.to(torch.float32)), strict=True):
        metric.update(cast, *([torch.arange(60) % 3] if metric.needs_labels else []))
    assert_same(metrics[0].compute(), metrics[1].compute())
    assert int(metrics[0].non_finite) == 1


class HostReads(TorchDispatchMode):
    """Fails on every operation that would wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{function} reads from the device")
        tensors = [a for a in args if isinstance(a, (list, tuple))]
        if "index" in function.overloadpacket.__name__:
            masks = [t for part in tensors for t in part if t is not None and t.dtype == torch.bool]
            assert not masks, "indexing with a mask reads from the device"
        return function(*args, **(kwargs or {}))


class TestNoSynchronisation:
    @pytest.fixture(autouse=True)
    def _as_on_an_accelerator(self, monkeypatch):
        monkeypatch.setattr(about_origin, "is_read_freely", lambda values: False)
        monkeypatch.setattr(compiled, "takes", lambda *args: False)

    def test_the_guard_itself(self):
        x = torch.ones(3)
        for read in (lambda: x[0].item(), lambda: bool(x.sum() > 0), lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(AssertionError, match="reads from the device"), HostReads():
                read()

    @pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", VARIANTS)
    def test_updates_after_the_first_read_nothing(self, name, dtype, gram_dtype):
        metric = VARIANTS[name](gram_dtype=gram_dtype)
        metric.update(torch.randn(30, 5).to(dtype))
        with HostReads():
            metric.update(torch.randn(30, 5).to(dtype))
            metric.update(torch.full((3, 5), torch.nan, dtype=dtype))
            metric.update(torch.randn(30, 5).to(torch.float32))
            maps = torch.randn(2, 5, 4, 4).to(dtype)
            metric.update(sm.Observations(maps, feature_dim=1))
            metric.update(sm.Observations(maps, feature_dim=1, valid=torch.ones(32, dtype=torch.bool)))

    @pytest.mark.parametrize("name", VARIANTS)
    def test_nor_after_a_first_batch_of_nan(self, name):
        metric = VARIANTS[name]()
        metric.update(torch.full((3, 5), torch.nan))
        with HostReads():
            metric.update(torch.randn(30, 5))


def test_memory_is_constant_in_the_number_of_updates():
    gc.collect()  # reference cycles left by other tests
    metric = sm.EigenspaceEmbeddingMetric(max_samples=16)
    generator = torch.Generator().manual_seed(0)

    def size():
        states = sum(value.untyped_storage().nbytes() for value in metric.metric_state.values())
        kept = sharing.Stream.of(metric.__dict__["second_moment"])
        return states, len(kept.cache), len(sharing._STREAMS), len(kept.merged), len(metric.__dict__)

    metric.update(torch.randn(4, 8, generator=generator))
    metric.compute()
    before = size()
    for index in range(10_000):
        metric.update(torch.randn(4, 8, generator=generator))
        if index % 1000 == 0:
            metric.compute()
    after = size()
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert after[2:] == before[2:]
    assert int(metric.count) == 40_004


def test_decompositions_do_not_outlive_their_state():
    gc.collect()
    before = len(sharing._STREAMS)
    metrics = [feed(sm.SaturationMetric(), torch.randn(20, 4)) for _ in range(5)]
    for metric in metrics:
        metric.compute()
    assert len(sharing._STREAMS) == before + 5
    del metrics, metric
    gc.collect()
    assert len(sharing._STREAMS) == before


def test_the_numbers_hold_after_ten_thousand_updates_far_from_zero():
    rows = random_rows(0, 20_000, 6, mean=1e6)
    metric = feed(sm.CovarianceMetric(), rows, 2)
    assert relative_error(metric.compute(), two_pass_covariance(rows)) < 1e-9


class TestWhatIsOverridden:
    """Behaviour of torchmetrics that forces an override; if a test fails, look at overrides.py again."""

    OVERRIDES: ClassVar = {
        "update_called": None,
        "_wrap_update": ["self", "update"],
        "_wrap_compute": ["self", "compute"],
        "sync": ["self", "dist_sync_fn", "process_group", "should_sync", "distributed_available"],
        "sync_context": [
            "self",
            "dist_sync_fn",
            "process_group",
            "should_sync",
            "should_unsync",
            "distributed_available",
        ],
        "_copy_state_dict": ["self"],
        "_reduce_states": ["self", "incoming_state"],
        "_sync_dist": ["self", "dist_sync_fn", "process_group"],
        "_apply": ["self", "fn", "exclude_state"],
        "_load_from_state_dict": [
            "self",
            "state_dict",
            "prefix",
            "local_metadata",
            "strict",
            "missing_keys",
            "unexpected_keys",
            "error_msgs",
        ],
        "merge_state": ["self", "incoming_state"],
        "__getstate__": ["self"],
        "__setattr__": ["self", "name", "value"],
    }

    def test_these_are_all(self):
        classes = (overrides.MergingMetric, overrides.OverriddenMetric)
        stock = {name for name in dir(torchmetrics.Metric) if callable(getattr(torchmetrics.Metric, name))}
        own = {name for each in classes for name in vars(each) if name in stock | {"update_called"}}
        made_by_python = {"__init_subclass__", "__doc__", "__module__"}
        assert own - made_by_python == set(self.OVERRIDES)

    def test_a_state_is_still_set_by_a_module(self, monkeypatch):
        stock, ours = torchmetrics.MeanMetric(), sm.CovarianceMetric()
        ours.update(torch.randn(3, 2))
        names, set_by_module = [], torch.nn.Module.__setattr__
        monkeypatch.setattr(
            torch.nn.Module, "__setattr__", lambda *each: names.append(each[1]) or set_by_module(*each)
        )
        stock.mean_value, ours.count = torch.ones(()), torch.tensor(7)
        assert (names, int(ours.count)) == (["mean_value"], 7)

    @pytest.mark.parametrize("name", [name for name, parameters in OVERRIDES.items() if parameters])
    def test_the_method_is_there_with_the_same_parameters(self, name):
        stock = list(inspect.signature(getattr(torchmetrics.Metric, name)).parameters)
        assert stock == self.OVERRIDES[name]

    def test_they_are_called_where_we_rely_on_it(self):
        metric = torchmetrics.Metric
        assert "_wrap_update" in inspect.getsource(metric.__init__)
        assert "_wrap_compute" in inspect.getsource(metric.__init__)
        assert "_copy_state_dict" in inspect.getsource(metric.sync)
        assert "_sync_dist" in inspect.getsource(metric.sync)
        assert "_reduce_states" in inspect.getsource(metric.merge_state)
        assert "_reduce_states" in inspect.getsource(metric._forward_reduce_state_update)

    def test_a_refused_update_still_counts_and_takes_the_value_away(self):
        stock, ours = torchmetrics.SumMetric(), feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        stock.update(1.0)
        pair = sm.LinearCKAMetric()
        pair.update(torch.randn(8, 2), torch.randn(8, 3))
        refused = {stock: ("x",), ours: (torch.zeros(3),), pair: (torch.zeros(3, 2), torch.zeros(3, 2))}
        for metric, arguments in refused.items():
            metric.compute()
            with pytest.raises((TypeError, ValueError)):
                metric.update(*arguments)
        assert (stock._update_count, stock._computed) == (2, None)  # why `_wrap_update` is overridden
        for metric in (ours, pair):
            assert metric._update_count == 1
            assert metric._computed == metric.compute()

    def test_a_copy_still_copies_the_process_group(self):
        class Group:
            def __reduce_ex__(self, protocol):
                raise TypeError("cannot pickle a process group")

        group = Group()
        stock, ours = torchmetrics.SumMetric(process_group=group), sm.SaturationMetric(process_group=group)
        with pytest.raises(TypeError, match="cannot pickle a process group"):
            stock.clone()  # why `__deepcopy__` is there
        assert overrides.copy_metric(stock).process_group is group
        feed(ours, random_rows(0, 30, 4))
        for twin in (ours.clone(), copy.deepcopy(ours), ours.with_folds(2), overrides.copy_metric(ours)):
            assert twin.process_group is group
        feed(ours.clone(), random_rows(1, 30, 4))
        assert int(ours.count) == 30

    def test_a_failed_sync_still_leaves_its_copy_behind(self):
        def fails(*args, **kwargs):
            raise OSError("the other side has hung up")

        def sync(metric):
            with pytest.raises(OSError, match="hung up"):
                metric.sync(fails, distributed_available=lambda: True)

        stock, ours = torchmetrics.SumMetric(), feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        stock.update(1.0)
        before = ours.metric_state
        sync(stock)
        sync(ours)
        assert stock._cache is not None  # why `sync` is overridden
        assert ours._cache is None
        assert not ours._is_synced
        assert all(ours.metric_state[name] is value for name, value in before.items())

    def test_a_sync_that_fails_half_way_still_leaves_half_merged_states(self):
        class Two(torchmetrics.Metric):
            def __init__(self):
                super().__init__()
                self.add_state("first", torch.ones(()), dist_reduce_fx="sum")
                self.add_state("second", torch.ones(()), dist_reduce_fx=lambda stacked: 1 / 0)

            def update(self):
                pass

            def compute(self):
                return self.first

        stock = Two()
        with pytest.raises(ZeroDivisionError):
            stock.sync(lambda value, group=None: [value, value], distributed_available=lambda: True)
        assert stock.first == 2  # why `sync` puts the states back

        def second_state_fails(value, group=None):
            if value.ndim == 2:
                raise OSError("the other side has hung up")
            return [value, value]

        ours = feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        value = ours.compute()
        with pytest.raises(OSError, match="hung up"):
            ours.sync(second_state_fails, distributed_available=lambda: True)
        assert_same(feed(ours, torch.zeros(0, 4)).compute(), value)

    def test_an_error_inside_a_synced_context_still_leaves_the_metric_synced(self):
        def both(value, group=None):
            return [value, value]

        def fail_inside(metric):
            with (
                pytest.raises(ZeroDivisionError),
                metric.sync_context(both, distributed_available=lambda: True),
            ):
                raise ZeroDivisionError

        stock, ours = torchmetrics.SumMetric(), feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        stock.update(1.0)
        fail_inside(stock)
        fail_inside(ours)
        assert stock._is_synced  # why `sync_context` is overridden
        assert not ours._is_synced
        assert int(ours.count) == 30

    def test_a_loaded_state_is_still_the_checkpoints_own_tensor(self):
        stock, saved = torchmetrics.SumMetric(), {"sum_value": torch.tensor(3.0)}
        stock.persistent(True)
        stock.load_state_dict(saved.copy())
        assert stock.sum_value is saved["sum_value"]  # why `_load_from_state_dict` copies
        ours = feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        ours.persistent(True)
        checkpoint = {name: value.clone() for name, value in ours.state_dict().items()}
        kept = {name: value.clone() for name, value in checkpoint.items()}
        fresh = sm.CovarianceTraceMetric()
        fresh.load_state_dict(checkpoint)
        for part in random_rows(1, 6000, 4).split(3000):
            fresh.update(part)
        assert int(fresh.count) == 6030
        assert all(torch.equal(checkpoint[name], kept[name]) for name in kept)

    def test_a_loaded_state_of_any_shape_is_still_taken(self):
        stock = torchmetrics.SumMetric()
        stock.persistent(True)
        stock.load_state_dict({"sum_value": torch.zeros(3)})
        assert stock.sum_value.shape == (3,)  # why `_load_from_state_dict` checks it first
        other = feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 5))
        other.persistent(True)
        ours = sm.CovarianceTraceMetric(4)
        ours.persistent(True)
        with pytest.raises(RuntimeError, match=r"num_features=4.*got one of 5"):
            ours.load_state_dict(other.state_dict())

    def test_what_is_pickled_is_still_the_instances_dictionary(self):
        class Marked(torchmetrics.SumMetric):
            pass

        stock = Marked()
        stock.anything = object()
        # Why `__getstate__` adds the waiting rows, and leaves out objects that hold the same tensors.
        assert stock.__getstate__()["anything"] is stock.anything
        ours = feed(sm.CovarianceTraceMetric(), random_rows(0, 60, 4), 20)
        assert int(ours.__dict__["count"]) == 20  # the others wait
        kept = ours.__getstate__()
        assert int(kept["count"]) == 60
        assert "_live" not in kept
        twin = copy.deepcopy(ours)
        twin.update(random_rows(1, 3000, 4))
        assert (int(twin.count), int(ours.count)) == (3060, 60)

    def test_torchmetrics_still_clones_before_a_merge(self):
        stock = torchmetrics.SumMetric()
        assert stock._copy_state_dict()["sum_value"] is not stock.sum_value
        ours = feed(sm.CovarianceTraceMetric(), random_rows(0, 30, 4))
        assert ours._copy_state_dict()["second_moment"] is ours.second_moment  # why `_copy_state_dict` is ours

    def test_torchmetrics_still_adds_sums_whatever_their_origins(self):
        class Summed(sm.CovarianceTraceMetric):
            _reduce_states = torchmetrics.Metric._reduce_states
            _sync_dist = torchmetrics.Metric._sync_dist

        rows = [random_rows(0, 30, 4), random_rows(1, 30, 4, mean=50.0)]
        expected = feed(sm.CovarianceTraceMetric(), torch.cat(rows)).compute()
        for kind, is_right in ((Summed, False), (sm.CovarianceTraceMetric, True)):
            merged = feed(kind(), rows[0])
            with contextlib.suppress(RuntimeError, ValueError):  # origins are not added, nor anything else
                merged.merge_state(feed(kind(), rows[1]))
            assert bool(torch.isclose(kind.compute(merged), expected)) is is_right

    def test_torch_compile_would_still_trace_the_bookkeeping(self):
        # Why `_wrap_update` is overridden: Dynamo traces what is not marked.
        assert not getattr(torchmetrics.SumMetric().update, "_torchdynamo_disable", False)
        assert getattr(sm.CovarianceTraceMetric().update, "_torchdynamo_disable", False)

    def test_a_cached_value_still_skips_the_merge(self):
        merges = []

        def both(value, group=None):
            merges.append(1)
            return [value, value]

        settings = {"dist_sync_fn": both, "distributed_available_fn": lambda: True}
        stock = torchmetrics.SumMetric(**settings)
        stock.update(1.0)
        stock.compute()
        merges.clear()
        stock.compute()
        assert not merges  # why `_wrap_compute` forgets the value first
        ours = feed(sm.CovarianceTraceMetric(**settings), random_rows(0, 30, 4))
        ours.compute()
        merges.clear()
        ours.compute()
        assert merges

    def test_torchmetrics_still_squeezes(self):
        class One(torchmetrics.Metric):
            def update(self):
                pass

            def compute(self):
                return torch.ones(1, 1)

        metric = One()
        metric.update()
        assert metric.compute().shape == ()  # why `_wrap_compute` restores shapes

    def test_torchmetrics_still_warns_before_update(self):
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            torchmetrics.MeanMetric().compute()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeError, match="no observation"):
                sm.SaturationMetric().compute()

    def test_torchmetrics_still_casts_states_inside_a_module(self):
        class Summed(torchmetrics.Metric):
            def __init__(self):
                super().__init__()
                self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

            def update(self):
                pass

            def compute(self):
                return self.total

        module = torch.nn.ModuleList([Summed()]).to(torch.bfloat16)
        assert module[0].total.dtype == torch.bfloat16  # why `_apply` only moves devices

    def test_torchmetrics_still_keeps_the_value_across_a_merge(self):
        metric, other = torchmetrics.SumMetric(), torchmetrics.SumMetric()
        metric.update(1.0)
        other.update(2.0)
        metric.compute()
        metric.merge_state(other)
        assert metric.compute() == 1.0  # why `merge_state` clears it


RANGES = {
    **dict.fromkeys(("saturation", "spread", "zero_share", "dead_features", "dormant_features"), (0, 1)),
    "outlier_features": (1, None),
    "linear_probe": (None, 1),
    "linear_cka": (-1, 1),
    **dict.fromkeys(("power_law_exponent", "covariance_determinant", "covariance", "embedding"), (None, None)),
}


def test_pictures_show_the_range_in_which_a_value_can_lie():
    ours = {name: kind for name, kind in sm.statistics().items() if hasattr(sm, kind.__name__)}
    for name, kind in {**ours, "linear_cka": sm.LinearCKAMetric}.items():
        bounds = kind.plot_lower_bound, kind.plot_upper_bound
        assert bounds == RANGES.get(name, (0, None)), name


def test_the_picture_of_a_sequence_of_covariances_is_the_last():
    values = [torch.eye(3) * number for number in (1, 2, 5)]
    _, axis = sm.CovarianceMetric().plot(values)
    assert axis.images[0].get_array().max() == 5
