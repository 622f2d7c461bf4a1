"""Keys, tenants and Host headers: who may enter, on every path and by every trick."""

import pytest
from prometheus_client import CollectorRegistry

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import FrontThread, chat, raw_post
from xllm.errors import AuthenticationError, ConfigError, ListenError
from xllm.router.http.application import routes_of
from xllm.router.http.auth import Gate, is_plain_host, read_key_file
from xllm.router.http.context import FrontContext
from xllm.router.http.figures import HttpFigures

KEYS = """# two tenants
alice:alice-key-0123456789

bob: bob-key-0123456789
bob:other-0123456789abc
"""
ALICE = {"authorization": "Bearer alice-key-0123456789"}
BOB = {"authorization": "Bearer bob-key-0123456789"}


def write_keys(path, text=KEYS, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    front = FrontThread(
        FakeService(), api_key_file=write_keys(tmp_path_factory.mktemp("keys") / "keys")
    )
    yield front
    front.close()


def test_tenants_have_their_own_salts(keyed):
    keyed.service.submitted.clear()
    other = {"authorization": "bearer other-0123456789abc"}
    for headers in (ALICE, BOB, other):
        assert keyed.post("/v1/chat/completions", chat(), headers=headers).status_code == 200
    alice, bob, bob_too = [tenant for _, tenant in keyed.service.submitted]
    assert (alice.name, bob.name) == ("alice", "bob")
    assert alice.salt != bob.salt
    assert len(alice.salt) == 32
    assert bob == bob_too


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer alice-key-012345678"},
        {"authorization": "Bearer alice-key-01234567890"},
        {"authorization": "Bearer alice:alice-key-0123456789"},
        {"authorization": "Basic alice-key-0123456789"},
        {"authorization": "alice-key-0123456789"},
        {"x-api-key": "alice-key-0123456789"},
    ],
)
def test_wrong_keys(keyed, headers):
    answer = keyed.post("/v1/chat/completions", chat(), headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "alice" not in answer.text


def test_two_authorization_headers_are_none(keyed):
    line = "authorization: Bearer alice-key-0123456789"
    data = raw_post("/v1/chat/completions", chat(), headers=[line, line])
    assert keyed.raw(data).startswith(b"HTTP/1.1 401")


def paths():
    context = FrontContext(FakeService(), None, None)
    figures = HttpFigures(CollectorRegistry(), lambda: 0)
    return [route.path.replace("{name:path}", "fake") for route in routes_of(context, figures)]


@pytest.mark.parametrize("path", [*paths(), "/", "/nothing", "/docs", "/openapi.json"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_every_path_but_one_needs_a_key(keyed, path, method):
    data = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    status = int(keyed.raw(data).split(b" ")[1])
    if path == "/health/live":
        assert status == (200 if method in ("GET", "HEAD") else 405)
    else:
        assert status == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/./v1/models",
        "/health/live/../../v1/models",
        "/health/live/%2e%2e/%2e%2e/v1/models",
        "/health/live%2f..%2f..%2fv1%2fmodels",
        "/health/live;/v1/models",
        "/health/live/",
        "/health/live%00",
        "/health/live%20",
        "/HEALTH/LIVE",
        "/v1/models?/health/live",
        "/v1/models#/health/live",
        "/v1/%6dodels",
        "http://localhost/v1/models",
        "/v1/models/fake?x=/health/live",
        "\\v1\\models",
        "/v1/models/%ff",
    ],
)
@pytest.mark.parametrize(
    "header",
    [
        "host: localhost",
        "host: x/health/live",
        "host: localhost\r\nx-original-url: /health/live",
        "host: x\r\nx-forwarded-prefix: /health/live",
        "host: x\r\nx-rewrite-url: /health/live",
    ],
)
def test_path_tricks_never_enter(keyed, target, header):
    for version in ("1.0", "1.1"):
        data = f"GET {target} HTTP/{version}\r\n{header}\r\nconnection: close\r\n\r\n".encode()
        assert keyed.raw(data).split(b" ")[1] in (b"400", b"401")


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost", True),
        ("LOCALHOST:8010", True),
        ("127.0.0.1:1", True),
        ("[::1]:8010", True),
        ("10.1.2.3", True),
        ("", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("127.0.0.1.nip.io", False),
        ("localhost:80:80", False),
        ("localhost:http", False),
        ("[::1", False),
        ("[::1]x", False),
        ("2130706433", False),
        ("user@localhost", False),
    ],
)
def test_hosts(front, host, good):
    assert is_plain_host(host.encode()) is good
    data = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
    status = front.raw(data).split(b" ")[1]
    assert status == b"200" if good else status in (b"400", b"403")


def test_clients_from_elsewhere_need_a_key():
    gate = Gate({})
    headers = [(b"host", b"10.0.0.1")]
    assert gate.admit("/v1/models", headers, "127.0.0.1").name == "default"
    with pytest.raises(Exception, match="only local clients"):
        gate.admit("/v1/models", headers, "10.0.0.2")


def test_a_gate_with_keys_admits_nobody_else(tmp_path):
    gate = Gate(read_key_file(write_keys(tmp_path / "keys")))
    assert gate.has_keys
    good = [(b"authorization", b"Bearer alice-key-0123456789")]
    assert gate.admit("/x", good, "10.0.0.2").name == "alice"
    with pytest.raises(AuthenticationError):
        gate.admit("/health/live/", [], "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (KEYS, 0o640, "0600"),
        (KEYS, 0o604, "0600"),
        ("", 0o600, "no key"),
        ("# nothing\n", 0o600, "no key"),
        ("alice\n", 0o600, "line 1"),
        (":alice-key-0123456789\n", 0o600, "line 1"),
        ("alice:short\n", 0o600, "line 1"),
        ("a:alice-key-0123456789\nb:alice-key-0123456789\n", 0o600, "line 2"),
        ("a:" + "x" * (1 << 20), 0o600, "larger"),
    ],
)
def test_bad_key_files(tmp_path, text, mode, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        read_key_file(write_keys(tmp_path / "keys", text, mode))
    assert "alice-key" not in str(caught.value)


def test_key_file_that_is_no_file(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(write_keys(tmp_path / "keys"))
    for path in (tmp_path / "none", tmp_path, link):
        with pytest.raises(ConfigError, match=rf"router\.api_key_file: {path}"):
            read_key_file(str(path))


def test_a_front_beyond_loopback_needs_keys():
    with pytest.raises(ConfigError, match="beyond loopback"):
        FrontThread(FakeService(), host="0.0.0.0")


def test_a_port_that_is_taken(front):
    with pytest.raises(ListenError, match="cannot listen"):
        taken(front.port)


def taken(port):
    from xllm.router.http.server import bind

    bind("127.0.0.1", port)
