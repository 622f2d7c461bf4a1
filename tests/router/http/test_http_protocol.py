"""Bounds of a connection: size, time, ambiguity; each refused in JSON, and others unharmed."""

import contextlib
import dataclasses
import json
import re
import socket
import threading
import time

import pytest

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import chat, raw_post, read_all, wait_until
from xllm.config.router import RouterSettings
from xllm.router.http.limits import limits_of

PATH = "/v1/chat/completions"
HOST = b"host: localhost\r\n"
JSON = b"content-type: application/json\r\n"


@pytest.fixture(scope="module")
def small():
    """A front with small bodies and short times."""
    from tests.router.http.front_thread import FrontThread

    limits = dataclasses.replace(
        limits_of(RouterSettings(max_body_bytes=100_000)), head_s=0.3, body_s=0.3, sweep_s=0.02
    )
    front = FrontThread(FakeService(), limits=limits)
    yield front
    front.close()


def status_of(data):
    """The status of the one answer in `data`, which must be a JSON error if it is one."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status >= 400:
        assert json.loads(body)["error"]["code"]
        assert b"connection: close" in head
    return status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /version HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 10_000 + b"\r\n", 431),
        (b"GET /version HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /version HTTP/1.1\r\n" + HOST + b"a: " + b"x" * (1 << 20) + b"\r\n\r\n", 431),
        (b"GET /version HTTP/1.1\r\n" + HOST + b"a" * (1 << 20), 431),
        (b"GET /version HTTP/1.1\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET http://x/version HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /version\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64, 400),
        (b"nonsense\r\n\r\n", 400),
        (
            b"GET /version HTTP/1.1\r\n" + HOST + b"connection: upgrade\r\n"
            b"upgrade: websocket\r\n\r\n",
            400,
        ),
        (
            b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"content-length: 2\r\n"
            b"content-length: 2\r\n\r\n{}",
            400,
        ),
        (
            b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"content-length: 2\r\n"
            b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"content-length: -1\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"content-length: 1073741824\r\n\r\n", 413),
        (
            b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n"
            b"zz\r\n{}\r\n",
            400,
        ),
    ],
)
def test_refused(front, data, status):
    assert status_of(front.raw(data)) == status
    assert front.get("/version").status_code == 200


def test_a_body_of_the_limit_passes(small):
    body = json.dumps(chat("")).encode()
    padded = json.dumps(chat("x" * (100_000 - len(body)))).encode()
    assert len(padded) == 100_000
    with small.socket() as sock:
        sock.sendall(raw_post(PATH, padded))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert status_of(small.raw(raw_post(PATH, padded + b" "))) == 413


def test_an_endless_chunked_body_is_cut(front):
    """A gigabyte is offered; how much is taken is seen by the sender, minus what the kernel
    keeps in its buffers."""
    head = b"POST /tokenize HTTP/1.1\r\n" + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with front.socket() as sock:
        sock.sendall(head)
        try:
            while sent < 1 << 30:
                sock.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        data = read_all(sock)
    assert status_of(data) == 413
    assert sent < 32 << 20


@pytest.mark.parametrize("path", ["/no/such/path", "/health/live"])
def test_a_body_that_nobody_reads_is_cut(front, path):
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with front.socket() as sock, pytest.raises(OSError):
        sock.sendall(head.encode())
        for _ in range(1 << 14):
            sock.sendall(chunk)


def test_a_body_shorter_than_it_says(small):
    """The rest never comes: the connection is closed in time."""
    data = raw_post(PATH, chat()).replace(b"content-length: ", b"content-length: 1")
    assert status_of(small.raw(data)) == 408


def drip(front, head, data):
    """Send `head`, then a byte of `data` now and then; how many the other side waited for."""
    with front.socket() as sock:
        sock.sendall(head)
        sock.settimeout(0.05)
        for at in range(len(data)):
            try:
                sock.sendall(data[at : at + 1])
                if not sock.recv(65536):
                    break
            except TimeoutError:
                pass
            except OSError:
                break
    return at + 1


def test_slow_heads_and_bodies_are_closed(small):
    request = raw_post(PATH, chat("x" * 1000))
    head, _, body = request.partition(b"\r\n\r\n")
    # Nearer to 6, which are 0.3 s, than to all of them.
    assert 1 < drip(small, b"", request) < 100
    assert 1 < drip(small, head + b"\r\n\r\n", body) < 100


def test_silent_connections_are_closed(small):
    assert small.raw(b"") == b""
    wait_until(lambda: small.call(lambda: small.front.num_connections == 0))


def test_many_slow_clients_do_not_delay_others(front):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(front.socket()) for _ in range(200)]
        for sock in slow:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost:")
        wait_until(lambda: front.call(lambda: front.front.num_connections >= 200))
        assert front.post(PATH, chat(max_tokens=1)).status_code == 200
        assert front.call(lambda: front.front.num_connections) >= 200  # it waited for none


def test_many_slow_clients_are_closed(small):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(small.socket()) for _ in range(200)]
        for sock in slow:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost:")
        for sock in slow:
            assert status_of(read_all(sock)) == 408
    wait_until(lambda: small.call(lambda: small.front.num_connections == 0))


def test_blank_lines_do_not_keep_a_connection(small):
    with small.socket() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"\r\n")
        begin = time.monotonic()
        read_all(sock)
        assert time.monotonic() - begin < 2


def test_a_long_answer_is_not_a_slow_request(start_front):
    limits = dataclasses.replace(limits_of(RouterSettings()), head_s=0.1, body_s=0.1, sweep_s=0.02)
    service = FakeService(held=True)
    front = start_front(service, limits=limits)
    with front.socket() as sock:
        sock.sendall(raw_post(PATH, chat(max_tokens=1)))
        wait_until(lambda: front.call(lambda: bool(service.open)))
        sock.settimeout(0.4)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        front.call(service.finish, next(iter(service.open)))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_keep_alive_and_pipelining_answer_in_order(front):
    request = raw_post(PATH, chat(max_tokens=1)) + b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n"
    with front.socket() as sock:
        sock.sendall(request + request + b"GET /nope HTTP/1.1\r\nhost: localhost\r\n\r\n")
        sock.settimeout(1)
        data = b""
        while data.count(b"HTTP/1.1") < 5:
            data += sock.recv(65536)
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", data)
    assert statuses == [b"200", b"200", b"200", b"200", b"404"]


def test_too_many_connections(start_front):
    limits = dataclasses.replace(limits_of(RouterSettings()), max_connections=2)
    front = start_front(limits=limits)
    with front.socket() as one, front.socket() as two:
        for sock in (one, two):
            sock.sendall(b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        data = front.raw(b"")
        assert status_of(data) == 503
        assert b"retry-after" in data
    wait_until(lambda: front.call(lambda: front.front.num_connections == 0))
    assert front.get("/version").status_code == 200


def test_expect_continue(front):
    data = raw_post(PATH, chat(max_tokens=1), headers=["expect: 100-continue"])
    head, _, body = data.partition(b"\r\n\r\n")
    with front.socket() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_nagle_is_off(front):
    with front.socket() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n")
        assert sock.recv(65536)

        def values():
            return [
                connection.transport.get_extra_info("socket").getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NODELAY
                )
                for connection in front.front._server.server_state.connections
            ]

        found = front.call(values)
        assert found
        assert all(found)


def test_a_storm_of_connections_leaves_nothing(front):
    def churn():
        for _ in range(100):
            with front.socket() as sock:
                sock.sendall(raw_post(PATH, chat(stream=True, max_tokens=50)))

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_until(lambda: front.call(lambda: front.front.num_connections == 0))
    assert front.call(lambda: front.service.num_open) == 0
    assert front.post(PATH, chat()).status_code == 200


def test_a_front_that_drains_leaves_a_shared_port_to_others(start_front):
    """Idle connections end, answers under way are the last of theirs, new ones go elsewhere."""
    service = FakeService(held=True)
    front = start_front(service, share_port=True)
    request = raw_post("/v1/chat/completions", chat(max_tokens=2))
    with front.socket() as idle, front.socket() as busy, front.socket() as fresh:
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        busy.sendall(request)
        wait_until(lambda: len(service.open) == 1)
        front.call(front.front.drain)
        assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", front.port), timeout=10)
        fresh.sendall(request)
        wait_until(lambda: len(service.open) == 2)
        for request_id in list(service.open):
            front.call(service.answer, request_id)
        answer = read_all(busy)
        assert status_of(answer) == 200
        assert b"connection: close" in answer
        assert fresh.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_front_that_has_its_port_alone_says_itself_that_it_drains(start_front):
    front = start_front()
    front.call(front.front.drain)
    assert front.get("/health").status_code == 200
