"""Client: AsyncClient's results and errors, from any thread."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client.fake_router import RouterThread
from xllm import Client
from xllm.errors import BrokenError, ClosedError, DeadlineError, InvalidRequestError


@pytest.fixture
def router():
    with RouterThread() as router:
        yield router


@pytest.fixture
def client(router):
    with Client(router.endpoint, timeout_s=20) as client:
        yield client


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_calls(client):
    assert client.generate("echo a b").text == "ab"
    assert client.chat([{"role": "user", "content": "echo c"}]).text == "c"
    assert client.models()[0].name == "m"
    assert client.health().live
    assert client.status()[0].kind == "instance"
    assert client.detokenize(client.tokenize("ab")) == "ab"


def test_stream(client):
    stream = client.stream("echo a b")
    assert [delta.text for delta in stream] == ["a", "b"]
    assert stream.completion.text == "ab"
    assert list(stream) == []


def test_break_aborts(client, router):
    for _ in client.stream("half"):
        break
    wait_until(lambda: len(router.aborts) == 1)


def test_an_interrupt_while_a_stream_is_opened_stops_its_request(router):
    class Interrupted(Client):
        def _call(self, work):
            super()._call(work)
            raise KeyboardInterrupt

    with Interrupted(router.endpoint, timeout_s=20) as client:
        Client._call(client, client._client.models())  # the connection stands
        with pytest.raises(KeyboardInterrupt):
            client.stream("silent")
        wait_until(lambda: len(router.aborts) == 1)


def test_errors_cross_threads(client):
    with pytest.raises(DeadlineError):
        client.generate("silent", timeout_s=0.1)
    with pytest.raises(DeadlineError):
        list(client.stream("half", timeout_s=0.1))
    with pytest.raises(InvalidRequestError):
        client.generate("echo a", temprature=1)


def test_many_threads(client):
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: client.generate(f"echo {i}").text, range(200)))
    assert texts == [str(i) for i in range(200)]


def test_closed(router):
    client = Client(router.endpoint)
    stream = client.stream("half")
    passing = iter(stream)
    next(passing)
    client.close()
    client.close()
    with pytest.raises(ClosedError):
        next(passing)
    with pytest.raises(ClosedError):
        client.generate("echo a")
    assert not any(t.name == "xllm-client" for t in threading.enumerate())


def test_closing_fails_other_threads_calls(router):
    client = Client(router.endpoint)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "silent")
        wait_until(lambda: router.submits)
        client.close()
        with pytest.raises(ClosedError):
            waiting.result(10)


def test_no_router():
    with Client("tcp://127.0.0.1:9", connect_timeout_s=0.2) as client, pytest.raises(BrokenError):
        client.models()
