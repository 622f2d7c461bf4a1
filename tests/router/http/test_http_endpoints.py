"""Every endpoint's answers, through a real socket and a fake service."""

import pytest

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import chat, raw_post, sse_events, wait_until
from xllm import __version__
from xllm.protocol.generation import RequestFailed
from xllm.router.http import application


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_chat(front):
    answer = front.post("/v1/chat/completions", chat(max_tokens=2))
    assert answer.status_code == 200
    shown = answer.json()
    assert shown["object"] == "chat.completion"
    assert shown["id"] == "chatcmpl-" + answer.headers["x-request-id"]
    (choice,) = shown["choices"]
    assert choice["message"] == {"role": "assistant", "content": " zero one", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert shown["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_chat_logprobs(front):
    answer = front.post(
        "/v1/chat/completions", chat(max_tokens=1, logprobs=True, top_logprobs=2)
    ).json()
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["token"] == " zero"
    assert bytes(entry["bytes"]) == b" zero"
    assert [top["token"] for top in entry["top_logprobs"]] == [" zero", " one"]


def test_chat_stream(front):
    body = chat(max_tokens=2, n=2, stream=True, stream_options={"include_usage": True})
    answer = front.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse_events(answer.text)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 4
    assert {event["id"] for event in events[:-1]} == {"chatcmpl-" + answer.headers["x-request-id"]}
    for index, text in enumerate((" zero one", " one two")):
        chunks = [event["choices"][0] for event in events[:-2]]
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(chunk["delta"].get("content", "") for chunk in mine) == text
        assert [chunk["finish_reason"] for chunk in mine] == [None, None, None, "length"]


def test_chat_stream_without_usage_has_none(front):
    events = sse_events(front.post("/v1/chat/completions", chat(stream=True)).text)
    assert all("usage" not in event for event in events[:-1])


def test_chat_stream_logprobs(front):
    body = chat(max_tokens=3, stream=True, logprobs=True, top_logprobs=1)
    events = sse_events(front.post("/v1/chat/completions", body).text)
    tokens = [
        entry["token"]
        for event in events[:-1]
        for entry in (event["choices"][0]["logprobs"] or {}).get("content", ())
    ]
    assert tokens == [" zero", " one", " two"]


@pytest.mark.parametrize(
    ("prompt", "num"), [("one", 1), (["one", "two"], 2), ([1, 2], 1), ([[1], [2], [3]], 3)]
)
def test_completion_prompts(front, prompt, num):
    body = {"model": "fake", "prompt": prompt, "max_tokens": 1, "n": 2}
    shown = front.post("/v1/completions", body).json()
    assert shown["object"] == "text_completion"
    assert [choice["index"] for choice in shown["choices"]] == list(range(2 * num))
    assert [choice["text"] for choice in shown["choices"]] == [" zero", " one"] * num
    assert shown["usage"]["completion_tokens"] == 2 * num


def test_completion_defaults_to_16_tokens(front):
    shown = front.post("/v1/completions", {"model": "fake", "prompt": "x"}).json()
    assert shown["usage"]["completion_tokens"] == 16


def test_completion_echo(front):
    for prompt in (" one two", [1, 2]):
        body = {"model": "fake", "prompt": prompt, "max_tokens": 1, "echo": True}
        assert front.post("/v1/completions", body).json()["choices"][0]["text"] == " one two zero"
        events = sse_events(front.post("/v1/completions", body | {"stream": True}).text)
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert text == " one two zero"


def test_completion_echo_with_logprobs(front):
    body = {"model": "fake", "prompt": " one two", "max_tokens": 1, "echo": True, "logprobs": 1}
    (choice,) = front.post("/v1/completions", body).json()["choices"]
    assert choice["text"] == " one two zero"
    assert choice["logprobs"]["tokens"] == [" one", " two", " zero"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 4, 8]
    assert choice["logprobs"]["top_logprobs"][1] == {" two": -0.5, " three": -1.5}


def test_completion_that_only_scores(front):
    body = {"model": "fake", "prompt": [1, 2], "max_tokens": 0, "echo": True, "logprobs": 1}
    shown = front.post("/v1/completions", body).json()
    assert shown["choices"][0]["text"] == " one two"
    assert shown["choices"][0]["logprobs"]["tokens"] == [" one", " two"]
    assert shown["usage"]["completion_tokens"] == 0


def test_completion_stream_offsets(front):
    body = {"model": "fake", "prompt": "x", "max_tokens": 3, "stream": True, "logprobs": 1}
    events = sse_events(front.post("/v1/completions", body).text)
    shown = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [one["text_offset"] for one in shown if one] == [[0], [5], [9]]


def test_models(front):
    shown = front.get("/v1/models").json()
    assert [one["id"] for one in shown["data"]] == ["fake"]
    assert front.get("/v1/models/fake").json() == shown["data"][0]
    assert shown["data"][0]["created"] == 0  # the same at every router, whenever it was started
    assert error_of(front.get("/v1/models/other/name"), 404)["code"] == "model_not_found"


def test_tokenize_and_detokenize(front):
    shown = front.post("/tokenize", {"prompt": "one two"}).json()
    assert shown == {"count": 2, "max_model_len": 1000, "tokens": [1, 2]}
    assert front.post("/detokenize", {"tokens": [1, 2]}).json() == {"prompt": " one two"}
    assert error_of(front.post("/tokenize", {}), 400)["param"] == "prompt"
    refused = error_of(front.post("/detokenize", {"tokens": [99]}), 400)
    assert refused["param"] == "tokens"  # as the body has it, not as the service does
    assert refused["message"].startswith("tokens must be")
    body = {"model": "fake", "prompt": [99], "echo": True}
    assert error_of(front.post("/v1/completions", body), 400)["param"] == "prompt"
    body["prompt"] = [[1], [99]]
    assert error_of(front.post("/v1/completions", body), 400)["param"] == "prompt[1]"


@pytest.mark.parametrize("body", [b"", b" \r\n"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_an_empty_body_is_called_one(front, path, body):
    with front.socket() as sock:
        sock.sendall(raw_post(path, body))
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"the body is empty, and must be a JSON object"' in answer


class PickyService(FakeService):
    """Takes no prompt that holds 7, in the words of the service."""

    def submit(self, request, tenant, sink):
        if 7 not in request.prompt:
            return super().submit(request, tenant, sink)
        place = f"prompt[{request.prompt.index(7)}]"
        text = f"{place} must be an id from 0 to 6, not 7"
        failed = RequestFailed(id=request.id, code="invalid_value", message=text, param=place)
        sink.send(failed)
        return "0" * 32


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompts", "place"), [([[1, 2], [3, 7]], "prompt[1][1]"), ([[1, 2, 7]], "prompt[2]")]
)
def test_a_wrong_id_is_told_with_its_prompt(start_front, prompts, place, stream):
    front = start_front(PickyService())
    body = {"model": "fake", "prompt": prompts, "stream": stream}
    error = error_of(front.post("/v1/completions", body), 400)
    assert error["param"] == place
    assert error["message"] == f"{place} must be an id from 0 to 6, not 7"


def test_health_metrics_version(front):
    assert front.get("/health/live").json() == {"status": "live"}
    assert front.get("/health/ready").status_code == 200
    assert front.get("/health").status_code == 200
    assert front.get("/metrics").headers["content-type"].startswith("text/plain")
    assert front.get("/version").json() == {"version": __version__}


def test_not_ready_is_503(start_front):
    service = FakeService()
    service.ready = False
    front = start_front(service)
    for path in ("/health", "/health/ready"):
        answer = front.get(path)
        assert answer.status_code == 503
        assert answer.json()["status"] == "not_ready"
    assert front.get("/health/live").status_code == 200


def test_wrong_path_and_method(front):
    assert error_of(front.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(front.get("/v1/chat/completions/"), 404)["code"] == "not_found"
    answer = front.get("/v1/chat/completions")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": ""}, {"content-encoding": "gzip"}],
)
def test_media_types(front, headers):
    answer = front.post("/v1/chat/completions", chat(), headers=headers)
    assert error_of(answer, 415)["code"] == "unsupported_media_type"


def test_failures_keep_status_param_and_code(front):
    error = error_of(front.post("/v1/chat/completions", chat(temperature=-1)), 400)
    assert (error["param"], error["code"]) == ("temperature", "invalid_value")
    assert error["type"] == "invalid_request_error"
    answer = front.post("/v1/chat/completions", chat(model="other", stream=True))
    assert error_of(answer, 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("overloaded", 429, "rate_limit_error"),
        ("unavailable", 503, "server_error"),
        ("aborted", 503, "server_error"),
        ("deadline_exceeded", 504, "server_error"),
        ("engine_error", 500, "server_error"),
        ("no_such_code", 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_of_the_service(start_front, code, status, kind, stream):
    service = FakeService()
    service.failure = RequestFailed(
        id=0, code=code, message="/secret/path: Traceback", retry_after_ms=1500
    )
    front = start_front(service)
    answer = front.post("/v1/chat/completions", chat(stream=stream))
    error = error_of(answer, status)
    assert error["type"] == kind
    if status in (429, 503):
        assert answer.headers["retry-after"] == "2"
    if status == 500:
        assert "secret" not in answer.text
    assert answer.headers["x-request-id"]


def test_one_failed_prompt_fails_all(start_front):
    service = FakeService(held=True)
    front = start_front(service)

    def fail_second():
        ids = list(service.open)
        if len(ids) == 3:
            service.fail(ids[1], "engine_error", "x")
            return True
        front.loop.call_later(0.005, fail_second)
        return False

    front.call(fail_second)
    body = {"model": "fake", "prompt": ["one", "two", "three"]}
    assert error_of(front.post("/v1/completions", body), 500)["code"] == "engine_error"
    assert front.call(lambda: service.num_open) == 0
    assert len(service.aborted) == 2


def test_a_bug_in_the_service_is_an_internal_error(start_front):
    class BrokenService(FakeService):
        def models(self):
            raise KeyError("secret")

    answer = start_front(BrokenService()).get("/v1/models")
    assert error_of(answer, 500)["message"] == "Internal error."
    assert "secret" not in answer.text


class BrokenLog:
    """A log that cannot be written; keeps what it was told."""

    def __init__(self):
        self.told = []

    def error(self, event, **values):
        self.told.append((event, values))
        raise ValueError("I/O operation on closed file")


def test_a_bug_is_answered_though_the_log_cannot_be_written(start_front, monkeypatch):
    class BrokenService(FakeService):
        def models(self):
            raise KeyError("secret")

    log = BrokenLog()
    monkeypatch.setattr(application, "LOG", log)
    answer = start_front(BrokenService()).get("/v1/models")
    assert error_of(answer, 500)["message"] == "Internal error."
    wait_until(lambda: log.told)
    [(event, values)] = log.told
    assert event == "request_failed"
    assert "KeyError" in values["error"]
    assert "secret" not in str(log.told)


def test_traceparent_is_carried(start_front):
    service = FakeService()
    front = start_front(service)
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    front.post("/v1/chat/completions", chat(), headers={"traceparent": trace})
    front.post("/v1/chat/completions", chat(), headers={"traceparent": "nonsense"})
    assert [request.traceparent for request, _ in service.submitted] == [trace, ""]


def test_figures_are_shown(start_front):
    front = start_front()
    front.post("/v1/chat/completions", chat())
    front.get("/nowhere")
    assert front.raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    text = front.get("/metrics").text
    assert 'xllm_http_requests_total{path="/v1/chat/completions"} 1.0' in text
    assert 'xllm_http_errors_total{status="404"} 1.0' in text
    assert 'xllm_http_errors_total{status="400"} 1.0' in text
    assert "\nxllm_http_connections " in text
