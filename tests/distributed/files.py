"""Rows in files: each process reads some of them, and all get the result for all rows."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import spectralmetrics as sm
from tests.distributed.records import shared_folder
from tests.files.world import rows
from tests.metrics.properties import assert_same
from tests.oracles import relative_error, two_pass_covariance

VALUES = rows(1300)
LABELS = torch.arange(1300) % 3


def assert_is_all(measured, parts):
    """All processes have the folds of all rows, with the values that one process computes."""
    for fold, expected in zip(measured.sums.folds, parts, strict=True):
        assert int(fold.count) == len(expected)
        assert relative_error(fold.covariance(), two_pass_covariance(expected)) < 1e-12
    alone = sm.EffectiveRankMetric(folds=len(parts), sync_on_compute=False)
    for group, part in enumerate(parts):
        alone.update(sm.Observations(part, group=group))
    assert_same(measured.values["effective_rank"], alone.compute(), 1e-9)
    assert_same(measured.intervals["effective_rank"].high, alone.interval().high, 1e-6)
    collapse = sm.NeuralCollapseMetric(3, sync_on_compute=False)
    collapse.update(VALUES, LABELS)
    assert_same(measured.values["neural_collapse"], collapse.compute(), 1e-9)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (str(measured), measured.values))
    assert all(str(each) == str(told[0]) for each in told)


def files_and_arrays_are_shared_out(rank, world):
    folder = shared_folder(rank)
    shards = VALUES.split(100)
    if rank == 0:
        for index, shard in enumerate(shards):
            np.save(folder / f"shard-{index}.npy", shard)
    dist.barrier()
    by_file = [torch.cat(shards[index::4]) for index in range(4)]
    assert_is_all(sm.measure(folder, labels=LABELS, folds=4, record=folder / "run"), by_file)
    if rank == 0:
        assert sm.recompute(folder / "run", statistics=["stable_rank"])
    blocks = VALUES.split(-(-1300 // 32))  # one array, eight blocks for each fold
    by_block = [torch.cat(blocks[index::4]) for index in range(4)]
    assert_is_all(sm.measure(VALUES, labels=LABELS, folds=4), by_block)
    assert_is_all(
        sm.measure(
            iter(shards), [sm.EffectiveRankMetric(), sm.NeuralCollapseMetric(3)], labels=LABELS, folds=4
        ),
        by_file,
    )


def a_file_that_one_process_cannot_read_is_an_error_on_all(rank, world):
    folder = shared_folder(rank)
    if rank == 0:
        for index in range(5):
            np.save(folder / f"{index}.npy", VALUES[:50, : 12 - 4 * (index == 3)])
    dist.barrier()
    with pytest.raises(
        sm.ReadError, match=r"row 0 of .*3.npy': expected 12 features as in .*0.npy', got 8"
    ) as caught:
        sm.measure(folder, folds=4)
    assert int(caught.value.partial.sums.num_observations) % 50 == 0
    stop = ZeroDivisionError if rank == world - 1 else RuntimeError
    with pytest.raises(stop):
        sm.measure(VALUES, progress=(lambda done, total: 1 / 0) if rank == world - 1 else None)


def metrics_of_a_group_cannot_measure_what_all_share(rank, world):
    if world == 1:
        return
    own = sm.EffectiveRankMetric(process_group=dist.new_group([0]))
    with pytest.raises(ValueError, match="got 'effective_rank' with a process_group of its own"):
        sm.measure(VALUES, own)
    measured = sm.measure(VALUES, sm.EffectiveRankMetric(process_group=dist.group.WORLD))
    assert int(measured.sums.num_observations) == 1300


SCENARIOS = [
    files_and_arrays_are_shared_out,
    a_file_that_one_process_cannot_read_is_an_error_on_all,
    metrics_of_a_group_cannot_measure_what_all_share,
]
