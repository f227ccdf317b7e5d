"""Statistics of labels equal a regression on the same rows, and two passes over them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from torchmetrics import MetricCollection

import spectralmetrics as sm
from spectralmetrics.functional import Observations, neural_collapse, ridge_explained_variance


def data(seed=0, count=300, features=7, classes=4, shift=0.0, apart=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = apart * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return rows * torch.arange(1, features + 1) + centres[labels] + shift, labels


def alpha(rows, ridge):
    """The ridge as scikit-learn's alpha, which is not divided by the number of rows."""
    return ridge * rows.var(0).mean() * len(rows)


def r_squared(labels, predicted, classes):
    return r2_score(np.eye(classes)[labels], predicted, multioutput="variance_weighted")


def refitted(rows, labels, folds, ridge, classes):
    """Predictions for each fold by a regression on the other folds."""
    predicted = np.zeros((len(rows), classes))
    for fold in np.unique(folds):
        others = folds != fold
        model = Ridge(alpha(rows[others], ridge), solver="cholesky")
        predicted[~others] = model.fit(rows[others], np.eye(classes)[labels[others]]).predict(rows[~others])
    return predicted


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_r_squared_is_that_of_scikit_learn(ridge, shift):
    rows, labels = data(shift=shift)
    metric = sm.LinearProbeMetric(4, ridge=ridge)
    for each in zip(rows.split(64), labels.split(64), strict=True):
        metric.update(*each)
    numbers = rows.numpy()
    model = Ridge(alpha(numbers, ridge), solver="cholesky").fit(numbers, np.eye(4)[labels])
    assert float(metric.compute()) == pytest.approx(r_squared(labels, model.predict(numbers), 4), abs=1e-8)


@given(
    seed=st.integers(0, 10**6), count=st.integers(8, 60), features=st.integers(1, 9), folds=st.integers(2, 4)
)
def test_held_out_r_squared_is_that_of_refitting_fold_by_fold(seed, count, features, folds):
    rows, labels = data(seed, count, features, 3)
    metric = sm.LinearProbeMetric(3, ridge=0.05, folds=folds)
    where = []
    for number, each in enumerate(zip(rows.split(3), labels.split(3), strict=True)):
        metric.update(*each)
        where += [number % folds] * len(each[0])
    predicted = refitted(rows.numpy(), labels.numpy(), np.array(where), 0.05, 3)
    seen = np.eye(3)[labels]
    variance = ((seen - seen.mean(0)) ** 2).sum()
    expected = 1 - ((seen - predicted) ** 2).sum() / variance if variance else np.nan  # NaN for a single class
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-8, rel=1e-8, nan_ok=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_least_squares_without_a_ridge_and_with_dependent_features(scale):
    rows, labels = data()
    rows = scale * torch.cat([rows, rows[:, :2].sum(1, keepdim=True), torch.ones(len(rows), 1)], 1)
    metric = sm.LinearProbeMetric(4, ridge=0)
    metric.update(rows, labels)
    model = LinearRegression().fit(rows.numpy(), np.eye(4)[labels])
    assert float(metric.compute()) == pytest.approx(r_squared(labels, model.predict(rows.numpy()), 4), abs=1e-8)


def test_far_from_zero():
    rows, labels = data()
    near, far = (sm.LinearProbeMetric(4, folds=3) for _ in range(2))
    for each, classes in zip(rows.split(50), labels.split(50), strict=True):
        near.update(each, classes)
        far.update(each + 1e8, classes)
    for value, expected in zip(far.interval(), near.interval(), strict=True):
        assert float(value) == pytest.approx(float(expected), abs=1e-7)


def collapse_in_two_passes(rows, labels, classes):
    rows, labels = rows.numpy().astype(np.longdouble), labels.numpy()
    present = [label for label in range(classes) if (labels == label).any()]
    means = np.stack([rows[labels == label].mean(0) for label in present])
    within = rows - means[np.searchsorted(present, labels)]
    within = (within.T @ within / len(rows)).astype(float)
    deviations = (means - means.mean(0)).astype(float)
    between = deviations.T @ deviations / len(present)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-12, hermitian=True)) / len(present)


@pytest.mark.parametrize("shift", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("apart", [0.3, 3.0, 1e3])
@pytest.mark.parametrize("features", [2, 7])
def test_neural_collapse_is_that_of_two_passes(shift, apart, features):
    rows, labels = data(features=features, shift=shift, apart=apart)
    metric = sm.NeuralCollapseMetric(4)
    for each in zip(rows.split(70), labels.split(70), strict=True):
        metric.update(*each)
    assert float(metric.compute()) == pytest.approx(collapse_in_two_passes(rows, labels, 4), rel=1e-7)


def test_classes_in_line_have_one_direction():
    along = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    across = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64) * 1e-12  # round-off
    counts, covariance = torch.tensor([5, 5, 5]), torch.diag(torch.tensor([2.0, 3.0]).double())
    value = neural_collapse(covariance, torch.stack([along, across], 1), counts)
    alone = neural_collapse(covariance[:1, :1], along[:, None], counts)
    assert float(value) == pytest.approx(float(alone), rel=1e-9)


def test_classes_that_nobody_has():
    rows, labels = data(classes=3)
    few, many = (sm.NeuralCollapseMetric(k) for k in (3, 9))
    some, all_ = (sm.LinearProbeMetric(k) for k in (3, 9))
    for metric in (few, many, some, all_):
        metric.update(rows, labels)
    assert float(many.compute()) == pytest.approx(float(few.compute()), rel=1e-12)
    assert float(all_.compute()) == pytest.approx(float(some.compute()), rel=1e-12)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.int8, 128), (torch.uint8, 256)])
def test_labels_whose_dtype_does_not_hold_the_number_of_classes(dtype, classes):
    rows, labels = data(classes=2)
    metric, expected = sm.LinearProbeMetric(classes), sm.LinearProbeMetric(classes)
    metric.update(rows, labels.to(dtype))
    expected.update(rows, labels)
    assert torch.equal(metric.compute(), expected.compute())


def test_labels_of_rows_that_are_not_valid_may_be_anything():
    rows, labels = data()
    valid, padded = torch.arange(300) % 3 > 0, labels.clone()
    padded[::3] = 255
    metric, expected = sm.LinearProbeMetric(4), sm.LinearProbeMetric(4)
    metric.update(Observations(rows, valid=valid, labels=padded))
    expected.update(rows[valid], labels[valid])
    assert float(metric.compute()) == pytest.approx(float(expected.compute()), rel=1e-9)


def test_rows_without_a_label_or_with_nan_are_passed_over():
    rows, labels = data(count=100)
    spoiled, marked = rows.clone(), labels.clone()
    marked[::3] = -100
    spoiled[::3] = torch.nan  # ignored, because they have no label
    spoiled[1] = torch.inf
    kept = (torch.arange(100) % 3 != 0) & (torch.arange(100) != 1)
    for new in (sm.LinearProbeMetric, sm.NeuralCollapseMetric):
        metric, expected = new(4, nan_strategy="ignore"), new(4)
        metric.update(spoiled, marked)
        expected.update(rows[kept], labels[kept])
        assert float(metric.compute()) == pytest.approx(float(expected.compute()), rel=1e-9)
        assert int(metric.non_finite) == 1


def test_features_that_know_everything_and_nothing():
    labels = torch.arange(400) % 4
    exact = sm.LinearProbeMetric(4, ridge=1e-9)
    exact.update(torch.eye(4)[labels], labels)
    assert float(exact.compute()) == pytest.approx(1, abs=1e-6)
    noise = sm.LinearProbeMetric(4, folds=4)
    for each in (torch.arange(400) % 4).split(50):
        noise.update(torch.randn(50, 30), each)
    low, high = noise.interval()
    assert float(low) == float(noise.compute()) < 0.05 < float(high)


@pytest.mark.parametrize("new", [sm.LinearProbeMetric, sm.NeuralCollapseMetric])
class TestEdges:
    def test_constant_features(self, new):
        metric = new(3)
        metric.update(torch.ones(30, 4), torch.arange(30) % 3)
        assert float(metric.compute()) == 0

    def test_one_class(self, new):
        metric = new(3)
        metric.update(torch.randn(30, 4), torch.ones(30, dtype=torch.int64))
        assert metric.compute().isnan()

    def test_nothing(self, new):
        metric = new(3)
        with pytest.raises(RuntimeError, match="has counted no observation"):
            metric.compute()
        metric.update(torch.randn(5, 4), torch.full((5,), -1))
        with pytest.raises(RuntimeError, match="has counted no observation"):
            metric.compute()

    def test_half_precision_and_small_integers(self, new):
        rows, labels = data()
        halves, wide = new(4), new(4)
        halves.update(rows.to(torch.bfloat16), labels.to(torch.uint8))
        wide.update(rows.to(torch.bfloat16).double(), labels)
        assert float(halves.compute()) == pytest.approx(float(wide.compute()), rel=1e-9)

    @pytest.mark.parametrize("folds", [1, 3])
    def test_parts_that_are_merged(self, new, folds):
        rows, labels = data(shift=5.0)
        whole, parts = new(4, folds=folds), [new(4, folds=folds) for _ in range(3)]
        for number, each in enumerate(zip(rows.split(20), labels.split(20), strict=True)):
            whole.update(*each)
            part = parts[number // folds % 3]  # whole turns, so that each batch gets the same fold
            part.update(*each)
        for part in parts[1:]:
            parts[0].merge_state(copy.deepcopy(part))
        if folds == 1:
            assert float(parts[0].compute()) == pytest.approx(float(whole.compute()), rel=1e-9)
        assert int(parts[0].class_count.sum()) == len(rows)

    def test_copies_pickles_and_saved_states(self, new):
        rows, labels = data()
        metric = new(4, folds=2)
        for each in zip(rows[:200].split(40), labels[:200].split(40), strict=True):
            metric.update(*each)
        metric.persistent(True)
        loaded = new(4, folds=2)
        loaded.load_state_dict(metric.state_dict())
        twins = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), loaded]
        metric.update(rows[200:], labels[200:])
        for twin in twins:
            twin.update(rows[200:], labels[200:])
            assert float(twin.compute()) == pytest.approx(float(metric.compute()), rel=1e-12)
        with pytest.raises(RuntimeError, match="num_classes=5"):
            new(5, folds=2).load_state_dict(metric.state_dict())

    def test_forward_and_reset(self, new):
        rows, labels = data()
        metric, batch = new(4), new(4)
        metric(rows[:100], labels[:100])
        value = metric(rows[100:], labels[100:])
        batch.update(rows[100:], labels[100:])
        assert float(value) == pytest.approx(float(batch.compute()), rel=1e-9)
        metric.reset()
        metric.update(rows, labels)
        batch.update(rows[:100], labels[:100])
        assert float(metric.compute()) == pytest.approx(float(batch.compute()), rel=1e-9)


def test_a_collection_accumulates_once():
    rows, labels = data()
    collection = MetricCollection([sm.LinearProbeMetric(4), sm.NeuralCollapseMetric(4), sm.SaturationMetric()])
    for _ in range(2):
        collection.update(rows=rows, labels=labels)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 2]
    alone = sm.NeuralCollapseMetric(4)
    alone.update(rows, labels)
    assert float(collection.compute()["NeuralCollapseMetric"]) == pytest.approx(
        float(alone.compute()), rel=1e-9
    )


def test_other_numbers_of_classes_stay_apart():
    rows, labels = data()
    collection = MetricCollection({"a": sm.LinearProbeMetric(4), "b": sm.LinearProbeMetric(5)})
    collection.update(rows, labels)
    assert len(collection.compute_groups) == 2


def test_the_functions_of_a_covariance():
    rows, labels = data()
    mean = rows.mean(0)
    means = torch.stack([rows[labels == label].mean(0) - mean for label in range(4)])
    counts = torch.bincount(labels)
    covariance = rows.T.cov(correction=0)
    probe, collapse = sm.LinearProbeMetric(4, ridge=0.02), sm.NeuralCollapseMetric(4)
    probe.update(rows, labels)
    collapse.update(rows, labels)
    found = ridge_explained_variance(covariance, means, counts, 0.02)
    assert float(found) == pytest.approx(float(probe.compute()), rel=1e-9)
    assert float(neural_collapse(covariance, means, counts)) == pytest.approx(
        float(collapse.compute()), rel=1e-9
    )


@pytest.mark.parametrize("folds", [1, 3])
def test_their_sums_tell_how_many_folds_they_have(folds):
    metric = sm.LinearProbeMetric(4, folds=folds)
    rows, labels = data()
    for each in zip(rows.split(50), labels.split(50), strict=True):
        metric.update(*each)
    (sums,) = metric.sums
    assert len(sums.folds) == (folds if folds > 1 else 0)
    assert metric.spectrum.num_folds == folds
    assert sum(int(fold.count) for fold in sums.folds) in (0, len(rows))
