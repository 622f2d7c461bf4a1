"""Bad input to the ZeroMQ port of `xllm serve`: refused, and a witness's tokens stay the same.

After each case the witness asks the same question on a connection of its own; at the end the
service has the processes that it began with, and its router never held much.
"""

from __future__ import annotations

import contextlib
import pathlib
import random
import socket
import struct
from urllib.parse import urlsplit

import msgpack
import pytest
import zmq

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, wait_until

pytestmark = pytest.mark.process

MODEL = "toy-model"
PEAK_BYTES = 192 << 20
ANSWER_MS = 5000
PROMPT = (70, 71, 72, 73)
NUM_TOKENS = 24
QUESTION = {
    "type": "submit",
    "id": 1,
    "prompt": PROMPT,
    "stream": False,
    "sampling": {"max_tokens": NUM_TOKENS, "seed": 9, "temperature": 1.0},
}


class Peer:
    """A DEALER that sends whatever it is told."""

    def __init__(self, context, endpoint):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def send(self, *frames):
        self.socket.send_multipart(frames)

    def say(self, message):
        self.send(msgpack.packb(message))

    def hear(self):
        """The next answer."""
        assert self.socket.poll(ANSWER_MS), "no answer"
        [frame] = self.socket.recv_multipart()
        return msgpack.unpackb(frame, strict_map_key=False)

    def ask(self):
        """The question's tokens."""
        self.say(QUESTION)
        answer = self.hear()
        assert answer["type"] == "finished", answer
        return tuple(answer["choices"][0]["token_ids"])


class Session:
    """A service, a witness, and strangers."""

    def __init__(self, served, expected):
        self.served = served
        self.expected = expected
        self.context = zmq.Context()
        self.address = urlsplit(served.zmq)
        self._strangers = []
        self.witness = Peer(self.context, served.zmq)
        self.check()
        self.pids = served.family()
        self.before = self.peak_bytes()

    def stranger(self):
        """A new connection."""
        one = Peer(self.context, self.served.zmq)
        self._strangers.append(one)
        return one

    def raw(self):
        """A bare TCP connection."""
        return socket.create_connection((self.address.hostname, self.address.port), timeout=10)

    def check(self):
        """The witness is served as ever."""
        assert self.witness.ask() == self.expected

    def peak_bytes(self):
        status = pathlib.Path(f"/proc/{self.served.child('router')}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def leave(self):
        """Close the strangers of a test."""
        for one in self._strangers:
            one.socket.close()
        self._strangers.clear()

    def close(self):
        self.leave()
        self.witness.socket.close()
        self.context.term()


@pytest.fixture(scope="module")
def module_session(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xz').name}"
    with Served(model, run_dir) as served:
        session = Session(served, expected_ids(model, PROMPT, NUM_TOKENS, seed=9))
        yield session
        session.close()
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


@pytest.fixture
def session(module_session):
    yield module_session
    module_session.leave()
    module_session.check()
    assert module_session.served.family() == module_session.pids
    assert module_session.peak_bytes() - module_session.before < PEAK_BYTES
    assert module_session.served.errors == []


def submit(**fields):
    """The question with other fields."""
    return msgpack.packb(QUESTION | fields)


def field(name, value):
    """A submit with one field more, given as bytes."""
    start = {"type": "submit", "id": 1}
    body = b"".join(msgpack.packb(k) + msgpack.packb(v) for k, v in start.items())
    return b"\x83" + body + msgpack.packb(name) + value


DECLARED = struct.pack(">I", 2**31)
BOMBS = {
    "deep-arrays": b"\x91" * 100_000,
    "deep-maps": b"\x81\xa1a" * 100_000,
    "deep-unknown": field("metadata", b"\x91" * 100_000 + b"\xc0"),
    "array-of-2-billion": b"\xdd" + DECLARED,
    "map-of-2-billion": b"\xdf" + DECLARED,
    **{
        f"{name}-of-{kind[0]:x}": field(name, kind + DECLARED)
        for name in ("prompt", "messages", "chat_template_kwargs", "sampling", "resume", "model")
        for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6")
    },
    "extension": field("prompt", b"\xd4\x01\x00"),
    "timestamp": field("prompt", b"\xd6\xff\x00\x00\x00\x00"),
    "empty-maps": field("chat_template_kwargs", b"\x81\xa1a\xdc\xff\xff" + b"\x80" * 0xFFFF),
    "never-used": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}
WRONG_TYPES = {
    "id": ["1", None, 1.5, []],
    "model": [1, None, []],
    "prompt": [1, {}, ["x"], [[1]], [1.5], [None]],
    "messages": [1, "hi", [1], [{}], [{"role": 1}], [{"role": "user", "content": 1}]],
    "chat_template_kwargs": [1, [], {"a": {}}, {"a": []}, {"a": None}, {1: "x"}],
    "sampling": [1, [], {"n": "1"}, {"stop": "x"}, {"stop": [1]}, {"logit_bias": {"x": 1}}],
    "stream": ["yes", 1, None],
    "timeout_ms": ["1", 1.5, None],
    "resume": [1, [], {}, {"attempt": 1}, {"attempt": 1, "outputs": [1], "seed": 1}],
}


def test_frames_that_are_no_message_are_answered(session):
    one = session.stranger()
    one.send(b"")
    assert one.hear()["type"] == "bad_message"
    one.send(b"", b"", b"")
    assert one.hear()["type"] == "bad_message"
    one.send(submit(), *[b"x"] * 100_000)
    assert one.hear()["type"] == "bad_message"
    assert one.ask() == session.expected  # the connection goes on


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(session, name):
    one = session.stranger()
    one.send(BOMBS[name])
    assert one.hear()["type"] == "bad_message"
    assert one.ask() == session.expected


def test_wrong_types_are_refused(session):
    one = session.stranger()
    for name, values in WRONG_TYPES.items():
        for value in values:
            one.send(submit(**{name: value}))
            answer = one.hear()
            assert answer["type"] == "bad_message", (name, value, answer)
            assert len(answer["message"]) < 500
    assert one.ask() == session.expected


def test_values_out_of_their_bounds_name_their_field(session):
    one = session.stranger()
    for name, value in {
        "sampling.temperature": {"sampling": {"temperature": float("nan")}},
        "sampling.n": {"sampling": {"n": 10**9}},
        "sampling.stop": {"sampling": {"stop": ["x" * 513]}},
        "prompt[0]": {"prompt": [2**40]},
        "resume.outputs": {"resume": {"attempt": 1, "outputs": [[1]] * 2, "seed": 1}},
        "timeout_ms": {"timeout_ms": -1},
        "chat_template_kwargs": {
            "prompt": None,
            "messages": [{"role": "user", "content": "x"}],
            "chat_template_kwargs": {"tokenize": False},
        },
    }.items():
        one.send(submit(**value))
        answer = one.hear()
        assert (answer["type"], answer["id"]) == ("failed", 1), answer
        assert name.endswith(answer["param"])


def test_the_longest_stops_for_the_most_choices_are_served(session):
    one = session.stranger()
    stops = ["a" * 500 + str(k).zfill(12) for k in range(16)]
    for number in range(4):
        one.send(submit(id=number, sampling={"n": 128, "stop": stops, "max_tokens": 2}))
    assert {one.hear()["type"] for _ in range(4)} == {"finished"}


@pytest.mark.parametrize("body", [b"\x01", b"\x80", b"\xa0"])
def test_a_frame_beyond_the_limit_costs_its_connection_only(session, body):
    one = session.stranger()
    size = 16 << 20
    one.send(field("prompt", b"\xdd" + struct.pack(">I", size) + body * size))
    one.say({"type": "list_models", "id": 5})  # on the connection that comes after
    assert one.hear()["type"] == "models"


@pytest.mark.parametrize("body", [b"\x01", b"\x80", b"\xa0"])
def test_the_largest_frame_is_bounded_in_memory(session, body):
    one = session.stranger()
    size = (4 << 20) - 64
    one.send(field("prompt", b"\xdd" + struct.pack(">I", size) + body * size))
    assert one.hear()["type"] in ("failed", "bad_message")


def test_random_bytes(session):
    one = session.stranger()
    draw = random.Random(7)
    good = submit(id=77, sampling={"max_tokens": 1})
    num_sent = 300
    for number in range(num_sent):
        if number % 2:
            data = draw.randbytes(draw.randrange(200))
        else:  # a message with a few bytes changed
            damaged = bytearray(good)
            for _ in range(3):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            data = bytes(damaged)
        one.send(data)
    one.say({"type": "query_health", "id": 123456})
    for _ in range(10 * num_sent):
        if one.hear().get("id") == 123456:
            break
    else:
        pytest.fail("the health was not told")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        bytes.fromhex("16030100c8010000c40303") + bytes(189),  # the start of a TLS hello
        b"",
        b"\xff" + bytes(8) + b"\x7f",  # half a ZMTP greeting
        b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(500),
        b"\xff" * 100_000,
    ],
    ids=["http", "tls", "nothing", "half-a-greeting", "bad-greeting", "bytes"],
)
def test_other_protocols(session, data):
    with session.raw() as sock, contextlib.suppress(OSError):
        sock.settimeout(10)
        sock.sendall(data)
        session.check()
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):  # closed in time, whatever it says before
            pass


def test_aborts_of_what_is_not_ours(session):
    one, other = session.stranger(), session.stranger()
    long = {"max_tokens": 400, "ignore_eos": True}
    other.send(submit(id=3, stream=True, hold_ms=0, sampling=long))
    assert other.hear()["type"] == "delta"
    assert one.ask() == session.expected  # number 1 has ended
    for number in (1, 2, 3, -1, 2**63):
        one.say({"type": "abort", "id": number})
    assert one.ask() == session.expected
    messages = [other.hear()]
    while messages[-1]["type"] == "delta":
        messages.append(other.hear())
    assert messages[-1]["type"] == "finished"


def test_a_number_in_use_is_refused_and_the_first_goes_on(session):
    one = session.stranger()
    long = {"max_tokens": 400, "ignore_eos": True}
    one.send(submit(id=3, stream=True, hold_ms=0, sampling=long))
    assert one.hear()["type"] == "delta"
    one.send(submit(id=3, sampling={"max_tokens": 1}))
    kinds = []
    while "finished" not in kinds:
        kinds.append(one.hear()["type"])
    assert kinds.count("bad_message") == 1
    assert set(kinds) <= {"delta", "bad_message", "finished"}


def test_connections_that_come_and_go(session):
    def open_files():
        return len(list(pathlib.Path(f"/proc/{session.served.child('router')}/fd").iterdir()))

    before = open_files()
    for _ in range(100):
        with session.raw() as sock:
            sock.sendall(b"\xff")
    wait_until(lambda: open_files() <= before + 2, 10, "the descriptors of closed connections")
