"""Bad input against `xllm serve`: each answered in time with its status, nothing harmed.

While the whole table is sent, a witness asks the same question over and over: its tokens must
be those of the engine each time. It runs within that test only: its connections come and go.
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
from tests.serve.bad_inputs import MODEL, PLAIN, all_cases, chat, post
from tests.serve.served import Served
from xllm.router.text.model import load_text_model

pytestmark = pytest.mark.process

ANSWER_S = 1.0
NOISE_S = 1.0
"""What a machine that others use may add to an answer's time."""
GROWTH_BYTES = 64 << 20
PEAK_BYTES = 192 << 20
WITNESS_PROMPT = (70, 71, 72, 73)
WITNESS_TOKENS = 24
WITNESS_S = 30.0


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
        self._answered = threading.Condition()

    @contextlib.contextmanager
    def witness(self):
        """Ask over and over meanwhile."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)

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
            if text != self.expected:
                self.wrong.append(text)
            with self._answered:
                self.num_seen += 1
                self._answered.notify_all()

    def wait_for_witness(self):
        """Return once the witness has been answered again."""
        with self._answered:
            seen = self.num_seen
            assert self._answered.wait_for(lambda: self.num_seen > seen, WITNESS_S)

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

    def memory_bytes(self, kind):
        """Memory of the router: VmRSS is what it has, VmHWM the most it ever had."""
        pid = self.served.child("router")
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.split(f"{kind}:")[1].split()[0])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xb').name}"
    with Served(model, run_dir) as served:
        yield BadInputSession(served, model)
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
    before = session.memory_bytes("VmRSS")
    problems = []
    with session.witness():
        for index, (name, data, statuses) in enumerate(cases):
            problems += judge(session, name, data, statuses)
            if index % 20 == 0:
                session.wait_for_witness()
    assert problems == []
    assert session.served.family() == pids
    assert session.memory_bytes("VmRSS") - before < GROWTH_BYTES
    assert session.memory_bytes("VmHWM") - before < PEAK_BYTES
    assert session.wrong == []
    assert session.num_seen >= len(cases) / 20
    assert session.ask() == session.expected


def judge(session, name, data, statuses):
    """What is wrong with the answer to one case."""
    status, head, body, seconds = session.send(data)
    if status not in statuses:
        return [f"{name}: {status} {body[:200]!r}, not {statuses}"]
    if seconds > ANSWER_S + NOISE_S:
        return [f"{name}: took {seconds:.1f} s"]
    if status >= 400 and b"HEAD" not in data[:5]:
        return [f"{name}: {what}" for what in flaws(head, body)]
    return []


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


@pytest.mark.parametrize("is_heard", [True, False])
def test_clients_that_vanish_leave_nothing(session, is_heard):
    """With their first words, or as soon as they have asked."""
    body = {"model": MODEL, "prompt": [70], "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = post(PLAIN, body)
    before = figure(session, ABORTED)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", session.port), timeout=20) as sock:
            sock.sendall(data)
            if is_heard:
                assert sock.recv(12) == b"HTTP/1.1 200"
    deadline = time.monotonic() + 5
    while figure(session, OPEN) != 0 or (is_heard and figure(session, ABORTED) == before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if is_heard:  # each was accepted, and a few may have been faster than their client's end
        assert figure(session, ABORTED) - before > 25
    assert session.ask() == session.expected


OPEN = "xllm_router_open_requests{"
ABORTED = 'xllm_router_requests_total{code="aborted"'


def figure(session, name):
    """The value of the one metric whose name and labels begin so; 0 where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = [line for line in text.splitlines() if line.startswith(name)]
    assert len(found) <= 1
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def test_a_good_request_is_answered_after_all_that(session):
    """The table's own base request is no bad input."""
    status, _, body, _ = session.send(chat())
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 2
    assert session.served.errors == []
