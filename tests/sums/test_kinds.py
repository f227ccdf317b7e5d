"""Requirements on every kind of sum, in one abstract case; a new kind adds a line to ``KINDS``."""

import copy
import dataclasses
import pickle
import random
from collections.abc import Callable
from functools import reduce
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmetrics.sums import (
    Observations,
    Reservoir,
    Sum,
    about_origin,
    empty_folds,
    empty_history,
    empty_labelled,
    empty_marginals,
    empty_moments,
    empty_numbered,
    empty_reservoir,
    empty_sketch,
    kinds,
    together,
)
from spectralmetrics.sums.about_origin import AboutOrigin
from spectralmetrics.sums.folds import InFolds
from spectralmetrics.sums.merging import ForReader, Largest
from tests.sums.streams import (
    check_folds,
    check_history,
    check_labelled,
    check_marginals,
    check_moments,
    check_numbered,
    check_reservoir,
    check_sketch,
    stream,
    streams,
)
from tests.sums.toy import check_extremes, empty_extremes


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of sum under test.

    Attributes:
        make: function that makes an empty sum of width zero.
        check: function of a sum and batches; raises unless it is the sum of these batches.
        other: function that makes a sum with other settings, which must not be added; None without settings.
        is_exact: True if the sum holds rows unchanged, whatever the dtype of products.
    """

    make: Callable[[], Sum]
    check: Callable[..., None]
    other: Callable[[], Sum] | None = None
    is_exact: bool = False


KINDS = {
    "moments": Kind(lambda: empty_moments(0), check_moments),
    "folds": Kind(lambda: empty_folds(3, 0), check_folds, lambda: empty_folds(2, 0)),
    "sketch": Kind(lambda: empty_sketch(3, 0), check_sketch, lambda: empty_sketch(4, 0)),
    "labelled": Kind(lambda: empty_labelled(3, 0), check_labelled, lambda: empty_labelled(4, 0)),
    "labelled, in folds": Kind(
        lambda: empty_labelled(3, 0, folds=2), check_labelled, lambda: empty_labelled(3, 0)
    ),
    "reservoir": Kind(
        lambda: empty_reservoir(20, 0, seed=3), check_reservoir, lambda: empty_reservoir(21, 0, seed=3), True
    ),
    "numbered": Kind(lambda: empty_numbered(20, 0), check_numbered, lambda: empty_numbered(21, 0), True),
    "marginals": Kind(lambda: empty_marginals(0), check_marginals),
    "history": Kind(lambda: empty_history(8, 0), check_history, lambda: empty_history(6, 0)),
    "extremes, a toy": Kind(lambda: empty_extremes(0), check_extremes, is_exact=True),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def begin(sums, batches):
    """An empty sum of the same kind with the width of these batches, or the sum itself if it has rows."""
    width = batches[0].observations.num_features
    return sums if sums.num_features else sums.empty(width)


def take(sums, batches, gram_dtype=torch.float64, flush_after=()):
    """Add batches as a stream does; the intake first meets a sum that has rows."""
    is_new = not sums.num_features
    if not batches:
        return sums
    sums = begin(sums, batches)
    intake = sums.intake(gram_dtype)
    if not is_new:
        intake.meet(sums)
    for batch in batches:
        with torch.inference_mode(False), torch.no_grad():
            intake.add(sums, batch.observations, batch.number)
        if batch.number in flush_after:
            intake.flush(sums)
    intake.flush(sums)
    assert not intake.flush(sums)  # nothing waits
    return sums


def exchanged(locals_, known=None, reader=None):
    """Results of several processes that exchange sums, and the number of collectives.

    With a reader, the other processes get nothing of what only the reader needs.
    """
    world = len(locals_)
    known = [None] * world if known is None else known
    processes = [
        together([each.exchange(its, rank, world)])
        for rank, (each, its) in enumerate(zip(locals_, known, strict=True))
    ]
    results, collectives = [None] * world, 0
    sent = [next(process) for process in processes]
    while True:
        is_for_all = reader is None or not all(isinstance(each, ForReader) for each in sent)
        stacked = torch.stack([each.as_subclass(torch.Tensor) for each in sent])
        total = stacked.amax(0) if isinstance(sent[0], Largest) else stacked.sum(0)
        collectives += 1
        sent = []
        for rank, process in enumerate(processes):
            try:
                sent.append(process.send(total.clone() if is_for_all or rank == reader else None))
            except StopIteration as finished:
                (results[rank],) = finished.value
        if not sent:
            return results, collectives
        assert len(sent) == world, "the processes do not make the same collectives"


def copied(sums):
    return sums.map(torch.clone)


def assert_identical(left, right):
    assert type(left) is type(right)
    assert left.settings() == right.settings()
    mine, others = left.tensors(), right.tensors()
    assert list(mine) == list(others)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_every_kind_of_the_package_is_here():
    assert {type(kind.make()) for kind in KINDS.values()} >= set(kinds())


@pytest.mark.usefixtures("instructions")  # by PyTorch and by the compiled code
class TestTaking:
    @given(batches=streams(), order=st.randoms(use_true_random=False))
    def test_any_split_in_any_order(self, kind, batches, order):
        kind.check(take(kind.make(), batches), batches)
        shuffled = batches.copy()
        order.shuffle(shuffled)
        kind.check(take(kind.make(), shuffled), batches)

    @given(batches=streams())
    def test_products_in_float32(self, kind, batches):
        kind.check(take(kind.make(), batches, torch.float32), batches, 1e-5)

    @given(batches=streams(), flush_after=st.sets(st.integers(0, 6)))
    def test_whoever_reads_between_two_batches_changes_nothing(self, kind, batches, flush_after):
        kind.check(take(kind.make(), batches, flush_after=flush_after), batches)

    def test_rows_that_wait_are_added_by_a_flush(self, kind):
        batches = stream(0, [300, 300, 300, 5, 5, 40], 3)
        sums = begin(kind.make(), batches)
        intake = sums.intake(torch.float64)
        for batch in batches[:5]:
            intake.add(sums, batch.observations, batch.number)
        waited = intake.flush(sums)
        kind.check(sums, batches[:5])
        assert intake.flush(sums) is False
        intake.add(sums, batches[5].observations, 5)
        assert intake.flush(sums) is waited
        kind.check(sums, batches)

    def test_more_rows_than_can_wait(self, kind):
        batches = stream(0, [300] * 3 + [250] * 40, 3)
        kind.check(take(kind.make(), batches), batches)

    def test_the_intake_writes_into_the_tensors_that_are_there(self, kind):
        batches = stream(0, [30, 3000], 4)
        sums = begin(kind.make(), batches)
        before = {name: tensor.data_ptr() for name, tensor in sums.tensors().items()}
        take_into = sums.intake(torch.float64)
        for batch in batches:
            take_into.add(sums, batch.observations, batch.number)
        take_into.flush(sums)
        assert {name: tensor.data_ptr() for name, tensor in sums.tensors().items()} == before

    @pytest.mark.parametrize("bad", [0.3, 1.0])
    def test_rows_that_are_not_finite(self, kind, bad):
        batches = stream(1, [40, 7, 300, 40], 4, means=(1e6,), bad=bad)
        kind.check(take(kind.make(), batches), batches)

    @pytest.mark.parametrize("before", [[5], [300] * 4], ids=["short", "long"])
    def test_a_beginning_without_a_finite_row(self, kind, before):
        begun = stream(1, before, 4, bad=1.0)
        batches = [*begun, *stream(2, [300, 40], 4, means=(1e8,), first=len(begun))]
        kind.check(take(kind.make(), batches), batches, 1e-9)

    def test_a_batch_that_begins_with_rows_that_do_not_count(self, kind):
        rows = torch.cat([batch.observations.rows() for batch in stream(2, [600], 4, means=(1e8,))])
        valid = torch.arange(600) >= 300
        batches = [dataclasses.replace(stream(0, [1], 4)[0], observations=Observations(rows, valid=valid))]
        kind.check(take(kind.make(), batches), batches, 1e-9)

    def test_rows_that_are_not_valid_are_not_looked_at(self, kind):
        rows = torch.randn(50, 3, dtype=torch.float64)
        rows[::2] = torch.nan
        valid = torch.arange(50) % 2 == 1
        batches = [dataclasses.replace(stream(0, [1], 3)[0], observations=Observations(rows, valid=valid))]
        assert batches[0].left_out() == 0
        kind.check(take(kind.make(), batches), batches)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_exact(self, kind, dtype):
        batches = stream(4, [40, 3, 300], 4, dtype=dtype)
        kind.check(take(kind.make(), batches), batches)

    def test_made_and_fed_inside_inference_mode(self, kind):
        batches = stream(5, [40, 7, 300, 2], 4)
        with torch.inference_mode():
            sums = begin(kind.make(), batches)
            assert not any(tensor.is_inference() for tensor in sums.tensors().values())
            inside = [
                dataclasses.replace(batch, observations=Observations(batch.observations.values * 1.0))
                for batch in batches[:2]
            ]
            assert inside[0].observations.values.is_inference()
            sums = take(sums, inside)
        kind.check(take(sums, batches[2:]), batches)

    @pytest.mark.parametrize("maps", [False, True])
    def test_batches_of_many_rows_of_which_some_do_not_count(self, kind, maps):
        batches = stream(9, [700, 40, 257, 1030], 4, means=(2.0,), bad=0.1, masked=True, maps=maps)
        kind.check(take(kind.make(), batches), batches)


class TestMerging:
    @given(
        batches=streams(means=(0.0,)) | streams(means=(0.0, 1e6, -1e6)),
        parts=st.integers(1, 5),
        order=st.randoms(use_true_random=False),
    )
    def test_any_parts_in_any_order(self, kind, batches, parts, order):
        where = [order.randrange(parts) for _ in batches]
        sides = [
            take(kind.make(), [batch for batch, part in zip(batches, where, strict=True) if part == number])
            for number in range(parts)
        ]  # some of width zero
        while len(sides) > 1:  # a tree of any shape
            left, right = (sides.pop(order.randrange(len(sides))) for _ in range(2))
            sides.append(left.merged(right))
        kind.check(sides[0], batches)

    def test_it_is_associative_and_commutative(self, kind):
        batches = stream(6, [300, 40, 500], 4, means=(0.0, 1e6, -1e6))
        a, b, c = (take(kind.make(), [batch]) for batch in batches)
        for merged in (
            a.merged(b).merged(c),
            a.merged(b.merged(c)),
            c.merged(b).merged(a),
            b.merged(c.merged(a)),
        ):
            kind.check(merged, batches)

    def test_neither_side_is_changed(self, kind):
        batches = stream(6, [300, 40], 4, means=(0.0, 1e6))
        left, right = (take(kind.make(), [batch]) for batch in batches)
        before = copied(left), copied(right)
        merged = left.merged(right)
        assert_identical(left, before[0])
        assert_identical(right, before[1])
        more = stream(7, [20], 4, first=2)
        kind.check(take(merged, more), [*batches, *more])
        assert_identical(left, before[0])
        assert_identical(right, before[1])

    @pytest.mark.parametrize("width", [0, 4])
    def test_with_nothing(self, kind, width):
        batches = stream(6, [300, 40], 4, means=(1e8,))
        nothing = kind.make().empty(width)
        full = take(kind.make(), batches)
        for merged in (full.merged(nothing), nothing.merged(full)):
            kind.check(merged, batches, 1e-9)
            assert_identical(merged, full)
        assert_identical(nothing.merged(nothing), nothing)

    def test_rows_left_out_are_counted_although_nothing_else_is_there(self, kind):
        bad, good = stream(1, [6], 4, bad=1.0), stream(2, [30], 4, first=1)
        left, right = take(kind.make(), bad), take(kind.make(), good)
        for merged in (left.merged(right), right.merged(left)):
            kind.check(merged, [*bad, *good])

    def test_what_came_after_a_merge(self, kind):
        batches = stream(8, [40, 300, 5, 5], 4, means=(1e6, -1e6))
        merged = take(kind.make(), batches[:1]).merged(take(kind.make(), batches[1:2]))
        kind.check(take(merged, batches[2:]), batches)

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.other])
    def test_other_settings_are_refused(self, name):
        batches = stream(8, [40], 4)
        mine, other = take(KINDS[name].make(), batches), take(KINDS[name].other(), batches)
        assert mine.settings() != other.settings()
        assert mine.settings() == KINDS[name].make().settings()
        before = copied(mine)
        with pytest.raises(ValueError, match=r"expected.*got"):
            mine.merged(other)
        assert_identical(mine, before)


class TestProcesses:
    @pytest.mark.parametrize("without", [None, 0, -1], ids=["all", "first empty", "last empty"])
    @pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
    def test_all_get_the_sum_of_all(self, kind, world, without):
        parts = [
            stream(rank, [40 + 7 * rank, 5, 300], 4, means=(1e6 * rank,), bad=0.1, first=10 * rank)
            for rank in range(world)
        ]
        if without is not None and world > 1:
            parts[without] = []
        locals_ = [take(kind.make(), part) for part in parts]
        before = [copied(each) for each in locals_]
        results, collectives = exchanged(locals_)
        assert collectives <= 3
        # The common origin is a rounded mean, which costs one or two digits of the spread about it.
        for result in results:
            kind.check(result, list(chain(*parts)), 1e-11)
            assert_identical(result, results[0])
        for each, own in zip(locals_, before, strict=True):
            assert_identical(each, own)

    @given(seed=st.integers(0, 10**6), world=st.integers(1, 5), far=st.sampled_from([0.0, 1e3, 1e7]))
    def test_any_share_of_any_stream(self, kind, seed, world, far):
        draw = random.Random(seed)
        parts = [
            stream(
                seed + rank,
                draw.choices([1, 2, 30, 300], k=draw.randrange(4)),
                3,
                means=(far * rank,),
                first=10 * rank,
                bad=draw.choice([0.0, 0.5]),
            )
            for rank in range(world)
        ]
        results, _ = exchanged([take(kind.make(), part) for part in parts])
        everything = list(chain(*parts))
        for result in results:
            if everything:
                kind.check(result, everything, 1e-11)
            else:
                assert result is None

    @pytest.mark.parametrize("reader", [None, 0, 2])
    def test_in_small_pieces_for_all_or_for_one(self, kind, reader, monkeypatch):
        monkeypatch.setattr(about_origin, "MOST_BYTES", 40)
        monkeypatch.setattr(about_origin, "_ROWS_BYTES", 50)
        parts = [stream(rank, [40 + rank, 30], 7, means=(3.0 * rank,), first=10 * rank) for rank in range(3)]
        results, _ = exchanged([take(kind.make(), part) for part in parts], reader=reader)
        for rank, result in enumerate(results):
            if reader is None or rank == reader:
                kind.check(result, list(chain(*parts)), 1e-11)
        if isinstance(kind.make(), AboutOrigin | InFolds) and reader is not None:
            assert [result is None for result in results] == [rank != reader for rank in range(3)]

    def test_it_is_what_a_merge_gives(self, kind):
        parts = [stream(rank, [300], 4, means=(rank,), first=rank) for rank in range(3)]
        locals_ = [take(kind.make(), part) for part in parts]
        kind.check(reduce(lambda left, right: left.merged(right), locals_), list(chain(*parts)))
        kind.check(exchanged(locals_)[0][0], list(chain(*parts)))

    def test_what_all_know_already_is_not_sent_again(self, kind):
        parts = [stream(rank, [300, 5], 4, first=10 * rank) for rank in range(3)]
        locals_ = [take(kind.make(), part) for part in parts]
        known, several = exchanged(locals_)
        again, one = exchanged(locals_, known)
        assert several > one == 1
        assert all(new is old for new, old in zip(again, known, strict=True))
        # One process has new rows since, so all must send again.
        more = stream(9, [30], 4, first=50)
        locals_[1] = take(locals_[1], more)
        renewed, _ = exchanged(locals_, [known[0], None, known[2]])
        for result in renewed:
            kind.check(result, [*chain(*parts), *more], 1e-11)

    def test_widths_that_differ_are_an_error_on_every_process(self, kind):
        locals_ = [take(kind.make(), stream(0, [9], width)) for width in (4, 4, 5)]
        exchanges = [each.exchange(None, rank, 3) for rank, each in enumerate(locals_)]
        total = sum(next(exchange) for exchange in exchanges)
        for exchange in exchanges:
            with pytest.raises(ValueError, match=r"4 on process 0, 4 on process 1, 5 on process 2"):
                exchange.send(total.clone())

    def test_the_result_takes_more(self, kind):
        parts = [stream(rank, [300], 4, means=(1e6 * rank,), first=rank) for rank in range(2)]
        result = exchanged([take(kind.make(), part) for part in parts])[0][0]
        more = stream(9, [30, 5], 4, first=2)
        kind.check(take(copied(result), more), [*chain(*parts), *more], 1e-11)


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda sums: pickle.loads(pickle.dumps(sums)), copied],
        ids=["deepcopy", "pickle", "map"],
    )
    @pytest.mark.parametrize("width", [0, 4])
    def test_are_the_same_and_apart(self, kind, duplicate, width):
        batches = stream(0, [30, 300], 4, means=(1e6,))
        sums = take(kind.make(), batches) if width else kind.make()
        before = copied(sums)
        twin = duplicate(sums)
        assert_identical(twin, sums)
        more = stream(9, [30, 5], 4, first=2)
        kind.check(take(twin, more), [*(batches if width else []), *more])
        assert_identical(sums, before)

    def test_from_its_tensors(self, kind):
        batches = stream(0, [30, 300], 4)
        sums = take(kind.make(), batches)
        tensors = sums.tensors()
        assert set(tensors) == set(sums.states.values())
        twin = kind.make().with_tensors({**tensors, "another state": torch.zeros(1)})
        assert all(tensor is tensors[name] for name, tensor in twin.tensors().items())
        assert_identical(twin, sums)
        assert twin.num_features == 4
        more = stream(9, [30], 4, first=2)
        kind.check(take(twin, more), [*batches, *more])

    def test_the_anchor_is_the_first_state(self, kind):
        assert next(iter(kind.make().tensors())) == next(iter(kind.make().states.values()))
        assert len(set(kind.make().states.values())) == len(kind.make().states)

    def test_no_two_kinds_name_a_state_or_an_array_alike(self, kind):
        mine = kind.make()
        others = [each.make() for each in KINDS.values() if type(each.make()) is not type(mine)]
        assert not set(mine.states.values()) & {name for each in others for name in each.states.values()}
        assert mine.arrays[0] not in {name for each in others for name in each.arrays}

    def test_on_another_device(self, kind):
        sums = take(kind.make(), stream(0, [30, 300], 4))
        moved = sums.map(lambda tensor: tensor.to("meta"))
        assert type(moved) is type(sums)
        assert moved.settings() == sums.settings()
        for made in (moved, kind.make().empty(4, "meta")):
            for name, tensor in made.tensors().items():
                assert tensor.device.type == "meta"
                assert tensor.shape == sums.tensors()[name].shape
                assert tensor.dtype == sums.tensors()[name].dtype
        # Sums from another device are moved to this one.
        assert {t.device.type for t in kind.make().empty(4, "meta").merged(sums).tensors().values()} == {"meta"}

    def test_through_a_run(self, kind):
        batches = stream(0, [30, 300, 7], 4, means=(1e3,), bad=0.1)
        sums = take(kind.make(), batches)
        kept = dict(sums.saved())
        assert set(sums.arrays) <= set(kept)
        # As read from a file: another tensor, on the CPU, without NaN.
        arrays = {name: torch.as_tensor(tensor.numpy().copy()) for name, tensor in kept.items()}
        assert all(tensor.isfinite().all() for name, tensor in arrays.items() if name != "sample_keys")
        restored = type(sums).restored(arrays.__getitem__)
        assert isinstance(restored, type(sums))
        kind.check(dataclasses.replace(restored, seed=3) if isinstance(sums, Reservoir) else restored, batches)
        assert {name: tensor.tolist() for name, tensor in restored.saved()} == {
            name: tensor.tolist() for name, tensor in kept.items()
        }  # to the last digit
        more = stream(9, [40], 4, first=3)
        if not isinstance(sums, Reservoir):  # its file does not say how the rows were drawn
            merged = restored.merged(take(kind.make(), more))
            kind.check(merged, [*batches, *more])
            # After the merge, saved values describe all rows, not only those of the file.
            for name, tensor in take(kind.make(), [*batches, *more]).saved():
                torch.testing.assert_close(dict(merged.saved())[name], tensor, rtol=1e-9, atol=1e-9)
