"""Small batches wait for a common product; every reader of a state gets all rows."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from spectralmetrics import (
    CovarianceMetric,
    IntrinsicDimensionMetric,
    Observations,
    SaturationMetric,
    SpectrumMetric,
)
from spectralmetrics.metrics.sharing import Stream
from spectralmetrics.sums import Moments
from spectralmetrics.sums.intake import WAITING_ROWS
from tests.oracles import relative_error, two_pass_covariance


def waiting(metric):
    intake = Stream.of(metric.__dict__["second_moment"])._intakes.get(Moments)
    return 0 if intake is None else intake.waiting


def fed(batches, **options):
    metric = CovarianceMetric(**options)
    for batch in batches:
        metric.update(batch)
    return metric


def batches(count=6, rows=20, width=5):
    return [torch.randn(rows, width) * torch.arange(1, width + 1) + 3 for _ in range(count)]


READERS = {
    "count": lambda m: m.count,
    "compute": lambda m: m.compute(),
    "moments": lambda m: m.moments,
    "spectrum": lambda m: m.spectrum,
    "metric_state": lambda m: m.metric_state,
    "state_dict": lambda m: (m.persistent(True), m.state_dict()),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "clone": lambda m: m.clone(),
    "save": lambda m: torch.save(m, io.BytesIO()),
    "to": lambda m: m.to("cpu"),
    "forward": lambda m: m(torch.randn(3, 5)),
    "merge_state": lambda m: fed(batches(1)).merge_state(m),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_finds_all_rows(reader):
    metric = fed(batches())
    assert waiting(metric) == 100  # the first batch is added at once
    READERS[reader](metric)
    assert waiting(metric) == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_hold_all_rows_and_go_on_alone(copier):
    data = batches(8)
    metric = fed(data[:4])
    twin = copier(metric)
    for batch in data[4:]:
        twin.update(batch)
    assert int(metric.count) == 80
    assert relative_error(twin.compute(), two_pass_covariance(torch.cat(data).double())) < 1e-12


@given(st.lists(st.integers(2, 900), min_size=1, max_size=12), st.sampled_from([3, 300]), st.booleans())
def test_any_sizes_of_batches(sizes, width, fast):
    data = [torch.randn(size, width) + 2 for size in sizes]
    metric = fed(data, gram_dtype=torch.float32 if fast else torch.float64)
    exact = torch.cat(data).double().T.cov(correction=0).numpy()
    assert relative_error(metric.compute(), exact) < (1e-5 if fast else 1e-12)
    assert int(metric.count) == sum(sizes)


def test_every_metric_of_a_group_reads_what_waits_with_its_leader():
    members = [SaturationMetric(), IntrinsicDimensionMetric(), SpectrumMetric()]
    collection = MetricCollection(members)
    data = batches()
    for batch in data:
        collection.update(batch)
    for member in collection.values(copy_state=False):
        assert int(member.count) == 120
    for batch in data:
        collection.update(batch)
    for member in members:  # members of the collection, read without it
        for batch in data:
            # The collection itself would read the states.
            members[0].update(batch)
        assert waiting(member) > 0
        seen = int(member.count)
        assert waiting(member) == 0
        assert {int(other.count) for other in members} == {seen}
    assert seen == 240 + 3 * 120


def test_what_is_changed_afterwards_does_not_change_what_waits():
    data = batches()
    metric = CovarianceMetric()
    for batch in data:
        rows = batch.clone()
        metric.update(rows)
        rows.zero_()
    assert relative_error(metric.compute(), two_pass_covariance(torch.cat(data).double())) < 1e-12


def test_dtypes_and_layouts_and_masks_mix():
    maps = torch.randn(4, 5, 3, 3)
    parts = [
        torch.randn(20, 5),
        torch.randn(20, 5),
        torch.randn(20, 5, dtype=torch.float64),
        torch.randn(20, 5, dtype=torch.bfloat16),
        Observations(maps, feature_dim=1),
        Observations(torch.randn(10, 5), valid=torch.arange(10) < 6),
    ]
    metric = fed(parts)
    rows = [*parts[:4], parts[4].rows(), parts[5].rows()[:6]]
    exact = two_pass_covariance(torch.cat([each.double() for each in rows]))
    assert relative_error(metric.compute(), exact) < 1e-12


def test_rows_that_are_not_finite_are_counted_when_they_are_read():
    data = batches()
    data[3][2, 1] = torch.nan
    metric = fed(data, nan_strategy="ignore")
    assert int(metric.non_finite) == 1
    assert int(metric.count) == 119


def test_a_reset_forgets_what_waits():
    metric = fed(batches())
    metric.reset()
    metric.update(torch.ones(3, 5))
    assert int(metric.count) == 3


def test_the_buffer_is_bounded():
    metric = fed([torch.randn(200, 4) for _ in range(50)])
    intake = Stream.of(metric.__dict__["second_moment"])._intakes[Moments]
    assert intake._buffer.shape == (WAITING_ROWS, 4)
    assert 0 < waiting(metric) <= WAITING_ROWS
    assert int(metric.count) == 10_000


def test_threads_have_memory_of_their_own(monkeypatch):
    """Two threads that accumulate at once do not write into each other's rows."""
    import threading

    data = [torch.randn(4000, 16, generator=torch.Generator().manual_seed(k)) + k for k in range(4)]
    results = [None] * 4

    def work(index):
        for _ in range(20):
            results[index] = fed([data[index]]).compute()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, result in enumerate(results):
        np.testing.assert_allclose(
            result, np.cov(data[index].double().T.numpy(), bias=True), rtol=1e-9, atol=1e-12
        )
