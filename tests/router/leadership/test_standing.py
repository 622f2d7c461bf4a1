"""Who leads, as one router hears of it."""

from __future__ import annotations

from xllm.protocol.bus import RouterPresence
from xllm.router.leadership.standing import Standing


def test_a_lower_epoch_is_ignored_and_counted():
    standing = Standing()
    assert standing.describe().startswith("nobody is known to")
    standing.elected("a", 10, "tcp://a")
    roles = (("i", "both"),)
    assert standing.heard(RouterPresence("b", "1", 1, (), 11, roles))
    assert (standing.leader, standing.epoch, standing.roles) == ("b", 11, roles)
    assert standing.address == ""
    assert standing.describe().startswith("b does, at an address that is not known yet")
    standing.elected("b", 11, "tcp://b")
    assert standing.describe() == "b at tcp://b does: ask there"
    assert not standing.heard(RouterPresence("a", "1", 1, (), 10, (("i", "decode"),)))
    standing.elected("a", 10, "tcp://a")
    assert (standing.leader, standing.address, standing.roles) == ("b", "tcp://b", roles)
    assert standing.num_stale == 1
    assert standing.heard(RouterPresence("c", "1", 1))
    assert standing.heard(RouterPresence("b", "1", 2))  # it stepped down
    assert (standing.leader, standing.epoch) == ("", 11)
    standing.elected("b", 11, "tcp://b")
    standing.vacant()
    assert (standing.leader, standing.epoch) == ("", 11)


def test_a_leader_whose_word_of_before_comes_late_keeps_its_address():
    standing = Standing()
    standing.elected("a", 10, "tcp://a")
    assert standing.heard(RouterPresence("a", "1", 1))  # said before its claim was answered
    assert standing.leader == ""
    assert standing.heard(RouterPresence("a", "1", 2, leader_epoch=10))
    assert standing.describe() == "a at tcp://a does: ask there"
    assert standing.heard(RouterPresence("b", "1", 1, leader_epoch=11))
    assert standing.address == ""
    assert standing.heard(RouterPresence("a", "1", 3, leader_epoch=12))
    assert (standing.leader, standing.address) == ("a", "")


def test_an_epoch_that_anybody_heard_of_ends_lower_ones():
    standing = Standing()
    standing.elected("a", 5, "tcp://a")  # as a registry that lost its data names it
    assert standing.heard(RouterPresence("b", "1", 1, highest_epoch=5))
    assert standing.leader == "a"
    assert standing.heard(RouterPresence("b", "1", 2, highest_epoch=9))
    assert (standing.leader, standing.epoch) == ("", 9)
    assert not standing.heard(RouterPresence("a", "1", 1, leader_epoch=5, highest_epoch=5))
    assert standing.num_stale == 1
    standing.elected("a", 5, "tcp://a")
    assert standing.leader == ""
    standing.elected("b", 12, "tcp://b")
    assert (standing.leader, standing.epoch, standing.address) == ("b", 12, "tcp://b")
