"""Processes that exchange numbers; here threads with a store in memory."""

import concurrent.futures
import threading

import pytest
import torch.distributed as dist

from spectralmetrics.probing import rendezvous
from spectralmetrics.probing.rendezvous import Rendezvous, key_of_probe


@pytest.fixture
def ask(monkeypatch):
    """Ask as one of several processes, each with its own rendezvous."""
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(rendezvous, "default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.5)
    monkeypatch.setattr(rendezvous, "_LATER_PATIENCE", 0.1)
    monkeypatch.setattr(rendezvous, "_PROBES", rendezvous.Counter())
    known = {}

    def ask(rank, topic, numbers, ranks=(0, 1)):
        here.rank = rank
        if rank not in known:
            monkeypatch.setattr(rendezvous, "_PROBES", rendezvous.Counter())
            known[rank] = Rendezvous(["a", "b"])
        return known[rank].gather(topic, numbers, ranks)

    return ask


def together(*calls):
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(*call) for call in calls]]


def test_all_hear_all_in_one_order(ask):
    ask(0, "before", [0], [0]), ask(1, "before", [0], [1])
    first, second = together((ask, 0, "a", [3, 4]), (ask, 1, "a", [5, 6]))
    assert first.is_all
    assert first == second
    assert list(first.by_rank) == list(second.by_rank)
    assert first.by_rank == {0: [3, 4], 1: [5, 6]}


def test_who_comes_late_hears_who_was_first(ask):
    alone = ask(0, "a", [3])
    assert not alone.is_all
    assert alone.up_to(0) == [(0, [3])]
    late = ask(1, "a", [5])  # does not wait
    assert not late.is_all
    assert late.up_to(1) == [(0, [3]), (1, [5])]
    assert late.up_to(0) == alone.up_to(0)


def test_layers_in_another_order_keep_nobody_waiting_for_ever(ask):
    ask(0, "before", [0], [0]), ask(1, "before", [0], [1])
    first, second = together((ask, 0, "a", [3]), (ask, 1, "b", [3]))
    assert not first.is_all
    assert not second.is_all
    first, second = together((ask, 0, "b", [3]), (ask, 1, "a", [3]))
    assert first.up_to(0) == [(1, [3]), (0, [3])]
    assert second.up_to(1) == [(0, [3]), (1, [3])]


def test_a_key_for_each_probe_and_subject(monkeypatch):
    monkeypatch.setattr(rendezvous, "_PROBES", rendezvous.Counter())
    keys = [key_of_probe("numbers", names) for names in ("ab", "ba", "ac")] + [key_of_probe("select", "ab")]
    assert [key.rpartition("/")[2] for key in keys] == ["1", "2", "1", "1"]
    assert keys[0].rpartition("/")[0] == keys[1].rpartition("/")[0]
    assert len(set(keys)) == 4
