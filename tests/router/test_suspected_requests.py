"""Requests under which workers ended by themselves: suspected, alone, convicted or cleared."""

from __future__ import annotations

import pytest

from tests.router.fake_cluster import FakeCluster, in_loop
from tests.router.oracle import item, make, start, stream
from xllm.protocol.instance import PASSED_TOKENS, AdmitRequest, RequestEnded, TokenBatch
from xllm.protocol.sampling import SamplingParams
from xllm.router.state.instructions import Wish
from xllm.router.state.moves import MAX_DEATHS, MAX_MOVES


def die(state, *, shared: bool):
    return state.engine_ended(
        RequestEnded("r", state.attempt, "worker_lost", "signal 11", shared=shared)
    )


def suspected(n: int = 1):
    """A request that was in two steps under which workers ended, a token apart."""
    state = make(n=n)
    for attempt in range(1, MAX_DEATHS + 1):
        assert not start(state, f"instance-{attempt}").alone
        for choice in range(n):
            state.tokens(item(attempt - 1, attempt=attempt, choice=choice))
        assert Wish.PLACE in die(state, shared=True)
    return state


def test_a_request_that_alone_was_in_steps_under_which_two_workers_ended_takes_no_third():
    state = make()
    for attempt in range(1, MAX_DEATHS + 1):
        assert not start(state, f"instance-{attempt}").alone
        state.tokens(item(attempt - 1, attempt=attempt))
        said = die(state, shared=False)
    assert Wish.PLACE not in said
    assert said[-1].code == "engine_error"
    assert "died" in said[-1].message
    assert state.moves.is_convicted


def test_what_was_in_company_both_times_runs_alone_and_then_takes_no_fourth():
    state = suspected()
    assert state.moves.died_at == {"instance-1", "instance-2"}
    admit = start(state, "instance-3")
    assert admit.alone
    assert admit.outputs == (stream(0)[:2],)
    said = die(state, shared=False)
    assert said[-1].code == "engine_error"
    assert state.moves.is_convicted


def test_an_instance_that_keeps_none_alone_convicts_nobody():
    """One of another version, say: bounded as all attempts are."""
    state = suspected()
    for _ in range(MAX_MOVES - MAX_DEATHS):
        assert start(state).alone
        assert Wish.PLACE in die(state, shared=True)
    start(state)
    assert die(state, shared=True)[-1].code == "engine_error"
    assert not state.moves.is_convicted


@pytest.mark.parametrize("how", ["refused", "lost", "unreached", "blameless"])
def test_it_stays_alone_until_it_has_passed(how):
    state = suspected()
    admit = start(state)
    state.tokens(item(2, attempt=admit.attempt))
    if how == "refused":
        state.engine_ended(RequestEnded("r", admit.attempt, "unavailable", "the worker ended"))
    elif how == "lost":
        state.instance_lost("a")
    elif how == "unreached":
        state.unreached("a", admit.attempt, "unavailable")
    else:
        state.engine_ended(RequestEnded("r", admit.attempt, "worker_lost", "9", blameless=True))
    admit = start(state)
    assert admit.alone
    state.tokens(item(3, attempt=admit.attempt))
    state.instance_lost("a")
    assert not start(state).alone
    assert state.moves.num_deaths == 0


@pytest.mark.parametrize("num_tokens", [1, 2, 20])
def test_a_death_that_was_survived_does_not_add_to_a_later_one(num_tokens):
    state = make(max_tokens=60)
    start(state)
    state.tokens(item(0, 3))
    assert Wish.PLACE in die(state, shared=True)
    start(state)
    state.tokens(item(3, num_tokens, attempt=2))
    assert Wish.PLACE in die(state, shared=True)
    is_past = num_tokens >= PASSED_TOKENS
    assert state.moves.num_deaths == (1 if is_past else 2)
    assert start(state).alone != is_past


def test_a_death_that_was_survived_is_forgotten_whatever_loss_comes_next():
    state = make(max_tokens=60)
    start(state)
    assert Wish.PLACE in die(state, shared=True)
    start(state)
    state.tokens(item(0, 5, attempt=2))
    state.instance_lost("a")
    assert not start(state).alone
    assert state.moves.num_deaths == 0
    assert state.moves.died_at == frozenset()


def test_what_has_passed_is_suspected_anew_from_the_start():
    state = suspected()
    admit = start(state)
    state.tokens(item(2, 2, attempt=admit.attempt))
    assert Wish.PLACE in die(state, shared=False)  # of something else, where nobody else was
    assert state.moves.num_deaths == 1
    assert not start(state).alone


def test_every_choice_must_pass_or_have_ended():
    state = suspected(n=3)
    admit = start(state)
    state.tokens(item(2, 2, attempt=admit.attempt, choice=0))
    state.tokens(item(2, 1, attempt=admit.attempt, choice=1, finish_reason="length"))
    state.tokens(item(2, 1, attempt=admit.attempt, choice=2))
    state.instance_lost("a")
    admit = start(state)
    assert admit.alone
    state.tokens(item(3, 1, attempt=admit.attempt, choice=2))
    state.instance_lost("a")
    assert not start(state).alone


def test_a_master_that_broke_with_others_convicts_nobody_and_one_that_had_no_other_does():
    """What is open where a master breaks ends as what is in a step under which a worker ended."""
    state = make()
    start(state)
    assert Wish.PLACE in die(state, shared=True)
    start(state)
    assert Wish.PLACE in die(state, shared=True)
    assert start(state).alone
    assert die(state, shared=False)[-1].code == "engine_error"


@pytest.mark.parametrize("code", ["engine_error", "internal_error"])
def test_a_step_that_failed_as_a_whole_costs_the_one_that_was_alone_in_it(code):
    state = make()
    for attempt in (1, 2):
        assert not start(state).alone
        word = RequestEnded("r", attempt, code, "no memory", shared=True)
        assert Wish.PLACE in state.engine_ended(word)
    assert start(state).alone
    said = state.engine_ended(RequestEnded("r", 3, code, "no memory"))
    assert (said[-1].code, said[-1].message) == (code, "no memory")


@in_loop
async def test_suspects_are_spread_and_the_others_run_where_they_may():
    cluster = FakeCluster("a", "b")
    asked = [cluster.ask(max_tokens=30) for _ in range(6)]

    def end_all(name):
        placed = {word.request_id: (at, word) for at, word in cluster.links.sent}
        words = [word for at, word in placed.values() if at == name]
        ended = [
            RequestEnded(word.request_id, word.attempt, "worker_lost", shared=True)
            for word in words
        ]
        del cluster.links.sent[:]
        cluster.service.instance_says(name, TokenBatch((), tuple(ended)))
        return {word.request_id for word in words}

    suspects = end_all("a")
    assert len(suspects) == 3
    assert not any(word.alone for word in cluster.links.admits())
    cluster.beat("a")  # its worker is back
    cluster.join("c")
    for request_id, _ in asked:  # where all of them are by now
        if request_id not in suspects:
            cluster.links.sent.append(("b", AdmitRequest(request_id, 1, "m", (), SamplingParams())))
    assert len(end_all("b")) == 6
    alone = {word.request_id: name for name, word in cluster.links.sent if word.alone}
    assert set(alone) == suspects
    assert sorted(alone.values()) == ["a", "a", "c"]  # two take turns there
    assert next(iter(alone.values())) == "a"  # it died there before
    others = {name for name, word in cluster.links.sent if not word.alone}
    assert "c" in others
    assert cluster.service.metrics.num_alone == 3
    [first, *_] = alone
    cluster.service.instance_says("a", TokenBatch((), (RequestEnded(first, 3, "worker_lost"),)))
    [failed] = [sink.last for request_id, sink in asked if request_id == first]
    assert failed.code == "engine_error"
    assert cluster.service.dispatcher.statistics().num_open == 5
    assert cluster.service.placement._num_suspects() == {"a": 1, "c": 1}
    [passed] = [request_id for request_id, name in alone.items() if name == "c"]
    cluster.say(passed, 0, "the quick brown", attempt=3)
    assert cluster.service.placement._num_suspects() == {"a": 1}  # it shares steps again
    for request_id in list(cluster.service.dispatcher.open):
        cluster.service.abort(request_id)
    assert not cluster.service.placement._suspects
    cluster.close()
