"""Sums of partitions, merged by an engine along any tree."""

import pickle
from functools import reduce

import numpy as np
import pandas
import pytest
import torch

import spectralmetrics as sm
from tests.files.world import rows
from tests.oracles import relative_error, two_pass_covariance

VALUES = (rows(3000) + 1e4).double()
EXPECTED = two_pass_covariance(VALUES)


def test_any_order_and_any_kind_of_partition():
    parts = VALUES.split(400)
    kinds = [
        lambda part: part,
        lambda part: part.numpy(),
        lambda part: pandas.DataFrame(part.numpy()),
        lambda part: pandas.Series(list(part.numpy())),
    ]
    sums = [sm.moments_of(kinds[index % 4](part)) for index, part in enumerate(parts)]
    empty = [sm.moments_of(np.zeros((0, 12))), sm.moments_of(pandas.Series([], dtype=object))]
    sums = [pickle.loads(pickle.dumps(each)) for each in [*empty[1:], *sums[::-1], *empty]]
    while len(sums) > 1:  # a tree
        sums = [reduce(sm.merge, sums[at : at + 2]) for at in range(0, len(sums), 2)]
    assert int(sums[0].count) == 3000
    assert relative_error(sums[0].covariance(), EXPECTED) < 1e-12
    measured = sm.measure(sums[0])
    assert float(measured.values["effective_rank"]) == pytest.approx(
        float(sm.measure(VALUES).values["effective_rank"]), rel=1e-9
    )
    assert not measured.intervals


def test_sums_of_several_parts_are_folds(tmp_path):
    measured = sm.measure([sm.moments_of(part) for part in VALUES.split(500)], record=tmp_path / "run")
    assert set(measured.intervals) > {"intrinsic_dimension"}
    assert "3,000 x 12, dimension" in str(measured)
    assert sm.measure(measured.sums).values == measured.values
    assert sm.recompute(tmp_path / "run", statistics=["stable_rank"])


def test_missing_rows_are_counted():
    holed = VALUES.clone()
    holed[::100] = torch.nan
    found = sm.merge(sm.moments_of(holed), sm.moments_of(holed[:100]))
    assert (int(found.count), int(found.non_finite)) == (2970 + 99, 31)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (3, TypeError),
        (VALUES[0], sm.ReadError),
        (VALUES.long(), sm.ReadError),
        (np.ones((2, 3, 4)), sm.ReadError),
    ],
)
def test_what_is_no_partition(value, error):
    with pytest.raises(error, match=r"expected .*rows"):
        sm.moments_of(value)


def test_dask_gives_what_one_pass_gives():
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    import dask.array
    import dask.bag

    data = dask.array.from_array(VALUES.numpy(), chunks=(170, -1))
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=True
    )
    with cluster, distributed.Client(cluster):
        partitions = dask.bag.from_delayed(list(data.to_delayed().ravel()))
        sums = partitions.map_partitions(lambda rows: [sm.moments_of(rows)])
        found = sums.fold(sm.merge, split_every=3).compute()
    assert int(found.count) == 3000
    assert relative_error(found.covariance(), EXPECTED) < 1e-12
    assert relative_error(found.covariance(), sm.moments_of(VALUES).covariance().numpy()) < 1e-12
