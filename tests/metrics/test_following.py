"""Metrics that read the states of another metric in place of their own."""

import torch

import spectralmetrics as sm


def pair():
    leader, follower = sm.SaturationMetric(), sm.EffectiveRankMetric()
    follower.follow(leader)
    leader.update(torch.randn(50, 4))
    return leader, follower


def test_a_follower_reads_what_its_leader_has():
    leader, follower = pair()
    assert int(follower.count) == 50
    assert follower.second_moment.data_ptr() == leader.second_moment.data_ptr()
    assert follower.is_borrowed()
    assert not leader.is_borrowed()
    assert follower.update_count == leader.update_count == 1
    expected = sm.EffectiveRankMetric()
    expected.merge_state(leader.metric_state)
    torch.testing.assert_close(follower.compute(), expected.compute())


def test_an_update_of_a_follower_alone_leaves_its_leader_as_it_is():
    leader, follower = pair()
    before = {name: value.clone() for name, value in leader.metric_state.items()}
    follower.update(torch.randn(30, 4) + 3)
    assert not follower.is_borrowed()
    assert int(follower.count) == 80
    assert all(torch.equal(value, before[name]) for name, value in leader.metric_state.items())
    leader.update(torch.randn(20, 4))  # users may give each metric of a collection the same rows
    assert (int(leader.count), int(follower.count)) == (70, 80)
    leader.reset()  # this resets both
    assert int(follower.count) == 0
    assert follower.is_borrowed()
