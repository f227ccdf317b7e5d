"""LinearCKAMetric: values of the pure functions, streamed."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchmetrics import MetricCollection

import spectralmetrics as sm
from spectralmetrics import functional
from tests.functional.test_relations import cka_by_definition, hsic_by_definition, related


def streamed(left, right, batch, metric=None):
    metric = sm.LinearCKAMetric() if metric is None else metric
    for parts in zip(left.split(batch), right.split(batch), strict=True):
        metric.update(*parts)
    return metric


def test_one_batch_is_the_full_estimator():
    left, right = related(60, 10, 80, 0)
    value = streamed(left, right, 60).compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(cka_by_definition(left, right), rel=1e-10)


def test_batches_are_added_by_their_samples():
    left, right = related(50, 10, 80, 0)
    sums = np.zeros(3, dtype=np.longdouble)
    for x, y in zip(left.split(20), right.split(20), strict=True):  # 20, 20 and 10
        sums += [len(x) * hsic_by_definition(*pair) for pair in ((x, y), (x, x), (y, y))]
    expected = float(sums[0] / np.sqrt(sums[1] * sums[2]))
    assert float(streamed(left, right, 20).compute()) == pytest.approx(expected, rel=1e-10)


def test_it_approaches_the_full_estimator_as_batches_grow():
    errors = {}
    for batch in (8, 32, 128, 512):
        deviations = []
        for seed in range(4):
            left, right = related(2048, 64, 64, seed)
            full = float(functional.linear_cka(left, right))
            deviations.append(float(streamed(left, right, batch).compute()) - full)
        errors[batch] = np.square(deviations).mean() ** 0.5
    # A biased estimator would be off by 0.3 at 8 samples of 64 features.
    assert errors[8] < 0.03
    assert errors[512] < 0.001
    assert errors[512] < errors[128] < errors[32] < errors[8]


def test_it_is_no_statistic_of_one_layer():
    assert sm.LinearCKAMetric not in sm.statistics().values()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_is_summed_in_float64(dtype):
    left, right = related(40, 6, 300, 0, dtype=dtype)
    metric = streamed(left, right, 20)
    exact = streamed(left.double(), right.double(), 20)
    assert metric.cross.dtype == torch.float64
    assert torch.equal(metric.compute(), exact.compute())


def test_autocast_and_inference_mode_change_nothing():
    left, right = related(40, 6, 300, 0, dtype=torch.float32)
    expected = streamed(left, right, 20).compute()
    metric = sm.LinearCKAMetric()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        metric.reset()
        metric.update(left[:20].clone(), right[:20].clone())
    metric.update(left[20:], right[20:])
    assert torch.equal(metric.compute(), expected)


def test_gradients_do_not_come_in():
    left, right = related(20, 6, 6, 0)
    metric = streamed(left.requires_grad_(), right, 20)
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("width", [3, 300])
def test_samples_that_are_not_finite_are_left_out_and_counted(width):
    left, right = related(40, width, 10, 0)
    holed, other = left.clone(), right.clone()
    holed[3, 1], other[25, 0], holed[25, 0], other[7, 7] = torch.nan, torch.inf, -torch.inf, 1e70
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 7, 25]] = False
    metric = streamed(holed, other, 20)
    expected = sm.LinearCKAMetric()
    for half in (slice(0, 20), slice(20, 40)):
        expected.update(left[half][keep[half]], right[half][keep[half]])
    with pytest.warns(UserWarning, match="samples left out for NaN or infinite values: 3"):
        value = metric.compute()
    torch.testing.assert_close(value, expected.compute(), rtol=1e-12, atol=0)
    silent = streamed(holed, other, 20, sm.LinearCKAMetric(nan_strategy="ignore"))
    assert torch.equal(silent.compute(), value)
    with pytest.raises(RuntimeError, match="values: 3; nan_strategy"):
        streamed(holed, other, 20, sm.LinearCKAMetric(nan_strategy="error")).compute()


def test_a_batch_with_too_few_finite_samples_adds_nothing():
    left, right = related(20, 5, 5, 0)
    metric = streamed(left, right, 20, sm.LinearCKAMetric(nan_strategy="ignore"))
    expected = metric.compute()
    holed = left.clone()
    holed[3:] = torch.nan
    metric.update(holed, right)
    assert torch.equal(metric.compute(), expected)
    assert (int(metric.count), int(metric.non_finite)) == (20, 20)  # three are finite, but not used
    only = sm.LinearCKAMetric()
    only.update(holed, right)
    with pytest.raises(RuntimeError, match=r"no sample \(samples left out .*: 20\)"):
        only.compute()


def test_constant_features_give_zero_in_silence():
    metric = sm.LinearCKAMetric()
    metric.update(torch.full((10, 3), 0.1), torch.randn(10, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute() == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_refused_batch_leaves_the_state_alone(count):
    left, right = related(20, 5, 5, 0)
    metric = streamed(left, right, 20)
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    with pytest.raises(ValueError, match=f"at least 4 samples, got {count}.*drop the last batch"):
        metric.update(left[:count], right[:count])
    with pytest.raises(ValueError, match="20 and 19"):
        metric.update(left, right[1:])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        metric.update(left.long(), right)
    metric.update(left[:0], right[:0])
    assert all(torch.equal(metric.metric_state[name], value) for name, value in before.items())


def test_without_samples_it_says_so():
    metric = sm.LinearCKAMetric()
    with pytest.raises(RuntimeError, match="no sample; call `update`"):
        metric.compute()
    assert not metric.update_called
    with pytest.raises(ValueError, match="got 'drop'"):
        sm.LinearCKAMetric(nan_strategy="drop")


def test_merging_forward_collections_and_copies():
    left, right = related(60, 10, 80, 0)
    whole = streamed(left, right, 20).compute()
    first, second = streamed(left[:20], right[:20], 20), streamed(left[20:], right[20:], 20)
    first.compute()
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole, rtol=1e-13, atol=0)
    by_forward = sm.LinearCKAMetric()
    for parts in zip(left.split(20), right.split(20), strict=True):
        value = by_forward(*parts)
        assert float(value) == pytest.approx(cka_by_definition(*parts), rel=1e-9)
    torch.testing.assert_close(by_forward.compute(), whole, rtol=1e-13, atol=0)
    collection = MetricCollection({"a": sm.LinearCKAMetric(), "b": sm.LinearCKAMetric(nan_strategy="ignore")})
    streamed(left, right, 20, collection)
    assert all(torch.equal(each, whole) for each in collection.compute().values())
    for copied in (copy.deepcopy(by_forward), pickle.loads(pickle.dumps(by_forward))):
        assert torch.equal(copied.compute(), by_forward.compute())


def test_casting_a_model_around_it_costs_no_digits():
    left, right = related(60, 10, 80, 0)
    metric = streamed(left, right, 20)
    expected = streamed(left[:20], right[:20], 20, copy.deepcopy(metric)).compute()
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    assert metric.cross.dtype == torch.float64
    assert torch.equal(streamed(left[:20], right[:20], 20, metric).compute(), expected)


def test_a_loaded_state_replaces_the_value():
    left, right = related(60, 10, 80, 0)
    saved, other = streamed(left, right, 20), streamed(right, left[:, :3], 20)
    saved.persistent(True)
    other.persistent(True)
    assert other.compute() != saved.compute()
    other.load_state_dict(saved.state_dict())
    assert other.compute() == saved.compute()


@pytest.mark.parametrize("width", [3, 300])
def test_an_update_waits_for_no_device(width):
    # With tensors that have no values, anything that reads one raises.
    metric = sm.LinearCKAMetric()
    with FakeTensorMode(allow_non_fake_inputs=True):
        left, right = torch.randn(20, width), torch.randn(20, 4)
        metric.update(left, right)
        metric.update(left, right)
        with pytest.raises(DataDependentOutputException):
            metric.compute()


def test_plot():
    left, right = related(60, 10, 80, 0)
    _, axis = streamed(left, right, 20).plot()
    assert axis.get_ylim()[0] <= -1
