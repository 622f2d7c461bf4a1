"""Bad input against `xllm serve`: each answered in time with its status, nothing harmed.

While the whole table is sent, a witness asks the same question over and over: its tokens must
be those of the engine each time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.bad_inputs import MODEL, PLAIN, all_cases, chat
from tests.serve.served import Served
from xllm.router.text.model import load_text_model

pytestmark = pytest.mark.process

ANSWER_S = 1.0
NOISE_S = 1.0
"""What a machine that others use may add to an answer's time."""
GROWTH_BYTES = 64 << 20
WITNESS_PROMPT = (70, 71, 72, 73)
WITNESS_TOKENS = 24


class BadInputSession:
    """A service under bad input, and the witness beside it."""

    def __init__(self, served, model):
        self.served = served
        self.port = urlsplit(served.http).port
        ids = expected_ids(model, WITNESS_PROMPT, WITNESS_TOKENS, seed=9)
        self.expected = load_text_model(model).decode(ids)
        self.num_seen = 0
        self.wrong = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join(30)

    def ask(self):
        """The witness's text, as the service gives it now."""
        body = {"model": MODEL, "prompt": list(WITNESS_PROMPT), "seed": 9}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(
                "POST",
                PLAIN,
                json.dumps(body | {"max_tokens": WITNESS_TOKENS}),
                {"content-type": "application/json"},
            )
            answer = json.load(connection.getresponse())
        return answer["choices"][0]["text"] if "choices" in answer else answer

    def _watch(self):
        while not self._stop.wait(0.02):
            try:
                text = self.ask()
            except OSError as error:
                text = repr(error)
            self.num_seen += 1
            if text != self.expected:
                self.wrong.append(text)

    def send(self, data):
        """(status, headers, body, seconds) of the answer to a whole request."""
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(65536):
                    received += piece
                    if not self._incomplete(received):
                        break
        seconds = time.monotonic() - begin
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), received[:200]
        return int(head.split(b" ")[1]), head.lower(), body, seconds

    @staticmethod
    def _incomplete(received):
        head, found, body = received.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if b"content-length: " in line]
        return not found or not length or len(body) < int(length[0].split()[1])

    def resident_bytes(self):
        pid = self.served.child("router")
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xb').name}"
    with Served(model, run_dir) as served:
        session = BadInputSession(served, model)
        try:
            yield session
        finally:
            session.close()
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


@pytest.fixture(scope="module")
def cases(session):
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        (model,) = json.load(connection.getresponse())["data"]
    return all_cases(model["max_model_len"])


def test_the_table(session, cases):
    """All cases in one test: the witness must run beside each, and a start costs seconds."""
    assert session.ask() == session.expected
    for _ in range(20):
        session.send(chat())
    pids = session.served.family()
    before = session.resident_bytes()
    problems = []
    for name, data, statuses in cases:
        status, head, body, seconds = session.send(data)
        if status not in statuses:
            problems.append(f"{name}: {status} {body[:200]!r}, not {statuses}")
        elif seconds > ANSWER_S + NOISE_S:
            problems.append(f"{name}: took {seconds:.1f} s")
        elif status >= 400 and b"HEAD" not in data[:5]:
            problems += [f"{name}: {what}" for what in flaws(head, body)]
    assert problems == []
    assert session.served.family() == pids
    assert session.resident_bytes() - before < GROWTH_BYTES
    assert session.wrong == []
    assert session.num_seen > len(cases) / 20
    assert session.ask() == session.expected


def flaws(head, body):
    """What is wrong with an error's answer."""
    if b"content-type: application/json" not in head:
        yield "no JSON"
        return
    error = json.loads(body)["error"]
    if error.keys() != {"message", "type", "param", "code"}:
        yield f"keys {sorted(error)}"
    if not error["message"] or not error["type"] or not error["code"]:
        yield "an empty field"
    if len(error["message"]) > 500:
        yield "a message without bound"
    for secret in ("Traceback", "xllm.", '.py"', "/tmp/", "site-packages"):
        if secret in error["message"]:
            yield f"tells {secret}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"logit_bias": {"10000000": 1}}, "logit_bias"),
        ({"model": "other"}, "model"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"chat_template": "x"}, "chat_template"),
        ({"cache_salt": "a b"}, "cache_salt"),
        ({"n": 0}, "n"),
    ],
)
def test_errors_name_the_field(session, fields, param):
    _, _, body, _ = session.send(chat(**fields))
    assert json.loads(body)["error"]["param"] == param


def test_a_context_that_is_too_small_tells_the_numbers(session):
    _, _, body, _ = session.send(chat(max_tokens=10**7))
    error = json.loads(body)["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(10**7) in error["message"]


def test_ids_are_the_servers(session):
    """Requests that name the same id get ids of their own."""
    found = []

    def ask():
        data = chat(request_id="mine", max_tokens=1).replace(
            b"host: localhost", b"host: localhost\r\nx-request-id: mine"
        )
        for _ in range(16):
            status, head, _, _ = session.send(data)
            assert status == 200
            found.append(head.split(b"x-request-id: ")[1].split(b"\r\n")[0])

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 256
    assert all(len(one) == 32 and one != b"mine" for one in found)


def test_clients_that_vanish_leave_nothing(session):
    body = json.dumps({"model": MODEL, "prompt": [70], "max_tokens": 500, "stream": True}).encode()
    head = f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    data = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", session.port), timeout=20) as sock:
            sock.sendall(data)
    deadline = time.monotonic() + 5
    while "xllm_router_open_requests 0.0" not in (text := metrics(session)):
        # The witness's own request may be open at any one look.
        if "xllm_router_open_requests 1.0" in text:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert session.ask() == session.expected


def metrics(session):
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return "\n".join(_without_labels(line) for line in text.splitlines())


def _without_labels(line):
    name, brace, rest = line.partition("{")
    return name + rest.partition("}")[2] if brace else line


def test_a_good_request_is_answered_after_all_that(session):
    """The table's own base request is no bad input."""
    status, _, body, _ = session.send(chat())
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 2
    assert session.served.errors == []
