"""A running service with keys: what listens, who is heard, what it tells, and whom it keeps apart.

One service for all tests of this module.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import httpx
import pytest
import zmq

from tests.cli.toy_model import expected_ids
from tests.security.keyed_peers import pair_of
from tests.security.keyed_service import (
    ALICE,
    ALICE_TOO,
    BOB,
    CANARY,
    CAROL,
    KEYS,
    MODEL,
    PROMPT,
    Keyed,
)
from tests.security.listeners import tcp_listeners, udp_sockets, unix_listeners
from tests.security.pickles import frames_of, pickles
from tests.serve.served import wait_until
from xllm.cli.keys import allow_peer, revoke_peer
from xllm.errors import PermissionDeniedError, XllmError
from xllm.protocol.transport.security import create_keys

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    run_dir = tempfile.mkdtemp(prefix="xk-", dir="/tmp")
    service = Keyed(tmp_path_factory.mktemp("keyed"), run_dir)
    with service.served:
        yield service
    shutil.rmtree(run_dir, ignore_errors=True)


# -- what listens --------------------------------------------------------------------------------


def test_nothing_listens_but_what_is_known(keyed):
    port = int(keyed.url.rpartition(":")[2])
    zmq_port = int(keyed.served.zmq.rpartition(":")[2])
    pids = keyed.pids
    assert tcp_listeners(pids) == {("127.0.0.1", port), ("127.0.0.1", zmq_port)}
    assert udp_sockets(pids) == []
    paths = unix_listeners(pids)
    assert {pathlib.Path(path).name for path in paths} == {
        "registry",
        "launch",
        "instance-0-instance",
        "instance-0-bus",
        "instance-0-worker",
        "kvcache-0-kvcache",
        "kvcache-0-kvcache-bus",
        "router-0-bus",
    }
    for path in paths:
        assert path.startswith(str(keyed.served.run_dir) + "/run-"), path
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700


def test_files_are_the_users_alone(keyed):
    [run] = keyed.served.run_dir.iterdir()
    for folder, _, names in os.walk(run):
        assert stat.S_IMODE(os.lstat(folder).st_mode) == 0o700
        for name in names:
            mode = os.lstat(os.path.join(folder, name)).st_mode
            assert stat.S_IMODE(mode) & 0o077 == 0, name
    # Shared memory has no name that anybody else could open.
    for pid in keyed.pids:
        maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
        assert "/dev/shm" not in maps
        limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4] == "0"
        files = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        assert files.split()[3] == files.split()[4]


# -- nothing unpickles ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_the_pickles_do_what_they_are_for(tmp_path, number):
    canary = tmp_path / "canary"
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", program], input=pickles(canary)[number], check=True)
    assert canary.exists()


def test_nothing_unpickles(keyed, tmp_path):
    """Every endpoint that listens gets pickles in every place, and goes on."""
    canary = tmp_path / "canary"
    public, secret = pair_of(keyed.folder / "client")
    context = zmq.Context()
    before = bad_messages(keyed)
    endpoints = [f"ipc://{path}" for path in unix_listeners(keyed.pids)]
    num_answered = 0
    for endpoint in [*endpoints, keyed.served.zmq]:
        peer = context.socket(zmq.XSUB if endpoint.endswith("-bus") else zmq.DEALER)
        peer.linger = 2000
        peer.sndtimeo = 10000
        if endpoint.startswith("tcp"):
            peer.curve_serverkey = keyed.public_key.encode()
            peer.curve_publickey, peer.curve_secretkey = public, secret
        peer.connect(endpoint)
        for poison in pickles(canary):
            for frames in frames_of(poison):
                peer.send_multipart(frames)
                while peer.poll(0):
                    peer.recv_multipart()
                    num_answered += 1
        num_answered += bool(peer.poll(2000))
        peer.close()
        keyed.check()  # a good request meanwhile
    context.destroy(linger=0)
    url = keyed.url + "/v1/completions"
    for poison in pickles(canary):
        for kind in ("application/json", "application/octet-stream", "application/x-python-pickle"):
            headers = {"authorization": f"Bearer {CAROL}", "content-type": kind}
            answer = httpx.post(url, content=poison, headers=headers, trust_env=False)
            assert 400 <= answer.status_code < 500
    assert num_answered > 100
    after = bad_messages(keyed)
    assert all(after[role] > before[role] for role in ("router", "master", "kvcache")), after
    keyed.check()
    assert not canary.exists()


def bad_messages(keyed) -> dict[str, float]:
    """Messages that did not decode, by role, once the figures are those of after the call."""

    def read():
        found = {}
        for line in keyed.metrics().splitlines():
            if line.startswith("xllm_transport_bad_messages_total{"):
                role = line.partition('role="')[2].partition('"')[0]
                found[role] = float(line.rpartition(" ")[2])
        return found

    last = read()
    # Figures travel with heartbeats, about one a second.
    deadline = threading.Event()
    for _ in range(8):
        deadline.wait(0.25)
        last = {role: max(value, last.get(role, 0.0)) for role, value in read().items()}
    return last


# -- HTTP ----------------------------------------------------------------------------------------

TARGETS = [
    "/v1/models", "//v1/models", "/v1//models", "/./v1/models", "/v1/../v1/models",
    "/health/live/../../v1/models", "/health/live/%2e%2e/%2e%2e/v1/models",
    "/health/live%2f..%2f..%2fv1%2fmodels", "/health/live/", "/health/live;/v1/models",
    "/health/live%00", "/HEALTH/LIVE", "/v1/models?x=/health/live", "/v1/models#/health/live",
    "http://localhost/v1/models", "http://localhost/health/live/../../v1/models", "\\v1\\models",
    "/metrics", "/metrics/", "/version", "/health", "/health/ready", "*", "/v1/models/%ff",
]  # fmt: skip
HEADERS = [
    ["host: localhost"],
    ["host: x/health/live"],
    ["host: localhost", "host: localhost"],
    ["host: localhost", "x-original-url: /health/live", "x-rewrite-url: /health/live"],
    ["host: localhost", "x-forwarded-for: 127.0.0.1", "x-forwarded-prefix: /health/live"],
    ["host: localhost", "authorization: Bearer", "x-api-key: " + ALICE],
    ["host: localhost.", "authorization: Basic " + ALICE],
    ["host: localhost", f"authorization: Bearer {ALICE}", f"authorization: Bearer {ALICE}"],
    ["host: localhost", f"cookie: authorization=Bearer {ALICE}"],
    ["host: localhost", "content-length: 4", "transfer-encoding: chunked"],
]


def test_tricks_with_paths_and_hosts_never_enter(keyed):
    """More than 60 variants of path, Host and framing, in HTTP 1.0 and 1.1: none has a 2xx."""
    port = int(keyed.url.rpartition(":")[2])
    statuses = []
    for number, target in enumerate(TARGETS):
        for lines in (HEADERS[0], *HEADERS[1 + number % 3 :: 3]):
            for method, version in (("GET", "1.1"), ("GET", "1.0"), ("POST", "1.1")):
                head = "\r\n".join([f"{method} {target} HTTP/{version}", *lines])
                data = f"{head}\r\nconnection: close\r\n\r\n".encode()
                with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
                    one.sendall(data)
                    answer = one.makefile("rb").readline()
                statuses.append(answer.split(b" ")[1])
    assert len(statuses) >= 60
    assert set(statuses) <= {b"400", b"401", b"403"}, set(statuses)


def test_every_refusal_is_short_and_tells_no_internals(keyed):
    bad = [
        {"max_tokens": -1}, {"prompt": {"a": 1}}, {"temperature": "hot"}, {"stop": ["x"] * 1000},
        {"n": 10**9}, {"model": "/etc/passwd"}, {"cache_salt": "../../x\n"}, {"prompt": [2**40]},
        {"cache_salt": "x" * 1000}, {"stream": "yes"}, {"logit_bias": {"x": 1}},
    ]  # fmt: skip
    texts = [keyed.post(ALICE, **fields) for fields in bad]
    for answer in texts:
        assert 400 <= answer.status_code < 500
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.text) < 1000
        for word in ("Traceback", ".py", "File ", str(keyed.folder), "/root", "/tmp", ALICE):
            assert word not in answer.text.replace('"/etc/passwd"', ""), answer.text


def test_keys_and_prompts_show_nowhere(keyed):
    """Not in logs, figures, command lines or environments; whatever the request's end."""
    secret = (keyed.folder / "node" / "node.key_secret").read_text().partition("secret-key")[2]
    secret = secret.partition('"')[2].partition('"')[0]
    assert len(secret) == 40
    assert keyed.post(ALICE, prompt=CANARY, stream=True).status_code == 200
    assert keyed.post(ALICE, prompt=CANARY, max_tokens=-1).status_code == 400
    assert keyed.post(ALICE, prompt=CANARY, model=CANARY).status_code == 404
    assert keyed.post("wrong-" + CANARY, prompt=CANARY).status_code == 401
    with keyed.client() as client:
        client.generate(CANARY, max_tokens=3)
        with pytest.raises(XllmError):
            client.generate(CANARY, max_tokens=-3)
    seen = [keyed.served.text, keyed.metrics()]
    seen += [path.read_text() for path in keyed.logs.iterdir()]
    for pid in keyed.pids:
        for name in ("cmdline", "environ"):
            seen.append(pathlib.Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace"))
    text = "\n".join(seen)
    assert "router_ready" in text  # the logs are those of this service
    for word in (CANARY, "kestrel", ALICE, BOB, secret):
        assert word not in text


# -- tenants -------------------------------------------------------------------------------------


def test_a_tenant_never_finds_what_another_asked(keyed):
    """In every try: what one tenant has warm is cold for the others, over HTTP and ZeroMQ."""
    with keyed.client() as client:
        for number in range(5):
            prompt = [20 + number, *range(30, 200), *range(30, 200), *range(30, 200)][:512]
            assert keyed.cached(ALICE, prompt) == 0
            assert keyed.cached(ALICE, prompt) > 400
            assert keyed.cached(BOB, prompt) == 0
            assert keyed.cached(CAROL, prompt) == 0
            assert keyed.cached(CAROL, prompt, cache_salt="x") == 0
            assert client.generate(prompt, max_tokens=1).usage.cached_tokens == 0
            assert client.generate(prompt, max_tokens=1).usage.cached_tokens > 400
            assert keyed.cached(ALICE_TOO, prompt) > 400  # another key of the same tenant
            assert keyed.cached(ALICE, prompt, cache_salt="x") == 0


# -- keys that change ----------------------------------------------------------------------------


def test_api_keys_are_revoked_without_a_restart(keyed):
    with httpx.Client(base_url=keyed.url, trust_env=False, timeout=30) as open_connection:

        def status(key):
            headers = {"authorization": f"Bearer {key}"}
            return open_connection.get("/v1/models", headers=headers).status_code

        assert (status(BOB), status(CAROL)) == (200, 200)
        keyed.write_keys(KEYS.replace(f"bob:{BOB}\n", "dave:dave-0123456789-canary\n"))
        wait_until(lambda: status(BOB) == 401)
        assert status(CAROL) == 200
        assert status("dave-0123456789-canary") == 200
        keyed.key_file.write_text("no line of a key file")
        keyed.write_keys("# nobody\n")
        wait_until(lambda: status(CAROL) == 401)
        keyed.write_keys(KEYS)
        wait_until(lambda: status(BOB) == 200)
    keyed.check()


def test_a_revoked_client_is_cut_in_the_middle_of_its_stream(keyed):
    """It has a stream open; its connection is cut, its request ends, others are served."""
    allow_peer(keyed.keys_dir, "gone", create_keys(str(keyed.folder / "gone")), client=True)
    prompt = tuple(PROMPT)
    with keyed.client() as other, keyed.client("gone") as client:
        wait_until(lambda: _served(client))
        with pytest.raises(XllmError):
            stream = client.stream(prompt, max_tokens=2000, timeout_s=60.0)
            for number, _ in enumerate(stream):
                if number == 3:
                    assert revoke_peer(keyed.keys_dir, "gone") == ["gone"]
        with pytest.raises(XllmError):
            client.generate(prompt, max_tokens=3, timeout_s=3.0)
        answer = other.generate(prompt, max_tokens=20, temperature=0.0)
        assert tuple(answer.choices[0].token_ids) == expected_ids(
            keyed.model, prompt, 20, temperature=0.0
        )
    keyed.check()


def _served(client) -> bool:
    with contextlib.suppress(XllmError):
        client.generate((70, 71), max_tokens=1, timeout_s=2.0)
        return True
    return False


def test_clients_may_ask_and_admins_may_put_to_sleep(keyed):
    with keyed.client() as client, keyed.client("ops") as admin:
        assert client.health().live
        assert {process.kind for process in client.status()} >= {"router", "instance"}
        with pytest.raises(PermissionDeniedError):
            client.sleep(MODEL)
        keyed.check()
        admin.sleep(MODEL)
        with pytest.raises(XllmError):
            client.generate(PROMPT, max_tokens=1, timeout_s=2.0)
        with pytest.raises(PermissionDeniedError):
            client.wake(MODEL)
        admin.wake(MODEL)
    keyed.check()
