"""Streams over time: clients that leave, readers that are slow, failures on the way."""

import dataclasses
import json
import socket
import threading
import time

import pytest

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import chat, raw_post, read_all, sse_events, wait_until
from xllm.config.router import RouterSettings
from xllm.protocol.generation import TokenDelta
from xllm.router.http.limits import limits_of

PATH = "/v1/chat/completions"


def first_id(front, service):
    wait_until(lambda: front.call(lambda: bool(service.open)))
    return front.call(lambda: next(iter(service.open)))


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_aborts(start_front, stream):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat(stream=stream)))
        request_id = first_id(front, service)
        if stream:
            front.call(lambda: service.delta(request_id, 0, 0))
            assert b" zero" in sock.recv(65536)
    wait_until(lambda: front.call(lambda: service.aborted == [request_id]))
    wait_until(lambda: front.call(lambda: front.front.num_connections == 0))


def test_client_that_leaves_with_a_large_body_aborts(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat("x" * 1_000_000)))
        request_id = first_id(front, service)
    wait_until(lambda: front.call(lambda: service.aborted == [request_id]), 0.5)


def test_client_that_closes_half_aborts(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat()))
        request_id = first_id(front, service)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: front.call(lambda: service.aborted == [request_id]), 0.5)


def test_tokens_come_one_by_one(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat(stream=True, max_tokens=3)))
        request_id = first_id(front, service)
        for index, word in enumerate((b" zero", b" one", b" two")):
            front.call(service.delta, request_id, 0, index)
            assert word in sock.recv(65536)
        front.call(service.finish, request_id)
        assert b"[DONE]" in sock.recv(65536)


def test_failure_on_the_way_is_an_event(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat(stream=True), headers=["connection: close"]))
        request_id = first_id(front, service)
        front.call(service.delta, request_id, 0, 0)
        front.call(service.fail, request_id, "engine_error", "secret")
        data = read_all(sock)
    assert data.startswith(b"HTTP/1.1 200")
    lines = [line for line in data.decode().splitlines() if line.startswith("data: ")]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_error"
    assert "secret" not in data.decode()
    assert data.endswith(b"0\r\n\r\n")


def test_a_shape_that_fails_ends_the_stream(start_front):
    class StrangeService(FakeService):
        def token_bytes(self, model, token_id):
            raise KeyError("secret")

    answer = start_front(StrangeService()).post(PATH, chat(stream=True, logprobs=True))
    assert answer.status_code == 200
    assert sse_events(answer.text)[-1]["error"]["code"] == "internal_error"


class FloodService(FakeService):
    """Sends many large deltas at once, and never ends by itself."""

    def __init__(self, num, size):
        super().__init__(held=True)
        self.num = num
        self.size = size

    def flood(self, request_id):
        one = self.open.get(request_id)
        for index in range(self.num):
            if one is not None:
                text = f"{index:08}" + "x" * (self.size - 8)
                one.sink.send(TokenDelta(id=0, first_index=index, token_ids=(0,), text=text))


def slow_limits(**times):
    return dataclasses.replace(limits_of(RouterSettings()), sweep_s=0.02, **times)


def test_a_reader_that_stands_still_is_given_up(start_front):
    service = FloodService(512, 1024)
    front = start_front(service, limits=slow_limits(blocked_s=0.2, max_pending_bytes=64 << 20))
    with front.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(raw_post(PATH, chat(stream=True)))
        request_id = first_id(front, service)
        deadline = time.monotonic() + 10
        while not front.call(lambda: service.aborted) and time.monotonic() < deadline:
            front.call(service.flood, request_id)
        assert front.call(lambda: service.aborted) == [request_id]


def test_what_waits_for_a_slow_reader_is_bounded(start_front):
    service = FloodService(512, 1024)
    front = start_front(service, limits=slow_limits(blocked_s=60.0))
    with front.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(raw_post(PATH, chat(stream=True)))
        request_id = first_id(front, service)
        for _ in range(64):
            front.call(service.flood, request_id)
        wait_until(lambda: front.call(lambda: service.aborted == [request_id]))


def test_a_reader_that_is_slow_for_a_while_gets_every_token(start_front):
    service = FloodService(4000, 64)
    front = start_front(service)
    with front.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(raw_post(PATH, chat(stream=True), headers=["connection: close"]))
        request_id = first_id(front, service)
        front.call(service.flood, request_id)
        front.call(service.flood, request_id)
        front.call(service.finish, request_id)
        data = read_all(sock).decode()
    seen = []
    for line in data.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text = choice["delta"].get("content", "")
                seen += [int(text[at : at + 8]) for at in range(0, len(text), 64)]
    assert seen == list(range(4000)) * 2


def test_stopping_lets_open_answers_end(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat(stream=True, max_tokens=1)))
        request_id = first_id(front, service)
        front.call(service.delta, request_id, 0, 0)
        assert b" zero" in sock.recv(65536)
        closer = threading.Thread(target=front.close)
        closer.start()

        def refuses():
            try:
                socket.create_connection(("127.0.0.1", front.port), timeout=1).close()
            except OSError:
                return True
            return False

        wait_until(refuses)
        front.call(service.finish, request_id)
        assert b"[DONE]" in read_all(sock)
        closer.join(10)
    assert service.aborted == []
    front.close = lambda: None


def test_probes_are_shared(start_front):
    service = FakeService()
    front = start_front(service)
    with front.socket() as one, front.socket() as two:
        before = service.num_probes
        request = b"GET /health/ready HTTP/1.1\r\nhost: localhost\r\n\r\n"
        one.sendall(request)
        two.sendall(request)
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        assert two.recv(65536).startswith(b"HTTP/1.1 200")
    assert before < service.num_probes <= before + 2
