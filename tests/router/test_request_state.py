"""The life of a request: one terminal message, no token lost or told twice, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.oracle import STOPS, ServedLife, expected, item, make, model, start, stream
from xllm.protocol.generation import (
    LIFE_ATTEMPTS,
    RequestFailed,
    RequestFinished,
    ResumePoint,
    TokenDelta,
)
from xllm.protocol.instance import (
    CancelRequest,
    PromptScores,
    RequestEnded,
    TokenItem,
)
from xllm.protocol.sampling import SamplingParams, TokenLogprobs
from xllm.router.state.instructions import SendTo, Wish
from xllm.router.state.moves import MAX_MOVES, PATIENCE_S


class Client:
    """Puts a stream together, and fails where it does not fit."""

    def __init__(self, num_choices: int, given: tuple[tuple[int, ...], ...] = ()) -> None:
        self.ids = [list(ids) for ids in given] or [[] for _ in range(num_choices)]
        self.texts = [""] * num_choices
        self.reasons = [""] * num_choices
        self.terminal: RequestFinished | RequestFailed | None = None

    def hear(self, message) -> None:
        assert self.terminal is None, f"{message} after the terminal message"
        assert message.id == 5
        if not isinstance(message, TokenDelta):
            self.terminal = message
            return
        assert not self.reasons[message.choice]
        assert message.first_index == len(self.ids[message.choice])
        self.ids[message.choice] += message.token_ids
        self.texts[message.choice] += message.text
        self.reasons[message.choice] = message.finish_reason


class Life(ServedLife):
    """One life of a request, whose words the client hears at once."""

    def __init__(self, state, num_tokens, client, begun=(Wish.PLACE,)) -> None:
        self.client = client
        super().__init__(state, num_tokens, begun)

    def tell(self, message) -> None:
        self.client.hear(message)


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(STOPS),
    st.booleans(),
    st.sampled_from([0.0, 0.02]),
)
def test_any_life_ends_once_with_the_right_tokens(data, n, num_tokens, stop, streams, hold_s):
    state = make(streams, hold_s, n=n, stop=stop, max_tokens=num_tokens)
    client = Client(n)
    life = Life(state, num_tokens, client)
    master = life.master
    old: list = []
    for _ in range(400):
        if client.terminal:
            break
        event = data.draw(st.sampled_from(["step"] * 6 + ["say"] * 6 + ["flush", "repeat", "lose"]))
        if event == "step" and master.done:
            attempt = data.draw(st.sampled_from(sorted(master.done)))
            choice = data.draw(st.integers(0, n - 1))
            master.step(attempt, choice, data.draw(st.integers(1, 6)))
        elif event == "say" and master.words:
            word = master.words.pop(0)
            old.append(word)
            life.hear(word)
        elif event == "flush" and life.wished:
            life.flush()
        elif event == "repeat" and old:
            word = data.draw(st.sampled_from(old))
            if isinstance(word, TokenItem):
                life.hear(word)
        elif event == "lose" and state.moves.num_lost < MAX_MOVES:
            if data.draw(st.booleans()) and master.words:
                master.words.pop(data.draw(st.integers(0, len(master.words) - 1)))
            if data.draw(st.booleans()) and state.instance:
                killed = RequestEnded("r", state.attempt, "worker_lost", "", blameless=True)
                life.carry_out(state.engine_ended(killed))
            else:
                life.carry_out(state.instance_lost("a"))
    if client.terminal is None:
        life.carry_out(state.cancel("aborted", "enough"))
    life.wished = False
    for word in [*old, *master.words]:  # late words
        life.hear(word)
        assert not life.wished
    for nothing in (state.flush(), state.cancel("aborted", ""), state.expire(1e9)):
        life.carry_out(nothing)
    assert client.terminal is not None
    check_told(state, client, streams, num_tokens)


def check_told(state, client, streams, num_tokens) -> None:
    sampling = state.spec.sampling
    finished = isinstance(client.terminal, RequestFinished)
    for choice in range(sampling.n):
        ids, text = expected(choice, num_tokens, sampling)
        if finished and streams:
            assert (client.ids[choice], client.texts[choice]) == (ids, text)
            assert client.reasons[choice] == client.terminal.choices[choice].finish_reason
        elif finished:
            result = client.terminal.choices[choice]
            assert (list(result.token_ids), result.text) == (ids, text)
        else:
            assert client.ids[choice] == ids[: len(client.ids[choice])]
            assert text.startswith(client.texts[choice])
    if finished:
        total = sum(len(expected(k, num_tokens, sampling)[0]) for k in range(sampling.n))
        assert client.terminal.usage.completion_tokens == total
        assert client.terminal.usage.prompt_tokens == 3


@given(st.integers(0, 20), st.sampled_from([(), ("fox",)]), st.booleans())
def test_a_resumed_stream_goes_on_where_the_client_was(have, stop, streams):
    whole = expected(0, 20, SamplingParams(stop=stop, max_tokens=20))
    have = min(have, len(whole[0]))
    state = make(streams, stop=stop)
    given_ids = (tuple(whole[0][:have]),)
    client = Client(1, given_ids if streams else ())
    begun = state.resume(ResumePoint(attempt=3, outputs=given_ids, seed=7))
    life = Life(state, 20, client, begun)
    master = life.master
    while client.terminal is None:
        if master.words:
            life.hear(master.words.pop(0))
            life.flush()
        else:
            assert list(master.done) == [LIFE_ATTEMPTS]
            master.step(LIFE_ATTEMPTS, 0, 3)
    before = model().output(SamplingParams(stop=stop), ()).feed(given_ids[0])
    if streams:
        assert (client.ids[0], before + client.texts[0]) == whole
        assert client.reasons == [client.terminal.choices[0].finish_reason]
    else:
        result = client.terminal.choices[0]
        assert (list(result.token_ids), result.text) == whole
    assert client.terminal.usage.completion_tokens == len(whole[0])


def test_first_token_at_once_then_held():
    state = make()
    start(state)
    [first] = state.tokens(item(0))
    assert isinstance(first, TokenDelta)
    assert list(state.tokens(item(1))) == [Wish.FLUSH]
    assert not state.tokens(item(2, 3))
    [delta] = state.flush()
    assert (delta.first_index, len(delta.token_ids)) == (1, 4)
    assert not state.flush()
    assert list(state.tokens(item(5))) == [Wish.FLUSH]


def test_no_hold_is_a_message_a_token():
    state = make(hold_s=0.0)
    start(state)
    for k in range(5):
        [delta] = state.tokens(item(k))
        assert delta.token_ids == stream(0)[k : k + 1]


def test_a_stop_id_counts_and_is_not_shown():
    [x] = model().encode("x")
    state = make(False, stop_token_ids=(x,))
    start(state)
    word = TokenItem("r", 0, 1, 0, (*stream(0)[:4], x), "stop", x)
    assert not state.tokens(word)
    [end] = state.engine_ended(RequestEnded("r", 1, cached_tokens=3))
    [choice] = end.choices
    assert choice.text == model().decode(stream(0)[:4])
    assert choice.token_ids[-1] == x
    assert (choice.finish_reason, choice.stop_reason) == ("stop", x)
    assert (end.usage.completion_tokens, end.usage.cached_tokens, end.seed) == (5, 3, 7)


def test_an_end_of_text_has_no_stop_reason():
    state = make(False)
    start(state)
    state.tokens(TokenItem("r", 0, 1, 0, (*stream(0)[:2], 9), "stop", 9))
    [end] = state.engine_ended(RequestEnded("r", 1))
    assert end.choices[0].stop_reason is None


def test_a_stop_string_cancels_its_choice_and_drops_what_came_beyond():
    state = make(True, 0.0, n=2, stop=("fox",))
    start(state)
    cancel, delta = state.tokens(item(0, 12))
    assert cancel == SendTo("a", CancelRequest("r", 1, 0))
    assert (delta.finish_reason, delta.text) == ("stop", "the quick brown ")
    assert not state.tokens(item(12, 3))
    assert state.choices[0].ids == list(delta.token_ids)
    assert not state.ended


def test_lost_tokens_move_the_request():
    state = make()
    start(state)
    state.tokens(item(0, 2))
    cancel, wish = state.tokens(item(3))
    assert cancel == SendTo("a", CancelRequest("r", 1))
    assert wish is Wish.PLACE
    admit = start(state, "b")
    assert (admit.attempt, admit.outputs) == (2, (stream(0)[:2],))
    assert not state.tokens(item(2, attempt=1))
    assert state.num_dropped == 1


def test_an_end_without_all_tokens_moves_the_request():
    state = make(n=2)
    start(state)
    state.tokens(item(0, 20, finish_reason="length"))
    state.tokens(item(0, 5, choice=1))
    _, wish = state.engine_ended(RequestEnded("r", 1))
    assert wish is Wish.PLACE
    admit, cancel = state.place((("both", "b"),), 0.0)
    assert admit.message.outputs == (stream(0)[:20], stream(1)[:5])
    assert cancel == SendTo("b", CancelRequest("r", 2, 0))  # that choice has ended


def test_a_refusal_moves_and_an_error_ends():
    state = make()
    start(state)
    assert list(state.engine_ended(RequestEnded("r", 1, "unavailable", "drains"))) == [Wish.PLACE]
    assert state.moves.avoid == {"a"}
    start(state, "b")
    [failed] = state.engine_ended(RequestEnded("r", 2, "engine_error", "broke", "x"))
    assert (failed.code, failed.message, failed.param) == ("engine_error", "broke", "x")
    assert failed.request_id == "r"


def test_no_instance_fails_a_new_request_and_holds_an_old_one():
    [failed] = make().unplaceable(0.0)
    assert (failed.code, failed.retry_after_ms) == ("unavailable", 1000)
    state = make()
    start(state)
    state.instance_lost("a")
    assert not state.unplaceable(10.0)
    assert not state.unplaceable(10.0 + PATIENCE_S)
    [failed] = state.unplaceable(10.1 + PATIENCE_S)
    assert failed.code == "unavailable"


def test_full_everywhere_is_overloaded():
    state = make()
    start(state)
    state.engine_ended(RequestEnded("r", 1, "overloaded", "full"))
    [failed] = state.unplaceable(0.0)
    assert failed.code == "overloaded"


def test_given_up_after_too_many_moves():
    state = make()
    for _ in range(MAX_MOVES):
        start(state)
        state.instance_lost("a")
    start(state)
    *_, failed = state.instance_lost("a")
    assert isinstance(failed, RequestFailed)


@pytest.mark.parametrize("by_worker", [True, False])
def test_deaths_that_others_brought_about_speak_against_no_request(by_worker):
    """Masters that are gone, and workers that somebody killed: moved on, as often as any loss."""
    state = make()
    for attempt in range(1, MAX_MOVES + 2):
        start(state, f"instance-{attempt}")
        state.tokens(item(attempt - 1, attempt=attempt))
        if by_worker:
            word = RequestEnded("r", attempt, "worker_lost", "signal 9", blameless=True)
            said = state.engine_ended(word)
        else:
            said = state.instance_lost(f"instance-{attempt}")
        assert (Wish.PLACE in said) == (attempt <= MAX_MOVES)
    assert state.moves.num_deaths == 0
    assert said[-1].code == "engine_error"
    assert "attempts" in said[-1].message


def test_what_was_refused_before_an_acceptance_is_forgotten():
    """Refused as full, accepted elsewhere, then lost: it waits for an instance, as any other."""
    state = make()
    start(state)
    state.engine_ended(RequestEnded("r", 1, "overloaded", "full"))
    assert state.moves.avoid == {"a"}
    start(state, "b")
    state.tokens(item(0, attempt=2))
    assert not state.moves.avoid
    state.instance_lost("b")
    assert not state.unplaceable(0.0)
    assert not state.ended


def test_with_tokens_it_waits_until_somebody_has_room():
    """Full everywhere is an answer to a new request, not to one that has begun."""
    state = make()
    start(state)
    state.tokens(item(0))
    state.instance_lost("a")
    now = 10.0
    for _ in range(3 * MAX_MOVES):
        admit = start(state, "b")
        state.engine_ended(RequestEnded("r", admit.attempt, "overloaded", "full"))
        assert not state.unplaceable(now)
        assert not state.moves.avoid  # everybody is asked again
        now += 0.1
    admit = start(state, "b")
    assert admit.outputs == (stream(0)[:1],)
    state.engine_ended(RequestEnded("r", admit.attempt, "overloaded", "full"))
    [*_, failed] = state.unplaceable(10.1 + PATIENCE_S)
    assert failed.code == "overloaded"


def test_an_attempt_that_never_left_is_a_refusal():
    state = make()
    start(state)
    assert not state.unreached("b", 1, "overloaded")
    assert not state.unreached("a", 2, "overloaded")
    assert list(state.unreached("a", 1, "overloaded")) == [Wish.PLACE]
    [failed] = state.unplaceable(0.0)
    assert failed.code == "overloaded"


def test_the_deadline_ends_it_and_tells_the_instance():
    state = make()
    start(state)
    state.tokens(item(0))
    state.tokens(item(1))
    assert not state.expire(99.9)
    delta, cancel, failed = state.expire(100.0)
    assert delta.token_ids == stream(0)[1:2]
    assert cancel == SendTo("a", CancelRequest("r", 1))
    assert failed.code == "deadline_exceeded"


def test_logprobs_go_with_their_tokens():
    state = make(True, stop=("fox",), logprobs=0)
    start(state)
    scores = tuple(TokenLogprobs(token_id=i, logprob=-1.0) for i in stream(0)[:12])
    _, delta = state.tokens(item(0, 12, logprobs=scores))
    assert tuple(one.token_id for one in delta.logprobs) == delta.token_ids


def test_prompt_logprobs_come_in_pieces():
    state = make(False, prompt_logprobs=0)
    start(state)
    one, two = (TokenLogprobs(token_id=k, logprob=-1.0) for k in (2, 3))
    state.prompt_word(PromptScores("r", 1, 1, (one,)))
    state.prompt_word(PromptScores("r", 1, 2, (two,)))
    state.prompt_word(PromptScores("r", 1, 3, (two,)))  # beyond the prompt: dropped
    state.tokens(TokenItem("r", 0, 1, 0, stream(0)[:1], "length"))
    [end] = state.engine_ended(RequestEnded("r", 1))
    assert end.prompt_logprobs == (None, one, two)


@pytest.mark.parametrize("bad", [-1, 1, 99])
def test_foreign_choices_are_dropped(bad):
    state = make()
    start(state)
    assert not state.tokens(TokenItem("r", bad, 1, 0, (1,)))
    assert state.num_dropped == 1
