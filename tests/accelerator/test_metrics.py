"""Metrics of rows on an accelerator equal the metrics of the same rows on the CPU."""

import copy
import pickle

import pytest
import torch

import spectralmetrics as sm
from spectralmetrics import (
    CovarianceMetric,
    IntrinsicDimensionMetric,
    LinearCKAMetric,
    LinearProbeMetric,
    MarginalMetric,
    NeuralCollapseMetric,
    Observations,
    SaturationMetric,
    statistics,
)
from spectralmetrics.sums import accelerated, products_dtype
from spectralmetrics.sums.arithmetic import has_fast_float64
from tests.accelerator.device import watching

OURS = {
    name: kind
    for name, kind in statistics().items()
    if kind.__module__.startswith("spectralmetrics.metrics.") and not kind.needs_labels
}


def batches(width=12, sizes=(40, 300, 7, 600, 33, 257, 513, 5), dtype=torch.float32, shift=30.0):
    scales = 2.0 ** -torch.arange(width) + 0.05
    rows = [(torch.randn(size, width) * scales + shift).to(dtype) for size in sizes]
    rows[1][2, 3] = torch.nan
    rows[3][0, 0] = torch.inf
    return rows


def both(new, device, rows, gram_dtype=torch.float32):
    here, there = (new(gram_dtype=gram_dtype, nan_strategy="ignore") for _ in range(2))
    for each in rows:
        here.update(each)
        there.update(each.to(device))
    return here, there


def assert_close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(value).cpu().double(), expected.double(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        (name, folds)
        for name, kind in OURS.items()
        for folds in (1, 3)
        if folds == 1 or not issubclass(kind, MarginalMetric)  # it refuses folds
    ],
)
def test_every_statistic(accelerator, name, folds):
    new = OURS[name]
    here, there = both(lambda **kwargs: new(folds=folds, **kwargs), accelerator, batches())
    value = there.compute()
    assert value.device == accelerator
    if name == "embedding":  # the drawn rows depend on the device's generator
        assert value.shape == here.compute().shape
    else:
        # A determinant multiplies the errors of all its factors.
        assert_close(value, here.compute(), 1e-3 if name == "covariance_determinant" else 1e-5)
    if folds > 1 and new.has_interval:
        for end, expected in zip(there.interval(), here.interval(), strict=True):
            assert_close(end, expected, 1e-3)
    assert int(there.non_finite) == 2
    sums = there.marginal_totals if issubclass(new, MarginalMetric) else there.second_moment
    assert sums.dtype == torch.float64
    there.reset()
    with pytest.raises(RuntimeError, match="no observation"):
        there.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["eager", "deterministic", "inference"])
def test_every_dtype_and_mode(accelerator, dtype, mode):
    rows = batches(dtype=dtype, shift=2.0)
    if mode == "deterministic":
        torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(mode == "inference"):
            here, there = both(CovarianceMetric, accelerator, rows)
        there.update(rows[0].to(accelerator))
        here.update(rows[0])
        assert_close(there.compute(), here.compute())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, 3, 1030])
def test_every_width(accelerator, width):
    rows = [torch.rand(300, width) + 100 for _ in range(7)]
    here, there = both(CovarianceMetric, accelerator, rows)
    exact = torch.cat(rows).double()
    exact = (exact - exact.mean(0)).mT @ (exact - exact.mean(0)) / len(exact)
    for metric in (here, there):
        difference = (metric.compute().cpu() - exact).abs().max() / exact.diagonal().max()
        assert difference < 1e-5


def test_far_from_zero(accelerator):
    rows = [torch.randn(700, 5, dtype=torch.float64) + 1e8 for _ in range(8)]
    metric = CovarianceMetric()
    for each in rows:
        metric.update(each.to(accelerator))
    expected = torch.cat(rows).T.cov(correction=0)
    assert_close(metric.compute(), expected, 1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e25])
def test_any_magnitude(accelerator, magnitude):
    rows = [torch.randn(300, 4) * magnitude for _ in range(9)]
    here, there = both(CovarianceMetric, accelerator, rows)
    torch.testing.assert_close(there.compute().cpu(), here.compute(), rtol=1e-5, atol=1e-5 * magnitude**2)


def test_features_that_grow_a_billion_times(accelerator):
    rows = [torch.randn(300, 4) * 10.0**power for power in (0, 0, 0, 0, 0, 3, 6, 9)]
    here, there = both(CovarianceMetric, accelerator, rows)
    torch.testing.assert_close(there.compute().cpu(), here.compute(), rtol=1e-5, atol=1e12)


def test_rows_that_overflow_are_said(accelerator):
    metric = CovarianceMetric(gram_dtype=torch.float32)
    for power in (0, 0, 0, 0, 0, 30):
        metric.update((torch.randn(300, 4) * 10.0**power).to(accelerator))
    with pytest.raises(RuntimeError, match="overflow"):
        metric.compute()


@pytest.mark.parametrize("valid", [False, True])
def test_batches_that_are_taken_in_pieces(accelerator, valid, monkeypatch):
    monkeypatch.setattr(accelerated, "_WORKSPACE_BYTES", 0)  # 256 rows at a time
    rows = [torch.randn(900, 5) + 3 for _ in range(7)]
    chosen = torch.rand(900) < 0.7 if valid else None
    here, there = CovarianceMetric(gram_dtype=torch.float32), CovarianceMetric()
    for each in rows:
        here.update(Observations(each, valid=chosen))
        there.update(
            Observations(each.to(accelerator), valid=None if chosen is None else chosen.to(accelerator))
        )
    assert_close(there.compute(), here.compute())
    assert int(there.count) == int(here.count) == 7 * (900 if chosen is None else int(chosen.sum()))


@pytest.mark.parametrize("valid", [False, True])
def test_maps_in_their_own_layout(accelerator, valid):
    maps = [torch.randn(6, 5, 9, 7) + 3 for _ in range(8)]
    chosen = torch.rand(6 * 9 * 7) < 0.7 if valid else None
    here, there = CovarianceMetric(gram_dtype=torch.float32), CovarianceMetric()
    for each in maps:
        here.update(Observations(each, feature_dim=1, valid=chosen))
        there.update(
            Observations(
                each.to(accelerator), feature_dim=1, valid=None if chosen is None else chosen.to(accelerator)
            )
        )
    assert_close(there.compute(), here.compute())
    assert int(there.count) == int(here.count)


def test_moves_copies_and_rows_from_elsewhere(accelerator):
    rows = batches()
    reference = CovarianceMetric(nan_strategy="ignore", gram_dtype=torch.float32)
    metric = CovarianceMetric(nan_strategy="ignore")
    for number, each in enumerate(rows):
        reference.update(each)
        metric.update(each if number % 3 == 1 else each.to(accelerator))
        if number == 2:
            metric = copy.deepcopy(metric)
        if number == 4:
            metric.to("cpu")
            assert metric.second_moment.device.type == "cpu"
            metric.to(accelerator)
        if number == 6:
            metric = pickle.loads(pickle.dumps(metric))
    assert metric.second_moment.device == accelerator
    assert_close(metric.compute(), reference.compute())


def test_forward_merge_and_saved_states(accelerator):
    rows = batches()
    reference = IntrinsicDimensionMetric(nan_strategy="ignore")
    one, other = (IntrinsicDimensionMetric(nan_strategy="ignore") for _ in range(2))
    for number, each in enumerate(rows):
        reference.update(each)
        (one, other)[number % 2](each.to(accelerator))
    one.merge_state(other)
    one.persistent(True)
    loaded = IntrinsicDimensionMetric(nan_strategy="ignore")
    loaded.load_state_dict(one.state_dict())
    assert int(one.compute()) == int(loaded.compute()) == int(reference.compute())


def test_similarity_of_two_layers(accelerator):
    here, there = LinearCKAMetric(), LinearCKAMetric()
    for _ in range(4):
        left, right = torch.randn(20, 6), torch.randn(20, 3)
        here.update(left, right)
        there.update(left.to(accelerator), right.to(accelerator))
    assert_close(there.compute(), here.compute())


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("new", [LinearProbeMetric, NeuralCollapseMetric])
def test_labelled_rows(accelerator, new, folds):
    here = new(3, folds=folds, nan_strategy="ignore", gram_dtype=torch.float32)
    there = new(3, folds=folds, nan_strategy="ignore")
    for rows in batches(width=6):
        labels = torch.randint(-1, 3, (len(rows),))
        rows = rows + labels[:, None] * torch.arange(6)
        here.update(rows, labels)
        there.update(rows.to(accelerator), labels.to(accelerator))
    assert_close(there.compute(), here.compute(), 1e-4)
    with watching() as seen:
        for _ in range(20):
            there.update(
                torch.ones(40, 6, device=accelerator), torch.ones(40, dtype=torch.int64).to(accelerator)
            )
    assert seen.reads == 0
    there.update(torch.ones(2, 6, device=accelerator), torch.tensor([1, 3]).to(accelerator))
    with pytest.raises(ValueError, match="below num_classes=3, got 1 of that and above"):
        there.compute()


def test_sketches(accelerator):
    new = sm.SaturationMetric
    here, there = both(lambda **options: new(sketch_size=8, threshold=0.9, **options), accelerator, batches())
    assert_close(there.compute(), here.compute())
    for end, expected in zip(there.interval(), here.interval(), strict=True):
        assert_close(end, expected)
    with watching() as seen:
        for _ in range(20):
            there.update(torch.randn(300, 12, device=accelerator))
    assert seen.reads == 0


def test_products_are_float64_on_the_cpu_and_where_that_is_fast(accelerator, monkeypatch):
    assert products_dtype(torch.device("cpu")) == torch.float64
    is_fast = accelerator.type == "cuda" and torch.cuda.get_device_capability(accelerator) in {(8, 0), (9, 0)}
    assert products_dtype(accelerator) == (torch.float64 if is_fast else torch.float32)
    rows = torch.randn(300, 2)
    exact = CovarianceMetric(center=False)
    asked_for = CovarianceMetric(center=False, gram_dtype=torch.float64)
    chosen = CovarianceMetric(center=False)
    for each in [rows] * 9:
        exact.update(each)
        asked_for.update(each.to(accelerator))
        chosen.update(each.to(accelerator))
    assert_close(asked_for.compute(), exact.compute(), 1e-12)
    assert torch.allclose(chosen.compute().cpu(), exact.compute(), rtol=1e-10, atol=0) == is_fast
    assert_close(chosen.compute(), exact.compute(), 1e-6)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_where_float64_is_fast(capability, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_fast_float64.cache_clear()
    try:
        assert has_fast_float64(torch.device("cuda", 0)) == (capability[1] == 0 and capability[0] < 12)
        assert not has_fast_float64(torch.device("cpu"))
    finally:
        has_fast_float64.cache_clear()


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float64_products_have_all_digits(accelerator, dtype, valid, monkeypatch):
    monkeypatch.setattr("spectralmetrics.sums.accelerated._WIDTH_OF_ONE_PRODUCT", 10)
    monkeypatch.setattr("spectralmetrics.sums.accelerated._WIDTH_OF_A_FLOAT64_PART", 8)
    monkeypatch.setattr("spectralmetrics.sums.accelerated._FLOAT64_WORKSPACE_BYTES", 8 * 20 * 100)
    here, there = (CovarianceMetric(gram_dtype=torch.float64, nan_strategy="ignore") for _ in range(2))
    for each in batches(20, [300] * 12, dtype, shift=1e4):
        flags = torch.rand(300) < 0.7 if valid else None
        here.update(Observations(each, valid=flags))
        there.update(Observations(each.to(accelerator), valid=None if flags is None else flags.to(accelerator)))
    assert int(there.count) == int(here.count)
    assert int(there.non_finite) == int(here.non_finite)
    spread = here.compute().diagonal().sqrt()
    error = (there.compute().cpu() - here.compute()).abs()
    assert (error <= 1e-12 * spread[:, None] * spread).all()


def test_a_metric_that_was_saved_before_products_were_chosen_by_the_device():
    saved = SaturationMetric(gram_dtype=torch.float64)
    saved.persistent(True)
    saved.update(torch.randn(30, 4))
    metric = SaturationMetric()
    metric.load_state_dict(saved.state_dict())
    assert torch.equal(metric.configuration, SaturationMetric().configuration)
    assert metric.compute() == saved.compute()


@pytest.mark.parametrize("rows", [16, 700])
def test_without_float64_the_sums_stay_with_the_cpu(like_mps, rows):
    data = [torch.randn(rows, 6) * torch.arange(1, 7) + 10 for _ in range(40)]
    data[20][3, 1] = torch.nan
    metric = CovarianceMetric(nan_strategy="ignore")
    reference = CovarianceMetric(nan_strategy="ignore", gram_dtype=torch.float32)
    for each in data:
        reference.update(each)
        with watching() as seen:
            metric.update(each.to(like_mps))
    assert metric.second_moment.device.type == "cpu"
    assert metric.second_moment.dtype == torch.float64
    assert int(metric.non_finite) == 1
    if rows > 256:  # the device computed the product
        assert seen.operations["bmm"] == 1
    assert_close(metric.compute(), reference.compute(), 1e-5)


def test_without_float64_a_metric_of_the_cpu_takes_the_rows_there(like_mps):
    metric = CovarianceMetric().to("cpu")
    for _ in range(6):
        with watching() as seen:
            metric.update(torch.randn(300, 4).to(like_mps))
    assert not seen.operations["bmm"]
    assert int(metric.count) == 1800


def test_without_float64_folds_and_samples(like_mps):
    from spectralmetrics import EigenspaceEmbeddingMetric

    folds, sample = SaturationMetric(folds=2), EigenspaceEmbeddingMetric(max_samples=9)
    for _ in range(8):
        rows = torch.randn(300, 4).to(like_mps)
        folds.update(rows)
        sample.update(rows)
    assert folds.interval().low <= folds.compute() <= folds.interval().high
    assert sample.compute().shape == (9, 2)


def test_sums_that_began_on_the_cpu_follow_the_rows_unless_they_were_put_there(accelerator):
    rows = batches()
    for pinned in (False, True):
        metric = CovarianceMetric(gram_dtype=torch.float32, nan_strategy="ignore")
        if pinned:
            metric.to("cpu")
        metric.update(rows[0])
        metric.update(rows[1].to(accelerator))
        (sums,) = metric.sums
        assert sums.second.device == (torch.device("cpu") if pinned else accelerator)
        assert int(sums.count) == 40 + 299


def test_a_metric_that_has_seen_nothing_takes_in_sums_where_they_are(accelerator):
    there, empty = CovarianceMetric(nan_strategy="ignore"), CovarianceMetric()
    there.update(batches()[0].to(accelerator))
    empty.merge_state(there)
    assert empty.sums[0].second.device == accelerator
    assert_close(empty.compute(), there.compute().cpu())
