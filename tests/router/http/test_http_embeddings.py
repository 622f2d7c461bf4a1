"""POST /v1/embeddings over a fake service: shapes, order, bounds, windows, the client's leaving."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from array import array

import pytest

from tests.router.http.fake_service import MODEL, FakeService
from tests.router.http.front_thread import wait_until
from xllm.config.router import RouterSettings
from xllm.router.http.embed import WINDOW, embedding_requests
from xllm.router.http.schema import EmbeddingBody

PATH = "/v1/embeddings"


def ask(front, **body):
    return front.post(PATH, {"model": MODEL, **body})


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ("hello", [5]),
        (["a", "bcd"], [1, 3]),
        ([4, 5, 6], [3]),
        ([[4, 5], [6]], [2, 1]),
    ],
)
def test_every_kind_of_input(front, given, lengths):
    answer = ask(front, input=given, user="someone", unknown=1)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", MODEL)
    tenth = struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert body["data"] == [
        {"object": "embedding", "index": index, "embedding": [length, index, tenth]}
        for index, length in enumerate(lengths)
    ]
    assert body["usage"] == {
        "prompt_tokens": sum(lengths),
        "total_tokens": sum(lengths),
        "prompt_tokens_details": {"cached_tokens": len(lengths)},
    }
    assert answer.headers["x-request-id"]


def test_base64_has_the_same_numbers(front):
    answer = ask(front, input=["ab", "c"], encoding_format="base64")
    vectors = [array("f", base64.b64decode(one["embedding"])) for one in answer.json()["data"]]
    assert vectors == [array("f", [2, 0, 0.1]), array("f", [1, 1, 0.1])]


def test_dimensions_reach_the_service(front):
    answer = ask(front, input="ab", dimensions=2)
    assert answer.json()["data"][0]["embedding"] == [2, 0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": "x"}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "model": ""}, "model"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
def test_bad_bodies_are_refused_by_field(front, body, param):
    answer = ask(front, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param), error


def test_another_model_is_not_found(front):
    answer = ask(front, input="a", model="other")
    assert answer.status_code == 404


def test_only_post_is_allowed(front):
    assert front.get(PATH).status_code == 405


class PickyService(FakeService):
    """Fails the inputs that say `bad`."""

    def embed(self, request_id, request, sink):
        if request.prompt == "bad":
            self.open[request_id] = self.kept[request_id]
            self.fail(request_id, "invalid_value", "prompt must not be bad", "prompt")
        else:
            super().embed(request_id, request, sink)

    def submit(self, request, tenant, sink):
        request_id = super().submit(request, tenant, sink)
        self.kept = {**getattr(self, "kept", {}), request_id: self.open[request_id]}
        return request_id


def test_one_bad_input_names_its_index(start_front):
    front = start_front(PickyService())
    answer = ask(front, input=["good", "fine", "bad", "good"])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "input[2]"
    assert error["message"] == "input[2] must not be bad"
    answer = ask(front, input="bad")
    assert answer.json()["error"]["param"] == "input"


def test_no_more_than_a_window_is_open_and_order_holds(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    lengths = [1 + index % 7 for index in range(WINDOW * 2 + 5)]
    answers = []

    def client():
        answers.append(ask(front, input=["x" * length for length in lengths]))

    thread = threading.Thread(target=client)
    thread.start()
    deadline = time.monotonic() + 20
    most = 0
    while thread.is_alive():
        assert time.monotonic() < deadline
        most = max(most, front.call(lambda: len(service.open)))
        front.call(lambda: [service.finish(name) for name in list(service.open)[-40:]])
    thread.join()
    assert most == WINDOW
    data = answers[0].json()["data"]
    assert [one["embedding"][0] for one in data] == lengths
    assert [one["index"] for one in data] == list(range(len(lengths)))


def test_a_tenants_limits_bound_a_list(start_front):
    service = FakeService(held=True)
    service.admission.most_open = 3
    front = start_front(service)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(front, input=["a"] * 10)))
    thread.start()
    most = 0
    deadline = time.monotonic() + 20
    while thread.is_alive():
        assert time.monotonic() < deadline
        most = max(most, front.call(lambda: len(service.open)))
        front.call(lambda: [service.finish(name) for name in list(service.open)])
    thread.join()
    assert most == 3
    assert answers[0].status_code == 200
    service.admission.most_a_minute = 9
    refused = ask(front, input=["a"] * 10)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input"
    assert refused.json()["error"]["message"] == "input: too many for a minute"
    many = {"model": MODEL, "prompt": ["a"] * 4, "max_tokens": 1}
    refused = front.post("/v1/completions", many)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    assert "3 open" in refused.json()["error"]["message"]
    assert not front.call(lambda: len(service.open))


def test_a_client_that_leaves_ends_all_of_it(start_front):
    service = FakeService(held=True)
    front = start_front(service)
    body = json.dumps({"model": MODEL, "input": ["a"] * 300}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: len(service.open) == WINDOW)
        assert not service.aborted
    wait_until(lambda: len(service.aborted) >= WINDOW)
    assert front.call(lambda: len(service.open)) == 0
    assert len(service.submitted) == WINDOW


def test_the_requests_carry_what_the_body_says():
    body = EmbeddingBody(
        model="m", input=["a", "b"], priority=3, offline=True, cache_salt="s", ttft_ms=9,
        dimensions=5,
    )  # fmt: skip
    first, second = embedding_requests(body, RouterSettings(), "trace")
    assert (first.id, first.prompt, second.id, second.prompt) == (0, "a", 1, "b")
    for one in (first, second):
        assert one.embed
        assert not one.stream
        assert (one.priority, one.offline, one.cache_salt) == (3, True, "s")
        assert (one.ttft_ms, one.dimensions, one.traceparent) == (9, 5, "trace")
