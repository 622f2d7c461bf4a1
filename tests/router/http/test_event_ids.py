"""Ids of events: what they say, who may use them, and what is said of a stream that goes on."""

from __future__ import annotations

import hashlib
import json
from array import array

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import chat, sse_blocks
from tests.router.oracle import STOPS, ServedLife, make, stream
from xllm.errors import InvalidRequestError, PermissionDeniedError
from xllm.protocol.instance import TokenItem
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.front import Tenant
from xllm.router.http.completion_shape import CompletionShape
from xllm.router.http.event_ids import (
    MAX_ID_CHARS,
    EventSigner,
    EventStage,
    LastEvent,
    Place,
    Stream,
    body_digest,
    borders_of,
    proven,
    token_digest,
)
from xllm.router.http.shape import Envelope
from xllm.router.http.stream_writer import StreamWriter
from xllm.router.state.instructions import Wish

KEY = b"k" * 32
BODY = b'{"prompt": "hi"}'
STREAM = Stream("ab" * 16, 1234, 2**64 - 1, body_digest(BODY))
ANNA, BEN = Tenant("anna", b"1"), Tenant("ben", b"2")

PLACES = st.lists(
    st.tuples(
        st.integers(0, 1 << 20), st.sampled_from(EventStage), st.binary(min_size=8, max_size=8)
    ),
    min_size=1,
    max_size=130,
)


def signed(places, signer=None, has_usage=False) -> bytes:
    signer = signer or EventSigner(KEY, ANNA)
    payload = signer.head(STREAM, has_usage) + b"".join(place.encode() for place in places)
    return signer.sign(payload)


@settings(max_examples=50, deadline=None)
@given(PLACES, st.booleans())
def test_an_id_says_what_was_put_in_and_is_short(drawn, has_usage):
    places = tuple(Place(n, stage, digest if n else b"") for n, stage, digest in drawn)
    value = signed(places, has_usage=has_usage)
    assert len(value) <= 90 + 16 * len(places)
    assert len(value) < MAX_ID_CHARS
    assert value.isascii()
    read = EventSigner(KEY, ANNA).read(value, BODY, len(places))
    assert read == LastEvent(STREAM, places, has_usage)


@settings(max_examples=50, deadline=None)
@given(st.data(), PLACES)
def test_a_changed_id_is_refused(data, drawn):
    value = bytearray(signed([Place(n, stage, dig if n else b"") for n, stage, dig in drawn]))
    at = data.draw(st.integers(0, len(value) - 5))  # the last ones may carry padding
    other = data.draw(st.sampled_from(b"AZaz09+/").filter(lambda byte: byte != value[at]))
    value[at] = other
    with pytest.raises(PermissionDeniedError):
        EventSigner(KEY, ANNA).read(bytes(value), BODY, len(drawn))


@pytest.mark.parametrize("signer", [EventSigner(KEY, BEN), EventSigner(b"x" * 32, ANNA)])
def test_ids_of_others_are_refused(signer):
    with pytest.raises(PermissionDeniedError, match="not given to you"):
        EventSigner(KEY, ANNA).read(signed([Place()], signer), BODY, 1)


@pytest.mark.parametrize("value", [b"x", b"!!!!", b"AA", "é".encode(), b"A" * (MAX_ID_CHARS + 1)])
def test_what_is_no_id(value):
    with pytest.raises(InvalidRequestError) as caught:
        EventSigner(KEY, ANNA).read(value, BODY, 1)
    assert caught.value.param == "last-event-id"


def test_an_id_goes_with_its_body_and_choices():
    signer = EventSigner(KEY, ANNA)
    value = signed([Place(), Place()])
    with pytest.raises(InvalidRequestError, match="another body"):
        signer.read(value, BODY + b" ", 2)
    with pytest.raises(InvalidRequestError, match="2 choices"):
        signer.read(value, BODY, 3)


# -- states and writer: any cut of any stream ----------------------------------------------------


class Answer(ServedLife):
    """One life of a streamed request, from the engine's tokens to events. `held`: so many tokens of
    each choice an instance still has of the life before."""

    def __init__(self, num_tokens, n, stop, logprobs, last=None, held=()) -> None:
        state = make(True, 0.02, n=n, stop=stop, max_tokens=num_tokens)
        self.logprobs = logprobs
        shape = CompletionShape(Envelope(STREAM.request_id, 1, "m", lambda t: b"%d" % t), n, None)
        self.writer = StreamWriter(
            shape, EventSigner(KEY, ANNA), STREAM, n, 1, include_usage=True, last=last
        )
        if last is not None:
            for choice, border in zip(state.choices, borders_of(last.places), strict=True):
                choice.border = border
        self.text = b""
        begun = (Wish.PLACE,)
        if last is not None and held:
            outputs = [stream(choice)[:count] for choice, count in enumerate(held)]
            recalled = proven(last.places, outputs)
            if any(recalled):
                begun = state.recall(recalled)
                assert not self.text
        super().__init__(state, num_tokens, begun)

    def tell(self, message) -> None:
        if not self.writer.ended:
            self.text += self.writer.events([msgspec.structs.replace(message, id=0)])

    def hear(self, word) -> None:
        if self.logprobs and isinstance(word, TokenItem):
            scores = tuple(TokenLogprobs(one, -one / 1000) for one in word.token_ids)
            word = msgspec.structs.replace(word, logprobs=scores)
        super().hear(word)

    def run(self, data) -> list[tuple[str, str]]:
        """To the end, the tokens in pieces of any size; what came as (id, data)."""
        while not self.state.ended:
            self.step_all(lambda: data.draw(st.integers(1, 7)))
            while self.master.words:
                self.hear(self.master.words.pop(0))
                if self.wished and data.draw(st.booleans()):
                    self.flush()
        if not self.writer.ended:
            self.text += self.writer.end()
        return sse_blocks(self.text.decode())


def put_together(blocks, n):
    """By choice: text, tokens, offsets, reasons; the usages; how often it was done."""
    texts, tokens, offsets, reasons = [""] * n, [[] for _ in range(n)], [[] for _ in range(n)], []
    usages, num_done = [], 0
    for _, data in blocks:
        if data == "[DONE]":
            num_done += 1
            continue
        event = json.loads(data)
        assert "error" not in event
        if event.get("usage"):
            usages.append(event["usage"])
        for choice in event["choices"]:
            k = choice["index"]
            texts[k] += choice["text"]
            if choice["logprobs"]:
                tokens[k] += choice["logprobs"]["tokens"]
                offsets[k] += choice["logprobs"]["text_offset"]
            if choice["finish_reason"]:
                reasons.append((k, choice["finish_reason"]))
    return texts, tokens, offsets, sorted(reasons), usages, num_done


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(STOPS),
    st.booleans(),
)
def test_any_cut_of_a_stream_goes_on_to_the_same_whole(data, n, num_tokens, stop, logprobs):
    whole = Answer(num_tokens, n, stop, logprobs).run(data)
    wanted = put_together(whole, n)
    assert wanted[-1] == len(wanted[-2]) == 1
    have = whole[: data.draw(st.integers(1, len(whole) - 1))]
    for _ in range(data.draw(st.integers(1, 2))):
        last = EventSigner(KEY, ANNA).read(have[-1][0].encode(), BODY, n)
        rest = Answer(num_tokens, n, stop, logprobs, last).run(data)
        keep = data.draw(st.integers(0, len(rest) - 1))
        if keep and data.draw(st.booleans()):
            have += rest[:keep]
    last = EventSigner(KEY, ANNA).read(have[-1][0].encode(), BODY, n)
    # An instance may have tokens of the choices that had not ended.
    held = [data.draw(st.integers(0, num_tokens - 1)) for _ in range(n)]
    have += Answer(num_tokens, n, stop, logprobs, last, () if logprobs else held).run(data)
    assert put_together(have, n) == wanted


def test_only_tokens_with_the_hash_of_an_id_are_proven():
    def place(count, stage=EventStage.SAID, ids=(5, 6, 7)) -> Place:
        tokens = hashlib.sha256(array("I", ids[:count]))
        return Place(count, stage, token_digest(tokens) if count else b"")

    assert proven([place(2)], [(5, 6, 7, 8)]) == [(5, 6)]
    assert proven([place(2)], [(5, 6)]) == [(5, 6)]
    assert proven([place(2)], [(5,)]) == [()]
    assert proven([place(2)], [(5, 9, 7)]) == [()]
    assert proven([place(2)], []) == [()]
    assert proven([place(0)], [(5, 6)]) == [()]
    assert proven([place(2, EventStage.ENDED)], [(5, 6)]) == [()]
    assert proven([place(1), place(3)], [(9,), (5, 6, 7)]) == [(), (5, 6, 7)]
    assert proven([place(1)], [(5,), (5,)]) == [(5,)]
    for number in (-1, 1 << 32, -(1 << 63), 1 << 63):  # another process says what it likes
        assert proven([place(2), place(1)], [(5, number), (5,)]) == [(), (5,)]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([(), ("fox",)]))
def test_another_answer_is_an_error_and_never_a_splice(data, n, stop):
    blocks = Answer(20, n, stop, False).run(data)
    wanted = put_together(blocks, n)[0]
    have = blocks[: data.draw(st.integers(1, len(blocks) - 1))]
    last = EventSigner(KEY, ANNA).read(have[-1][0].encode(), BODY, n)
    bad = data.draw(st.integers(0, n - 1))
    place = last.places[bad]
    if not place.num_tokens:
        return
    wrong = hashlib.sha256(place.digest).digest()[:8]
    places = list(last.places)
    places[bad] = Place(place.num_tokens, place.stage, wrong)
    rest = Answer(20, n, stop, False, LastEvent(last.stream, tuple(places), False)).run(data)
    assert json.loads(rest[-1][1])["error"]["code"] == "conflict"
    texts = ["".join(_texts(have, k)) for k in range(n)]
    for k in range(n):
        more = "".join(_texts(rest, k))
        assert k != bad or not more
        assert wanted[k].startswith(texts[k] + more)
    # The client may ask again with the id of that event: it says what the client has.
    again = EventSigner(KEY, ANNA).read(rest[-1][0].encode(), BODY, n)
    assert again.places[bad].num_tokens == place.num_tokens


def _texts(blocks, k):
    for _, data in blocks:
        event = json.loads(data) if data != "[DONE]" else {}
        yield from (c["text"] for c in event.get("choices", ()) if c["index"] == k)


# -- over HTTP ------------------------------------------------------------------------------------

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USAGE = {"include_usage": True}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(max_tokens=4, n=2, stream=True, stream_options=USAGE)),
        (CHAT, chat(max_tokens=3, stream=True, logprobs=True)),
        (PLAIN, {"model": "fake", "prompt": ["a", "b"], "n": 2, "max_tokens": 3, "stream": True}),
        (PLAIN, {"model": "fake", "prompt": "a", "echo": True, "max_tokens": 3, "stream": True}),
        (PLAIN, {"model": "fake", "prompt": "a", "logprobs": 1, "max_tokens": 4, "stream": True}),
    ],
)
def test_every_event_is_a_place_to_go_on_from(front, path, body):
    whole = sse_blocks(front.post(path, body).text)
    assert len({name for name, _ in whole}) >= len(whole) - 1  # [DONE] says nothing new
    for at in range(len(whole) - 1):
        answer = front.post(path, body, headers={"Last-Event-ID": whole[at][0]})
        assert answer.headers["x-request-id"] in whole[0][1]
        rest = sse_blocks(answer.text)
        assert rest == whole[at + 1 :]


def test_an_id_is_refused_with_the_status_that_says_why(front):
    body = chat(max_tokens=2, stream=True)
    name = sse_blocks(front.post(CHAT, body).text)[0][0]

    def status(body, name, path=CHAT):
        answer = front.post(path, body, headers={"Last-Event-ID": name})
        error = answer.json()["error"]
        assert error["param"] == "last-event-id"
        return answer.status_code

    assert status(body, "nonsense!") == 400
    assert status(chat(max_tokens=3, stream=True), name) == 400
    assert status({**body, "stream": False}, name) == 400
    forged = ("B" if name[20] != "B" else "C").join((name[:20], name[21:]))
    assert status(body, forged) == 403
    fresh = front.post(CHAT, body, headers={"Last-Event-ID": ""})
    assert len(sse_blocks(fresh.text)) > 3


def test_an_id_holds_at_another_router_and_names_the_seed(start_front):
    body = chat(max_tokens=3, stream=True)
    services = FakeService(), FakeService()
    fronts = [start_front(service) for service in services]
    whole = sse_blocks(fronts[0].post(CHAT, body).text)
    rest = fronts[1].post(CHAT, body, headers={"Last-Event-ID": whole[1][0]})
    assert sse_blocks(rest.text) == whole[2:]
    seeds = [service.submitted[0][0].sampling.seed for service in services]
    assert seeds[0] == seeds[1] is not None
    services[1].event_keys = b"a later key", *services[1].event_keys
    taken = fronts[1].post(CHAT, body, headers={"Last-Event-ID": whole[1][0]})
    assert len(sse_blocks(taken.text)) == len(whole[2:])
    services[1].event_keys = (b"another cluster",)
    again = fronts[1].post(CHAT, body, headers={"Last-Event-ID": whole[1][0]})
    assert again.status_code == 403
