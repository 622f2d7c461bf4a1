"""Requests that are answered without a task: as all others are, byte for byte."""

import dataclasses
import json
import math

import pytest

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import chat, raw_post, read_all, wait_until
from xllm.config.router import RouterSettings
from xllm.protocol.generation import ChoiceResult, RequestFailed, RequestFinished, Usage
from xllm.router.http.limits import limits_of

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"


def num_tasks_now(front):
    return len(front.front._server.server_state.tasks)


def num_tasks(front):
    return front.call(num_tasks_now, front)


def read_answer(file):
    """One answer with a content-length: its status line, headers by name, and body."""
    status = file.readline().removesuffix(b"\r\n")
    headers = {}
    while line := file.readline().removesuffix(b"\r\n"):
        name, _, value = line.partition(b": ")
        assert name not in headers
        headers[name] = value
    body = file.read(int(headers[b"content-length"]))
    assert len(body) == int(headers[b"content-length"])
    return status, headers, body


def lasting(headers, body):
    """What does not change from one answer to the next."""
    value = json.loads(body)
    for name in ("id", "created"):
        value.pop(name, None)
    kept = {name: headers[name] for name in headers if name not in (b"date", b"x-request-id")}
    return headers.keys(), kept, value


def test_which_requests_take_a_task(start_front):
    service = FakeService(held=True)
    front = start_front(service)

    def ask(path, body):
        with front.socket() as sock:
            sock.sendall(raw_post(path, body))
            wait_until(lambda: front.call(lambda: len(service.open)))
            tasks = num_tasks(front)
            for request_id in front.call(lambda: list(service.open)):
                front.call(service.answer, request_id)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: not num_tasks(front))
        return tasks

    ids = {"model": "fake", "prompt": [1, 2], "max_tokens": 1}
    assert ask(CHAT, chat(max_tokens=1)) == 0
    assert ask(CHAT, chat(max_tokens=1, n=3)) == 0
    assert ask(PLAIN, ids) == 0
    assert ask(CHAT, chat(max_tokens=1, stream=True)) == 1
    assert ask(PLAIN, ids | {"prompt": [[1], [2]]}) == 1
    assert ask(PLAIN, ids | {"echo": True}) == 1


FAILURE = RequestFailed(id=0, code="overloaded", message="full", retry_after_ms=2500)
REQUESTS = [
    (CHAT, json.dumps(chat(max_tokens=3, n=2, logprobs=True)).encode(), None),
    (PLAIN, b'{"model": "fake", "prompt": [1, 2], "max_tokens": 3}', None),
    (PLAIN, b'{"model": "fake", "prompt": [1, "x"]}', None),
    (PLAIN, b'{"model": "fake"', None),
    (PLAIN, b'{"model": "other", "prompt": "x"}', None),
    (CHAT, json.dumps(chat()).encode(), FAILURE),
]


@pytest.mark.parametrize(("path", "body", "failure"), REQUESTS)
def test_the_answer_is_the_same_with_a_task(start_front, path, body, failure):
    service = FakeService()
    service.failure = failure
    front = start_front(service)
    data = raw_post(path, body)
    with front.socket() as sock, sock.makefile("rb") as answers:
        sock.sendall(data)
        status, headers, content = read_answer(answers)
        whole = status, *lasting(headers, content)
        for cut in (1, 40, len(data) - len(body), len(data) - 1):
            sock.sendall(data[:cut])
            for _ in range(2):
                front.call(num_tasks_now, front)  # a turn of the loop, which reads what there is
            sock.sendall(data[cut:])
            status, headers, content = read_answer(answers)
            assert (status, *lasting(headers, content)) == whole
    assert b"date" in headers
    assert (b"x-request-id" in headers) == (b"200" in status or b'"other"' in body or bool(failure))


def test_errors_that_end_the_connection_say_so_once(start_front, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one:0123456789abcdef0123\n")
    keys.chmod(0o600)
    front = start_front(api_key_file=str(keys))
    data = front.raw(raw_post(CHAT, chat()))
    assert data.startswith(b"HTTP/1.1 401 ")
    assert data.count(b"connection: close\r\n") == 1
    assert front.service.submitted == []


@pytest.mark.parametrize("end", [b"HTTP/1.0", b"HTTP/1.1\r\nconnection: close"])
def test_a_client_that_wants_one_answer(front, end):
    data = front.raw(raw_post(CHAT, chat(max_tokens=1)).replace(b"HTTP/1.1", end))
    assert data.startswith(b"HTTP/1.1 200 ")
    assert data.count(b"connection: close\r\n") == 1
    assert data.endswith(b"}")


@pytest.mark.parametrize("body", [chat(max_tokens=1), chat(max_tokens=1, stream=True), {}])
def test_a_connection_that_says_no_more_is_closed(start_front, body):
    limits = dataclasses.replace(limits_of(RouterSettings()), keep_alive_s=0.1, sweep_s=0.02)
    front = start_front(limits=limits)
    data = front.raw(raw_post(CHAT, body))  # to the end of the connection
    assert data.startswith(b"HTTP/1.1 200 " if body else b"HTTP/1.1 400 ")
    wait_until(lambda: not front.call(lambda: front.front.num_connections))


def test_a_connection_that_waits_for_its_answer_is_not_closed(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock, sock.makefile("rb") as answers:
        for _ in range(2):
            sock.sendall(raw_post(CHAT, chat(max_tokens=1)))
            wait_until(lambda: front.call(lambda: len(service.open)))
            (connection,) = front.call(lambda: [*front.front._server.server_state.connections])
            assert connection._deadline == math.inf
            front.call(service.answer, next(iter(service.open)))
            read_answer(answers)
            assert connection._deadline < math.inf


class LongService(FakeService):
    """Says as many characters as tokens are asked for."""

    def finish(self, request_id):
        request = self.open[request_id].request
        count = request.sampling.max_tokens
        choice = ChoiceResult(index=0, finish_reason="length", text="x" * count)
        self.open.pop(request_id).sink.send(
            RequestFinished(
                id=0, request_id=request_id, choices=(choice,), usage=Usage(1, count, 0)
            )
        )

    def tokens_of(self, request, choice):
        return []


def test_nothing_is_added_to_what_a_client_does_not_read(start_front):
    """The second answer waits for the first one to be read: as a task, which can."""
    front = start_front(LongService())
    num_chars = 16 << 20  # more than the kernel keeps for two sockets
    body = {"model": "fake", "prompt": "x"}
    with front.socket() as sock, sock.makefile("rb") as answers:
        sock.sendall(raw_post(PLAIN, body | {"max_tokens": num_chars}))
        wait_until(lambda: front.call(is_paused, front))
        sock.sendall(raw_post(PLAIN, body | {"max_tokens": 2}))
        wait_until(lambda: num_tasks(front) == 1)
        for count in (num_chars, 2):
            status, _, data = read_answer(answers)
            assert status == b"HTTP/1.1 200 OK"
            assert json.loads(data)["choices"][0]["text"] == "x" * count
    wait_until(lambda: not num_tasks(front))


def is_paused(front):
    return any(one.flow.write_paused for one in front.front._server.server_state.connections)


def test_a_shape_that_fails_is_an_internal_error(start_front):
    class StrangeService(FakeService):
        def token_bytes(self, model, token_id):
            raise KeyError("secret")

    front = start_front(StrangeService())
    with front.socket() as sock, sock.makefile("rb") as answers:
        for _ in range(2):
            sock.sendall(raw_post(CHAT, chat(logprobs=True, max_tokens=1)))
            status, _, body = read_answer(answers)
            assert status.startswith(b"HTTP/1.1 500 ")
            assert json.loads(body)["error"]["code"] == "internal_error"
            assert b"secret" not in body
    assert front.call(lambda: front.service.num_open) == 0


def test_answers_after_a_stop_began(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(CHAT, chat(max_tokens=1)))
        wait_until(lambda: front.call(lambda: len(service.open)))
        stopping = front.call(lambda: front.loop.create_task(front.front.stop()))
        wait_until(lambda: not front.call(lambda: front.front._server.servers[0].is_serving()))
        front.call(service.answer, next(iter(service.open)))
        data = read_all(sock)
    assert data.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in data
    wait_until(lambda: front.call(stopping.done))
    assert service.aborted == []
