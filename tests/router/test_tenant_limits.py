"""Token buckets, tenants' limits and their file."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import ConfigError, InvalidRequestError, RateLimitError
from xllm.protocol.bus import TenantUse
from xllm.router.admission.bucket import TokenBucket
from xllm.router.admission.limits_file import read_limits
from xllm.router.admission.shared_use import HEARD_S, MAX_TOLD
from xllm.router.admission.tenants import MAX_RETRY_S, TenantGate, TenantLimits

NONE = TenantLimits()


@given(
    st.floats(0.1, 1000),
    st.floats(1, 1000),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 300)), max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate_and_its_burst(rate, burst, asks):
    bucket = TokenBucket(rate, burst, 0.0)
    now = given_away = 0.0
    for pause, amount in asks:
        now += pause
        wait = bucket.wait_s(amount, now)
        if bucket.take(amount, now):
            assert wait == 0
            given_away += amount
        else:
            assert wait > 0
        bucket.check()
        assert given_away <= burst + rate * now + 1e-6


@given(st.floats(0.1, 1000), st.floats(1, 1000), st.floats(0, 1))
def test_what_is_waited_for_is_there_then(rate, burst, share):
    bucket = TokenBucket(rate, burst, 0.0)
    assert bucket.take(burst, 0.0)
    amount = burst * share
    wait = bucket.wait_s(amount, 0.0)
    assert bucket.wait_s(amount, wait + 1e-6) == pytest.approx(0, abs=1e-6)
    assert bucket.wait_s(burst * 1.01, wait) == math.inf


def test_debts_are_worked_off_first():
    bucket = TokenBucket(1.0, 10, 0.0)
    bucket.charge(25, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(16)
    assert not bucket.take(1, 15.0)
    assert bucket.take(1, 16.0)
    assert not bucket.is_full(20.0)
    assert bucket.is_full(40.0)


def test_a_bucket_does_not_mind_a_clock_that_stands():
    bucket = TokenBucket(1.0, 2, 5.0)
    assert bucket.take(2, 5.0)
    assert not bucket.take(1, 4.0)


def refused(gate: TenantGate, tenant: str, now: float) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        gate.enter(tenant, now)
    return caught.value


def test_requests_a_minute_come_back_evenly():
    gate = TenantGate({"a": TenantLimits(requests_per_minute=60)}, NONE)
    for _ in range(60):
        assert gate.enter("a", 0.0)
    error = refused(gate, "a", 0.5)
    assert error.retry_after_s == pytest.approx(0.5)
    assert (error.code, error.http_status) == ("rate_limit_exceeded", 429)
    assert gate.enter("a", 1.0)
    refused(gate, "a", 1.0)
    assert not gate.enter("b", 1.0)  # has no limit, and is not remembered
    assert gate.num_known == 1


def test_open_requests_are_counted_until_they_leave():
    gate = TenantGate({}, TenantLimits(concurrency=2))
    assert gate.enter("a", 0.0)
    assert gate.enter("a", 0.0)
    assert gate.enter("b", 0.0)
    for _ in range(64):
        gate.leave("b", 0, 8.0, 1.0)
        gate.enter("b", 1.0)
    error = refused(gate, "a", 1.0)
    assert error.retry_after_s == pytest.approx(4, rel=0.1)  # requests last 8 s, two run
    gate.leave("a", 0, 1.0, 2.0)
    assert gate.enter("a", 2.0)


def test_tokens_are_spent_by_the_prompt_and_charged_at_the_end():
    gate = TenantGate({}, TenantLimits(tokens_per_minute=600))
    assert gate.enter("a", 0.0)
    gate.spend("a", 500, 0.0)
    assert gate.enter("a", 0.0)
    with pytest.raises(RateLimitError) as caught:
        gate.spend("a", 200, 0.0)
    assert caught.value.retry_after_s == pytest.approx(10)
    gate.leave("a", 0, 1.0, 0.0)
    gate.leave("a", 300, 1.0, 0.0)  # 200 in debt now
    with pytest.raises(RateLimitError) as caught:
        gate.spend("a", 100, 0.0)
    assert caught.value.retry_after_s == pytest.approx(30)
    with pytest.raises(InvalidRequestError) as never:
        gate.spend("a", 601, 0.0)
    assert never.value.param == "prompt"
    gate.spend("b", 1000, 0.0)  # never entered: not counted


def test_a_debt_is_waited_for_as_long_as_it_takes():
    gate = TenantGate({}, TenantLimits(requests_per_minute=60, tokens_per_minute=600))
    assert gate.enter("a", 0.0)
    gate.leave("a", 6000, 1.0, 0.0)  # 5400 in debt: nine minutes, and one for the next 600
    with pytest.raises(RateLimitError) as caught:
        gate.spend("a", 600, 0.0)
    assert caught.value.retry_after_s == pytest.approx(600)
    gate.spend("a", 600, 600.0)


def test_what_goes_on_here_was_let_in_elsewhere():
    limits = TenantLimits(requests_per_minute=2, tokens_per_minute=60, concurrency=5)
    gate = TenantGate({}, limits)
    gate.heard("r2", [TenantUse("a", 5, 0, 0)], 0.0)
    refused(gate, "a", 0.0)
    for _ in range(4):
        assert gate.enter("a", 0.0, resumed=True)  # the last two on credit
    refused(gate, "a", 0.0)
    with pytest.raises(RateLimitError):
        gate.enter("a", 0.0, resumed=True)
    gate.spend("a", 60, 0.0)
    gate.spend("a", 60, 0.0, resumed=True)
    for resumed in (True, False):
        with pytest.raises(RateLimitError) as caught:
            gate.spend("a", 1, 0.0, resumed=resumed)
    assert caught.value.retry_after_s == pytest.approx(61)
    with pytest.raises(InvalidRequestError):
        gate.spend("a", 61, 0.0, resumed=True)
    assert gate.enter("a", 60.0, resumed=True)
    with pytest.raises(RateLimitError, match="5 requests"):
        gate.enter("a", 600.0, resumed=True)


def pass_on(speaker: TenantGate, name: str, hearer: TenantGate, now: float) -> None:
    hearer.heard(name, speaker.word(), now)


def test_open_requests_at_other_routers_count():
    first, second = (TenantGate({}, TenantLimits(concurrency=3)) for _ in range(2))
    assert first.enter("a", 0.0)
    assert first.enter("a", 0.0)
    pass_on(first, "r1", second, 0.1)
    assert second.enter("a", 0.2)
    refused(second, "a", 0.2)
    assert second.enter("b", 0.2)
    first.leave("a", 0, 1.0, 0.3)
    pass_on(first, "r1", second, 0.3)
    assert second.enter("a", 0.3)
    refused(second, "a", 0.3)
    assert second.enter("a", 0.3 + HEARD_S + 0.01), "who is silent has nothing open"
    second.forget(5.0)
    refused(second, "a", 5.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 3), st.integers(1, 40)), max_size=80))
def test_what_is_used_at_one_router_is_gone_at_all(events):
    """All that three routers let in is at most what one may, where each hears of all at once."""
    limits = TenantLimits(requests_per_minute=60, tokens_per_minute=600)
    gates = [TenantGate({}, limits) for _ in range(3)]
    now = num_requests = num_tokens = 0.0
    for place, pause, tokens in events:
        now += pause
        gate = gates[place]
        try:
            gate.enter("a", now)
            num_requests += 1
            gate.spend("a", tokens, now)
            num_tokens += tokens
        except RateLimitError:
            pass
        word = gate.word()
        for other in gates:
            if other is not gate:
                other.heard(f"r{place}", word, now)
        assert num_requests <= 60 + now + 1e-6
        assert num_tokens <= 600 + 10 * now + 1e-6


def test_only_limited_tenants_are_told_of_and_each_use_once():
    gate = TenantGate({"free": NONE}, TenantLimits(tokens_per_minute=600))
    gate.enter("free", 0.0)
    gate.enter("a", 0.0)
    gate.spend("a", 7, 0.0)
    assert gate.word() == (TenantUse("a", 1, 1, 7),)
    assert gate.word() == (TenantUse("a", 1, 0, 0),)
    gate.leave("a", 5, 1.0, 0.0)
    assert gate.word() == (TenantUse("a", 0, 0, 5),)
    assert gate.word() == ()
    gate.heard("r2", [TenantUse("free", 9, 9, 9), TenantUse("a", 0, -5, -5)], 0.0)
    assert gate.word() == (), "what was heard is not told on"
    assert gate.num_known == 1


def test_a_word_is_bounded_and_nothing_is_kept_back_forever():
    gate = TenantGate({}, TenantLimits(requests_per_minute=60))
    for number in range(3 * MAX_TOLD):
        gate.enter(f"t{number}", 0.0)
        gate.leave(f"t{number}", 0, 1.0, 0.0)
    words = [gate.word() for _ in range(4)]
    assert [len(word) for word in words] == [MAX_TOLD] * 3 + [0]
    assert len({one.tenant for word in words for one in word}) == 3 * MAX_TOLD


def test_idle_tenants_are_forgotten_and_owing_ones_are_not():
    gate = TenantGate({}, TenantLimits(tokens_per_minute=60))
    for tenant in ("a", "b"):
        gate.enter(tenant, 0.0)
    gate.leave("a", 600, 1.0, 0.0)
    gate.leave("b", 0, 1.0, 0.0)
    gate.forget(1.0)
    assert gate.num_known == 1
    gate.forget(700.0)
    assert gate.num_known == 0
    assert MAX_RETRY_S <= 60


GOOD = """
[alice]
requests_per_minute = 600
concurrency = 8
["zmq peer"]
tokens_per_minute = 0
"""


def test_the_file_of_limits(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text(GOOD)
    assert read_limits(str(path), TenantLimits(1, 2, 3)) == {
        "alice": TenantLimits(600, 2, 8),
        "zmq peer": TenantLimits(1, 0, 3),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice = 3", "tenant alice: a table"),
        ("[alice]\nrequests = 3", "tenant alice: requests is none of"),
        ("[alice]\nconcurrency = -1", "concurrency must be from 0"),
        ("[alice]\nconcurrency = 1.5", "concurrency must be from 0"),
        ("[alice]\nconcurrency = true", "concurrency must be from 0"),
        ("[alice", "is no TOML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, words):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_limits(str(path), NONE)
    assert caught.value.param == "admission.tenant_limits_file"
    with pytest.raises(ConfigError, match=r"admission\.tenant_limits_file: .*No such file"):
        read_limits(str(tmp_path / "none"), NONE)
