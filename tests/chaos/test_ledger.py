"""The ledger and the comparison: they must find what is wrong, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cli.chaos.comparing import EQUAL, Differences, compare
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.load import RECALLED, _Source
from xllm.cli.chaos.oracle import expected_streams
from xllm.cli.chaos.verdict import Injection, Limits, calm_in, judge, section
from xllm.cli.model_source import demo_model_path
from xllm.cli.supervision import Quarantine, Restart, RestartPolicy
from xllm.protocol.sampling import SamplingParams

STREAM = tuple(range(100, 130))


@pytest.mark.parametrize(
    ("got", "found"),
    [
        (STREAM, EQUAL),
        (STREAM[:7] + STREAM[8:], Differences(lost=1)),
        (STREAM[:7] + STREAM[6:], Differences(duplicated=1)),
        (STREAM[:7] + STREAM[4:7] + STREAM[7:], Differences(duplicated=3)),
        ((*STREAM[:7], STREAM[8], STREAM[7], *STREAM[9:]), Differences(reordered=1)),
        ((*STREAM[:7], 5, *STREAM[8:]), Differences(lost=1, foreign=1)),
        ((*STREAM[:7], 5, *STREAM[7:]), Differences(foreign=1)),
        ((), Differences(lost=30)),
    ],
)
def test_each_kind_of_difference(got, found):
    assert compare(STREAM, got) == found


def test_a_failed_stream_may_stop_but_not_differ():
    assert compare(STREAM, STREAM[:9], ended=False) == EQUAL
    assert compare(STREAM, STREAM[1:9], ended=False)
    assert compare("naïve", "na\ufffd", ended=False) == EQUAL
    assert compare("naïve", "na\ufffd") == Differences(lost=3, foreign=1)
    assert compare(STREAM, (*STREAM, 7), ended=False) == Differences(foreign=1)


@given(st.lists(st.integers(0, 20), max_size=40), st.lists(st.integers(0, 20), max_size=40))
def test_only_equal_streams_are_equal(expected, got):
    assert bool(compare(expected, got)) == (expected != got)
    assert compare("".join(map(chr, expected)), "".join(map(chr, expected))) == EQUAL


def test_pauses_and_moves():
    ledger = Ledger()
    key = ledger.opened("zmq", (STREAM,), 0.0)
    ledger.heard(key, 0, STREAM[:10], 1.0, attempt=1)
    ledger.heard(key, 0, STREAM[10:20], 1.05, attempt=1)
    assert [one.key for one in ledger.streaming(10)] == [key]
    assert ledger.streaming(11) == []
    ledger.heard(key, 0, STREAM[20:], 1.4, attempt=2)
    ledger.finished(key, 1.5)
    ledger.check()
    assert ledger.num_interrupted == 1
    assert not ledger.differences
    record = ledger.touching(1.2, 2.0)[0]
    assert record.longest_pause(1.2, 2.0).length == pytest.approx(0.35)
    assert record.longest_pause(1.41, 2.0) is None


@pytest.mark.parametrize(
    ("drawn_from", "waste"),
    [
        (None, 2.5),  # an instance had them, or they travelled
        (4.1, 1.5),  # all of them were drawn, and then nothing came for a while
        (6.1, 2.1),  # no longer ago than this: that is all that drawing can have taken
    ],
)
def test_a_stream_that_is_posted_again_may_be_drawn_again(drawn_from, waste):
    """The tokens of a second: that is what drawing them again takes, at most."""
    ledger = Ledger()
    key = ledger.opened("http", (STREAM,), 0.0)
    for index in range(21):
        ledger.heard(key, 0, STREAM[index : index + 1], 3.0 + 0.05 * index)
    ledger.heard(key, 0, STREAM[21:], 6.5, 1, drawn_from)
    pause = ledger.open[key].longest_pause(6.0, 8.0)
    assert pause.length == pytest.approx(2.5)
    assert pause.waste == pytest.approx(waste)


def test_the_head_of_an_answer_says_whether_it_is_drawn_again():
    for headers, drawn in (
        ({RECALLED: "21"}, False),
        ({RECALLED: "0"}, True),
        ({"x-request-id": "7"}, True),  # a router that does not say
    ):
        source = _Source()
        source.began(headers)
        assert (source.drawn_from is not None) == drawn


def test_a_second_drawing_is_as_long_as_the_tokens_took():
    """The pause of the first one is no part of it."""
    ledger = Ledger()
    key = ledger.opened("http", (STREAM,), 0.0)
    for index in range(10):
        ledger.heard(key, 0, STREAM[index : index + 1], 1.0 + 0.05 * index)
    ledger.heard(key, 0, STREAM[10:11], 2.45, 1, 1.5)
    ledger.heard(key, 0, STREAM[11:], 3.45, 2, 2.5)
    assert [one.redraw for one in ledger.open[key].pauses] == pytest.approx([0.45, 0.45])
    assert [one.waste for one in ledger.open[key].pauses] == pytest.approx([0.55, 0.55])


def test_an_open_stream_pauses_until_now():
    ledger = Ledger()
    key = ledger.opened("http", ("abc",), 0.0)
    ledger.heard(key, 0, "a", 1.0)
    assert ledger.open[key].longest_pause(2.0, 4.0).length == 3.0


def test_words_after_the_end_are_counted():
    ledger = Ledger()
    key = ledger.opened("zmq", (STREAM,), 0.0)
    ledger.failed(key, "unavailable", 1.0)
    ledger.heard(key, 0, STREAM, 1.0)
    ledger.finished(key, 1.0)
    assert ledger.num_after_end == 2
    assert ledger.failures == {"unavailable": 1}
    ledger.check()


def test_differing_requests_are_named():
    ledger = Ledger()
    for wrong in (False, True):
        key = ledger.opened("zmq", (STREAM, STREAM), 0.0)
        ledger.heard(key, 0, STREAM[wrong:], 1.0)
        ledger.heard(key, 1, STREAM[wrong:], 1.0)
        ledger.finished(key, 1.0)
    assert ledger.differing == [
        "request 2 over zmq, ended with success; choice 0 at 0 of 30: [100, 101, 102, 103, 104] is "
        "[101, 102, 103, 104, 105]; choice 1 at 0 of 30: [100, 101, 102, 103, 104] is "
        "[101, 102, 103, 104, 105]"
    ]
    assert ledger.differences == Differences(lost=2)


def test_a_broken_promise_is_found():
    limits = Limits(gap_p50_ms=300, gap_max_ms=1000, detect_ms=1000)
    kept = Injection("F01", "a", 1.0, 32, gaps_s=[0.1, 0.2], longest_s=0.5, detect_s=0.01)
    assert all(one.passed for one in judge(limits, [kept], 1.0))
    slow = Injection("F01", "a", 1.0, 32, gaps_s=[0.5, 0.5], longest_s=1.5, detect_s=2.0)
    assert [one.name for one in judge(limits, [slow], 1.0) if not one.passed] == [
        "gap_p50_ms", "gap_max_ms", "detect_ms",
    ]  # fmt: skip
    assert all(one.passed for one in judge(limits, [slow], 3.0))
    web = Injection("F01", "a", 1.0, 32, longest_s=0.5, http_gaps_s=[3.0], http_longest_s=1.5)
    assert [one.name for one in judge(limits, [web], 1.0) if not one.passed] == ["http_gap_max_ms"]
    own = dataclasses.replace(limits, http_gap_max_ms=2000)
    assert all(one.passed for one in judge(own, [web], 1.0))
    assert section("t", own, [web], 1.0)["interrupted"] == 1
    failing = Injection("F01", "a", 1.0, 32, failures={"unavailable": 1})
    found = section("t", limits, [failing], 1.0)
    assert not found["passed"]
    assert section("t", Limits(may_fail=True), [failing], 1.0)["passed"]
    unseen = Injection("F01", "a", 1.0, 32, broken=["nobody noticed"])
    assert not section("t", limits, [unseen], 1.0)["passed"]


def test_the_oracle_depends_on_all_of_a_request():
    model = demo_model_path()
    one = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=2)
    streams = expected_streams(model, (40, 41, 42), one)
    assert [len(stream) for stream in streams] == [20, 20]
    assert streams[0] != streams[1]
    assert streams == expected_streams(model, (40, 41, 42), one)
    assert streams != expected_streams(model, (40, 42, 41), one)


def test_nobody_is_ended_so_often_that_the_launcher_leaves_it_out():
    ends = [Injection("F01", "a", at, 0, ended="a") for at in (0.0, 10.0, 20.0)]
    others = [Injection("F04", "a", 21.0, 0), Injection("F01", "b", 22.0, 0, ended="b")]
    assert calm_in([*ends, *others], 30.0) == 0
    ends.append(Injection("F01", "a", 25.0, 0, ended="a"))
    policy = RestartPolicy()
    for one in ends:
        policy.exited(-9, one.at, was_ready=True, needed=False)
    assert calm_in([*ends, *others], 30.0) == 30.0
    assert calm_in([*ends, *others], 60.0) == 0
    assert isinstance(policy.exited(-9, 60.0, was_ready=True, needed=False), Restart)
    assert isinstance(policy.exited(-9, 60.0, was_ready=True, needed=False), Quarantine)
