"""The table of bad inputs: what is sent, and which status answers it.

A case is (name, request, statuses). Requests are whole HTTP requests as bytes, so that nothing
between the table and the server repairs them.
"""

from __future__ import annotations

import gzip
import json

MODEL = "toy-model"
CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
MIB = 1 << 20


def post(path, body, *, headers=(), content_type="application/json", length=None):
    """A POST whose body is bytes, or a value to encode."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "connection: close"]
    if content_type:
        lines.append(f"content-type: {content_type}")
    lines.append(f"content-length: {len(data) if length is None else length}")
    return "\r\n".join([*lines, *headers]).encode() + b"\r\n\r\n" + data


def chat(**fields):
    """A chat with some fields set, or left out where they are `...`."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body |= fields
    return post(CHAT, {name: value for name, value in body.items() if value is not ...})


def plain(**fields):
    """A plain completion with some fields set."""
    return post(PLAIN, {"model": MODEL, "prompt": "hi", "max_tokens": 2} | fields)


def said(content):
    """A chat whose one message has this content."""
    return chat(messages=[{"role": "user", "content": content}])


def with_raw(field, raw):
    """A chat with a field whose JSON is given as text."""
    text = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
    return post(CHAT, f'{text[:-1]}, "max_tokens": 2, "{field}": {raw}}}'.encode())


HOST = b"host: localhost\r\n"
JSON = b"content-type: application/json\r\n"
EMPTY_OBJECT = b"content-length: 2\r\n"
BAD_GZIP = gzip.compress(b"x" * MIB)
DEEP = "[" * 100_000 + "]" * 100_000


def bodies():
    """B01 to B08: what is no JSON object, or not one of ours."""
    for name, body in {
        "empty": b"",
        "object": b"{}",
        "array": b"[]",
        "null": b"null",
        "text": b"hello",
        "truncated": b'{"model": "toy-model", "messages": [',
        "utf16": '{"model": "m"}'.encode("utf-16"),
        "bom": b"\xef\xbb\xbf{}",
        "invalid-utf8": b'{"model": "\xff\xfe"}',
        "surrogate": b'{"model": "toy-model", "messages": [{"role":"user","content":"\\ud800"}]}',
    }.items():
        for path in (CHAT, PLAIN, "/tokenize"):
            yield f"B01-{name}-{path}", post(path, body), {400}
    yield "B03-depth-unknown", with_raw("metadata", DEEP), {400}
    yield "B03-depth-known", with_raw("chat_template_kwargs", '{"a":' * 50_000), {400}
    for raw in ("NaN", "Infinity", "-Infinity", "1e400", "9" * 5000):
        yield f"B04-temperature-{raw[:9]}", with_raw("temperature", raw), {400}
        yield f"B04-max-tokens-{raw[:9]}", with_raw("seed", raw), {400}
    yield "B05-nul", said("a\0b"), {200, 400}
    yield "B05-odd-characters", said("\u202e\u200b😀\u0301"), {200}
    yield "B06-twice", with_raw("model", f'"{MODEL}"'), {200}
    yield "B06-twice-wrong", with_raw("model", '"other"'), {404}
    yield "B07-declared-gigabyte", post(CHAT, b"{}", length=1 << 30), {413}
    yield "B07-over-the-limit", said("x" * (4 * MIB)), {413}
    yield "B07-negative-length", post(CHAT, b"{}", length=-1), {400}
    yield "B07-length-no-number", post(CHAT, b"{}", length="many"), {400}
    yield "B08-gzip", post(CHAT, BAD_GZIP, headers=["content-encoding: gzip"]), {415}


def heads():
    """B09 and B11: what is no proper HTTP."""
    get = b"GET /v1/models HTTP/1.1\r\n" + HOST
    start = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + JSON
    yield "B09-many-headers", get + b"a: b\r\n" * 10_000 + b"\r\n", {431}
    yield "B09-long-header", get + b"a: " + b"x" * MIB + b"\r\n\r\n", {431}
    yield "B09-long-url", b"GET /" + b"x" * MIB + b" HTTP/1.1\r\n" + HOST + b"\r\n", {414}
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"):
        yield f"B11-type-{kind}", post(CHAT, b"{}", content_type=kind), {415}
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
        data = f"{method} {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        yield f"B11-method-{method}", data.encode(), {400, 405}
    yield "B11-no-such-method", b"HELLO / HTTP/1.1\r\n" + HOST + b"\r\n", {400}
    yield "B11-no-version", b"GET /v1/models\r\n\r\n", {400}
    yield "B11-http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}
    yield "B11-two-lengths", start + EMPTY_OBJECT + b"content-length: 3\r\n\r\n{}", {400}
    smuggled = EMPTY_OBJECT + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    yield "B11-length-and-chunks", start + smuggled, {400}
    yield "B11-strange-encoding", start + b"transfer-encoding: x\r\n\r\n{}", {400}
    yield "B11-no-host", b"GET /v1/models HTTP/1.1\r\n\r\n", {400}
    evil = b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"
    yield "B11-foreign-host", evil, {403}
    gone = b"GET /nothing HTTP/1.1\r\nconnection: close\r\n" + HOST + b"\r\n"
    yield "B11-no-such-path", gone, {404}


def chats():
    """B12 to B14: model and messages."""
    yield "B12-missing", chat(model=...), {400}
    for name in ("", None, 1, ["x"]):
        yield f"B12-{name!r}", chat(model=name), {400}
    for name in ("other", "x" * MIB, "../../x", "/etc/passwd", MODEL + "\0"):
        yield f"B12-{name[:12]!r}", chat(model=name), {404}
    yield "B13-missing", chat(messages=...), {400}
    turn = {"role": "user", "content": "hi"}
    for name, messages in {
        "empty": [],
        "many": [turn] * 60_000,
        "null": None,
        "text": "hi",
        "of-text": ["hi"],
        "role": [{"role": "robot", "content": "hi"}],
        "no-role": [{"content": "hi"}],
        "no-content": [{"role": "user"}],
        "null-content": [{"role": "user", "content": None}],
        "number": [{"role": "user", "content": 1}],
        "object": [{"role": "user", "content": {}}],
        "null-part": [{"role": "user", "content": [None]}],
        "tool-calls": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
        "later": [turn, {"role": "user", "content": 1}],
    }.items():
        yield f"B13-{name}", chat(messages=messages), {400}
    for kind in ("image_url", "input_audio", "file", "", "TEXT"):
        part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x"}}
        yield f"B14-{kind}", said([part]), {400}
    yield "B14-text-without-text", said([{"type": "text"}]), {400}


def numbers():
    """B15 to B22: sampling parameters."""
    for value in (0, -1, 2**63, 2**200, "10", 1.5, True, [], 10**7):
        yield f"B15-{value!r:.20}", chat(max_tokens=value), {400}
        yield f"B15-new-{value!r:.20}", chat(max_tokens=..., max_completion_tokens=value), {400}
    yield "B15-null", plain(max_tokens=None), {200}
    yield "B16-min-over-max", chat(min_tokens=3), {400}
    yield "B16-min-without-max", chat(max_tokens=None, min_tokens=10**7), {400}
    yield "B16-min-negative", chat(min_tokens=-1), {400}
    for value in (0, -1, 10**9, 129, 1.5, "2"):
        yield f"B17-n-{value}", chat(n=value), {400}
    yield "B17-best-of", plain(n=2, best_of=1), {400}
    yield "B17-best-of-more", plain(n=1, best_of=5), {400}
    yield "B17-prompts-times-n", plain(prompt=["x"] * 64, n=3), {400}
    for name, values in {
        "temperature": (-1, 1e30, "0.7", 2.01, []),
        "top_p": (0, 2, -1, "1"),
        "top_k": (-5, 1.5, "all"),
        "min_p": (-0.1, 1.1),
        "presence_penalty": (1e9, -1e9),
        "frequency_penalty": (1e9, -1e9),
        "repetition_penalty": (0, -1, 1e9),
    }.items():
        for value in values:
            yield f"B18-{name}-{value}", chat(**{name: value}), {400}
    for value in (-1, 21, 154_880, 10**9, 2**70, "1", True):
        yield f"B19-plain-{value}", plain(logprobs=value), {400}
        yield f"B19-chat-{value}", chat(logprobs=True, top_logprobs=value), {400}
        yield f"B19-prompt-{value}", plain(prompt_logprobs=value), {400}
    for name, bias in {
        "many": {str(token): 1 for token in range(300_000)},
        "beyond": {"10000000": 1},
        "negative": {"-1": 1},
        "no-number": {"abc": 1},
        "huge": {"1": 1e9},
        "huge-negative": {"1": -1e9},
        "text": {"1": "1"},
        "list": [1],
    }.items():
        yield f"B20-{name}", chat(logit_bias=bias), {400}
    for name, stop in {
        "many": ["x"] * 10_000,
        "empty": "",
        "empty-one": ["a", ""],
        "long": "x" * MIB,
        "number": 1,
        "nested": [["x"]],
    }.items():
        yield f"B21-{name}", chat(stop=stop), {400}
    longest = ["a" * 500 + str(k).zfill(12) for k in range(16)]
    yield "B21-most", chat(stop=longest, n=128), {200}
    for k in range(4):
        yield f"B21-most-{k}", plain(stop=longest, prompt=["x"] * 64, n=2), {200}
    for value in (-1, 2**64, 2**100, 1.5, "1"):
        yield f"B22-{value}", chat(seed=value), {400}
    for value in ([-1], [10**7], [2**70], ["x"], list(range(5000)), 1):
        yield f"B22-stop-ids-{str(value)[:9]}", chat(stop_token_ids=value), {400}


def prompts(max_model_len):
    """B23 and B24: prompts, as texts and as ids."""
    for name, prompt in {
        "missing": None,
        "empty": "",
        "empty-list": [],
        "empty-ids": [[]],
        "many": ["x"] * 100_000,
        "65": ["x"] * 65,
        "negative": [-1],
        "beyond": [10**7],
        "huge": [2**70],
        "float": [1.5],
        "nested": [[[1]]],
        "mixed": ["x", 1],
        "mixed-lists": [[1], "x"],
        "object": {"x": 1},
        "true": [True],
        "context-plus-one": [7] * (max_model_len + 1),
        "context": [7] * max_model_len,
        "ten-contexts": [7] * (10 * max_model_len),
    }.items():
        yield f"B23-{name}", plain(prompt=prompt, max_tokens=1), {400}
    full = plain(prompt=[7] * (max_model_len - 1), max_tokens=2)
    yield "B24-prompt-and-output", full, {400}
    yield "B24-text", plain(prompt="x" * MIB), {400}


def features():
    """B25 to B28: flags, what is not here, and what nobody may set."""
    for value in ("yes", 1, [], {}):
        yield f"B25-stream-{value}", chat(stream=value), {400}
    yield "B25-options-alone", chat(stream_options={"include_usage": True}), {400}
    yield "B25-options-text", chat(stream=True, stream_options="x"), {400}
    yield "B25-unknown", chat(whatever={"a": [1]}, another=None), {200}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    for name, fields in {
        "schema": {"response_format": schema},
        "object": {"response_format": {"type": "json_object"}},
        "large": {"response_format": {"type": "json_schema", "x": "a" * MIB}},
        "bad-type": {"response_format": {"type": 1}},
        "regex": {"guided_regex": "(a+)+b"},
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "functions": {"functions": [{"name": "f"}]},
        "choice": {"tool_choice": "required"},
        "audio": {"modalities": ["text", "audio"], "audio": {"voice": "x"}},
    }.items():
        yield f"B26-{name}", chat(**fields), {400}
    loop = "{% for i in range(10**9) %}x{% endfor %}"
    for name, fields in {
        "template": {"chat_template": loop},
        "kwargs-template": {"chat_template_kwargs": {"chat_template": loop}},
        "kwargs-tokenize": {"chat_template_kwargs": {"tokenize": False}},
        "kwargs-list": {"chat_template_kwargs": []},
        "kwargs-tree": {"chat_template_kwargs": {"a": {"b": "c"}}},
        "kwargs-forest": {"chat_template_kwargs": {"a": [{}] * 1_000_000}},
        "generation-prompt": {"add_generation_prompt": False},
        "continue": {"continue_final_message": True},
        "documents": {"documents": [{"text": "x"}]},
        "path": {"lora_path": "/etc/passwd"},
        "processor": {"mm_processor_kwargs": {"x": 1}},
    }.items():
        yield f"B27-{name}", chat(**fields), {400}
    for value in ("x" * MIB, "a\nb", "a/../b\0", "a b", 1):
        yield f"B28-salt-{str(value)[:6]!r}", chat(cache_salt=value), {400}
    yield "B28-user", chat(user="x" * MIB), {200}
    yield "B28-request-id", chat(request_id="../../x", id="x"), {200}
    for value in (2**31, -(2**31), "1", 1.5):
        yield f"B28-priority-{value}", chat(priority=value), {400}


def all_cases(max_model_len):
    """Every case of the table."""
    return [*bodies(), *heads(), *chats(), *numbers(), *prompts(max_model_len), *features()]
