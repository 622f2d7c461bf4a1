"""A successor at an address is no forger; who says its own words between others' is one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol.bus import DaemonHeartbeat, InstanceHeartbeat, SnapshotOfBlocks
from xllm.router.bus_words import BusWords

HANDOVER_S = 20.0
NOTHING = (None, 0)


def beat(name, incarnation="1"):
    return InstanceHeartbeat(name, incarnation, 1, "ready")


def foreign(words, word, now=0.0):
    return words.foreign(word, now, may_be_heard=not isinstance(word, SnapshotOfBlocks))


def test_a_successor_that_is_registered_later_is_no_forger():
    words = BusWords(HANDOVER_S)
    assert words.known(beat("went")) == NOTHING
    for now in (1.0, HANDOVER_S, 1.0 + HANDOVER_S):
        assert foreign(words, beat("came"), now) == NOTHING
    assert words.known(beat("came")) == NOTHING  # the registry told of it
    assert words.known(beat("came")) == NOTHING
    assert foreign(words, DaemonHeartbeat("d", "1", 1), 1e6) == NOTHING  # and then of another
    assert not words.is_forged


def test_who_speaks_before_and_after_said_what_was_between():
    words = BusWords(HANDOVER_S)
    words.known(beat("evil"))
    assert foreign(words, beat("good")) == NOTHING
    assert foreign(words, beat("other")) == NOTHING
    assert words.known(beat("evil")) == (beat("good"), 2)
    assert words.is_forged
    assert foreign(words, beat("good")) == (None, 1)  # named once, counted each time
    assert words.known(beat("evil")) == NOTHING


def test_the_same_name_under_another_incarnation_is_another_process():
    words = BusWords(HANDOVER_S)
    words.known(beat("a", "1"))
    foreign(words, beat("b"))
    assert words.known(beat("a", "2")) == NOTHING
    assert not words.is_forged


def test_who_never_says_an_own_word_is_waited_for_as_long_as_a_record_may_stand():
    words = BusWords(HANDOVER_S)
    assert foreign(words, beat("good"), 5.0) == NOTHING
    assert foreign(words, beat("good"), 5.0 + HANDOVER_S) == NOTHING
    assert foreign(words, beat("good"), 5.1 + HANDOVER_S) == (beat("good"), 3)


def test_no_time_passes_while_the_registry_tells_nothing():
    words = BusWords(HANDOVER_S)
    foreign(words, beat("came"), 0.0)
    words.wait(1000.0)
    assert foreign(words, beat("came"), 1000.0 + HANDOVER_S) == NOTHING
    assert foreign(words, beat("came"), 1000.1 + HANDOVER_S) == (beat("came"), 3)


def test_what_is_said_on_no_bus_is_no_successors():
    words = BusWords(HANDOVER_S)
    foreign(words, beat("b"))
    assert foreign(words, SnapshotOfBlocks("a", "1", 1)) == (beat("b"), 2)


@given(st.lists(st.sampled_from("abcx"), max_size=30))
def test_processes_one_after_the_other_are_never_forgers(order):
    """Each speaks for a while, first as nobody who is registered, and never again: whoever is told
    of, and whenever, no word is counted."""
    words = BusWords(HANDOVER_S)
    for number, name in enumerate(order):
        one = beat(name, str(number))
        assert foreign(words, one) == NOTHING
        if name != "x":  # which ends before it is registered
            assert words.known(one) == words.known(one) == NOTHING


@given(st.lists(st.sampled_from("ef"), max_size=30))
def test_each_forged_word_is_counted_once(said):
    """e: the evil one's own word, f: another's."""
    words, counted = BusWords(HANDOVER_S), 0
    for one in ["e", *said, "e"]:
        counted += (words.known(beat("evil")) if one == "e" else foreign(words, beat("good")))[1]
    assert counted == said.count("f")
    assert words.is_forged == bool(counted)
